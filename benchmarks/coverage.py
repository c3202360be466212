"""What rbpfx makes of models that nobody here has written.

For every model of a suite: how it was captured and whether the graph computes the same, what the
analysis found, and whether the network that a random plan leaves (half the units of every group)
equals the masked one in float64, in eval and in train mode. Every model runs in a process of its
own, with a time and a memory limit.

    python -m benchmarks.coverage --suite torchvision|timm|transformers [--models 'resnet*' ...]
    python -m benchmarks.coverage --markdown docs/coverage.md
"""

from __future__ import annotations

import argparse
import copy
import gc
import hashlib
import importlib
import random
import re
import resource
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

import rbpfx
from benchmarks import _zoo
from benchmarks._isolate import Report, Row, first_line, isolated
from benchmarks._record import Record
from rbpfx import PruningPlan
from rbpfx.graph.verification import difference, in_double
from rbpfx.testing import randomize

RESULTS = Path(__file__).parent / "results"
SUITES = ("torchvision", "timm", "transformers")
EXACT = 1e-9
ROUNDING = 1e-4  # of float32, through a deep network; only where captured and original differ


def main() -> None:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--suite", choices=SUITES)
    parser.add_argument("--models", nargs="+", default=["*"], metavar="GLOB")
    parser.add_argument("--time-limit", type=float, default=300, help="seconds per model")
    parser.add_argument("--memory-limit", type=float, default=8, help="gigabytes per model")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--rerun", action="store_true", help="also rows newer than the code")
    parser.add_argument("--markdown", type=Path, help="write the page of all suites and stop")
    options = parser.parse_args()
    if options.markdown:
        options.markdown.write_text(page())
        return
    record = Record(RESULTS / f"coverage-{options.suite}.json")
    code = fingerprint()
    chosen = [n for n in _zoo.suite(options.suite) if any(fnmatch(n, g) for g in options.models)]
    importlib.import_module(options.suite)  # once, for all processes
    missing = [n for n in chosen if options.rerun or record.rows.get(n, {}).get("code") != code]
    tasks = [(options.suite, name) for name in missing]
    limits = {"seconds": options.time_limit, "gigabytes": options.memory_limit}
    for (_, name), row in isolated(measure, tasks, jobs=options.jobs, **limits):
        record.add(name, row | {"code": code})
        print(f"{name}: {verdict(row)}", flush=True)
    rows = {name: record.rows[name] for name in chosen}
    print(table(rows))
    print(summary(rows.values()))


def fingerprint() -> str:
    """What the source of rbpfx is, so that a row is known to be older than a change of it."""
    sources = sorted(Path(rbpfx.__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]


# -- one model -----------------------------------------------------------------------------


def measure(task: tuple[str, str], report: Report) -> None:
    """One row, stage after stage; a stage that fails leaves the figures of those before it."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    began = time.perf_counter()
    subject = Subject(*task)
    stages = ("build", "capture", "fidelity", "analyse", "prune", "compare")
    for stage in stages:
        try:
            report(getattr(subject, stage)())
        except Exception as error:
            report({"failure": f"{stage}: {first_line(error)}"})
            break
        gc.collect()  # a graph and its module refer to each other
    report({"seconds": round(time.perf_counter() - began, 1), "gigabytes": peak_memory()})


class Subject:
    """A model on its way through the compiler; every stage returns the figures it adds."""

    model: nn.Module
    inputs: Any
    train: str
    gm: nn.Module
    analysis: rbpfx.Analysis
    masked: nn.Module
    pruned: nn.Module

    def __init__(self, suite: str, name: str) -> None:
        self.make = _zoo.suite(suite)[name]

    def build(self) -> Row:
        """Random weights, none of them 0 or 1, and nothing random at run time."""
        torch.manual_seed(0)
        self.model, self.inputs = self.make()
        randomize(self.model)
        without_dropout(self.model)
        self.model.eval()
        return {"parameters": count(self.model)}

    def capture(self) -> Row:
        """Trace, and say what stayed whole."""
        with clock() as seconds:
            self.gm = rbpfx.trace(self.model, self.inputs)
        graphs = [m for m in self.gm.modules() if isinstance(m, fx.GraphModule)]
        nodes = [n for graph in graphs for n in graph.graph.nodes]
        whole = dict(whole_modules(graphs))
        captured = {id(p) for graph in graphs for p in graph.parameters()}
        opaque = {id(p) for module in whole.values() for p in module.parameters()}
        sizes = {id(p): p.numel() for p in self.gm.parameters()}
        inside = sum(n for i, n in sizes.items() if i in captured - opaque)
        return {
            "capture": "graph" if isinstance(self.gm, fx.GraphModule) and not whole else "partial",
            "whole": {name: type(module).__name__ for name, module in whole.items()},
            "captured": share(inside, sum(sizes.values())),
            "nodes": len(nodes),
            "capture_seconds": seconds(),
        }

    def fidelity(self) -> Row:
        """The captured network beside the original one: two batch sizes, both modes, names."""
        row: Row = {"same_keys": self.gm.state_dict().keys() == self.model.state_dict().keys()}
        larger = other_batch(self.inputs)
        for what, inputs in {"capture_error": self.inputs, "capture_error_batch": larger}.items():
            try:
                with torch.no_grad():
                    expected = call(self.model, inputs)
            except Exception:
                continue  # the model itself is made for one batch size
            row[what] = attempt(lambda i=inputs, e=expected: difference(e, evaluate(self.gm, i)))
        self.train = row["train"] = train_mode(self.model, self.inputs)
        if self.train == "deterministic":
            networks = (copy.deepcopy(n).train() for n in (self.model, self.gm))
            row["capture_error_train"] = attempt(
                lambda: difference(*(evaluate(n, self.inputs) for n in networks))
            )
        del self.model
        return row

    def analyse(self) -> Row:
        """Groups, and what stays for which reason."""
        with clock() as seconds:
            self.analysis = rbpfx.analyze(self.gm)
        groups = self.analysis.groups
        return {
            "groups": len(groups),
            "units": sum(group.size for group in groups),
            "frozen": frozen_reasons(self.gm, self.analysis),
            "unknown": dict(Counter(self.analysis.unknown.values()).most_common()),
            "analysis_seconds": seconds(),
        }

    def prune(self) -> Row:
        """Rewrite by a random plan, and by the plan that keeps one unit of every group."""
        groups, rng = self.analysis.groups, random.Random(0)
        fewest = PruningPlan({g.name: [rng.randrange(g.size)] for g in groups})
        plan = PruningPlan({g.name: rng.sample(range(g.size), (g.size + 1) // 2) for g in groups})
        least = count(rbpfx.rewrite(self.gm, self.analysis, fewest))
        with clock() as seconds:
            self.pruned = rbpfx.rewrite(self.gm, self.analysis, plan)
        rewriting = seconds()
        shapes = {name: p.shape for name, p in self.pruned.named_parameters()}
        full, total = dict(self.gm.named_parameters()), count(self.gm)
        in_groups = sum(p.numel() for name, p in full.items() if shapes.get(name) != p.shape)
        self.masked = rbpfx.apply_mask(self.gm, self.analysis, plan)
        return {
            "in_groups": share(in_groups, total),
            "removable": share(total - least, total),
            "rewrite_seconds": rewriting,
            "pruned_parameters": count(self.pruned),
            "macs": rbpfx.count_macs(self.gm),
            "pruned_macs": rbpfx.count_macs(self.pruned),
        }

    def compare(self) -> Row:
        """Masked and sliced in float64: eval mode, then train mode, which changes statistics."""
        dense, removed = (evaluate(network, self.inputs) for network in (self.gm, self.masked))
        row: Row = {"effect": difference(dense, removed)}
        del self.gm, self.analysis  # the largest models barely fit in double precision
        with_statistics = any(isinstance(m, _BatchNorm) for m in self.masked.modules())
        networks = [in_double(network).eval() for network in (self.masked, self.pruned)]
        row["error"] = difference(*(evaluate(network, self.inputs) for network in networks))
        if self.train == "deterministic":
            for network in networks:
                network.train()
            row["error_train"] = difference(*(evaluate(n, self.inputs) for n in networks))
        elif with_statistics:
            for network in networks:
                for module in network.modules():
                    module.training = isinstance(module, _BatchNorm)
            row["error_train"] = difference(*(evaluate(n, self.inputs) for n in networks))
        return row


def without_dropout(model: nn.Module) -> None:
    """Set all rates to 0 at which modules drop values."""
    for module in model.modules():
        for name, value in vars(module).items():
            rate = name == "p" or ("drop" in name and name != "drop_last")
            if rate and isinstance(value, float):
                setattr(module, name, 0.0)


def train_mode(model: nn.Module, inputs: Any) -> str:
    """Whether train mode runs on these inputs alone, and gives the same twice."""
    results = []
    for seed in range(2):
        torch.manual_seed(seed)
        try:
            results.append(evaluate(copy.deepcopy(model).train(), inputs))
        except Exception as error:
            return first_line(error)
    return "deterministic" if difference(*results) == 0 else "random"


def whole_modules(graphs: list[fx.GraphModule]) -> Iterator[tuple[str, nn.Module]]:
    """Modules with parameters that a graph calls without looking inside."""
    for graph in graphs:
        for node in graph.graph.nodes:
            if node.op == "call_module":
                module = graph.get_submodule(str(node.target))
                own = isinstance(module, fx.GraphModule) or next(module.parameters(), None) is None
                if not own and any(True for _ in module.children()) and not is_torch_layer(module):
                    yield str(node.target), module


def is_torch_layer(module: nn.Module) -> bool:
    """Whether a module belongs to `torch.nn`."""
    return type(module).__module__.startswith("torch.nn.")


def frozen_reasons(gm: nn.Module, analysis: rbpfx.Analysis) -> list[tuple[str, float]]:
    """Why channels stay, with the share of the parameters that bring them to life."""
    sizes = {name: p.numel() for name, p in gm.named_parameters()}
    shares: Counter[str] = Counter()
    for axis in analysis.frozen:
        own = sizes.get(axis.name, sizes.get(f"{axis.name}.weight", 0))
        for reason in axis.reason.split("; "):
            kind = re.sub(r"\(.*?\)|'.*?'", "", reason)  # without the names of nodes
            shares[" ".join(kind.split())] += own * axis.channels / axis.size
    total = sum(sizes.values())
    return [(reason, share(n, total)) for reason, n in shares.most_common(8)]


def other_batch(inputs: Any) -> Any:
    """The same inputs with one more example."""
    if isinstance(inputs, tuple) and isinstance(inputs[0], list):
        return ([*inputs[0], inputs[0][0]],)
    return tree_map(lambda v: torch.cat([v, v[:1]]) if isinstance(v, Tensor) else v, inputs)


def call(network: nn.Module, inputs: Any) -> Any:
    """The network on positional or keyword inputs."""
    return network(**inputs) if isinstance(inputs, dict) else network(*inputs)


def evaluate(network: nn.Module, inputs: Any) -> Any:
    """The result on inputs of the network's precision."""
    dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)

    def cast(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if floating else value

    with torch.no_grad():
        return call(network, tree_map(cast, inputs))


def attempt(function: Callable[[], float]) -> float | str:
    """A figure, or what went wrong."""
    try:
        return function()
    except Exception as error:
        return first_line(error)


def count(model: nn.Module) -> int:
    """Number of parameters."""
    return rbpfx.count_parameters(model)


def share(part: float, whole: float) -> float:
    """A ratio worth four digits."""
    return round(part / whole, 4) if whole else 0.0


def peak_memory() -> float:
    """The largest size that this process had, in gigabytes."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


@contextmanager
def clock() -> Iterator[Callable[[], float]]:
    """Seconds since the block was entered."""
    start = time.perf_counter()
    yield lambda: round(time.perf_counter() - start, 4)


# -- all models ----------------------------------------------------------------------------


def is_exact(row: Row) -> bool:
    """Whether the network that is left equals the masked one, as far as it could be run."""
    errors = [row[name] for name in ("error", "error_train") if name in row]
    return "failure" not in row and bool(errors) and max(errors) <= EXACT


def is_faithful(row: Row) -> bool:
    """Whether the captured network is the model."""
    errors = [row[n] for n in row if n.startswith("capture_error")]
    return row.get("same_keys", False) and all(
        isinstance(e, float) and e <= ROUNDING for e in errors
    )


def is_smaller(row: Row) -> bool:
    """Whether parameters went."""
    return row.get("pruned_parameters", float("inf")) < row.get("parameters", 0)


def is_partial(row: Row) -> bool:
    """Whether a tenth of the parameters is out of reach, or something was not understood."""
    return bool(row.get("unknown") or row.get("whole")) or row.get("in_groups", 0) < 0.9


def verdict(row: Row) -> str:
    """A row in a few words."""
    if "failure" in row:
        return row["failure"]
    problems = [] if is_faithful(row) else ["captured graph differs"]
    problems += [] if is_exact(row) else [f"NOT EXACT ({row.get('error')})"]
    problems += [] if is_smaller(row) else ["nothing removed"]
    return ", ".join(problems) or f"exact, {row['in_groups']:.0%} of the parameters in groups"


def table(rows: dict[str, Row], tablefmt: str = "simple") -> str:
    """One line per model."""
    headers = ["model", "capture", "nodes", "groups", "units", "in groups %", "removable %"]
    headers += ["params M", "-> M", "MACs M", "-> M", "trace s", "analyse ms", "rewrite ms"]
    headers += ["error", "train", "what stays, or what failed"]
    return tabulate([_line(n, r) for n, r in rows.items()], headers=headers, tablefmt=tablefmt)


def _line(name: str, row: Row) -> list[Any]:
    def scaled(key: str, factor: float, digits: int = 2) -> Any:
        value = row.get(key)
        return value if value is None else f"{value * factor:.{digits}f}"

    error, train = row.get("error"), row.get("error_train")
    return [
        name,
        row.get("capture", "failed"),
        row.get("nodes"),
        row.get("groups"),
        row.get("units"),
        scaled("in_groups", 100, 0),
        scaled("removable", 100, 0),
        scaled("parameters", 1e-6),
        scaled("pruned_parameters", 1e-6),
        scaled("macs", 1e-6, 0),
        scaled("pruned_macs", 1e-6, 0),
        scaled("capture_seconds", 1),
        scaled("analysis_seconds", 1e3, 0),
        scaled("rewrite_seconds", 1e3, 0),
        None if error is None else f"{error:.0e}",
        None if train is None else f"{train:.0e}",
        explanation(row),
    ]


def explanation(row: Row) -> str:
    """Why a model is only partly prunable, in a line."""
    if "failure" in row:
        return str(row["failure"])
    if not is_partial(row):
        return ""
    parts = [f"whole: {kind}" for kind in sorted(set(row.get("whole", {}).values()))]
    parts += [f"no rule: {operator}" for operator in row.get("unknown", {})]
    told = (r for r in row.get("frozen", []) if "no rule" not in r[0] and r[1] >= 0.02)
    parts += [f"{reason} ({size:.0%})" for reason, size in told]
    return "; ".join(parts[:4])


def summary(rows: Iterable[Row]) -> str:
    """The line that counts."""
    rows = list(rows)
    counts = {
        "captured": sum("capture" in row for row in rows),
        "faithful": sum(is_faithful(row) for row in rows),
        "exact": sum(is_exact(row) for row in rows),
        "smaller": sum(is_smaller(row) for row in rows),
        "partly prunable": sum(is_partial(row) for row in rows if "failure" not in row),
    }
    told = ", ".join(f"{n} {what}" for what, n in counts.items())
    return f"{len(rows)} models: {told}"


def page() -> str:
    """The page of the documentation with the tables of all suites."""
    parts = ["# Coverage\n\nGenerated by `python -m benchmarks.coverage --markdown`."]
    for suite in SUITES:
        rows = Record(RESULTS / f"coverage-{suite}.json").rows
        if rows:
            parts.append(f"## {suite}\n\n{summary(rows.values())}\n\n{table(rows, 'github')}")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
