"""How long capture, analysis and rewriting take, beside Torch-Pruning.

Every torchvision classification model, one 224-pixel image, one thread: `trace`, `analyze` and
`rewrite` by a plan that halves every group, against Torch-Pruning's dependency graph and its
pruning of half the channels. Both sides take turns in one process per model; the best of a few
turns counts, in seconds of CPU time, because machines are shared. The peer is given random
importances, which cost it nothing.

    python -m benchmarks.analysis [--models 'resnet*' ...]
    python -m benchmarks.analysis --suite synthetic

The synthetic suite shows how the times grow: residual and dense networks of 100 to 10 000 layers,
and networks of one depth and growing width.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, fx, nn

import rbpfx
from benchmarks import _zoo
from benchmarks._isolate import Report, Row, first_line, isolated
from benchmarks._record import Record
from rbpfx import Analysis, PruningPlan

RESULTS = Path(__file__).parent / "results"
LAYERS = (100, 300, 1_000, 3_000, 10_000)
WIDTHS = (64, 128, 256, 512, 1_024)


def main() -> None:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--suite", choices=["torchvision", "synthetic"], default="torchvision")
    parser.add_argument("--models", nargs="+", default=["*"], metavar="GLOB")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--time-limit", type=float, default=180, help="seconds per model")
    parser.add_argument("--rerun", action="store_true")
    options = parser.parse_args()
    record = Record(RESULTS / f"analysis-{options.suite}.json")
    real = options.suite == "torchvision"
    names = _zoo.classifiers() if real else [f"{kind}-{n}" for kind, n in synthetic_models()]
    chosen = [name for name in names if any(fnmatch(name, glob) for glob in options.models)]
    tasks = [(n, options.repeats) for n in chosen if options.rerun or not record.done(n)]
    if real:
        import torch_pruning  # noqa: F401  (once, for all processes)
    work = compare if real else measure_growth
    for (name, _), row in isolated(work, tasks, seconds=options.time_limit):
        record.add(name, row)
        print(f"{name}: {row.get('failure') or row.get('ratio') or 'done'}", flush=True)
    rows = {name: record.rows[name] for name in chosen}
    print(table(rows) if real else growth_table(rows))
    if real:
        print(summary(rows))


# -- ours and theirs -----------------------------------------------------------------------


def compare(task: tuple[str, int], report: Report) -> None:
    """One row: both sides in turns."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    name, repeats = task
    model, image = classifier(name)
    sides: dict[str, Callable[[nn.Module, Tensor], Row]] = {"ours": ours, "peer": peer}
    row: Row = {}
    for _ in range(repeats):
        for side, run in list(sides.items()):
            report({"running": side})
            try:
                result = run(model, image)
            except Exception as error:
                row[f"{side}_error"] = first_line(error)
                del sides[side]
                continue
            if result["total"] < row.get(side, {}).get("total", float("inf")):
                row[side] = result
            report(row)
        if "ours" in row and "peer" in row:
            report({"ratio": round(row["peer"]["total"] / row["ours"]["total"], 1)})


def classifier(name: str) -> tuple[nn.Module, Tensor]:
    """A model and one image of the size it is made for."""
    size = 299 if name == "inception_v3" else 224
    return _zoo.torchvision_model(name).eval(), torch.randn(1, 3, size, size)


def ours(model: nn.Module, image: Tensor) -> Row:
    """Seconds of the three passes; the model is copied by the first."""
    start = time.process_time()
    gm = rbpfx.trace(model, image)
    traced = time.process_time()
    analysis = rbpfx.analyze(gm)
    analysed = time.process_time()
    pruned = rbpfx.rewrite(gm, analysis, half(analysis))
    end = time.process_time()
    return {
        "trace": round(traced - start, 4),
        "analyze": round(analysed - traced, 4),
        "rewrite": round(end - analysed, 4),
        "total": round(end - start, 4),
        "parameters": rbpfx.count_parameters(pruned),
    }


def peer(model: nn.Module, image: Tensor) -> Row:
    """Seconds of Torch-Pruning's documented road, output layer ignored; it prunes in place."""
    import torch_pruning

    model = copy.deepcopy(model)  # not counted
    widths = {"out_features", "out_channels"}
    output = [m for m in model.modules() if any(getattr(m, w, None) == 1000 for w in widths)]
    start = time.process_time()
    pruner = torch_pruning.pruner.BasePruner(
        model,
        image,
        importance=torch_pruning.importance.RandomImportance(),
        pruning_ratio=0.5,
        ignored_layers=output,
    )
    built = time.process_time()
    pruner.step()
    end = time.process_time()
    return {
        "build": round(built - start, 4),
        "prune": round(end - built, 4),
        "total": round(end - start, 4),
        "parameters": rbpfx.count_parameters(model),
    }


def half(analysis: Analysis) -> PruningPlan:
    """Half the units of every group, at random."""
    rng = random.Random(0)
    return PruningPlan(
        {g.name: rng.sample(range(g.size), (g.size + 1) // 2) for g in analysis.groups}
    )


def table(rows: dict[str, Row]) -> str:
    """One line per model."""
    headers = ["model", "trace s", "analyze ms", "rewrite ms", "ours s", "peer s", "ratio", "peer"]
    return tabulate([_line(*item) for item in rows.items()], headers=headers, tablefmt="github")


def _line(name: str, row: Row) -> list[Any]:
    own, other = row.get("ours", {}), row.get("peer", {})
    return [
        name,
        own.get("trace"),
        own and round(1e3 * own["analyze"], 1),
        own and round(1e3 * own["rewrite"], 1),
        own.get("total"),
        other.get("total"),
        row.get("ratio"),
        _trouble(row, "peer"),
    ]


def _trouble(row: Row, side: str) -> str:
    if side in row:
        return ""
    stopped = row.get("failure") if row.get("running") == side else None
    return str(row.get(f"{side}_error") or stopped or "")


def summary(rows: dict[str, Row]) -> str:
    """The figures of the goals."""
    ratios = {name: row["ratio"] for name, row in rows.items() if "ratio" in row}
    analyses = [row["ours"]["analyze"] for row in rows.values() if "ours" in row]
    lines = [
        f"{len(rows)} models, {len(analyses)} done here, "
        f"{sum('peer' in row for row in rows.values())} by the peer; "
        f"slowest analysis {1e3 * max(analyses, default=0):.0f} ms"
    ]
    for what, glob in {"all": "*", "DenseNets": "densenet*"}.items():
        those = [ratio for name, ratio in ratios.items() if fnmatch(name, glob)]
        if those:
            median = statistics.median(those)
            lines.append(f"{what}: median {median:.1f}x, {min(those):.1f}x to {max(those):.1f}x")
    return "\n".join(lines)


# -- growth --------------------------------------------------------------------------------


def synthetic_models() -> Iterable[tuple[str, int]]:
    """Kinds of networks, with layers or widths."""
    yield from (("residual", n) for n in LAYERS)
    yield from (("dense", n) for n in LAYERS)
    yield from (("wide", n) for n in WIDTHS)


class Residual(nn.Module):
    """x + conv(relu(bn(conv(x))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.bn(self.conv1(x)).relu())


class Dense(nn.Module):
    """Layers that read all layers before them, and a transition back to the first width."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Conv2d(width * (i + 1), width, 3, padding=1) for i in range(layers)
        )
        self.transition = nn.Conv2d(width * (layers + 1), width, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)).relu())
        return self.transition(torch.cat(features, 1))


def synthetic(name: str) -> nn.Module:
    """The network of a name such as "residual-100"."""
    kind, _, size = name.partition("-")
    width = int(size) if kind == "wide" else 16
    blocks: list[nn.Module]
    if kind == "dense":
        blocks = [Dense(width, 9) for _ in range(int(size) // 10)]
    else:
        blocks = [Residual(width) for _ in range(10 if kind == "wide" else int(size) // 2)]
    return nn.Sequential(nn.Conv2d(3, width, 3), *blocks, nn.Conv2d(width, 10, 1)).eval()


def measure_growth(task: tuple[str, int], report: Report) -> None:
    """One row of a synthetic network."""
    torch.set_num_threads(1)
    name, repeats = task
    model, image = synthetic(name), torch.randn(1, 3, 8, 8)
    report({"bytes": sum(p.numel() * p.element_size() for p in model.parameters())})
    start = time.process_time()
    gm = rbpfx.trace(model, image)
    assert isinstance(gm, fx.GraphModule)
    report({"nodes": len(gm.graph.nodes), "trace": round(time.process_time() - start, 4)})
    seconds: dict[str, list[float]] = {"analyze": [], "rewrite": []}
    for _ in range(repeats):
        start = time.process_time()
        analysis = rbpfx.analyze(gm)
        analysed = time.process_time()
        rbpfx.rewrite(gm, analysis, half(analysis))
        seconds["analyze"].append(analysed - start)
        seconds["rewrite"].append(time.process_time() - analysed)
        report({what: round(min(all_), 4) for what, all_ in seconds.items()})


def growth_table(rows: dict[str, Row]) -> str:
    """Times per node and per megabyte."""
    lines = []
    for name, row in rows.items():
        nodes, megabytes = row.get("nodes", 0), row.get("bytes", 0) / 1e6
        trace, analyze, rewrite = (row.get(what) for what in ("trace", "analyze", "rewrite"))
        per_node = [s and 1e6 * s / nodes for s in (trace, analyze, rewrite)]
        per_megabyte = rewrite and 1e3 * rewrite / megabytes
        figures = [nodes, megabytes, trace, analyze, rewrite, *per_node, per_megabyte]
        lines.append([name, *figures, row.get("failure", "")])
    headers = ["network", "nodes", "MB", "trace s", "analyze s", "rewrite s"]
    headers += ["trace us/node", "analyze us/node", "rewrite us/node", "rewrite ms/MB", ""]
    return tabulate(lines, headers=headers, tablefmt="github", floatfmt=".3g")


if __name__ == "__main__":
    main()
