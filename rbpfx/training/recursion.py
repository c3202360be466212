"""Recursive training: the noise of group after group is trained, then hardened.

A group is trained with all earlier groups hardened, because the noise over the layers is a
Markov chain whose conditional p(theta_l | theta_{l-1}) is replaced by the one at the mean of
theta_{l-1} (Zhou et al., ICCV 2019, arXiv 1812.00353). Groups ahead of the front may be noisy
already (`window`), so that they compete for one budget; the front then passes over them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rbpfx.errors import DivergenceError
from rbpfx.graph.capture import evaluating
from rbpfx.methods import Gate, Method, Phase, noise_gates
from rbpfx.selection import Selection, Units, Values
from rbpfx.training.budget import BudgetProjection
from rbpfx.training.engine import Stepper
from rbpfx.training.loop import batches, grouped, snapshot, steps_per_epoch, still_finite
from rbpfx.training.record import MOMENTS, Curves, GateHistograms, due
from rbpfx.training.schedule import Evidence, Recursion, Schedule
from rbpfx.training.settings import Training
from rbpfx.training.task import Loader, Task, examples_in

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """What a training reports after every step.

    Attributes:
        step: Optimiser steps done.
        steps: Optimiser steps planned.
        group: The group at the front.
        hardened: Number of groups hardened.
        loss: Data loss of the step.
        bound: Negative evidence lower bound per example of the step, up to the constant N.
        strength: The prior's strength per example.
        cost: Expected share of the cost: of the parameters if these are the target, else of the
            multiply-accumulates.
        open_gates: Number of units with a mean above one half.
        phase: "noise" while gates are trained, "fine-tuning" after the cut; nothing is at the
            front then, and the bound is the loss.
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
    phase: str = "noise"


class RecursiveTraining:
    """Trains the gates of a graph and its weights along with them, and decides group by group.

    Args:
        noisy: Graph with gates, from `insert_noise`; trained in place.
        selection: Chooses units by score, within a budget if there is one.
        method: The method that the gates are of.
        task: Turns batches into losses.
        settings: How.
        teacher: Network whose outputs are imitated in half of the loss.
        training: How a training step is carried out.

    Attributes:
        scores: Group name -> score of every unit, once it is hardened; those of removed units
            too, since another target may call them back.
        needed: Group name -> which units the decision at its hardening kept.
        multipliers: Group name -> the multiplier of every unit if it stays.
        history: One entry per hardened group.
        curves: Loss, bound, expected cost and open gates over the training.
        histograms: How open the gates were, from time to time.
    """

    def __init__(
        self,
        noisy: nn.Module,
        selection: Selection,
        method: Method,
        task: Task,
        settings: Recursion,
        teacher: torch.nn.Module | None = None,
        training: Training | None = None,
    ) -> None:
        self.noisy = noisy
        self.selection = selection
        self.method = method
        self.task = task
        self.settings = settings
        self.budget = selection.training_budget
        self.teacher = teacher
        self.training = training or Training()
        self.gates: list[Gate] = noise_gates(noisy)
        self.weights = self._unit_weights()
        self.strength = settings.strength if settings.strength is not None else method.strength
        self.scores: dict[str, Values] = {}
        self.needed: dict[str, Units] = {}
        self.multipliers: dict[str, Tensor] = {}
        self.history: list[dict[str, Any]] = []
        self.curves = Curves()
        self.histograms = GateHistograms()
        self.sharpness = settings.sharpness[0]
        self.projection = BudgetProjection(self.gates, self.weights, self.expected_cost)

    def run(self, loader: Loader, report: Callable[[Progress], None] | None = None) -> None:
        """Train and harden every group.

        Args:
            loader: Training batches.
            report: Called after every step.

        Raises:
            InputError: The loss does not depend on the network, or a `train_step` hook does not
                do its part.
            DivergenceError: The loss is no finite number any more; `noisy` is back at the state
                after the last hardening that was followed by a finite loss.
        """
        settings = self.settings
        per_epoch = steps_per_epoch(loader, self.training.accumulate)
        steps = max(round(settings.epochs * per_epoch), len(self.gates))
        examples = examples_in(loader)
        good = latest = self._state()
        optimizers = self._optimizers()
        stepper = Stepper(
            self.noisy,
            self.task,
            self.training,
            optimizers,
            teacher=self.teacher,
            penalty=lambda: self._penalty(examples),
        )
        schedule = Schedule.plan(len(self.gates), steps, settings)
        evidence = Evidence(max(round(settings.patience * per_epoch), 1), settings.tolerance)
        strength = self.strength if self.budget is None else 0.0
        front = 0
        for step, group in enumerate(grouped(loader, steps, self.training.accumulate)):
            for index, gate in enumerate(self.gates[front:], start=front):
                gate.phase = schedule.phase(index, front)
            if step % per_epoch == 0:
                self._begin_epoch(step)
            losses = stepper.step(group, lambda: self._diverged(good, front, step))  # noqa: B023
            good = latest
            if self.budget is not None and self.method.trains:
                self.sharpness = schedule.sharpness(step, settings.sharpness)
                strength = self.projection.apply(optimizers[0], schedule.budget(step, self.budget))
            for gate in self.gates[front:]:
                gate.update()
            loss, bound = float(losses.data), float(losses.data + losses.penalty)
            if front == 0 and self.budget is None and evidence.settled(bound):
                schedule = schedule.started(step + 1)
            hardens = front < len(self.gates) and schedule.hardens(step, front)
            recorded = self.curves.add(step + 1, schedule.steps, loss=loss, bound=bound)
            if report is not None or hardens or recorded:
                reached = self._progress(step, schedule.steps, front, loss, bound, strength)
            choice = self._choice() if hardens else {}
            while front < len(self.gates) and schedule.hardens(step, front):
                self._harden(self.gates[front], choice)
                self.history.append({**asdict(reached), "group": self.gates[front].group})
                logger.info("step %d: hardened %s", step + 1, self.gates[front].group)
                latest = self._state()
                front += 1
            if recorded:
                self.curves.point(step + 1, cost=reached.cost, open_gates=reached.open_gates)
            if due(step + 1, schedule.steps, MOMENTS):
                openness = {gate.group: self._openness(gate) for gate in self.gates}
                self.histograms.add(step + 1, openness)
            if report is not None:
                report(reached)
            if front == len(self.gates):
                break
        if not still_finite(self.noisy, group[-1], self.task):
            raise self._diverged(good, front, step)

    def decide(self, loader: Loader, max_batches: int = 64) -> None:
        """Harden every group at once without training.

        Args:
            loader: Training batches, for methods whose scores need gradients.
            max_batches: How many batches such a method looks at, at most.
        """
        if self.method.observes:
            with evaluating(self.noisy), torch.enable_grad():
                for batch in batches(loader, min(max_batches, steps_per_epoch(loader))):
                    self.task.loss(self.noisy, batch).backward()
            self.noisy.zero_grad(set_to_none=True)
        choice = self._choice()
        for gate in self.gates:
            self._harden(gate, choice)

    def expected_cost(self) -> float:
        """Share of the dense cost, given how open the gates are.

        Groups that wait count as if they were at the budget already, so that a strict recursion
        asks its fair share of every group.
        """
        waiting = 1.0 if self.budget is None else self.budget**0.5
        shares: dict[str, Values | float] = {}
        for gate in self.gates:
            shares[gate.group] = waiting if gate.phase is Phase.WAITING else self._openness(gate)
        return self.selection.expected(shares)

    def _begin_epoch(self, step: int) -> None:
        """Tell the gates what the target would keep; remove what is redundant, if so wished."""
        waiting = [gate for gate in self.gates if gate.phase is not Phase.HARDENED]
        if self.budget is not None:
            choice = self._choice()
            for gate in waiting if choice else ():
                gate.choose(choice[gate.group].to(gate.alive.device))
        elif self.settings.decisions == "epoch" and step > 0:
            for gate in waiting:
                if gate.phase is Phase.NOISY:
                    gate.remove(~self._own_rule(gate))

    def _own_rule(self, gate: Gate) -> Tensor:
        """Which units the method's rule keeps: always the best of them at least."""
        needed = gate.needed() & gate.alive
        if not needed.any():
            needed[self._score(gate).argmax()] = True
        return needed

    @torch.no_grad()
    def _score(self, gate: Gate) -> Tensor:
        """Scores, `(size,)`; units that were removed for good come last."""
        score = gate.score()
        return torch.where(gate.alive, score, score.min() - score.min().abs() - 1)

    def _choice(self) -> dict[str, Tensor]:
        """What the target keeps by the present scores: group name -> boolean `(size,)`.

        Empty where every gate decides by its own rule: without a budget, and while the noise of
        some groups waits, of which nothing is known that a budget could be shared out by.
        """
        waiting = any(gate.phase is Phase.WAITING for gate in self.gates)
        if self.budget is None or (waiting and self.method.decides):
            return {}
        scores = {
            gate.group: self.scores[gate.group]
            if gate.group in self.scores
            else self._score(gate).double().cpu().numpy()
            for gate in self.gates
        }
        kept = self.selection.kept(self.selection.training_plan(scores))
        return {name: torch.from_numpy(units) for name, units in kept.items()}

    def _openness(self, gate: Gate) -> Values:
        with torch.no_grad():
            if gate.phase is Phase.HARDENED:
                openness = (gate.constants != 0).double()
            elif gate.phase is Phase.WAITING:
                openness = torch.ones_like(gate.constants)
            else:
                openness = gate.openness(self.sharpness) * gate.alive
            values: Values = openness.double().cpu().numpy()
            return values

    @torch.no_grad()
    def _harden(self, gate: Gate, choice: Mapping[str, Tensor]) -> None:
        needed = choice[gate.group] if gate.group in choice else self._own_rule(gate)
        self.scores[gate.group] = self._score(gate).double().cpu().numpy()
        self.needed[gate.group] = needed.cpu().numpy()
        self.multipliers[gate.group] = gate.kept_multiplier().detach().clone()
        gate.harden(needed)

    def _penalty(self, examples: int) -> Tensor:
        """What all gates add to the loss of an example.

        With a budget the strength of the prior is applied by the projection; what is left here
        is the divergence from a prior that hardly pulls.
        """
        found = None if self.budget is None else self.method.budgeted_strength
        strength = self.strength if found is None else found
        total = self.weights[0].new_zeros(())
        for gate, weight in zip(self.gates, self.weights, strict=True):
            if gate.phase is Phase.NOISY:
                total = total + weight.to(total) * gate.penalty(strength, examples).sum()
        return total

    def _unit_weights(self) -> list[Tensor]:
        """One weight per group, proportional to the cost of a unit, of mean 1 over all units."""
        groups = [self.selection.analysis.group(gate.group) for gate in self.gates]
        aware = self.settings.cost_aware and self.method.cost_weighted
        cost = np.array([self.selection.unit_cost(g) if aware else 1.0 for g in groups])
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
        optimizers: list[torch.optim.Optimizer] = []
        if noise:
            rate = self.method.noise_lr if settings.noise_lr is None else settings.noise_lr
            optimizers.append(torch.optim.Adam(noise, rate))
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
        loss: float,
        bound: float,
        strength: float,
    ) -> Progress:
        group = self.gates[min(front, len(self.gates) - 1)].group
        cost = self.expected_cost()
        open_gates = sum(int((self._openness(gate) > 0.5).sum()) for gate in self.gates)
        return Progress(step + 1, steps, group, front, loss, bound, strength, cost, open_gates)
