"""The budget: how strong the noise has to be."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rbpfx.methods import Gate, Phase

LARGEST_STRENGTH = 1e12
"""Strength per unit and example beyond which a budget counts as out of reach; its inverse is the
least that is tried."""

BISECTIONS = 8
"""Halvings of the interval in which the strength lies: it is found to a part in 250."""


class BudgetProjection:
    """Finds, at every step, the strength of the prior that holds a budget exactly.

    The divergence pulls every gate down with a force proportional to the strength. Instead of
    choosing the strength beforehand, or steering it by a controller that always answers too
    late, the optimiser first follows the data alone; then all gates are moved along the force of
    the prior, as far as the budget asks: the strength is the Lagrange multiplier of the budget.
    Where Adam scaled the data's gradient, the force is scaled alike, so that the two are weighed
    against each other unit by unit.

    Args:
        gates: The noise; gates that are not noisy stay as they are.
        weights: What a unit of each gate weighs, in proportion to its cost.
        cost: Expected share of the dense cost under the present gates.
    """

    def __init__(
        self, gates: Sequence[Gate], weights: Sequence[Tensor], cost: Callable[[], float]
    ) -> None:
        self.gates = gates
        self.weights = weights
        self.cost = cost

    def apply(self, optimizer: torch.optim.Optimizer, budget: float) -> float:
        """Move the gates until the expected cost is within the budget.

        Args:
            optimizer: The Adam that has just made its step on the gates.
            budget: Share of the dense cost.

        Returns:
            The strength that this amounts to, per unit of weight and example; 0 if the budget
            held already, or cannot be held because hardened groups alone exceed it (the final
            cut then sees to it).
        """
        if self.cost() <= budget:
            return 0.0
        parameters, directions = self._directions(optimizer)
        if not parameters:
            return 0.0
        start = [p.detach().clone() for p in parameters]

        def within(distance: float) -> bool:
            with torch.no_grad():
                for p, origin, direction in zip(parameters, start, directions, strict=True):
                    p.copy_(origin - distance * direction)
            return self.cost() <= budget

        step = float(optimizer.param_groups[0]["lr"])
        low, high = 0.0, step
        if within(high):  # far too far, where the loss is small and so is what Adam divides by
            while high > step / LARGEST_STRENGTH and within(high / 2):
                high /= 2
            low = high / 2
        while not within(high):
            low, high = high, 2 * high
            if high > LARGEST_STRENGTH * step:
                within(0.0)
                return 0.0
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            if within(middle):
                high = middle
            else:
                low = middle
        within(high)
        return high / step

    def _directions(self, optimizer: torch.optim.Optimizer) -> tuple[list[Tensor], list[Tensor]]:
        """Parameters of the noisy gates and the scaled force of the prior on each."""
        noisy = [
            (gate, weight)
            for gate, weight in zip(self.gates, self.weights, strict=True)
            if gate.phase is Phase.NOISY
        ]
        parameters: list[Tensor] = [p for gate, _ in noisy for p in gate.parameters()]
        # Adam has no scale yet if its first step was skipped, by an overflow in float16.
        if not parameters or any("step" not in optimizer.state[p] for p in parameters):
            return [], []
        pressure = torch.stack([weight * gate.pressure().sum() for gate, weight in noisy]).sum()
        forces = torch.autograd.grad(pressure, parameters)
        return parameters, [
            force / _adam_scale(optimizer, p) for p, force in zip(parameters, forces, strict=True)
        ]


def _adam_scale(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor:
    """What Adam divided the gradient of a parameter by in its last step."""
    state, group = optimizer.state[parameter], optimizer.param_groups[0]
    correction = 1 - group["betas"][1] ** float(state["step"])
    scale: Tensor = (state["exp_avg_sq"] / correction).sqrt() + group["eps"]
    return scale
