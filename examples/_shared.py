"""What the examples share: the `--tiny` switch, and data that need no download."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from rbpfx.demo import digits_loaders, train_digits


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with `--tiny`, for a run of seconds that only shows that everything fits."""
    formatter = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(description=description, formatter_class=formatter)
    made.add_argument("--tiny", action="store_true", help="seconds on one core, made-up images")
    return made


def digits_options(description: str | None, tiny_epochs: float) -> argparse.Namespace:
    """What examples on the digits are asked for on the command line.

    Args:
        description: What the example does.
        tiny_epochs: The epochs of a tiny run.
    """
    arguments = parser(description)
    arguments.add_argument("--macs", type=float, default=0.3, help="share to keep")
    arguments.add_argument("--epochs", type=float, default=8, help="of noise, and of fine-tuning")
    options = arguments.parse_args()
    if options.tiny:
        options.epochs = tiny_epochs
    return options


def write_stripes(root: Path, size: int = 32, images: int = 8) -> None:
    """A small image folder: `train` and `val`, three classes, the bright third is the class."""
    for part in ("train", "val"):
        for label in range(3):
            folder = root / part / f"third{label}"
            folder.mkdir(parents=True)
            for index in range(images):
                image = torch.randint(0, 128, (size, size, 3), dtype=torch.uint8)
                image[label * size // 3 : (label + 1) * size // 3] += 100
                Image.fromarray(image.numpy()).save(folder / f"{index}.png")


def trained_digits(tiny: bool) -> tuple[nn.Module, DataLoader, DataLoader]:
    """A trained residual network and its batches (scikit-learn's embedded 8x8 digits)."""
    torch.manual_seed(0)
    loader, test_loader = digits_loaders()
    return train_digits(loader, epochs=1 if tiny else 10, progress=False), loader, test_loader
