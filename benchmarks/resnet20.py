"""ResNet-20 with zero-padded shortcuts on CIFAR-10: RBP against magnitude pruning.

Both start from the same dense weights, see the same training images, keep the same share of the
multiply-accumulates, train for the same number of epochs in all (RBP spends some of its epochs on
the noise) and learn from the dense network in the same way. The groups of the shortcuts, whose
channels a whole stage shares, are pruned like all others.

    python -m benchmarks.resnet20 --data-dir DIR

DIR holds the trained weights (resnet20-cifar10.safetensors) and the images: the original
CIFAR-10, or its JPEG version (figures on the two are not comparable).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks._baseline import prune_by_magnitude
from benchmarks._data import ImageData, add_data_argument, cifar10
from benchmarks._record import Deadline, Record
from benchmarks._train import accuracy, adapted_resnet, evaluation_loader, training_loader
from rbpfx import FineTune, Recursion, Target, prune

RESULTS = Path(__file__).parent / "results" / "resnet20.json"


def main() -> None:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_data_argument(parser)
    parser.add_argument("--macs", type=float, nargs="+", default=[0.5], help="shares to keep")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=10_000, help="training images used")
    parser.add_argument("--noise-epochs", type=float, default=4)
    parser.add_argument("--finetune-epochs", type=float, default=2)
    parser.add_argument("--seconds", type=float, help="time box")
    options = parser.parse_args()
    record, deadline = Record(RESULTS), Deadline(options.seconds)
    data = cifar10(options.data_dir)
    dense = adapted_resnet("resnet20", data, options.data_dir, options.images)
    dense.to(memory_format=torch.channels_last)
    for seed in range(options.seeds):
        for share in options.macs:
            for method in ("rbp", "magnitude"):
                key = f"{data.name}/{method}/macs={share}/seed={seed}"
                if record.done(key) or deadline.expired:
                    continue
                print(key, flush=True)
                record.add(key, run(dense, data, method, share, seed, options))
    columns = ["data", "method", "macs_kept", "seed", "dense", "after_cut", "accuracy", "epochs"]
    print(record.table(columns))


def run(
    dense: nn.Module,
    data: ImageData,
    method: str,
    share: float,
    seed: int,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """One row."""
    loader = training_loader(data, options.images, seed)
    test = evaluation_loader(data)
    epochs = options.noise_epochs + options.finetune_epochs
    row: dict[str, Any] = {
        "data": data.name,
        "method": method,
        "seed": seed,
        "training_images": options.images,
        "test_images": len(data.test_images),
        "epochs": epochs,
        "distillation": True,
    }
    if method == "magnitude":
        result = prune_by_magnitude(
            dense, loader, test, share, FineTune(epochs), distill=True, seed=seed
        )
        return row | {
            "macs_kept": round(result.macs[1] / result.macs[0], 4),
            "dense": accuracy(dense, test),
            "after_cut": result.accuracy_after_cut,
            "accuracy": result.accuracy,
            "verification_error": result.verification_error,
            "plan": result.plan.to_dict(),
        }
    pruned = prune(
        dense,
        loader,
        target=Target(macs=share),
        val_loader=test,
        recursion=Recursion(epochs=options.noise_epochs),
        recovery=FineTune(epochs=options.finetune_epochs),
        distill=True,
        seed=seed,
        progress=False,
    )
    report = pruned.report
    return row | {
        "macs_kept": round(report.pruned.macs / report.dense.macs, 4),
        "dense": report.dense.accuracy,
        "after_cut": report.accuracy_after_cut,
        "accuracy": report.pruned.accuracy,
        "verification_error": report.verification_error,
        "seconds": round(report.seconds),
        "widths": report.widths,
        "plan": pruned.plan.to_dict(),
    }


if __name__ == "__main__":
    main()
