"""From trained gates to a pruned network: decide, slice, verify, fine-tune, measure."""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

from tabulate import tabulate
from torch import Tensor, nn

from rbpfx.circumstances import environment, in_words
from rbpfx.deployment.deploy import deploy
from rbpfx.errors import InputError, RbpfxError, TargetError
from rbpfx.graph.capture import ExampleInputs
from rbpfx.graph.cost import count_macs, count_parameters
from rbpfx.graph.gates import apply_mask
from rbpfx.graph.groups import Analysis
from rbpfx.graph.slicing import rewrite
from rbpfx.graph.verification import require_equal
from rbpfx.latency import first_examples, measure_latency
from rbpfx.methods import Method
from rbpfx.plan import PruningPlan
from rbpfx.progress import Bar, patient
from rbpfx.report import Figures, Report
from rbpfx.saving.origin import Origin
from rbpfx.saving.save import save
from rbpfx.saving.source import write_source
from rbpfx.selection import LatencyMeter, Selection, Units, Values
from rbpfx.target import Target
from rbpfx.training.finetune import FineTune, finetune
from rbpfx.training.loop import refresh_batchnorm
from rbpfx.training.record import Curves, GateHistograms, Series
from rbpfx.training.recursion import Progress
from rbpfx.training.settings import Training
from rbpfx.training.task import Loader, Task

logger = logging.getLogger(__name__)

VERIFIED_EXAMPLES = 4


@dataclass
class PruningResult:
    """What `prune` returns.

    Attributes:
        model: The smaller network, a `torch.fx.GraphModule` with the submodule names of the
            original, in the mode and on the device it was in. If the forward of the original
            cannot be traced, a module of its class with `GraphModule`s in it.
        plan: Which units of every group stay.
        report: Figures before and after; `str(report)` is a table.
        dense: The captured network in its original size, with the weights that the training of
            the gates left: `rewrite(dense, analysis, plan)` is the cut before fine-tuning, but
            for multipliers that were folded in.
        analysis: Its analysis.
        source: A weak reference to the model that was given to `prune`, for `rbpfx.rebind`.
        origin: What has to be known of that model to rebuild the network from files.
    """

    model: nn.Module
    plan: PruningPlan
    report: Report
    dense: nn.Module = field(repr=False)
    analysis: Analysis = field(repr=False)
    source: weakref.ref[nn.Module] | None = field(default=None, repr=False)
    emission: Emission | None = field(default=None, repr=False)
    origin: Origin | None = field(default=None, repr=False)

    def deploy(self, **options: Any) -> nn.Module:
        """The form of the network to run: equal to it in eval mode, and faster.

        Args:
            options: Those of `rbpfx.deploy`: `dtype`, `compile`, and others.

        Raises:
            RbpfxError: The result was loaded or pickled, and the example inputs are gone; use
                `rbpfx.deploy(result.model, example_inputs)`.
            VerificationError: The deployed network differs.
        """
        if self.emission is None:
            raise RbpfxError(
                "this result has been pickled or loaded and no longer holds example inputs; call "
                "rbpfx.deploy(result.model, example_inputs)"
            )
        return deploy(self.model, self.emission.inputs, **options)

    def save(
        self,
        directory: str | os.PathLike[str],
        *,
        source: str | None = None,
        program: bool = False,
    ) -> None:
        """Save the network as it is now, for `rbpfx.load` in another process or on another machine.

        Writes `plan.json` (how to rebuild it, and the figures of the report) and
        `weights.safetensors` (all tensors, in their dtypes); no pickle. An earlier save in the
        directory is replaced when the new one is complete, never in part.

        Args:
            directory: Where to write; made if it does not exist.
            source: Where the original comes from, so that `rbpfx.load(directory)` needs no model:
                for example "torchvision:resnet18?num_classes=10" or "timm:resnet18". By default
                it is found out for models of torchvision and timm, where it is certain.
            program: Whether to write `network.pt2` too, an exported program of the network in
                eval mode, for models without a name. Read the caveat on `rbpfx.load(trusted=...)`.

        Raises:
            SaveError: The result cannot be described, `source` is another architecture, or the
                directory cannot be written.
        """
        save(self, directory, source=source, program=program)

    def to_source(self, path: str | os.PathLike[str]) -> None:
        """Write the network as readable Python, with its widths written out.

        The module holds one class, named as that of the original, which needs neither rbpfx nor
        arguments. `weights.safetensors` fits it: pass `safetensors.torch.load_file(...)` to its
        `load_state_dict` or, with tied parameters, use `safetensors.torch.load_model`.

        Args:
            path: The file to write, for example "network.py".

        Raises:
            SaveError: A part of the network cannot be written as source; names it.
        """
        write_source(self.model, path)

    def sweep(
        self, targets: float | Target | Iterable[float | Target], recovery: FineTune | None = None
    ) -> Front:
        """Networks for other targets from the same noise training; nothing is trained but these.

        Sweep downwards: the weights have learnt to do without the units that the training closed,
        so that networks above its target gain little.

        Args:
            targets: Targets, or numbers that take the place of the budget in this result's
                target (shares of the MACs if it had none). One alone will do.
            recovery: How each is fine-tuned; as in `prune` by default. `FineTune(epochs=0)` for
                networks right after the cut.

        Returns:
            One result for each target, in the order given; printed, it is a table.

        Raises:
            TargetError: A target cannot be reached, or has no budget.
            RbpfxError: The result was loaded or pickled: the gates and the loader are gone.
        """
        if self.emission is None:
            raise RbpfxError(
                "this result has been pickled or copied and no longer holds the gates and the "
                "loader; sweep the result that prune returned"
            )
        emission = self.emission
        if not isinstance(targets, Iterable):
            targets = [targets]
        chosen = [emission.target_of(target) for target in targets]
        selections = [emission.selection(target) for target in chosen]  # all errors first
        return Front(emission.emit(s, recovery, source=self.source) for s in selections)

    def _repr_html_(self) -> str:
        return self.report._repr_html_()

    def __getstate__(self) -> dict[str, Any]:
        """For pickling and copying: without the analysis, the loader, the teacher and the original.

        The analysis names nodes of the very graph it was made of; a copy would name no other's.
        """
        return {**self.__dict__, "analysis": None, "source": None, "emission": None}


class Front(list[PruningResult]):
    """Results for several targets, cheapest first or in any order; `str` is a table."""

    def __str__(self) -> str:
        return self._table("simple")

    def _repr_html_(self) -> str:
        return self._table("html")

    def _table(self, style: str) -> str:
        rows = []
        for result in self:
            dense, pruned = result.report.dense, result.report.pruned
            batch = max(pruned.latency)
            rows.append(
                (
                    result.report.target.short() if result.report.target else "",
                    f"{pruned.macs / dense.macs:.1%}",
                    f"{pruned.parameters / dense.parameters:.1%}",
                    f"{pruned.latency[batch] / dense.latency[batch]:.1%}",
                    "" if pruned.accuracy is None else f"{pruned.accuracy:.4g}",
                )
            )
        metric = self[0].report.metric if self else "accuracy"
        headers = ["target", "MACs kept", "parameters kept", "time kept", metric]
        return str(tabulate(rows, headers=headers, disable_numparse=True, tablefmt=style))


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

    def emit(
        self,
        selection: Selection,
        recovery: FineTune | None = None,
        *,
        started: float | None = None,
        source: weakref.ref[nn.Module] | None = None,
    ) -> PruningResult:
        """Decide, slice, verify, refresh BatchNorm, fine-tune, measure.

        Raises:
            VerificationError: Slicing changed the function.
            DivergenceError: The loss of the fine-tuning stopped being finite.
        """
        started = time.perf_counter() if started is None else started
        chosen = [g.name for g in selection.groups]
        plan = selection.plan(
            {name: self.scores[name] for name in chosen},
            {name: self.needed[name] for name in chosen},
        )
        folded = rewrite(self.gm, self.analysis, PruningPlan(), multipliers=self.multipliers)
        pruned = rewrite(folded, self.analysis, plan)
        masked = apply_mask(folded, self.analysis, plan)
        examples = first_examples(self.inputs, VERIFIED_EXAMPLES)
        error = require_equal(masked, pruned, examples, inexact=self.analysis.inexact(plan))
        logger.info("sliced differs from masked by %.1e (relative, float64)", error)
        del folded, masked
        recovery, curves = recovery or self.recovery, Curves()
        kept = {name: units.astype(float) for name, units in selection.kept(plan).items()}
        cost, open_units = selection.expected(kept), int(sum(u.sum() for u in kept.values()))
        with self.seeded():
            batches = patient(self.loader, "BatchNorm statistics", self.progress)
            refresh_batchnorm(pruned, batches, self.task)
            after_cut = self.evaluate(pruned)
            teacher = self.original.eval() if self.distill else None
            with Bar("fine-tuning", self.progress, lambda: self.evaluate(pruned), curves) as bar:

                def hear(step: int, steps: int, loss: float) -> None:
                    bar.steps(step, steps, loss)
                    if self.callback is not None:
                        told = (step, steps, "", len(chosen), loss, loss, 0.0, cost, open_units)
                        self.callback(Progress(*told, phase="fine-tuning"))

                finetune(pruned, self.loader, self.task, recovery, teacher, hear, self.training)
        networks = [self.original, pruned]
        latency = {
            size: measure_latency(networks, first_examples(self.inputs, size))
            for size in sorted({1, self.batch})
        }
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
        )
        return PruningResult(
            pruned, plan, report, self.gm, self.analysis, source, self, self.origin
        )


__all__ = ["Emission", "Front", "PruningResult"]
