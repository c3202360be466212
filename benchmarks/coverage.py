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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

import rbpfx
from benchmarks import _coverage_report, _zoo
from benchmarks._coverage_report import SUITES, page, summary, table, verdict
from benchmarks._isolate import Report, Row, first_line, isolated
from benchmarks._record import Record
from rbpfx import PruningPlan
from rbpfx.graph.verification import difference, in_double, largest_difference
from rbpfx.testing import randomize


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
    record = Record(_coverage_report.RESULTS / f"coverage-{options.suite}.json")
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
        gc.collect()  # graphs and modules refer to each other, so they stay until collected
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
        del self.gm, self.analysis
        gc.collect()  # the largest models barely fit in double precision
        with_statistics = any(isinstance(m, _BatchNorm) for m in self.masked.modules())
        networks = [in_double(network).eval() for network in (self.masked, self.pruned)]
        row["error"] = self.compared(*networks)
        if self.train == "deterministic":
            for network in networks:
                network.train()
            row["error_train"] = self.compared(*networks)
        elif with_statistics:
            for network in networks:
                for module in network.modules():
                    module.training = isinstance(module, _BatchNorm)
            row["error_train"] = self.compared(*networks)
        return row

    def compared(self, masked: nn.Module, pruned: nn.Module) -> float:
        """The largest difference on the model's inputs."""
        with torch.no_grad():
            return largest_difference(masked, pruned, lambda n: evaluate(n, self.inputs))


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


if __name__ == "__main__":
    main()
