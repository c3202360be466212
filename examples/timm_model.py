"""Prune a model of timm on a folder of images, with timm's own transforms.

The folder holds `train` and `val`, each with one folder for every class of the model. Half of the
loss is distilled from the dense network. The result is saved with its name in timm, so that
`rbpfx.load("pruned")` rebuilds it without a line of model code:

    python examples/timm_model.py --data imagenet --model resnet50.a1_in1k --macs 0.5
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import timm
import torch
from _shared import parser, write_stripes
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import rbpfx


def main(options: argparse.Namespace) -> None:
    """Prune, fine-tune, save, load."""
    classes = len(list((options.data / "train").iterdir()))
    model = timm.create_model(options.model, pretrained=not options.tiny, num_classes=classes)
    settings = timm.data.resolve_model_data_config(model)
    loaders = {}
    for part in ("train", "val"):
        transform = timm.data.create_transform(**settings, is_training=part == "train")
        images = ImageFolder(options.data / part, transform)
        loaders[part] = DataLoader(
            images, options.batch_size, shuffle=part == "train", num_workers=options.workers
        )

    result = rbpfx.prune(
        model,
        loaders["train"],
        val_loader=loaders["val"],
        target=rbpfx.Target(macs=options.macs),
        recursion=rbpfx.Recursion(epochs=options.epochs),
        recovery=rbpfx.FineTune(epochs=options.epochs, lr=options.lr),
        distill=True,
        device=options.device,
        progress=not options.tiny,
    )
    print(result.report)
    result.save(options.out)
    print("loaded:", type(rbpfx.load(options.out)).__name__, "from", options.out)


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--data", type=Path, help="folder with `train` and `val`")
    arguments.add_argument("--model", default="resnet50.a1_in1k", help="a name of timm")
    arguments.add_argument("--macs", type=float, default=0.5, help="share to keep")
    arguments.add_argument("--epochs", type=float, default=5, help="of noise, and of fine-tuning")
    arguments.add_argument("--lr", type=float, default=0.01)
    arguments.add_argument("--batch-size", type=int, default=64)
    arguments.add_argument("--workers", type=int, default=8)
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--out", default="pruned", help="where the result is saved")
    options = arguments.parse_args()
    if options.tiny:
        with tempfile.TemporaryDirectory() as folder:
            write_stripes(Path(folder))
            tiny = {"data": Path(folder), "model": "test_resnet", "epochs": 0.5, "batch_size": 8}
            vars(options).update(tiny, workers=0, device="cpu", out=f"{folder}/pruned")
            main(options)
    elif options.data is None:
        arguments.error("--data is needed, or --tiny")
    else:
        main(options)
