"""Prune, then quantize to 8 bits: PyTorch 2 export quantization of torchao, for x86 CPUs.

A pruned network is a network like any other, so that quantization does not know of the pruning.
`torch.compile` of the converted program makes int8 kernels of it. Deployed networks are packed
already and not to be quantized: quantize `result.model`.

    pip install torchao
    python examples/quantize.py --macs 0.3
"""

from __future__ import annotations

import argparse

import torch
from _shared import digits_options, trained_digits
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

import rbpfx


def main(options: argparse.Namespace) -> None:
    """Prune, quantize, compare."""
    model, loader, test_loader = trained_digits(options.tiny)
    result = rbpfx.prune(
        model,
        loader,
        val_loader=test_loader,
        target=rbpfx.Target(macs=options.macs),
        recursion=rbpfx.Recursion(epochs=options.epochs),
        recovery=rbpfx.FineTune(epochs=options.epochs),
        progress=not options.tiny,
    )
    print(result.report)

    network = result.model.eval()
    images, labels = next(iter(test_loader))
    batch = torch.export.Dim("batch", min=2, max=4096)
    program = torch.export.export(network, (images,), dynamic_shapes=({0: batch},)).module()
    settings = get_default_x86_inductor_quantization_config()
    observed = prepare_pt2e(program, X86InductorQuantizer().set_global(settings))
    with torch.no_grad():
        for calibration, _ in loader:
            observed(calibration)
        quantized = convert_pt2e(observed)
        scores, rounded = network(images), quantized(images)
    for name, output in {"pruned": scores, "pruned, 8 bits": rounded}.items():
        print(f"{name}: accuracy {(output.argmax(1) == labels).double().mean():.1%}")
    print(f"8 bits change scores by {(rounded - scores).abs().max() / scores.abs().max():.1%}")


if __name__ == "__main__":
    main(digits_options(__doc__, tiny_epochs=0.5))
