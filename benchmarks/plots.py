"""Pictures of what the other benchmarks measured, from their JSON.

    python -m benchmarks.plots [--out benchmarks/results]

`latency-macs.png` from `latency.json`, `staircase.png` from `staircase.json` and
`accuracy-latency.png` from `digits.json`. Needs `pip install 'rbpfx[plot]'`. Colours are those of
Okabe and Ito, which colour-blind readers tell apart; markers and lines differ as well.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no screen is needed

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from benchmarks._latency_report import PEER, TITLES, variants
from benchmarks._record import Record

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]

# Okabe and Ito, "Color Universal Design", 2008.
BLUE, ORANGE, GREEN, RED, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9"
# Colour, marker, and how far to the right: all three cost nearly the same.
SOURCES = {"ragged": (BLUE, "o", -0.015), "rounded": (GREEN, "s", 0.0), PEER: (ORANGE, "^", 0.015)}
CURVES = ((BLUE, "-"), (ORANGE, "--"), (GREEN, "-."), (RED, ":"), (SKY, "-"))
STYLE = {
    "figure.dpi": 160,
    "font.size": 9,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def main() -> None:
    """Draw everything for which there are results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder with the JSON files")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name, (source, draw) in PLOTS.items():
        rows = list(Record(options.results / source).rows.values())
        if not rows:
            print(f"{source} has no rows: {name} is not drawn")
            continue
        with plt.rc_context(STYLE):
            figure = draw(rows)
            figure.savefig(options.out / name, bbox_inches="tight")
            plt.close(figure)
        print(options.out / name)


# -- latency against multiply-accumulates --------------------------------------------------


def latency_macs(rows: list[Row]) -> Figure:
    """Share of the time kept against share of the multiply-accumulates kept, per form and batch."""
    forms = list(dict.fromkeys(v["form"] for row in rows for v in row["variants"] if "spread" in v))
    settings = sorted({(row["device"], row["batch"]) for row in rows})
    figure, axes = plt.subplots(
        len(settings),
        len(forms),
        figsize=(3.1 * len(forms) + 0.4, 3.0 * len(settings) + 0.6),
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    for line, setting in zip(axes, settings, strict=True):
        chosen = [row for row in rows if (row["device"], row["batch"]) == setting]
        for axis, form in zip(line, forms, strict=True):
            _kept(axis, chosen, form)
            axis.set_title(f"{TITLES[form]}, {setting[0].upper()}, batch {setting[1]}", fontsize=9)
        line[0].set_ylabel("time kept")
    for axis in axes[-1]:
        axis.set_xlabel("MACs kept (markers set apart)")
    axes[0][0].set_ylim(bottom=0)  # of all
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=4)
    figure.suptitle("Time against multiply-accumulates, each against the dense network", y=1.0)
    figure.tight_layout()
    return figure


def _kept(axis: Axes, rows: list[Row], form: str) -> None:
    for source, (colour, marker, shift) in SOURCES.items():
        points = [point for row in rows if (point := _point(row, source, form)) is not None]
        macs, times, low, high = zip(*points, strict=True) if points else ([], [], [], [])
        axis.errorbar(
            [share + shift for share in macs],
            times,
            yerr=[low, high],
            fmt=marker,
            color=colour,
            markersize=5,
            elinewidth=0.8,
            markeredgecolor="white",
            markeredgewidth=0.5,
            label=TITLES[source],
        )
    axis.plot([0, 1], [0, 1], color="#888888", linewidth=0.9, label="as many MACs, as much time")
    axis.axhline(1, color="#888888", linewidth=0.9, linestyle=":")
    axis.set_xlim(0, 0.75)
    for direction in (axis.xaxis, axis.yaxis):
        direction.set_major_formatter(PercentFormatter(1, decimals=0))


def _point(row: Row, source: str, form: str) -> tuple[float, float, float, float] | None:
    """Share of the MACs, share of the time, and how far its quartiles lie below and above."""
    found = variants(row)
    own, dense = found.get((source, form), {}), found.get(("dense", form), {})
    if "over_dense_in_same_form" not in own:
        return None
    slow, middle, fast = own["over_dense_in_same_form"]
    return (
        own["macs"] / dense["macs"],
        1 / middle,
        1 / middle - 1 / fast,
        1 / slow - 1 / middle,
    )


# -- the staircase -------------------------------------------------------------------------


def staircase(rows: list[Row]) -> Figure:
    """Best time of a convolution against its width; multiples of 16 are marked."""
    figure, axis = plt.subplots(figsize=(6.4, 3.8))
    for row, (colour, line) in zip(rows, CURVES, strict=False):
        widths, times = row["widths"], row["microseconds"]
        label = f"{row['convolution']} ({row['pixels']}×{row['pixels']} pixels)"
        axis.plot(widths, times, line, color=colour, linewidth=1.3, label=label)
        even = [(w, t) for w, t in zip(widths, times, strict=True) if w % 16 == 0]
        axis.plot(*zip(*even, strict=True), "o", color=colour, markersize=4)
    axis.set(xlabel="channels, in and out", ylabel="best time", yscale="log")
    axis.set_xticks(range(0, max(max(row["widths"]) for row in rows) + 1, 32))
    axis.yaxis.set_major_formatter(FuncFormatter(_seconds))
    first = rows[0]
    axis.set_title(
        f"A convolution, {first['device'].upper()}, batch {first['batch']}: "
        "dots are multiples of 16 channels",
        fontsize=9,
    )
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _seconds(microseconds: float, _: int) -> str:
    return f"{microseconds:g} us" if microseconds < 1000 else f"{microseconds / 1000:g} ms"


# -- accuracy against latency --------------------------------------------------------------


def accuracy_latency(rows: list[Row]) -> Figure:
    """Test accuracy against how many times faster, for the largest batch; means over the seeds."""
    figure, axis = plt.subplots(figsize=(5.2, 3.6))
    batch = max(rows[0]["latency_ratio"], key=int)
    targets = list(dict.fromkeys(row["target"] for row in rows))
    for target, (colour, _), marker in zip(targets, CURVES, "osD^v", strict=False):
        chosen = [row for row in rows if row["target"] == target]
        x = [row["latency_ratio"][batch] for row in chosen]
        y = [row["accuracy"] for row in chosen]
        fewer = mean(row["macs_ratio"] for row in chosen)
        name = "automatic" if target == "auto" else f"Target(macs={target})"
        axis.plot(x, y, marker, color=colour, markersize=4, alpha=0.45, markeredgewidth=0)
        label = f"{name}: {fewer:.1f}x fewer MACs"
        axis.plot(mean(x), mean(y), marker, color=colour, markersize=8, label=label)
    dense = [row["dense_accuracy"] for row in rows]
    axis.axhline(mean(dense), color="#888888", linewidth=0.9, linestyle=":")
    axis.annotate(
        "dense, mean",
        (1, mean(dense)),
        xytext=(2, 3),
        textcoords="offset points",
        fontsize=8,
        color="#555555",
    )
    axis.set(xlabel=f"times faster than dense, batch {batch}", ylabel="test accuracy")
    axis.set_xlim(1, None)
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x"))
    axis.set_title("A small ResNet on digits: large markers are means over the seeds", fontsize=9)
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


PLOTS: dict[str, tuple[str, Callable[[list[Row]], Figure]]] = {
    "latency-macs.png": ("latency.json", latency_macs),
    "staircase.png": ("staircase.json", staircase),
    "accuracy-latency.png": ("digits.json", accuracy_latency),
}


if __name__ == "__main__":
    main()
