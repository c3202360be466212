"""Recursive training: the noise of group after group is trained, then hardened.

A group is trained with all earlier groups hardened, because the noise over the layers is a
Markov chain whose conditional p(theta_l | theta_{l-1}) is replaced by the one at the mean of
theta_{l-1} (Zhou et al., ICCV 2019, arXiv 1812.00353). Groups ahead of the front may be noisy
already (`window`), so that they compete for one budget; the front then passes over them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rbpfx.checkpoints import Checkpoints
from rbpfx.graph.capture import evaluating
from rbpfx.methods import Gate, Method, Phase, noise_gates
from rbpfx.selection import Selection
from rbpfx.training.budget import BudgetProjection
from rbpfx.training.decisions import Decisions, own_rule, unit_weights
from rbpfx.training.engine import Losses, Stepper
from rbpfx.training.interruption import Interruption
from rbpfx.training.loop import batches, epoch_steps, planned_steps, steps_per_epoch
from rbpfx.training.record import MOMENTS, Curves, GateHistograms, due
from rbpfx.training.safeguard import Safeguard
from rbpfx.training.schedule import Evidence, Recursion, Schedule
from rbpfx.training.settings import Training
from rbpfx.training.task import TEN_CLASSES, Loader, Task

logger = logging.getLogger(__name__)

EXAMPLES_PER_UNIT = 20
"""Where the strength is shared by all units, at least so many examples are taken to be there. The
entropy of the noise, which weighs 1 / N, would else move the gates of a wide network whatever the
data say: in all it may weigh a twentieth of a nat (ours, docs/experiments.md, "Other losses")."""


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
        strength: `Recursion.strength` as set, or as the target found it; 0 after the cut.
        cost: Expected share of the cost: of the parameters if these are the target, else of the
            multiply-accumulates.
        open_gates: Number of units that are more likely to stay than not.
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
        step: Optimiser steps done.
        front: Number of groups hardened.
        decisions: What was decided about the units of these.
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
        self.strategy = self.training.spread
        for gate in self.gates:
            gate.processes = (self.strategy.rank, self.strategy.processes)
        self.decisions = Decisions(
            self.gates, selection, method, settings.sharpness[0], self.strategy.mean
        )
        aware = settings.cost_aware and method.cost_weighted
        self.weights = unit_weights(selection, self.gates, aware)
        self.strength = method.strength if settings.strength is None else settings.strength
        self._share, self._evidence_needed = 1.0, 0
        if method.shares_strength:
            units = sum(gate.size for gate in self.gates)
            # At the price of ten classes, a network that had less to learn would be sold whole.
            self._share = min(1, task.scale.learnt / TEN_CLASSES) / units
            self._evidence_needed = EXAMPLES_PER_UNIT * units
        self.step = 0
        self.front = 0
        self.history: list[dict[str, Any]] = []
        self.curves = Curves()
        self.histograms = GateHistograms()
        self.projection = BudgetProjection(self.gates, self.weights, self.decisions.expected_cost)
        self._schedule = Schedule.plan(len(self.gates), len(self.gates), settings)
        self._evidence = Evidence(1, settings.tolerance)

    def run(
        self,
        loader: Loader,
        report: Callable[[Progress], None] | None = None,
        checkpoints: Checkpoints | None = None,
        interruption: Interruption | None = None,
    ) -> str:
        """Train and harden every group.

        Args:
            loader: Training batches.
            report: Called after every step.
            checkpoints: Where the training is saved, and goes on if it was saved there.
            interruption: Asks the training to stop.

        Returns:
            How far it got before it was stopped, in words, with groups that are not hardened;
            empty if it has finished.

        Raises:
            InputError: The loss does not depend on the network, or a `train_step` hook does not
                do its part.
            DivergenceError: The loss is no finite number any more, or has exploded, and was not
                saved by lower learning rates; `noisy` is back at its last good state.
        """
        settings = self.settings
        per_epoch = steps_per_epoch(self.task, loader, self.training.accumulate)
        steps = max(planned_steps(settings.epochs, per_epoch), len(self.gates))
        self.strategy.require_same("the number of batches in an epoch", per_epoch)
        counts = self.strategy.gather(self.task.examples_in(loader))
        examples = max(sum(counts), self._evidence_needed)
        self._schedule = Schedule.plan(len(self.gates), steps, settings)
        epoch = epoch_steps(settings.epochs, per_epoch)
        patience = max(round(settings.patience * epoch), 1)
        self._evidence = Evidence(patience, settings.tolerance)
        optimizers = self._optimizers()
        stepper = Stepper(
            self.noisy,
            self.task,
            self.training,
            optimizers,
            teacher=self.teacher,
            penalty=lambda: self._penalty(examples),
        )
        safeguard = Safeguard(
            self,
            stepper,
            loader,
            place=lambda: (self._group(), f", with group {self._group()!r} at the front"),
            advice="Lower Recursion(weight_lr=...) or strength.",
            checkpoints=checkpoints,
            interruption=interruption,
        )
        while not self.finished and not safeguard.stopped:
            for index, gate in enumerate(self.gates[self.front :], start=self.front):
                gate.phase = self._schedule.phase(index, self.front)
            if self.step % per_epoch == 0:
                self._begin_epoch()
            losses = safeguard.step()
            if losses is None:
                continue
            strength = self._hold_budget(optimizers[0])
            for gate in self.gates[self.front :]:
                gate.update()
            hardened = self._end_step(losses, strength, report)
            safeguard.passed(milestone=self.step % per_epoch == 0, minor=hardened)
        self.strategy.synchronize(self.noisy)  # the statistics of BatchNorm
        if self.finished:
            return ""
        return f"after step {self.step} of {self._schedule.steps} of the noise training"

    @property
    def finished(self) -> bool:
        """Whether every group is hardened."""
        return self.front == len(self.gates)

    def decide(self, loader: Loader, max_batches: int = 64) -> None:
        """Harden every group at once without training.

        Args:
            loader: Training batches, for methods whose scores need gradients.
            max_batches: How many batches such a method looks at, at most.
        """
        if self.method.observes:
            with evaluating(self.noisy), torch.enable_grad():
                for batch in batches(loader, min(max_batches, self.task.batches_in(loader))):
                    self.task.loss(self.noisy, batch).backward()
            self.noisy.zero_grad(set_to_none=True)
        self.decisions.harden_all()
        self._require_agreement()

    def state_dict(self) -> dict[str, Any]:
        """All that the training has changed, but for its optimisers."""
        return {
            "step": self.step,
            "front": self.front,
            "network": self.noisy.state_dict(),
            "decisions": self.decisions.state_dict(),
            "schedule": asdict(self._schedule),
            "evidence": self._evidence.state_dict(),
            "history": self.history,
            "curves": self.curves.state_dict(),
            "histograms": asdict(self.histograms),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Return to a state."""
        self.step, self.front = state["step"], state["front"]
        self.noisy.load_state_dict(state["network"])
        self.decisions.load_state_dict(state["decisions"])
        self._schedule = Schedule(**state["schedule"])
        self._evidence.load_state_dict(state["evidence"])
        self.history = state["history"]
        self.curves.load_state_dict(state["curves"])
        self.histograms = GateHistograms(**state["histograms"])

    def _begin_epoch(self) -> None:
        """Tell the gates what the target would keep; remove what is redundant, if so wished."""
        waiting = [gate for gate in self.gates if gate.phase is not Phase.HARDENED]
        if self.budget is not None:
            choice = self.decisions.choice()
            for gate in waiting if choice else ():
                gate.choose(choice[gate.group].to(gate.alive.device))
        elif self.settings.decisions == "epoch" and self.step > 0:
            for gate in waiting:
                if gate.phase is Phase.NOISY:
                    gate.remove(~own_rule(gate))

    def _hold_budget(self, optimizer: torch.optim.Optimizer) -> float:
        """Close gates until the budget holds; the strength of the prior that this amounts to."""
        if self.budget is None:
            return self.strength
        if not self.method.trains:
            return 0.0
        self.decisions.sharpness = self._schedule.sharpness(self.step, self.settings.sharpness)
        budget = self._schedule.budget(self.step, self.budget)
        return self.projection.apply(optimizer, budget) / self._share / self.task.scale.nat

    def _end_step(
        self, losses: Losses, strength: float, report: Callable[[Progress], None] | None
    ) -> bool:
        """Harden the groups whose time has come and write the step down; whether there were any."""
        loss, bound = float(losses.data), float(losses.data + losses.penalty)
        if self.front == 0 and self.budget is None and self._evidence.settled(bound):
            self._schedule = self._schedule.started(self.step + 1)
        hardens = self._schedule.hardens(self.step, self.front)
        steps = self._schedule.steps
        recorded = self.curves.add(self.step + 1, steps, loss=loss, bound=bound)
        if report is not None or hardens or recorded:
            cost, open_units = self.decisions.expected_cost(), self.decisions.open_units()
            told = (self._group(), self.front, loss, bound, strength, cost, open_units)
            reached = Progress(self.step + 1, steps, *told)
        choice = self.decisions.choice() if hardens else {}
        while not self.finished and self._schedule.hardens(self.step, self.front):
            self.decisions.harden(self.gates[self.front], choice)
            self.history.append({**asdict(reached), "group": self._group()})
            logger.info("step %d: hardened %s", self.step + 1, self._group())
            self.front += 1
        if hardens:
            self._require_agreement()
        if recorded:
            self.curves.point(self.step + 1, cost=reached.cost, open_gates=reached.open_gates)
        if due(self.step + 1, steps, MOMENTS):
            openness = {gate.group: self.decisions.openness(gate) for gate in self.gates}
            self.histograms.add(self.step + 1, openness)
        self.step += 1
        if report is not None:
            report(reached)
        return hardens

    def _require_agreement(self) -> None:
        """All processes decided alike."""
        needed = self.decisions.needed
        kept = {name: np.flatnonzero(units).tolist() for name, units in needed.items()}
        self.strategy.require_same("what is kept", kept)

    def _group(self) -> str:
        """The group at the front, or the last one."""
        return self.gates[min(self.front, len(self.gates) - 1)].group

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
                penalty = gate.penalty(self._share * strength, examples)
                total = total + weight.to(total) * penalty.sum()
        return self.task.scale.nat * total

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        settings, scale = self.settings, self.task.scale
        noise = [p for gate in self.gates for p in gate.parameters()]
        known = {id(p) for p in noise}
        weights = [p for p in self.noisy.parameters() if id(p) not in known and p.requires_grad]
        optimizers: list[torch.optim.Optimizer] = []
        if noise:
            rate = self.method.noise_lr if settings.noise_lr is None else settings.noise_lr
            # Its epsilon must stay small beside gradients of a small loss.
            optimizers.append(torch.optim.Adam(noise, rate, eps=1e-8 * min(1, scale.nat)))
        rate = scale.learning_rate if settings.weight_lr is None else settings.weight_lr
        if weights and rate > 0:
            optimizers.append(
                torch.optim.SGD(
                    weights,
                    lr=rate,
                    momentum=0.9,
                    nesterov=True,
                    weight_decay=settings.weight_decay,
                )
            )
        return optimizers
