"""The report: what pruning changed, measured."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tabulate import tabulate

from rbpfx.errors import InputError, LoadError
from rbpfx.files import written_aside
from rbpfx.plain import from_plain, to_plain
from rbpfx.saving.files import read_plan
from rbpfx.target import COSTS, Reached
from rbpfx.training.record import BINS, GateHistograms, Series

MUCH_FORGOTTEN = 0.2
"""The report warns if more than this share of what was learnt is lost (ours)."""


@dataclass(frozen=True)
class Figures:
    """What one network costs and achieves.

    Attributes:
        parameters: Number of parameters.
        macs: Multiply-accumulates per example.
        latency: Batch size -> median seconds of a forward pass.
        accuracy: Top-1 accuracy (or the user's metric), if known.
    """

    parameters: int
    macs: int
    latency: dict[int, float]
    accuracy: float | None = None


@dataclass(frozen=True)
class Report:
    """What `prune` did.

    Attributes:
        method: Name of the method.
        dense: The captured network before.
        pruned: The emitted network.
        widths: Group name -> (units before, units after).
        verification_error: Largest relative difference between the sliced and the masked
            network, float64.
        target: What was asked for and what was reached, or None.
        frozen: Producers whose channels stay -> the reason.
        excluded: Groups that the target leaves whole.
        accuracy_after_cut: Accuracy of the emitted network before fine-tuning, if known.
        device: Where latency was measured, with the number of CPU threads.
        seconds: Wall time of the whole call.
        history: One entry per hardened group: step, strength, expected cost, open gates.
        metric: Name of what `accuracy` is.
        inexact: Normalisations that were sliced without regard to exactness, on demand.
        curves: Training phase -> figures over its steps: loss, bound, expected cost, open gates,
            and accuracy where it was measured.
        gates: How open the gates of every group were, from time to time.
        coupling: Group name -> the groups that are computed from it.
        settings: What was asked for, in words: name -> value.
        environment: When and with what it was made: date, versions, processor.
        interrupted: How far training got before it was stopped or failed; empty if it was not.
        forgotten: Share of what the dense network had learnt that this one has not: 0 at the
            training loss of the dense network, 1 at that of its mean output, the same for every
            example. None if it is not known.
    """

    method: str
    dense: Figures
    pruned: Figures
    widths: dict[str, tuple[int, int]]
    verification_error: float
    target: Reached | None
    frozen: dict[str, str]
    accuracy_after_cut: float | None
    device: str
    seconds: float
    history: list[dict[str, Any]] = field(default_factory=list)
    metric: str = "accuracy"
    inexact: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    curves: dict[str, Series] = field(default_factory=dict, repr=False)
    gates: GateHistograms = field(default_factory=GateHistograms, repr=False)
    coupling: dict[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    settings: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    interrupted: str = ""
    forgotten: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON types; numbers that JSON lacks, like infinity, are None."""
        plain: dict[str, Any] = to_plain(self)
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Report:
        """The report that `to_dict` made plain; numbers that are None are not-a-number then.

        Raises:
            LoadError: Entries are missing, of another type, or contradict each other.
        """
        report: Report = from_plain(cls, plain, "report")
        _require_consistent(report)
        return report

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Report:
        """The report of a result that was saved with `PruningResult.save`.

        Raises:
            LoadError: The directory holds no plan.json, or a damaged one.
        """
        return cls.from_dict(dict(read_plan(Path(directory)).report))

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the report as one file: a page that needs nothing beside it, or a picture.

        Args:
            path: Ends in .html, or in .png, .svg or .pdf, which need matplotlib. A file that is
                there is replaced when the new one is complete.

        Raises:
            InputError: It ends in something else, or matplotlib is missing.
            OSError: The file cannot be written.
        """
        from rbpfx.reporting import render_html, render_picture

        path = Path(path)
        if path.suffix not in (".html", ".png", ".svg", ".pdf"):
            raise InputError(f"a report is written as .html, .png, .svg or .pdf, not {path.name!r}")
        with written_aside(path) as aside:
            if path.suffix == ".html":
                aside.write_text(render_html(self), encoding="utf-8")
            else:
                render_picture(self).savefig(aside)

    def _repr_html_(self) -> str:
        from rbpfx.reporting import render_summary

        return render_summary(self)

    def __str__(self) -> str:
        return "\n\n".join([self._figures(), self._widths(), self._closing()])

    def rows(self) -> list[tuple[str, str, str, str]]:
        """What is compared, as text: name, dense, pruned, change."""
        dense, pruned = self.dense, self.pruned
        measured = [
            ("parameters", dense.parameters, pruned.parameters, "{:,}".format),
            ("MACs per example", dense.macs, pruned.macs, "{:,}".format),
            *(
                (f"latency, batch {batch}", before, pruned.latency[batch], _milliseconds)
                for batch, before in dense.latency.items()
            ),
        ]
        rows = [
            (name, show(before), show(after), _times(before, after))
            for name, before, after, show in measured
        ]
        if dense.accuracy is not None and pruned.accuracy is not None:
            rows.append((self.metric, *self._accuracies(dense.accuracy, pruned.accuracy)))
        return rows

    def _figures(self) -> str:
        return tabulate(
            self.rows(),
            headers=["", "dense", "pruned", "change"],
            colalign=("left", "right", "right", "right"),
            disable_numparse=True,
        )

    def _accuracies(self, before: float, after: float) -> tuple[str, str, str]:
        points = f"{100 * (after - before):+.2f} points"
        change = points if self.metric == "accuracy" else f"{after - before:+.4g}"
        return self.shown(before), self.shown(after), change

    def shown(self, accuracy: float) -> str:
        """An accuracy in percent; another metric as it is."""
        return f"{accuracy:.2%}" if self.metric == "accuracy" else f"{accuracy:.4g}"

    def _widths(self) -> str:
        rows = [
            [name, before, after, f"{after / before:.0%}"]
            for name, (before, after) in self.widths.items()
        ]
        return tabulate(rows, headers=["channel group", "units", "kept", "share"])

    def _closing(self) -> str:
        lines = [
            f"method {self.method}, {self.seconds:.0f} s, latency on {self.device}",
            self.exactness(),
            *self.remarks(),
        ]
        if self.excluded:
            lines.append(f"excluded by the target: {', '.join(self.excluded)}")
        if self.frozen:
            lines.append(f"kept whole: {', '.join(f'{n} ({r})' for n, r in self.frozen.items())}")
        return "\n".join(lines)

    def remarks(self) -> list[str]:
        """What was asked for and reached, and what kept it from being more."""
        lines = [] if self.target is None else [str(self.target)]
        if self.interrupted:
            lines.append(f"NOT FINISHED: training ended {self.interrupted}")
        if self.forgotten is not None and self.forgotten > MUCH_FORGOTTEN:
            remedy = "lower Recursion(strength=...)" if self.target is None else "a milder target"
            lines.append(
                f"MUCH IS LOST: {min(self.forgotten, 1):.0%} of what the dense network had learnt "
                f"from the training data. Train longer (more epochs), or ask for less: {remedy}"
            )
        if all(before == after for before, after in self.widths.values()):
            lines.append(
                "nothing was removed: no unit was redundant by the method's own rule. Train longer "
                "(more epochs), harder (a larger strength), or give a target"
                if self.target is None
                else "nothing was removed: the target allows the whole network"
            )
        return lines

    def exactness(self) -> str:
        """How far the sliced network is from the masked one, and why if it is not exact."""
        if not self.inexact:
            return f"sliced equals masked to {self.verification_error:.1e} (relative, float64)"
        return (
            f"NOT EXACT: sliced differs from masked by {self.verification_error:.1e} (relative), "
            f"because normalization='sliced' cut {', '.join(self.inexact)}"
        )


def _require_consistent(report: Report) -> None:
    """Check what the types of a report do not say.

    Raises:
        LoadError: It was not written by rbpfx; names the field.
    """
    moments = len(report.gates.steps)
    sound = {
        "widths": bool(report.widths)
        and all(0 <= after <= before > 0 for before, after in report.widths.values()),
        "latency": report.dense.latency.keys() == report.pruned.latency.keys(),
        "target": report.target is None or report.target.cost in COSTS,
        "curves": all(points for series in report.curves.values() for points in series.values()),
        "gates": all(
            len(counts) == moments and all(len(bins) == BINS and min(bins) >= 0 for bins in counts)
            for counts in report.gates.counts.values()
        ),
    }
    for name, good in sound.items():
        if not good:
            raise LoadError(f"the figures of {name!r} in this report contradict each other")


def _times(before: float, after: float) -> str:
    """How many times less it became, or more."""
    if not before or not after:
        return ""
    times, word = (before / after, "less") if after < before else (after / before, "more")
    return "none" if f"{times:.2f}" == "1.00" else f"{times:.2f}x {word}"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"
