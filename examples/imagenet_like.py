"""Prune a torchvision classifier on a folder of images, trained as torchvision's references do.

The folder holds `train` and `val`, each with one folder for every class. Random crops, MixUp, label
smoothing, SGD with warm-up and a cosine, mixed precision: as in `references/classification`.

    python examples/imagenet_like.py --data imagenet --model resnet50 --macs 0.5
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from _shared import parser, write_stripes
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate
from torchvision.datasets import ImageFolder
from torchvision.models import get_model
from torchvision.transforms import v2

import rbpfx

TO_TENSOR = [
    v2.ToImage(),
    v2.ToDtype(torch.float32, scale=True),
    v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
]


def loaders(options: argparse.Namespace) -> tuple[DataLoader, DataLoader, int]:
    """Training batches with MixUp, validation batches, and the number of classes."""
    crop = [v2.RandomResizedCrop(options.size), v2.RandomHorizontalFlip()]
    resize = [v2.Resize(options.size * 8 // 7), v2.CenterCrop(options.size)]
    train = ImageFolder(options.data / "train", v2.Compose(crop + TO_TENSOR))
    val = ImageFolder(options.data / "val", v2.Compose(resize + TO_TENSOR))
    mixup = v2.MixUp(num_classes=len(train.classes), alpha=0.2)

    def collate(batch: list[Any]) -> tuple[Tensor, Tensor]:
        return mixup(*default_collate(batch))

    shared: dict[str, Any] = {"batch_size": options.batch_size, "num_workers": options.workers}
    return (
        DataLoader(train, shuffle=True, drop_last=True, collate_fn=collate, **shared),
        DataLoader(val, **shared),
        len(train.classes),
    )


def main(options: argparse.Namespace) -> None:
    """Prune, fine-tune, save."""
    train_loader, val_loader, classes = loaders(options)
    published = None if options.tiny or options.weights else "DEFAULT"
    model = get_model(options.model, weights=published, num_classes=classes)
    if options.weights:
        model.load_state_dict(torch.load(options.weights, weights_only=True))
    result = rbpfx.prune(
        model,
        train_loader,
        val_loader=val_loader,
        loss_fn=nn.CrossEntropyLoss(label_smoothing=0.1),
        target=rbpfx.Target(macs=options.macs, round_to=8),
        recursion=rbpfx.Recursion(epochs=options.noise_epochs),
        recovery=rbpfx.FineTune(
            epochs=options.epochs, lr=options.lr, weight_decay=1e-4, warmup=0.05
        ),
        distill=True,
        training=rbpfx.Training(precision=options.precision),
        device=options.device,
        progress=not options.tiny,
    )
    print(result.report)
    result.save(options.out)


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--data", type=Path, help="folder with `train` and `val`")
    arguments.add_argument("--model", default="resnet50", help="a name of torchvision.models")
    arguments.add_argument("--weights", help="state_dict of the trained model, else torchvision's")
    arguments.add_argument("--macs", type=float, default=0.5, help="share to keep")
    arguments.add_argument("--noise-epochs", type=float, default=10)
    arguments.add_argument("--epochs", type=float, default=30, help="of fine-tuning")
    arguments.add_argument("--lr", type=float, default=0.05)
    arguments.add_argument("--batch-size", type=int, default=128)
    arguments.add_argument("--size", type=int, default=224, help="side of the images")
    arguments.add_argument("--workers", type=int, default=8)
    arguments.add_argument("--precision", default="float32", help="or bfloat16, float16")
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--out", default="pruned", help="where the result is saved")
    options = arguments.parse_args()
    if options.tiny:
        with tempfile.TemporaryDirectory() as folder:
            write_stripes(Path(folder))
            tiny = {"data": Path(folder), "model": "resnet18", "noise_epochs": 0.5}
            tiny |= {"epochs": 0.5, "batch_size": 8, "size": 32, "workers": 0, "device": "cpu"}
            vars(options).update(tiny, out=f"{folder}/pruned")
            main(options)
    elif options.data is None:
        arguments.error("--data is needed, or --tiny")
    else:
        main(options)
