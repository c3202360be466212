"""`torch.compile`, while the gates and the pruned network are trained, and of the result.

    python examples/compile.py --macs 0.3

It needs a C++ compiler on CPUs. `result.deploy(compile=True)` goes further: it folds BatchNorm
first and freezes the weights.
"""

from __future__ import annotations

import argparse

import torch
from _shared import digits_options, trained_digits
from torch import nn

import rbpfx


def main(options: argparse.Namespace) -> None:
    """Prune with compiled training, compile the result, compare."""
    model, loader, test_loader = trained_digits(options.tiny)
    if options.tiny:  # compiling a residual network takes a minute
        model = nn.Sequential(
            nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 10)
        )
    result = rbpfx.prune(
        model,
        loader,
        val_loader=test_loader,
        target=rbpfx.Target(macs=options.macs),
        recursion=rbpfx.Recursion(epochs=options.epochs),
        recovery=rbpfx.FineTune(epochs=options.epochs),
        training=rbpfx.Training(compile=True),
        progress=not options.tiny,
    )
    print(result.report)

    network = result.model.eval()
    compiled = torch.compile(network)
    images = next(iter(test_loader))[0]
    with torch.no_grad():
        change = (compiled(images) - network(images)).abs().max() / network(images).abs().max()
    print(f"compiled and eager scores differ by {change:.1e}")
    print(rbpfx.compare_latency(network, compiled, images, seconds=0.2 if options.tiny else 2.0))


if __name__ == "__main__":
    main(digits_options(__doc__, tiny_epochs=0.3))
