"""What each choice in the noise training is worth: one change at a time, over several seeds.

The small residual network of the demo on scikit-learn's embedded digits, cut to 5 % of its
multiply-accumulates: a budget so small that bad choices show.

    python -m benchmarks.ablation
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from tabulate import tabulate

from benchmarks._record import Record
from rbpfx import FineTune, Recursion, Target, prune
from rbpfx.demo import digits_loaders, train_digits

RESULTS = Path(__file__).parent / "results" / "ablation.json"
SHARE = 0.05
BASE = Recursion(epochs=10)
VARIANTS = {
    "default": BASE,
    "gates count softly to the end": replace(BASE, sharpness=(2.0, 2.0)),
    "strict recursion (window=1)": replace(BASE, window=1),
    "joint (all hardened at the end)": replace(BASE, front=0),
    "weights frozen while gates decide": replace(BASE, weight_lr=0.0),
    "cost-blind divergence": replace(BASE, cost_aware=False),
    "noise learning rate 0.05": replace(BASE, noise_lr=0.05),
}


def main() -> None:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    record = Record(RESULTS)
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        loader, test = digits_loaders(seed=seed)
        dense = train_digits(loader, epochs=10, progress=False)
        for name, recursion in VARIANTS.items():
            key = f"{name}/seed={seed}"
            if not record.done(key):
                print(key, flush=True)
                record.add(key, run(name, recursion, seed, dense, loader, test))
    print(table(list(record.rows.values())))


def run(
    name: str, recursion: Recursion, seed: int, dense: torch.nn.Module, loader: Any, test: Any
) -> dict[str, Any]:
    """One row."""
    result = prune(
        dense,
        loader,
        val_loader=test,
        target=Target(macs=SHARE),
        recursion=recursion,
        recovery=FineTune(epochs=5),
        seed=seed,
        progress=False,
    )
    report = result.report
    assert result.emission is not None
    gates = list(result.emission.scores.values())
    values = np.concatenate(gates)
    return {
        "data": "digits (scikit-learn)",
        "variant": name,
        "seed": seed,
        "dense": report.dense.accuracy,
        "after_cut": report.accuracy_after_cut,
        "accuracy": report.pruned.accuracy,
        "macs_kept": report.pruned.macs / report.dense.macs,
        "gates_between": float(((values > 0.2) & (values < 0.8)).mean()),
        "seconds": round(report.seconds, 1),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over the seeds, in percent."""
    lines = []
    for name in VARIANTS:
        group = [row for row in rows if row["variant"] == name]
        if group:
            columns = ("after_cut", "accuracy", "gates_between")
            lines.append([name, *(_spread([row[c] for row in group]) for c in columns)])
    headers = ["", "after the cut", "fine-tuned", "gates in 0.2-0.8"]
    return tabulate(lines, headers=headers, tablefmt="github")


def _spread(values: list[float]) -> str:
    spread = stdev(values) if len(values) > 1 else 0.0
    return f"{100 * mean(values):.1f} ± {100 * spread:.1f} %"


if __name__ == "__main__":
    main()
