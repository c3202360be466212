"""The tables of the accuracy benchmark, and the page of the documentation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mean, stdev
from typing import Any, NamedTuple

from tabulate import tabulate

from benchmarks._accuracy_rows import is_automatic

Row = dict[str, Any]

TITLES = {
    "lenet300100": "LeNet-300-100",
    "lenet5": "LeNet-5 (Caffe)",
    "resnet20": "ResNet-20",
    "resnet18": "ResNet-18 (torchvision)",
    "resnet56": "ResNet-56",
    "vgg16_bn": "VGG-16 with BatchNorm",
}


class Mark(NamedTuple):
    """A published result: what it calls itself, how much smaller, accuracy before and after."""

    name: str
    reduction: str
    accuracy: str


PUBLISHED: dict[tuple[str, str], tuple[Mark, ...]] = {
    ("lenet5", "MNIST"): (Mark("AFP", "95.1 % fewer FLOPs", "not at hand"),),
    ("resnet56", "CIFAR-10"): (
        Mark("AFP", "60.9 % fewer FLOPs", "93.93 -> 92.94 %"),
        Mark("DepGraph (CVPR 2023)", "2.13x fewer MACs", "93.53 -> 93.77 %"),
        Mark("DepGraph (CVPR 2023)", "2.57x fewer MACs", "93.53 -> 93.64 %"),
    ),
    ("vgg16_bn", "CIFAR-10"): (
        Mark("AFP", "79.7 % fewer FLOPs", "not at hand"),
        Mark("CHIP (NeurIPS 2021)", "66.6 % fewer FLOPs", "93.96 -> 93.72 %"),
        Mark("AutoBot", "65.4 % fewer FLOPs", "-> 94.01 %"),
        Mark("BB (beta-Bernoulli, ICML 2018), a VGG-like network", "", "6.66 % error"),
        Mark("VIB (ICML 2018), a VGG-like network", "", "7.17 % error"),
    ),
}

INTRODUCTION = """\
# What pruning costs in accuracy

Written by `python -m benchmarks.accuracy --markdown`, from `benchmarks/results/accuracy.json`.

Every method starts from the same dense network and has the same training images, the same number
of epochs in all, the same distillation from the dense network and the same fine-tuning. Cells are
percentage points of test accuracy against the dense network, mean ± standard deviation over the
seeds; ×n is the number of seeds where it is not the largest of the table. In **bold** the best
mean of a column. Columns are times fewer multiply-accumulates, counted on the network that comes
out; with `auto` the method decides, and the cell says how far it went (`auto@8`: with
`Recursion(strength=8)` in place of the method's own).

`joint` decides all groups at one moment (rankings: before any training), `recursive` one after
another with training in between. `tp-` is Torch-Pruning 1.6.1; how it is used, and what it makes of
zero-padded shortcuts, is written in `benchmarks/_torch_pruning.py`. `modelopt-fastnas` is FastNAS
of NVIDIA's Model Optimizer 0.47, used as `benchmarks/_modelopt.py` says.
"""


def page(rows: Iterable[Row], environments: Sequence[dict[str, Any]] = ()) -> str:
    """The page of the documentation."""
    rows = list(rows)
    machines = sorted({_machine(environments[row["environment"]]) for row in rows if environments})
    measured = [f"Measured on: {'; '.join(machines)}."] if machines else []
    return "\n\n".join([INTRODUCTION.rstrip(), *measured, tables(rows, "github")]) + "\n"


def tables(rows: Iterable[Row], tablefmt: str = "simple") -> str:
    """One section per network, data set and budget of training."""
    settings: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        kind = (row["network"], row["data"], row["images"], row["epochs"], row["noise_share"])
        settings.setdefault(kind, []).append(row)
    order = list(TITLES)
    kinds = sorted(settings, key=lambda kind: (order.index(kind[0]), *kind[1:]))
    return "\n\n".join(section(settings[kind], tablefmt) for kind in kinds)


def section(rows: Sequence[Row], tablefmt: str = "simple") -> str:
    """The tables of rows that share network, data and budget: fine-tuned, and right after the cut.

    Args:
        rows: At least one.
        tablefmt: As `tabulate` calls it.
    """
    first = rows[0]
    network, data = first["network"], first["data"]
    done = [row for row in rows if "failure" not in row]
    dense = {f"{100 * row['dense_accuracy']:.2f}" for row in done}
    parts = [
        f"## {TITLES[network]}, {data}",
        f"{first['images']} training images, {first['epochs']:g} epochs in all ("
        f"{first['noise_share']:.0%} of them before the cut, where a method trains there), "
        f"{first['test_images']} test images. Dense: {', '.join(sorted(dense)) or '?'} %.",
        _table(rows, "accuracy", tablefmt),
        "Right after the cut, before fine-tuning:",
        _table(rows, "accuracy_after_cut", tablefmt),
        *_scopes(done),
        *_failures(rows),
        *_published(network, data, tablefmt),
    ]
    return "\n\n".join(parts)


def change(row: Row, name: str = "accuracy") -> float:
    """Points of accuracy against the dense network."""
    return 100 * (row[name] - row["dense_accuracy"])


def _table(rows: Sequence[Row], name: str, tablefmt: str) -> str:
    methods = list(dict.fromkeys((row["method"], row["mode"]) for row in rows))
    columns = sorted({row["ratio"] for row in rows}, key=_ratio)
    cells = {
        (line, ratio): [r for r in rows if (r["method"], r["mode"]) == line and r["ratio"] == ratio]
        for line in methods
        for ratio in columns
    }
    seeds = max(map(len, cells.values()))
    best = {
        ratio: max(
            (m for line in methods if (m := _mean(cells[line, ratio], name)) is not None),
            default=None,
        )
        for ratio in columns
        if not is_automatic(ratio)
    }
    lines = [
        [*line, *(_cell(cells[line, ratio], name, seeds, best.get(ratio)) for ratio in columns)]
        for line in methods
    ]
    headers = ["method", "mode", *(r if is_automatic(r) else f"{r}x" for r in columns)]
    aligned = ["left", "left", *("right" for _ in columns)]
    return tabulate(lines, headers, tablefmt=tablefmt, disable_numparse=True, colalign=aligned)


def _cell(rows: Sequence[Row], name: str, seeds: int, best: float | None) -> str:
    done = [row for row in rows if "failure" not in row]
    if not done:
        return ", ".join(sorted({row["failure"] for row in rows}))
    changes = [change(row, name) for row in done]
    text = f"{mean(changes):+.2f}"
    if len(changes) > 1:
        text += f" ± {stdev(changes):.2f}"
    if best is not None and round(mean(changes), 2) == round(best, 2):
        text = f"**{text}**"
    if len(changes) < seeds:
        text += f" ×{len(changes)}"
    if is_automatic(done[0]["ratio"]):
        text += f" at {1 / mean(row['macs_kept'] for row in done):.1f}x"
    return text


def _mean(rows: Sequence[Row], name: str) -> float | None:
    changes = [change(row, name) for row in rows if "failure" not in row]
    return mean(changes) if changes else None


def _ratio(text: str) -> tuple[bool, float]:
    """Sorts columns: ratios, then automatic, then strengths."""
    if is_automatic(text):
        return True, float(text.partition("@")[2] or 0)
    return False, float(text)


def _scopes(rows: Sequence[Row]) -> list[str]:
    """Which methods are not free to prune everything as it is."""
    scopes: dict[str, list[str]] = {}
    for row in rows:
        if row["scope"] != "all groups" and row["method"] not in scopes.setdefault(
            row["scope"], []
        ):
            scopes[row["scope"]].append(row["method"])
    targeted = [row for row in rows if not is_automatic(row["ratio"])]
    spread = [abs(row["macs_kept"] * float(row["ratio"]) - 1) for row in targeted]
    notes = [f"Pruned in {', '.join(methods)}: {scope}." for scope, methods in scopes.items()]
    if spread:
        notes.append(f"Costs lie at most {100 * max(spread):.1f} % from the target, none above it.")
    return [" ".join(notes)] if notes else []


def _failures(rows: Sequence[Row]) -> list[str]:
    failed = [row for row in rows if "failure" in row]
    return [
        f"{row['method']}, {row['mode']}, {row['ratio']}x, seed {row['seed']}: {row['failure']} "
        f"({row['reason']})"
        for row in failed
    ]


def _published(network: str, data: str, tablefmt: str) -> list[str]:
    if "JPEG" in data:
        return ["The images are JPEG-compressed: not comparable with published figures."]
    marks = PUBLISHED.get((network, data), ())
    if not marks:
        return []
    headers = ["published", "smaller by", "accuracy"]
    return [
        "Published, each from a dense network and a training of its own:",
        tabulate(marks, headers, tablefmt=tablefmt, disable_numparse=True),
    ]


def _machine(environment: dict[str, Any]) -> str:
    device = environment["gpu"] or f"{environment['cpu']}, {environment['threads']} thread(s)"
    return f"{device}, torch {environment['torch']}"
