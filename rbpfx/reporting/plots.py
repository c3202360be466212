"""The charts of a report on matplotlib axes, for papers and slides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING

import numpy as np

from rbpfx.errors import InputError, RbpfxError
from rbpfx.graph.groups import Analysis
from rbpfx.report import Report
from rbpfx.reporting.layout import detour, edges, place
from rbpfx.reporting.markup import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOUR = "#3b82c4"
INK = "0.45"


def plot_widths(report: Report, ax: Axes | None = None) -> Axes:
    """Units of every group, before (outline) and after (filled), in the order of the network.

    Args:
        report: What to draw.
        ax: Where; a new figure by default.

    Returns:
        The axes.

    Raises:
        RbpfxError: matplotlib is not installed.
    """
    ax = _axes(ax, (6, 1 + 0.2 * len(report.widths)))
    names = [shortened(name, 32) for name in report.widths]
    rows = range(len(names))
    ax.barh(rows, [after for _, after in report.widths.values()], color=COLOUR, label="kept")
    dense = [before for before, _ in report.widths.values()]
    ax.barh(rows, dense, fill=False, edgecolor=INK, label="dense")
    ax.set_yticks(rows, names, fontsize=7)
    ax.invert_yaxis()
    ax.margins(y=0.01)
    ax.set_xlabel("units")
    ax.legend(frameon=False, fontsize=7)
    return ax


def plot_gates(report: Report, group: str | None = None, ax: Axes | None = None) -> Axes:
    """How open gates were over the training, as a heat map of their histograms.

    Args:
        report: What to draw.
        group: Name of a group; by default the units of all groups are counted together.
        ax: Where; a new figure by default.

    Returns:
        The axes: steps to the right, openness upwards, darker where more units are.

    Raises:
        RbpfxError: matplotlib is not installed.
        InputError: The report has no such group, or no gates were trained.
    """
    steps, counts = report.gates.steps, report.gates.counts
    if not steps or (group is not None and group not in counts):
        known = ", ".join(counts) or "none, because no gates were trained"
        raise InputError(f"the report has no histograms of {group or 'gates'}; it has: {known}")
    ax = _axes(ax, (5, 3))
    chosen = list(counts.values()) if group is None else [counts[group]]
    total = np.sum(np.array(chosen, dtype=float), axis=0)
    share = total / total.sum(axis=1, keepdims=True)
    extent = (-0.5, len(steps) - 0.5, 0.0, 1.0)
    ax.imshow(share.T**0.5, origin="lower", aspect="auto", cmap="Blues", extent=extent, vmin=0)
    shown = list(range(0, len(steps), 3))
    ax.set_xticks(shown, [str(steps[i]) for i in shown])
    ax.set_xlabel("step")
    ax.set_ylabel("openness")
    ax.set_title("all gates" if group is None else group)
    return ax


def plot_history(report: Report, figure: str = "loss", ax: Axes | None = None) -> Axes:
    """A figure of the training over its steps, fine-tuning after the training of the gates.

    Args:
        report: What to draw.
        figure: "loss", "bound", "cost", "open_gates" or "accuracy".
        ax: Where; a new figure by default.

    Returns:
        The axes.

    Raises:
        RbpfxError: matplotlib is not installed.
        InputError: No such figure was written down.
    """
    phases = {phase: series for phase, series in report.curves.items() if figure in series}
    if not phases:
        known = sorted({name for series in report.curves.values() for name in series})
        raise InputError(
            f"the report has no curve of {figure!r}; it has: {', '.join(known) or 'none'}"
        )
    ax = _axes(ax, (5, 3))
    offset = 0
    for phase, series in report.curves.items():
        if figure in series:
            steps, values = zip(*series[figure], strict=True)
            ax.plot(np.array(steps) + offset, values, marker=".", label=phase)
        offset += max(points[-1][0] for points in series.values())
    if figure == "accuracy" and report.dense.accuracy is not None:
        ax.axhline(report.dense.accuracy, color=INK, linestyle="--", label="dense")
    ax.set_xlabel("step")
    ax.set_ylabel(report.metric if figure == "accuracy" else figure.replace("_", " "))
    ax.legend(frameon=False, fontsize=7)
    return ax


def plot_coupling(source: Report | Analysis, ax: Axes | None = None) -> Axes:
    """The coupling graph: an arrow where a group is computed from another, the input above.

    Args:
        source: A report, or an analysis, of which all units stay.
        ax: Where; a new figure by default.

    Returns:
        The axes. The area of a dot grows with the units of its group before pruning; it is filled
        as far as they stay. Arrows back to an earlier group are dotted.

    Raises:
        RbpfxError: matplotlib is not installed.
    """
    _require_matplotlib()
    from matplotlib.patheffects import withStroke

    widths, coupling = _graph(source)
    placed = place(list(widths), coupling)
    rows = 1 + max((row for _, row in placed.values()), default=0)
    ax = _axes(ax, (11, 1 + 0.55 * rows))
    points = {name: (x, -row) for name, (x, row) in placed.items()}
    for start, end in edges(list(widths), coupling):
        down = placed[end][1] - placed[start][1]
        straight = down == 1 or (
            down > 1 and not detour(placed[start], placed[end], placed.values())
        )
        arrow = {
            "arrowstyle": "-|>",
            "color": INK,
            "linestyle": "-" if down > 0 else ":",
            "connectionstyle": f"arc3,rad={0.0 if straight else 0.25}",
            "shrinkA": 7,
            "shrinkB": 7,
        }
        ax.annotate("", points[end], points[start], arrowprops=arrow)
    widest = max((before for before, _ in widths.values()), default=1)
    for name, (before, after) in widths.items():
        x, y = points[name]
        area = 30 + 170 * before / widest
        ax.scatter(x, y, area, facecolor="white", edgecolor=INK, zorder=2)
        ax.scatter(x, y, area * after / before, color=COLOUR, zorder=3)
        label = f"{shortened(name, 24)}\n{after} / {before}"
        text = ax.annotate(label, (x, y), (8, 2), textcoords="offset points", fontsize=6, va="top")
        text.set_path_effects([withStroke(linewidth=2, foreground="white")])
    xs = [x for x, _ in points.values()] or [0.0]
    ax.set_xlim(min(xs) - 0.4, max(xs) + 0.9)
    ax.set_ylim(0.6 - rows, 0.6)
    ax.set_axis_off()
    return ax


def render_picture(report: Report) -> Figure:
    """All charts that the report has data for, in one figure.

    Raises:
        RbpfxError: matplotlib is not installed.
    """
    _require_matplotlib()
    from matplotlib.figure import Figure

    recorded = {name for series in report.curves.values() for name in series}
    curves = [name for name in ("loss", "accuracy", "cost") if name in recorded]
    rows = len(curves) + bool(report.gates.steps)
    height = max(5.0, 1 + 0.2 * len(report.widths), 1 + 2.2 * rows)
    figure = Figure(figsize=(17 if rows else 13, height), layout="constrained", dpi=110)
    costs = (f"{name} {before} → {after}" for name, before, after, _ in report.rows())
    title = f"{report.method}: {', '.join(costs)}; {report.exactness()}"
    figure.suptitle(fill(title, 130), fontsize=9)
    ratios = (5, 8, 4)[: 2 + bool(rows)]
    panels = figure.subfigures(1, len(ratios), squeeze=False, width_ratios=ratios)[0]
    plot_widths(report, panels[0].subplots())
    plot_coupling(report, panels[1].subplots())
    axes = list(np.ravel(panels[2].subplots(rows, 1))) if rows else []
    for name, ax in zip(curves, axes, strict=False):
        plot_history(report, name, ax)
    if report.gates.steps:
        plot_gates(report, ax=axes[-1])
    return figure


def _graph(
    source: Report | Analysis,
) -> tuple[Mapping[str, tuple[int, int]], Mapping[str, Sequence[str]]]:
    if isinstance(source, Report):
        return source.widths, source.coupling
    widths = {group.name: (group.size, group.size) for group in source.groups}
    return widths, {name: list(targets) for name, targets in source.graph.adj.items()}


def _axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    if ax is not None:
        return ax
    _require_matplotlib()
    from matplotlib import pyplot

    return pyplot.subplots(figsize=size, layout="constrained")[1]


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise RbpfxError('plots need matplotlib: pip install "rbpfx[plot]"') from error


__all__ = ["plot_coupling", "plot_gates", "plot_history", "plot_widths", "render_picture"]
