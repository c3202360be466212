"""From trained gates to a pruned network: decide, slice, verify, fine-tune, measure."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from rbpfx.bars import stages, steps
from rbpfx.checkpoints import Checkpoints
from rbpfx.checkpoints.encoding import encode
from rbpfx.circumstances import environment
from rbpfx.errors import DivergenceError, InputError, TargetError
from rbpfx.graph.capture import ExampleInputs
from rbpfx.graph.cost import count_macs, count_parameters
from rbpfx.graph.examples import first_examples
from rbpfx.graph.gates import apply_mask
from rbpfx.graph.groups import Analysis
from rbpfx.graph.slicing import rewrite
from rbpfx.graph.verification import require_equal
from rbpfx.latency import measure_latency
from rbpfx.methods import Method
from rbpfx.plan import PruningPlan
from rbpfx.progress import Bar, patient
from rbpfx.report import Figures, Report
from rbpfx.result import PruningResult
from rbpfx.saving.origin import Origin
from rbpfx.selection import LatencyMeter, Selection, Units, Values
from rbpfx.surroundings import usual_modes
from rbpfx.target import Target
from rbpfx.training.finetune import FineTune, finetune
from rbpfx.training.interruption import Interruption
from rbpfx.training.loop import refresh_batchnorm
from rbpfx.training.record import Curves, GateHistograms, Series
from rbpfx.training.recursion import Progress
from rbpfx.training.scale import share_forgotten
from rbpfx.training.settings import Training
from rbpfx.training.task import Loader, Task
from rbpfx.wording import in_words

logger = logging.getLogger(__name__)

VERIFIED_EXAMPLES = 4


@dataclass
class Emission:
    """All it takes to emit a network for a target once the gates are trained.

    Attributes:
        origin: What has to be known of the model that was given to rebuild networks from files.
        original: The dense network as it was given, in eval mode: baseline and teacher.
        gm: The captured network, with the weights as trained along with the gates.
        analysis: Its analysis.
        method: The method.
        target: What was asked for.
        scores: Group name -> score of every unit.
        needed: Group name -> the units that the method's own rule keeps.
        multipliers: Group name -> the multiplier of every unit that stays.
        history: What happened in training.
        curves: The figures of training, moment by moment.
        histograms: How open the gates were, from time to time.
        settings: What was asked for, in words.
        callback: Called after every step of fine-tuning.
        task: Turns batches into losses.
        loader: Training batches.
        inputs: Example inputs.
        batch: Size of a training batch.
        evaluate: The user's metric of a network, or None if there is no validation set.
        accuracy: That of the dense network.
        recovery: How networks are fine-tuned.
        training: How a training step is carried out.
        distill: Whether they learn from the original.
        meter: Measures latency, for latency targets.
        progress: Whether to show progress bars.
        metric: Name of what `evaluate` measures.
        device: Where all this happens, in words.
        seeded: Context in which random numbers are the same every time.
    """

    origin: Origin
    original: nn.Module
    gm: nn.Module
    analysis: Analysis
    method: Method
    target: Target | None
    scores: Mapping[str, Values]
    needed: Mapping[str, Units]
    multipliers: Mapping[str, Tensor]
    history: list[dict[str, Any]]
    curves: Series
    histograms: GateHistograms
    settings: dict[str, str]
    callback: Callable[[Progress], None] | None
    task: Task
    loader: Loader
    inputs: ExampleInputs
    batch: int
    evaluate: Callable[[nn.Module], float | None]
    accuracy: float | None
    recovery: FineTune
    training: Training
    distill: bool
    meter: Callable[[Target | None], LatencyMeter | None]
    progress: bool
    metric: str
    device: str
    seeded: Callable[[], AbstractContextManager[None]]

    def target_of(self, value: float | Target) -> Target:
        """A target, or this one's with another budget.

        Raises:
            TargetError: It has no budget, and the training had one, or the method has no rule.
        """
        if isinstance(value, Target):
            trained_for = None if self.target is None else self.target.cost
            if value.cost is None and (trained_for is not None or not self.method.decides):
                raise TargetError(
                    f"a sweep needs a budget in every target, not {value}: the units were trained "
                    "for a budget, not by the method's own rule"
                )
            return value
        if value is None:  # it would be the old target again
            raise TargetError(
                "a sweep takes targets and numbers, not None; for example result.sweep([0.5])"
            )
        asked = self.target or Target()
        budget: dict[str, Any] = {asked.cost or "macs": value}
        return replace(asked, **budget)

    def selection(self, target: Target | None) -> Selection:
        """What chooses the units for a target.

        Raises:
            TargetError: The target cannot be reached.
        """
        selection = Selection(self.analysis, target, self.meter(target))
        missing = [g.name for g in selection.groups if g.name not in self.scores]
        if missing:
            raise InputError(
                f"the groups {', '.join(missing)} were excluded when the gates were trained, so "
                "that nothing is known about their units; exclude them from this target too"
            )
        return selection

    @usual_modes()
    def emit(
        self,
        selection: Selection,
        recovery: FineTune | None = None,
        *,
        started: float | None = None,
        source: weakref.ref[nn.Module] | None = None,
        checkpoints: Callable[[str], Checkpoints | None] = lambda stage: None,
        interruption: Interruption | None = None,
        interrupted: str = "",
        failure: DivergenceError | None = None,
    ) -> PruningResult:
        """Decide, slice, verify, refresh BatchNorm, fine-tune, measure.

        Args:
            selection: Chooses the units.
            recovery: How the network is fine-tuned; by default as it was asked for.
            started: When all this began, by `time.perf_counter`.
            source: The model that was given.
            checkpoints: Name of a stage -> where it is saved.
            interruption: Asks the fine-tuning to stop.
            interrupted: How far the training of the gates got, if it was stopped.
            failure: What ended it, if it failed; raised with the result.

        Raises:
            VerificationError: Slicing changed the function.
            DivergenceError: The loss of the fine-tuning stopped being finite; or `failure`.
        """
        started = time.perf_counter() if started is None else started
        chosen = [g.name for g in selection.groups]
        plan = self._plan(selection, checkpoints("cut"))
        with stages("pruned network", 2, visible=self.progress) as begin:
            begin("slicing")
            folded = rewrite(self.gm, self.analysis, PruningPlan(), multipliers=self.multipliers)
            pruned = rewrite(folded, self.analysis, plan)
            begin("verification")
            masked = apply_mask(folded, self.analysis, plan)
            examples = first_examples(self.inputs, VERIFIED_EXAMPLES)
            error = require_equal(masked, pruned, examples, inexact=self.analysis.inexact(plan))
        logger.info("sliced differs from masked by %.1e (relative, float64)", error)
        del folded, masked
        recovery, curves = recovery or self.recovery, Curves()
        strategy = self.training.spread
        kept = {name: units.astype(float) for name, units in selection.kept(plan).items()}
        cost, open_units = selection.expected(kept), int(sum(u.sum() for u in kept.values()))
        with self.seeded():
            batches = patient(self.loader, "BatchNorm statistics", self.progress)
            refresh_batchnorm(pruned, batches, self.task, mean=strategy.mean)
            after_cut = self.evaluate(pruned)
            teacher = self.original.eval() if self.distill else None
            watched = (lambda: self.evaluate(pruned)) if strategy.processes == 1 else None
            with Bar("fine-tuning", self.progress, watched, curves) as bar:

                def hear(step: int, steps: int, loss: float) -> None:
                    bar.steps(step, steps, loss)
                    if self.callback is not None:
                        told = (step, steps, "", len(chosen), loss, loss, 0.0, cost, open_units)
                        self.callback(Progress(*told, phase="fine-tuning"))

                try:
                    interrupted = interrupted or finetune(
                        pruned,
                        self.loader,
                        self.task,
                        recovery,
                        teacher,
                        hear,
                        self.training,
                        curves,
                        checkpoints("fine-tuning"),
                        interruption,
                    )
                except DivergenceError as fault:
                    failure, interrupted = fault, f"by a fault: {fault}"
        networks = [self.original, pruned]
        sizes = sorted({1, self.batch})
        shown = steps(sizes, "latency", visible=self.progress, unit="batch size")
        latency = strategy.first(
            lambda: {n: measure_latency(networks, first_examples(self.inputs, n)) for n in shown}
        )
        dense_figures, figures = (
            Figures(
                parameters=count_parameters(network),
                macs=count_macs(graph),
                latency={size: measured[place].median for size, measured in latency.items()},
                accuracy=accuracy,
            )
            for place, (network, graph, accuracy) in enumerate(
                [(self.original, self.gm, self.accuracy), (pruned, pruned, self.evaluate(pruned))]
            )
        )
        groups = self.analysis.groups
        report = Report(
            method=self.method.name,
            dense=dense_figures,
            pruned=figures,
            widths={g.name: (g.size, len(plan.kept.get(g.name, range(g.size)))) for g in groups},
            verification_error=error,
            target=selection.reached(plan),
            frozen={axis.name: axis.reason for axis in self.analysis.frozen},
            excluded=tuple(g.name for g in groups if g.name not in chosen),
            accuracy_after_cut=after_cut,
            forgotten=share_forgotten(pruned, self.loader, self.task, self.training, self.batch),
            device=self.device,
            seconds=time.perf_counter() - started,
            history=self.history,
            inexact=self.analysis.inexact(plan),
            metric=self.metric,
            curves={
                phase: series
                for phase, series in (("noise", self.curves), ("fine-tuning", curves.series))
                if series
            },
            gates=self.histograms,
            coupling={name: tuple(targets) for name, targets in self.analysis.graph.adj.items()},
            settings={
                **self.settings,
                "target": in_words(selection.target),
                "recovery": in_words(recovery),
            },
            environment=environment(),
            interrupted=interrupted,
        )
        result = PruningResult(
            pruned, plan, report, self.gm, self.analysis, source, self, self.origin
        )
        if failure is not None:
            failure.result = result
            raise failure
        return result

    def _plan(self, selection: Selection, checkpoints: Checkpoints | None) -> PruningPlan:
        """Which units stay, as decided now or, since latencies vary, before an interruption."""
        strategy = self.training.spread
        saved = None if checkpoints is None else checkpoints.latest()
        if saved is not None:
            return PruningPlan(saved)
        chosen = [g.name for g in selection.groups]
        plan = selection.plan(
            {name: self.scores[name] for name in chosen},
            {name: self.needed[name] for name in chosen},
        )
        strategy.require_same("the plan", plan.kept)
        if checkpoints is not None:
            checkpoints.write(0, encode(dict(plan.kept)))
        return plan


__all__ = ["Emission"]
