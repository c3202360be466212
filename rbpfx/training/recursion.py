"""Recursive training: the noise of group after group is trained, then hardened.

A group is trained with all earlier groups hardened, because the noise over the layers is a
Markov chain whose conditional p(theta_l | theta_{l-1}) is replaced by the one at the mean of
theta_{l-1} (Zhou et al., ICCV 2019, arXiv 1812.00353). Groups ahead of the front may be noisy
already (`window`), so that they compete for one budget; the front then passes over them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from rbpfx.errors import DivergenceError, InputError, RbpfxError
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
from rbpfx.training.task import Loader, Task, examples_in

SETTLING = 0.1
"""Share of the budget's ramp in which it stays at 1, while Adam learns the gradients' scale."""


@dataclass(frozen=True)
class Recursion:
    """How the noise is trained. Every default is ours, chosen in docs/experiments.md.

    Attributes:
        epochs: Passes over the loader for all groups together (at most, without a target).
        strength: Price of an open gate of average cost, in nats per training example:
            lambda / N with the prior's lambda = 1 / (2 eps^2). A channel stays if it lowers the
            mean training loss by more. Not used with a target, which finds the strength.
        window: How many groups are noisy at a time. 1 is the strict recursion; None makes all
            groups noisy from the start, the front then hardens them one by one.
        front: Share of the steps during which the front passes, if `window` is None.
        budget_ramp: Share of the steps before the front in which the budget falls to the target.
        sharpness: How decided gates count towards a budget, while it falls and at the end (see
            `NoiseGate.openness`): the growth pushes half-open gates apart.
        noise_lr: Learning rate of the noise parameters (Adam).
        weight_lr: Learning rate of the weights (SGD, Nesterov momentum 0.9); 0 freezes them.
        weight_decay: L2 penalty on the weights.
        patience: Without a target, noise training moves on to hardening when over this share of
            an epoch the evidence bound has fallen by less than `tolerance` of its whole fall.
        tolerance: See `patience`.
        cost_aware: Weigh every unit's divergence by the multiply-accumulates it costs.
    """

    epochs: float = 3.0
    strength: float = 0.003
    window: int | None = None
    front: float = 0.3
    budget_ramp: float = 0.7
    sharpness: tuple[float, float] = (2.0, 8.0)
    noise_lr: float = 0.05
    weight_lr: float = 0.01
    weight_decay: float = 5e-4
    patience: float = 0.5
    tolerance: float = 0.02
    cost_aware: bool = True

    def __post_init__(self) -> None:
        positive = ("epochs", "strength", "noise_lr", "patience")
        for name in positive:
            if not getattr(self, name) > 0:
                raise RbpfxError(f"Recursion({name}={getattr(self, name)}) must be positive")
        if self.window is not None and self.window < 1:
            raise RbpfxError(f"Recursion(window={self.window}) must be at least 1, or None")
        if not 0 <= self.front < 1 or not 0 < self.budget_ramp <= 1:
            raise RbpfxError("Recursion(front=...) lies in [0, 1), budget_ramp in (0, 1]")


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
        noisy: fx.GraphModule,
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
        self.dense_macs = analysis.macs(np.ones(len(analysis.channel)))
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
        return self.analysis.macs(self.analysis.gather(shares)) / self.dense_macs

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
            mean = gate.mean() if gate.foldable else torch.ones_like(gate.constants)
            self.scores[gate.group] = score.double().cpu().numpy()
            self.needed[gate.group] = needed.cpu().numpy()
            self.multipliers[gate.group] = mean.clone()
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


@dataclass(frozen=True)
class Schedule:
    """When every group becomes noisy and when it is hardened.

    Attributes:
        groups: Number of groups.
        ahead: How many groups from the front on are noisy.
        start: Step at which the front sets out.
        steps: Step at which it has passed the last group.
        ramp: Steps in which the budget falls.
    """

    groups: int
    ahead: int
    start: int
    steps: int
    ramp: float

    @classmethod
    def plan(cls, groups: int, steps: int, settings: Recursion) -> Schedule:
        """The schedule that settings ask for."""
        if settings.window is not None:
            return cls(groups, settings.window, 0, steps, 0)
        start = round((1 - settings.front) * steps)
        return cls(groups, groups, start, steps, settings.budget_ramp * start)

    def phase(self, group: int, front: int) -> Phase:
        """The phase of a group that is not hardened yet."""
        return Phase.NOISY if group < front + self.ahead else Phase.WAITING

    def hardens(self, step: int, group: int) -> bool:
        """Whether a group is hardened after a step."""
        return step + 1 >= self.start + (group + 1) * (self.steps - self.start) / self.groups

    def budget(self, step: int, target: float) -> float:
        """Share of the cost allowed at a step: falls linearly from 1, then stays."""
        settling = SETTLING * self.ramp
        fallen = (step + 1 - settling) / (self.ramp - settling + 1)
        return 1 - (1 - target) * min(max(fallen, 0), 1)

    def sharpness(self, step: int, between: tuple[float, float]) -> float:
        """How decided gates count at a step: grows geometrically once the budget has fallen."""
        first, last = between
        passed = max(step + 1 - self.ramp, 0) / max(self.steps - self.ramp, 1)
        return float(first * (last / first) ** passed)

    def started(self, step: int) -> Schedule:
        """The same schedule with the front setting out at `step` instead of later."""
        if step >= self.start:
            return self
        return replace(self, start=step, steps=step + self.steps - self.start)


class Evidence:
    """Watches the negative evidence bound and says when it has stopped falling.

    Args:
        interval: Steps averaged into one reading.
        tolerance: A fall between two readings below this share of the whole fall counts as none.
    """

    def __init__(self, interval: int, tolerance: float) -> None:
        self.interval = interval
        self.tolerance = tolerance
        self.window: list[float] = []
        self.readings: list[float] = []

    def settled(self, bound: float) -> bool:
        """Take one step's bound; whether it has stopped falling."""
        self.window.append(bound)
        if len(self.window) < self.interval:
            return False
        self.readings.append(sum(self.window) / len(self.window))
        self.window.clear()
        if len(self.readings) < 3:
            return False
        first, before, now = self.readings[0], *self.readings[-2:]
        return before - now < self.tolerance * abs(first - now)
