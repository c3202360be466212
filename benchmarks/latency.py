"""What pruning gives in time: dense, pruned and deployed networks, beside Torch-Pruning's.

    python -m benchmarks.latency --seconds 3600
    python -m benchmarks.latency --networks resnet18 --batch-sizes 1 --forms emitted compiled
    python -m benchmarks.latency --markdown docs/latency.md

One row per network, ratio and batch size. All variants of a row (`_latency_networks.py` says what
they are) are measured in one process, one forward pass each in turns, on one CPU thread by
default; every ratio is that of two passes of the same round, of which the median and the quartiles
are kept. Weights are random: no kernel is faster or slower for it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import _latency_networks as networks
from benchmarks._latency_networks import FORMS, PEER, SOURCES, Variant
from benchmarks._latency_report import page, tables
from benchmarks._record import Deadline, Record, write_aside
from rbpfx import Latency, measure_latency
from rbpfx.graph.cost import count_parameters
from rbpfx.latency import Comparison

RESULTS = Path(__file__).parent / "results" / "latency.json"
NETWORKS = (
    "resnet18",
    "mobilenet_v2",
    "resnet50",
    "efficientnet_b0",
    "densenet121",
    "convnext_tiny",
    "vit_b_16",
    "vgg16_bn",
)


class Case(NamedTuple):
    """A row to be."""

    network: str
    ratio: float
    batch: int
    device: str


class Setting(NamedTuple):
    """How every row is measured."""

    forms: tuple[str, ...] = ("emitted", "deployed", "onnx")
    threads: int = 1
    image_size: int = 224
    row_seconds: float = 60.0
    rounds: int = 30


def main() -> None:
    """Run what is missing, print the tables."""
    options = _parser().parse_args()
    record = Record(options.results)
    setting = Setting(
        tuple(options.forms),
        options.threads,
        options.image_size,
        options.row_seconds,
        options.rounds,
    )
    found = cases(options.networks, options.ratios, options.batch_sizes, options.devices)
    run_missing(record, found, setting, Deadline(options.seconds))
    rows = list(record.rows.values())
    print(tables(rows))
    if options.markdown:
        write_aside(options.markdown, page(rows, record.environments))


def _parser() -> argparse.ArgumentParser:
    defaults, devices = Setting(), ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--ratios", type=float, nargs="+", default=[2, 4], help="times fewer MACs")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--devices", nargs="+", choices=["cpu", "cuda"], default=devices)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=defaults.forms)
    parser.add_argument("--threads", type=int, default=defaults.threads)
    parser.add_argument("--image-size", type=int, default=defaults.image_size)
    parser.add_argument("--rounds", type=int, default=defaults.rounds, help="of a row, at most")
    parser.add_argument(
        "--row-seconds", type=float, default=defaults.row_seconds, help="of measuring a row, about"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, help="time box")
    parser.add_argument("--markdown", type=Path, help="write the page")
    return parser


def cases(
    names: Iterable[str], ratios: Iterable[float], batches: Iterable[int], devices: Iterable[str]
) -> list[Case]:
    """All rows; those that share their networks come one after another."""
    names, batches, devices = list(names), list(batches), list(devices)
    return [
        Case(name, ratio, batch, device)
        for ratio in ratios
        for name in names
        for batch in batches
        for device in devices
    ]


def key_of(case: Case, setting: Setting) -> str:
    """What identifies a row; other forms and threads are other rows."""
    return (
        f"{case.network}/ratio={case.ratio:g}/batch={case.batch}/{case.device}"
        f"/threads={setting.threads}/image={setting.image_size}/{'+'.join(setting.forms)}"
    )


def run_missing(
    record: Record, found: Iterable[Case], setting: Setting, deadline: Deadline
) -> None:
    """Run the rows that the record lacks, until the time is over."""
    shared: tuple[str, float] | None = None
    for case in found:
        key = key_of(case, setting)
        if record.done(key):
            continue
        if deadline.expired:
            print("the time is over")
            return
        if shared != (case.network, case.ratio):
            networks.source.cache_clear()
            networks.dense.cache_clear()
            shared = case.network, case.ratio
        print(f"{deadline.elapsed:6.0f} s  {key}", flush=True)
        record.add(key, run(case, setting))


def run(case: Case, setting: Setting) -> dict[str, Any]:
    """Measure all variants of a row side by side."""
    started = time.monotonic()
    size = setting.image_size
    torch.set_num_threads(setting.threads)  # torch.compile generates code for so many
    images = torch.randn(case.batch, 3, size, size, device=case.device)
    found = networks.variants(case.network, case.ratio, setting.forms, images, setting.threads)
    working = {name: v.network for name, v in found.items() if v.network is not None}
    measured = measure_latency(
        {"/".join(name): network for name, network in working.items()},
        images,
        seconds=setting.row_seconds,
        max_repeats=setting.rounds,
        threads=setting.threads,
        memory=True,
    )
    latencies = dict(zip(working, measured.values(), strict=True))
    costs = {name: _cost(case, name, size) for name in SOURCES}
    return {
        **case._asdict(),
        "threads": setting.threads,
        "image_size": size,
        "rounds": max(latency.repeats for latency in latencies.values()),
        "seconds": round(time.monotonic() - started, 1),
        "variants": [_figures(name, found[name], latencies, costs[name[0]]) for name in found],
    }


def _cost(case: Case, name: str, image_size: int) -> dict[str, int]:
    """Multiply-accumulates and parameters of a source."""
    emitted = networks.source(name, case.network, case.ratio, image_size)
    if isinstance(emitted, str):
        return {}
    return {"macs": networks.macs(emitted, image_size), "parameters": count_parameters(emitted)}


def _figures(
    name: tuple[str, str],
    variant: Variant,
    latencies: Mapping[tuple[str, str], Latency],
    cost: dict[str, int],
) -> dict[str, Any]:
    """What is kept of a variant; ratios are the quartiles of those of all rounds.

    A ratio is that of the other's time to this one's: above 1 this one is faster.
    """
    source, form = name
    figures: dict[str, Any] = {"source": source, "form": form, **cost}
    if variant.failure is not None:
        return figures | {"failure": variant.failure}
    latency = latencies[name]
    others = {
        "over_dense": ("dense", "emitted"),
        "over_dense_in_same_form": ("dense", form),
        "over_torch_pruning": (PEER, form),
        "over_torch_pruning_as_emitted": (PEER, "emitted"),
    }
    ratios = {
        column: _quartiles(latencies[other], latency)
        for column, other in others.items()
        if other in latencies and other != name
    }
    # What ONNX Runtime allocates, torch does not see.
    memory = None if form == "onnx" or latency.memory is None else latency.memory
    return {
        **figures,
        "difference": variant.difference,
        "milliseconds": round(1e3 * latency.median, 4),
        "spread": round(1e3 * latency.spread, 4),
        **ratios,
        "parameter_bytes": memory and memory.parameters,
        "activation_bytes": memory and memory.activations,
    }


def _quartiles(other: Latency, latency: Latency) -> list[float]:
    comparison = Comparison(other, latency)
    low, high = comparison.quartiles
    return [round(ratio, 4) for ratio in (low, comparison.speedup, high)]


if __name__ == "__main__":
    main()
