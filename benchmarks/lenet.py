"""LeNets on MNIST: error against cost over the strength of the prior, beside published marks.

For every network, seed and strength: take the dense network (trained once per seed), prune it
with every flattened feature as a unit of its own, fine-tune, and record error, widths,
multiply-accumulates, parameters and wall time.

    python -m benchmarks.lenet --data-dir DIR     # DIR holds MNIST/raw; downloaded by default
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from tabulate import tabulate

from benchmarks._data import ImageData, add_data_argument, mnist
from benchmarks._record import Deadline, Record
from benchmarks._train import LENETS, accuracy, dense_lenet, evaluation_loader, training_loader
from rbpfx import FineTune, Recursion, prune

RESULTS = Path(__file__).parent / "results" / "lenet.json"
# Round numbers per unit, 0.0003 to 0.02, times the units of the network.
STRENGTHS = {
    "lenet5": (6.85, 2.74, 13.7, 1.37, 27.4),
    "lenet300100": (0.3552, 0.7104, 1.184, 2.368, 5.92),
    "lenet500300": (0.4752, 0.9504, 1.584, 3.168, 7.92),
}


class Mark(NamedTuple):
    """A published result: multiply-accumulates, error in percent, widths."""

    name: str
    macs: int
    error: str
    widths: str


PUBLISHED = {
    "lenet5": (
        Mark("SBP (NIPS 2017)", 218_000, "0.86", "3-18-284-283"),
        Mark("BC-GHS (NIPS 2017)", 158_000, "1.0", "5-10-76-16"),
        Mark("SSR-L2,1", 118_000, "dense + 0.05", "3-11-108"),
        Mark("SSR-L2,1", 67_000, "dense + 0.18", "2-8-77"),
    ),
    "lenet500300": (Mark("SBP (NIPS 2017)", 48_500, "1.55", "245-160-55-10"),),
    "lenet300100": (),
}


def main() -> None:
    """Run what is missing, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_data_argument(parser)
    parser.add_argument("--networks", nargs="+", choices=list(LENETS), default=list(LENETS))
    parser.add_argument("--strengths", type=float, nargs="+", help="in place of the default ones")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--noise-epochs", type=float, default=4)
    parser.add_argument("--finetune-epochs", type=float, default=10)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, help="time box")
    options = parser.parse_args()
    record, deadline = Record(options.results), Deadline(options.seconds)
    data = mnist(options.data_dir)
    for network in options.networks:
        for strength in options.strengths or STRENGTHS[network]:
            for seed in options.seeds:
                key = f"{network}/strength={strength}/seed={seed}"
                if not record.done(key) and not deadline.expired:
                    print(key, flush=True)
                    record.add(key, run(network, strength, seed, data, options))
    for network in options.networks:
        print(f"\n{network}\n{table(network, record.rows.values())}")


def run(
    network: str, strength: float, seed: int, data: ImageData, options: argparse.Namespace
) -> dict[str, Any]:
    """One row."""
    # On CPUs convolutions train faster in this memory format.
    dense = dense_lenet(network, seed, data).to(memory_format=torch.channels_last)
    loader = training_loader(data, 0, seed)
    test = evaluation_loader(data)
    started = time.perf_counter()
    result = prune(
        dense,
        loader,
        val_loader=test,
        unit="feature",
        recursion=Recursion(epochs=options.noise_epochs, strength=strength, noise_lr=0.05),
        recovery=FineTune(epochs=options.finetune_epochs, lr=0.02),
        distill=True,
        seed=seed,
        progress=False,
    )
    report = result.report
    return {
        "network": network,
        "data": data.name,
        "strength": strength,
        "seed": seed,
        "dense_error": round(100 * (1 - accuracy(dense, test)), 3),
        "error_after_cut": round(100 * (1 - report.accuracy_after_cut), 3),
        "error": round(100 * (1 - report.pruned.accuracy), 3),
        "widths": "-".join(str(kept) for _, kept in report.widths.values()),
        "dense_macs": report.dense.macs,
        "macs": report.pruned.macs,
        "dense_parameters": report.dense.parameters,
        "parameters": report.pruned.parameters,
        "verification_error": report.verification_error,
        "noise_epochs": options.noise_epochs,
        "finetune_epochs": options.finetune_epochs,
        "seconds": round(time.perf_counter() - started, 1),
    }


def table(network: str, rows: Iterable[dict[str, Any]]) -> str:
    """Mean and spread over the seeds for every strength, published marks among them."""
    rows = [row for row in rows if row["network"] == network]
    lines: list[tuple[float, list[Any]]] = []
    for strength in sorted({row["strength"] for row in rows}):
        group = [row for row in rows if row["strength"] == strength]
        macs = mean(row["macs"] for row in group)
        errors = [row["error"] for row in group]
        lines.append(
            (
                macs,
                [
                    f"rbpfx, strength {strength}",
                    f"{macs / 1e3:.0f} K",
                    f"{group[0]['dense_macs'] / macs:.1f}x",
                    f"{mean(errors):.2f} +- {stdev(errors) if len(errors) > 1 else 0:.2f}",
                    f"{mean(errors) - mean(row['dense_error'] for row in group):+.2f}",
                    group[0]["widths"],
                ],
            )
        )
    for mark in PUBLISHED[network]:
        cost = f"{mark.macs / 1e3:.0f} K"
        lines.append((mark.macs, [mark.name, cost, "", mark.error, "", mark.widths]))
    headers = ["", "MACs", "fewer", "error %", "vs dense", "widths (seed 0)"]
    return tabulate([line for _, line in sorted(lines, key=lambda line: -line[0])], headers=headers)


if __name__ == "__main__":
    main()
