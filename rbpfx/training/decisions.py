"""Decisions: which units of a group stay, given how needed its gate finds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rbpfx.methods import Gate, Method, Phase
from rbpfx.selection import Selection, Units, Values


class Decisions:
    """Hardens gates, and knows what hardening all of them now would cost.

    Args:
        gates: One for each group, in the order in which they are hardened.
        selection: Chooses units by score, within a budget if there is one.
        method: The method that the gates are of.
        sharpness: How decided gates count towards a budget at the start.
        mean: The mean of a tensor over all processes, for scores that are measured in each.

    Attributes:
        scores: Group name -> score of every unit, once it is hardened; those of removed units
            too, since another target may call them back.
        needed: Group name -> which units the decision at its hardening kept.
        multipliers: Group name -> the multiplier of every unit if it stays.
        sharpness: How decided gates count now.
    """

    def __init__(
        self,
        gates: Sequence[Gate],
        selection: Selection,
        method: Method,
        sharpness: float,
        mean: Callable[[Tensor], Tensor] = lambda values: values,
    ) -> None:
        self.gates = gates
        self.selection = selection
        self.method = method
        self.budget = selection.training_budget
        self.sharpness = sharpness
        self.mean = mean
        self.scores: dict[str, Values] = {}
        self.needed: dict[str, Units] = {}
        self.multipliers: dict[str, Tensor] = {}

    def choice(self) -> dict[str, Tensor]:
        """What the target keeps by the present scores: group name -> boolean `(size,)`.

        Empty where every gate decides by its own rule: without a budget, and while the noise of
        some groups waits, of which nothing is known that a budget could be shared out by.
        """
        waiting = any(gate.phase is Phase.WAITING for gate in self.gates)
        if self.budget is None or (waiting and self.method.decides):
            return {}
        for gate in self.gates:
            gate.average(self.mean)
        scores = {
            gate.group: self.scores[gate.group]
            if gate.group in self.scores
            else _score(gate).double().cpu().numpy()
            for gate in self.gates
        }
        kept = self.selection.kept(self.selection.training_plan(scores))
        return {name: torch.from_numpy(units) for name, units in kept.items()}

    @torch.no_grad()
    def harden(self, gate: Gate, choice: Mapping[str, Tensor]) -> None:
        """End the training of a group: by a choice, or by the method's own rule."""
        needed = choice[gate.group] if gate.group in choice else own_rule(gate)
        self.scores[gate.group] = _score(gate).double().cpu().numpy()
        self.needed[gate.group] = needed.cpu().numpy()
        self.multipliers[gate.group] = gate.kept_multiplier().detach().clone()
        gate.harden(needed)

    def harden_all(self) -> None:
        """Harden every group that is not, at once."""
        undecided = [gate for gate in self.gates if gate.phase is not Phase.HARDENED]
        choice = self.choice() if undecided else {}
        for gate in undecided:
            self.harden(gate, choice)

    def expected_cost(self) -> float:
        """Share of the dense cost, given how open the gates are.

        Groups that wait count as if they were at the budget already, so that a strict recursion
        asks its fair share of every group.
        """
        waiting = 1.0 if self.budget is None else self.budget**0.5
        shares: dict[str, Values | float] = {}
        for gate in self.gates:
            shares[gate.group] = waiting if gate.phase is Phase.WAITING else self.openness(gate)
        return self.selection.expected(shares)

    @torch.no_grad()
    def openness(self, gate: Gate) -> Values:
        """How likely the units of a gate are to stay, in [0, 1], `(size,)`."""
        if gate.phase is Phase.HARDENED:
            openness = (gate.constants != 0).double()
        elif gate.phase is Phase.WAITING:
            openness = torch.ones_like(gate.constants)
        else:
            openness = gate.openness(self.sharpness) * gate.alive
        values: Values = openness.double().cpu().numpy()
        return values

    def open_units(self) -> int:
        """Number of units that are more likely to stay than not."""
        return sum(int((self.openness(gate) > 0.5).sum()) for gate in self.gates)

    def state_dict(self) -> dict[str, Any]:
        """What was decided, and where every group is in the recursion."""
        return {
            "phases": [gate.phase.value for gate in self.gates],
            "sharpness": self.sharpness,
            "scores": self.scores,
            "needed": self.needed,
            "multipliers": self.multipliers,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Return to a state."""
        for gate, phase in zip(self.gates, state["phases"], strict=True):
            gate.phase = Phase(phase)
        self.sharpness = state["sharpness"]
        self.scores, self.needed = dict(state["scores"]), dict(state["needed"])
        devices = {gate.group: gate.constants.device for gate in self.gates}
        self.multipliers = {n: t.to(devices[n]) for n, t in state["multipliers"].items()}


def own_rule(gate: Gate) -> Tensor:
    """Which units the method's rule keeps, `(size,)`: always the best of them at least."""
    needed = gate.needed() & gate.alive
    if not needed.any():
        needed[_score(gate).argmax()] = True
    return needed


@torch.no_grad()
def _score(gate: Gate) -> Tensor:
    """Scores, `(size,)`; units that were removed for good come last."""
    score = gate.score()
    return torch.where(gate.alive, score, score.min() - score.min().abs() - 1)


def unit_weights(selection: Selection, gates: Sequence[Gate], cost_aware: bool) -> list[Tensor]:
    """One weight per group, proportional to the cost of a unit, of mean 1 over all units."""
    groups = [selection.analysis.group(gate.group) for gate in gates]
    cost = np.array([selection.unit_cost(g) if cost_aware else 1.0 for g in groups])
    sizes = np.array([g.size for g in groups])
    cost = np.maximum(cost, cost.max() * 1e-6) if cost.max() > 0 else np.ones_like(cost)
    cost = cost * sizes.sum() / (cost * sizes).sum()
    device = gates[0].constants.device
    return [torch.tensor(float(c), device=device) for c in cost]


__all__ = ["Decisions", "own_rule", "unit_weights"]
