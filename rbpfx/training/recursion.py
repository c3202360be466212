"""Recursive training: the noise of group after group is trained, then hardened.

A group is trained with all earlier groups hardened, because the noise over the layers is a
Markov chain whose conditional p(theta_l | theta_{l-1}) is replaced by the one at the mean of
theta_{l-1} (Zhou et al., ICCV 2019, arXiv 1812.00353). Groups ahead of the front may be noisy
already (`window`), so that they compete for one budget; the front then passes over them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from rbpfx.errors import DivergenceError, InputError
from rbpfx.graph.groups import Analysis
from rbpfx.methods import NoiseGate, Phase, noise_gates
from rbpfx.plan import PruningPlan
from rbpfx.training.budget import BudgetProjection, Values, complete, cut
from rbpfx.training.loop import (
    batches,
    gradient_step,
    snapshot,
    steps_per_epoch,
    still_finite,
)
from rbpfx.training.schedule import Evidence, Recursion, Schedule
from rbpfx.training.task import Loader, Task, examples_in


@dataclass(frozen=True)
class Progress:
    """What the recursion reports after every step.

    Attributes:
        step: Optimiser steps done.
        steps: Optimiser steps planned.
        group: The group at the front.
        hardened: Number of groups hardened.
        loss: Data loss of the step.
        bound: Negative evidence lower bound per example of the step, up to the constant N.
        strength: The prior's strength per example.
        cost: Expected share of the multiply-accumulates.
        open_gates: Number of units with a mean above one half.
    """

    step: int
    steps: int
    group: str
    hardened: int
    loss: float
    bound: float
    strength: float
    cost: float
    open_gates: int


class RecursiveTraining:
    """Trains the noise of a graph and its weights along with it.

    Args:
        noisy: Graph with noise, from `insert_noise`; trained in place.
        analysis: The analysis of the graph without noise.
        task: Turns batches into losses.
        settings: How.
        budget: Share of the dense multiply-accumulates to reach; None for a fixed strength.
        teacher: Network whose outputs are imitated in half of the loss.
    """

    def __init__(
        self,
        noisy: nn.Module,
        analysis: Analysis,
        task: Task,
        settings: Recursion,
        budget: float | None = None,
        teacher: torch.nn.Module | None = None,
    ) -> None:
        self.noisy = noisy
        self.analysis = analysis
        self.task = task
        self.settings = settings
        self.budget = budget
        self.teacher = teacher
        self.gates: list[NoiseGate] = noise_gates(noisy)
        self.weights = self._unit_weights()
        self.scores: dict[str, Values] = {}
        self.needed: dict[str, npt.NDArray[np.bool_]] = {}
        self.multipliers: dict[str, Tensor] = {}
        self.history: list[dict[str, Any]] = []
        self.sharpness = settings.sharpness[0]
        self.projection = BudgetProjection(self.gates, self.weights, self.expected_cost)

    def run(self, loader: Loader, report: Callable[[Progress], None] = lambda _: None) -> None:
        """Train and harden every group.

        `scores` then holds the score of every unit and `multipliers` its mean multiplier, both by
        group name; those of removed units too, since a target may call them back.

        Args:
            loader: Training batches.
            report: Called after every step.

        Raises:
            InputError: The loss does not depend on the network.
            DivergenceError: The loss is no finite number any more; `noisy` is back at the state
                after the last hardening that was followed by a finite loss.
        """
        settings = self.settings
        per_epoch = steps_per_epoch(loader)
        steps = max(round(settings.epochs * per_epoch), len(self.gates))
        examples = examples_in(loader)
        good = latest = self._state()
        optimizers = self._optimizers()
        schedule = Schedule.plan(len(self.gates), steps, settings)
        evidence = Evidence(max(round(settings.patience * per_epoch), 1), settings.tolerance)
        strength = settings.strength if self.budget is None else 0.0
        front = 0
        for step, batch in enumerate(batches(loader, steps)):
            for index, gate in enumerate(self.gates[front:], start=front):
                gate.phase = schedule.phase(index, front)
            self.noisy.train()
            loss = self.task.loss(self.noisy, batch, self.teacher)
            if not loss.requires_grad:
                raise InputError(
                    "the loss does not depend on the network: it was detached, or computed under "
                    "torch.no_grad() or by operations without a gradient"
                )
            divergence = self._divergence(examples)
            gradient_step(
                loss + divergence,
                optimizers,
                lambda: self._diverged(good, front, step),  # noqa: B023
            )
            good = latest
            if self.budget is not None:
                self.sharpness = schedule.sharpness(step, settings.sharpness)
                strength = self.projection.apply(optimizers[0], schedule.budget(step, self.budget))
            bound = float(loss.detach() + divergence.detach())
            if front == 0 and self.budget is None and evidence.settled(bound):
                schedule = schedule.started(step + 1)
            reached = self._progress(step, schedule.steps, front, loss, bound, strength)
            while front < len(self.gates) and schedule.hardens(step, front):
                self._harden(self.gates[front])
                self.history.append({**asdict(reached), "group": self.gates[front].group})
                latest = self._state()
                front += 1
            report(reached)
            if front == len(self.gates):
                break
        if not still_finite(self.noisy, batch, self.task):
            raise self._diverged(good, front, step)

    def expected_cost(self) -> float:
        """Share of the dense multiply-accumulates, given how open the gates are.

        Groups that wait count as if they were at the budget already, so that a strict recursion
        asks its fair share of every group.
        """
        waiting = 1.0 if self.budget is None else self.budget**0.5
        shares: dict[str, Values | float] = {}
        for gate in self.gates:
            shares[gate.group] = waiting if gate.phase is Phase.WAITING else self._openness(gate)
        return self.analysis.macs(self.analysis.gather(shares)) / self.analysis.dense_macs

    def plan(self) -> PruningPlan:
        """Which units stay: the highest scores within the budget, or the method's own rule."""
        if self.budget is not None:
            return cut(self.analysis, self.scores, self.budget)
        return complete(self.analysis, self.needed, self.scores)

    def _openness(self, gate: NoiseGate) -> Values:
        with torch.no_grad():
            if gate.phase is Phase.HARDENED:
                openness = (gate.constants != 0).double()
            elif gate.phase is Phase.WAITING:
                openness = torch.ones_like(gate.constants)
            else:
                openness = gate.openness(self.sharpness)
            values: Values = openness.double().cpu().numpy()
            return values

    def _harden(self, gate: NoiseGate) -> None:
        with torch.no_grad():
            score = gate.score()
            needed = gate.needed()
            if not needed.any():
                needed[score.argmax()] = True
            self.scores[gate.group] = score.double().cpu().numpy()
            self.needed[gate.group] = needed.cpu().numpy()
            self.multipliers[gate.group] = gate.kept_multiplier().clone()
            gate.harden(needed)

    def _divergence(self, examples: int) -> Tensor:
        """Weighted divergence of all noisy gates per example.

        With a budget the strength of the prior is applied by the projection; what is left here
        is the divergence from a prior of strength 1, which hardly pulls.
        """
        strength = 1.0 if self.budget is not None else self.settings.strength * examples
        total = self.weights[0].new_zeros(())
        for gate, weight in zip(self.gates, self.weights, strict=True):
            if gate.phase is Phase.NOISY:
                total = total + weight.to(total) * gate.divergence(strength).sum()
        return total / examples

    def _unit_weights(self) -> list[Tensor]:
        """One weight per group, proportional to the cost of a unit, of mean 1 over all units."""
        groups = [self.analysis.group(gate.group) for gate in self.gates]
        cost = np.array([g.macs_per_unit if self.settings.cost_aware else 1.0 for g in groups])
        sizes = np.array([g.size for g in groups])
        cost = np.maximum(cost, cost.max() * 1e-6) if cost.max() > 0 else np.ones_like(cost)
        cost = cost * sizes.sum() / (cost * sizes).sum()
        device = self.gates[0].constants.device
        return [torch.tensor(float(c), device=device) for c in cost]

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        settings = self.settings
        noise = [p for gate in self.gates for p in gate.parameters()]
        known = {id(p) for p in noise}
        weights = [p for p in self.noisy.parameters() if id(p) not in known and p.requires_grad]
        optimizers: list[torch.optim.Optimizer] = [torch.optim.Adam(noise, settings.noise_lr)]
        if weights and settings.weight_lr > 0:
            optimizers.append(
                torch.optim.SGD(
                    weights,
                    lr=settings.weight_lr,
                    momentum=0.9,
                    nesterov=True,
                    weight_decay=settings.weight_decay,
                )
            )
        return optimizers

    def _state(self) -> tuple[dict[str, Tensor], list[Phase]]:
        """A state to return to."""
        return snapshot(self.noisy), [gate.phase for gate in self.gates]

    def _diverged(
        self, good: tuple[dict[str, Tensor], list[Phase]], front: int, step: int
    ) -> DivergenceError:
        state, phases = good
        self.noisy.load_state_dict(state)
        for gate, phase in zip(self.gates, phases, strict=True):
            gate.phase = phase
        group = self.gates[min(front, len(self.gates) - 1)].group
        return DivergenceError(
            f"the loss is not a finite number at step {step + 1}, with group {group!r} at "
            "the front. The network is back at its last good state (error.model). Lower "
            "Recursion(weight_lr=...) or strength, and check the batches for NaN.",
            stage=group,
            step=step + 1,
            model=self.noisy,
        )

    def _progress(
        self,
        step: int,
        steps: int,
        front: int,
        loss: Tensor,
        bound: float,
        strength: float,
    ) -> Progress:
        group = self.gates[min(front, len(self.gates) - 1)].group
        cost = self.expected_cost()
        open_gates = sum(int((self._openness(gate) > 0.5).sum()) for gate in self.gates)
        value = float(loss.detach())
        return Progress(step + 1, steps, group, front, value, bound, strength, cost, open_gates)
