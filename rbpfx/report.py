"""The report: what pruning changed, measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any

from tabulate import tabulate

from rbpfx.selection import Reached


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

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON types; numbers that JSON lacks, like infinity, are None."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain

    def __str__(self) -> str:
        return "\n\n".join([self._figures(), self._widths(), self._closing()])

    def _figures(self) -> str:
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
        return tabulate(
            rows,
            headers=["", "dense", "pruned", "change"],
            colalign=("left", "right", "right", "right"),
            disable_numparse=True,
        )

    def _accuracies(self, before: float, after: float) -> tuple[str, str, str]:
        """Accuracies in percent; another metric as it is."""
        if self.metric == "accuracy":
            return f"{before:.2%}", f"{after:.2%}", f"{100 * (after - before):+.2f} points"
        return f"{before:.4g}", f"{after:.4g}", f"{after - before:+.4g}"

    def _widths(self) -> str:
        rows = [
            [name, before, after, f"{after / before:.0%}"]
            for name, (before, after) in self.widths.items()
        ]
        return tabulate(rows, headers=["channel group", "units", "kept", "share"])

    def _closing(self) -> str:
        lines = [
            f"method {self.method}, {self.seconds:.0f} s, latency on {self.device}",
            self._verification(),
        ]
        if self.target is not None:
            lines.append(str(self.target))
        if all(before == after for before, after in self.widths.values()):
            lines.append(
                "nothing was removed: no unit was redundant by the method's own rule. Train longer "
                "(Recursion(epochs=...)), harder (strength=...), or give a target"
                if self.target is None
                else "nothing was removed: the target allows the whole network"
            )
        if self.excluded:
            lines.append(f"excluded by the target: {', '.join(self.excluded)}")
        if self.frozen:
            lines.append(f"kept whole: {', '.join(f'{n} ({r})' for n, r in self.frozen.items())}")
        return "\n".join(lines)

    def _verification(self) -> str:
        if not self.inexact:
            return f"sliced equals masked to {self.verification_error:.1e} (relative, float64)"
        return (
            f"NOT EXACT: sliced differs from masked by {self.verification_error:.1e} (relative), "
            f"because normalization='sliced' cut {', '.join(self.inexact)}"
        )


def _times(before: float, after: float) -> str:
    return f"{before / after:.2f}x less" if after else ""


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"
