"""Prune an image classifier of Hugging Face, then fine-tune it in a loop like that of `Trainer`.

Batches are dictionaries and the model returns its loss, so that rbpfx is told how to get at it by
`forward=`. Attention heads and MLP widths go; the residual stream stays, as LayerNorms mix it.

    python examples/hugging_face.py --data flowers --model google/vit-base-patch16-224

The folder holds `train` and `val`, each with one folder for every class.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from _shared import parser, write_stripes
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    get_cosine_schedule_with_warmup,
)

import rbpfx

Batch = dict[str, Tensor]


def main(options: argparse.Namespace) -> None:
    """Prune, then train."""
    processor, model = (tiny_model if options.tiny else pretrained)(options)

    def collate(examples: list[tuple[Any, int]]) -> Batch:
        images, labels = zip(*examples, strict=True)
        batch = processor(list(images), return_tensors="pt")
        return {"pixel_values": batch["pixel_values"], "labels": torch.tensor(labels)}

    loaders = {
        part: DataLoader(
            ImageFolder(options.data / part),
            options.batch_size,
            part == "train",
            collate_fn=collate,
        )
        for part in ("train", "val")
    }
    result = rbpfx.prune(
        model,
        loaders["train"],
        forward=lambda network, batch: network(**batch).loss,
        val_loader=loaders["val"],
        metric=top1,
        target=rbpfx.Target(macs=options.macs),
        recursion=rbpfx.Recursion(epochs=options.epochs, weight_lr=options.lr),
        recovery=rbpfx.FineTune(epochs=0),
        device=options.device,
        progress=not options.tiny,
    )
    print(result.report)

    network = result.model.train()
    optimizer = torch.optim.AdamW(network.parameters(), options.lr)
    steps = options.epochs * len(loaders["train"])
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    for _ in range(options.epochs):
        for batch in loaders["train"]:
            loss = network(**{name: x.to(options.device) for name, x in batch.items()}).loss
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    print(f"after fine-tuning: accuracy {top1(network, loaders['val']):.1%}")


@torch.no_grad()
def top1(network: nn.Module, loader: DataLoader) -> float:
    """Accuracy in eval mode."""
    network.eval()
    device = next(network.parameters()).device
    hits = []
    for batch in loader:
        batch = {name: x.to(device) for name, x in batch.items()}
        hits.append(network(**batch).logits.argmax(-1) == batch["labels"])
    return torch.cat(hits).double().mean().item()


def pretrained(options: argparse.Namespace) -> tuple[Any, nn.Module]:
    """A processor and a model of the hub, with a new head for the classes of the folder."""
    classes = len(list((options.data / "train").iterdir()))
    return AutoImageProcessor.from_pretrained(
        options.model
    ), AutoModelForImageClassification.from_pretrained(
        options.model, num_labels=classes, ignore_mismatched_sizes=True
    )


def tiny_model(options: argparse.Namespace) -> tuple[Any, nn.Module]:
    """A vision transformer of two layers and four heads for images of 32 pixels."""
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=3,
    )
    return ViTImageProcessor(size={"height": 32, "width": 32}), ViTForImageClassification(config)


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--data", type=Path, help="folder with `train` and `val`")
    arguments.add_argument(
        "--model", default="google/vit-base-patch16-224", help="a name on the hub"
    )
    arguments.add_argument("--macs", type=float, default=0.6, help="share to keep")
    arguments.add_argument("--epochs", type=int, default=3, help="of noise, and of fine-tuning")
    arguments.add_argument("--lr", type=float, default=5e-5)
    arguments.add_argument("--batch-size", type=int, default=32)
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = arguments.parse_args()
    if options.tiny:
        with tempfile.TemporaryDirectory() as folder:
            write_stripes(Path(folder))
            tiny = {"data": Path(folder), "epochs": 1, "batch_size": 8, "device": "cpu"}
            vars(options).update(tiny)
            main(options)
    elif options.data is None:
        arguments.error("--data is needed, or --tiny")
    else:
        main(options)
