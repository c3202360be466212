"""Augmentation: random changes of training images that leave what they show as it is."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

MARGIN = 8
"""Images move by up to this part of their sides: 4 of 32 pixels, as He et al., CVPR 2016, on
CIFAR-10; the same part for other sizes is ours."""


def moved(image: Tensor) -> Tensor:
    """An image `(..., H, W)` moved by up to an eighth of its sides, zeros coming in."""
    sides = image.shape[-2:]
    margins = [side // MARGIN for side in sides]
    down, right = margins
    padded = F.pad(image, (right, right, down, down))
    for axis, (side, margin) in enumerate(zip(sides, margins, strict=True), -2):
        padded = padded.narrow(axis, int(torch.randint(2 * margin + 1, ())), side)
    return padded


def mirrored(image: Tensor) -> Tensor:
    """An image `(..., H, W)`, or with even odds its mirror image."""
    return image.flip(-1) if torch.rand(()) < 0.5 else image


AUGMENTATIONS: dict[str, tuple[Callable[[Tensor], Tensor], ...]] = {
    "none": (),
    "crop": (moved,),
    "flip": (mirrored,),
    "crop-flip": (moved, mirrored),
}
"""Changes by name; the first is the default."""


class Augmented(Dataset[Any]):
    """A data set of (image, target) pairs whose images are changed anew whenever they are read.

    Args:
        dataset: The data set, with images as tensors `(C, H, W)`.
        augmentation: A name in `AUGMENTATIONS`.
    """

    def __init__(self, dataset: Any, augmentation: str) -> None:
        self.dataset = dataset
        self.changes = AUGMENTATIONS[augmentation]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: int) -> tuple[Tensor, Any]:
        image, target = self.dataset[place]
        return reduce(lambda changed, change: change(changed), self.changes, image), target


__all__ = ["AUGMENTATIONS", "Augmented", "mirrored", "moved"]
