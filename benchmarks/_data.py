"""Image data sets as tensors in memory, and batches of them without per-sample Python.

A small network reads a batch faster than a worker process delivers one, so the data sets are
loaded whole, and augmentation works on a batch at a time.
"""

from __future__ import annotations

import argparse
import io
import os
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from rbpfx.files import written_aside
from rbpfx.latency.operators import cache_directory

MNIST_MEAN, MNIST_STD = (0.1307,), (0.3081,)
# Those of ImageNet: the public ResNet-20 and ResNet-56 were trained with them.
CIFAR_MEAN, CIFAR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_JPEG_FILE = "cifar10-jpeg.npz"


class ImageData(NamedTuple):
    """A data set in memory.

    Attributes:
        name: What to print next to every figure measured on it.
        train_images: Normalised, float32, `(N, C, H, W)`.
        train_labels: int64, `(N,)`.
        test_images: Normalised, float32, `(M, C, H, W)`.
        test_labels: int64, `(M,)`.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def add_data_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--data-dir`, which defaults to the environment variable `RBPFX_DATA`."""
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=os.environ.get("RBPFX_DATA"),
        help="folder that holds the data sets; downloaded if absent (default: $RBPFX_DATA)",
    )


def mnist(data_dir: str | Path | None = None) -> ImageData:
    """MNIST, images of shape `(N, 1, 28, 28)`.

    Args:
        data_dir: The folder that holds `MNIST/raw`. Downloaded to the cache if None.
    """
    train, test = (
        torchvision.datasets.MNIST(data_dir or cache_directory(), train, download=data_dir is None)
        for train in (True, False)
    )
    return ImageData(
        "MNIST",
        _normalise(train.data[:, None], MNIST_MEAN, MNIST_STD),
        train.targets,
        _normalise(test.data[:, None], MNIST_MEAN, MNIST_STD),
        test.targets,
    )


def cifar10(data_dir: str | Path | None = None, *, jpeg: bool | None = None) -> ImageData:
    """CIFAR-10, images of shape `(N, 3, 32, 32)`.

    Figures on the JPEG version compare with one another only, never with published ones: print
    the name of the data set with them.

    Args:
        data_dir: The folder that holds the data set. Downloaded to the cache if None.
        jpeg: Whether to read the JPEG-compressed version, `cifar10-jpeg.npz`. By default, that
            is read where `data_dir` has it.
    """
    if jpeg is None:
        jpeg = data_dir is not None and (Path(data_dir) / CIFAR_JPEG_FILE).is_file()
    if jpeg:
        if data_dir is None:
            raise ValueError(f"{CIFAR_JPEG_FILE} cannot be downloaded: give its folder, data_dir")
        name, raw = "CIFAR-10 (JPEG)", _decoded_once(Path(data_dir) / CIFAR_JPEG_FILE)
    else:
        name, raw = "CIFAR-10", _original_cifar10(data_dir)
    return ImageData(
        name,
        _normalise(raw["train_images"], CIFAR_MEAN, CIFAR_STD),
        raw["train_labels"],
        _normalise(raw["test_images"], CIFAR_MEAN, CIFAR_STD),
        raw["test_labels"],
    )


def _normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Bytes `(N, C, H, W)` to normalised float32 of the same shape."""
    shape = (1, -1, 1, 1)
    scaled = images.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    return scaled.sub_(torch.tensor(mean).view(shape)).div_(torch.tensor(std).view(shape))


def _original_cifar10(data_dir: str | Path | None) -> dict[str, Tensor]:
    raw = {}
    for part in ("train", "test"):
        dataset = torchvision.datasets.CIFAR10(
            data_dir or cache_directory(), part == "train", download=data_dir is None
        )
        raw[f"{part}_images"] = torch.from_numpy(dataset.data).permute(0, 3, 1, 2)
        raw[f"{part}_labels"] = torch.tensor(dataset.targets)
    return raw


def _decoded_once(archive: Path) -> dict[str, Tensor]:
    """The bytes of the images of a JPEG archive; decoding takes seconds, so they are cached."""
    # The size stands for the content: another archive does not meet this one's cache.
    cached = cache_directory() / f"{archive.stem}-{archive.stat().st_size}.safetensors"
    if not cached.exists():
        with written_aside(cached) as aside:
            save_file(_decode(archive), aside)
    return load_file(cached)


def _decode(archive: Path) -> dict[str, Tensor]:
    decoded = {}
    with np.load(archive) as arrays:
        for part in ("train", "test"):
            stream, offsets = arrays[f"jpeg_{part}"], arrays[f"offsets_{part}"]
            images = np.stack(
                [
                    np.asarray(Image.open(io.BytesIO(stream[start:end])).convert("RGB"))
                    for start, end in pairwise(offsets)
                ]
            )
            decoded[f"{part}_images"] = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
            decoded[f"{part}_labels"] = torch.from_numpy(arrays[f"labels_{part}"]).long()
    return decoded


class Augmentation(Protocol):
    """A random change of a batch of images `(N, C, H, W)`, of the same shape."""

    def __call__(self, images: Tensor, *, generator: Generator | None = None) -> Tensor: ...


class TensorLoader:
    """Iterates over tensors in batches `(images, labels)`, as a `DataLoader` does.

    Attributes:
        dataset: The examples; `len(loader.dataset)` is their number.
        batch_size: The number of examples in a batch; the last batch of an epoch may be smaller.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        shuffle: bool = False,
        *,
        augment: Augmentation | None = None,
        generator: Generator | None = None,
    ) -> None:
        """Keeps the tensors; nothing is copied.

        Args:
            images: `(N, C, H, W)`.
            labels: `(N,)`.
            batch_size: The number of examples in a batch.
            shuffle: Whether every epoch has an order of its own.
            augment: Applied to the images of every batch.
            generator: Decides the order and the augmentation; torch's own if None.
        """
        self.dataset = TensorDataset(images, labels)
        self.batch_size = batch_size
        self._shuffle = shuffle
        self._augment = augment
        self._generator = generator

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in self._choices():
            images, labels = self.dataset[chosen]
            if self._augment is not None:
                images = self._augment(images, generator=self._generator)
            yield images, labels

    def _choices(self) -> Iterable[Tensor | slice]:
        """The examples of each batch; slices where that spares a copy."""
        count = len(self.dataset)
        if self._shuffle:
            return torch.randperm(count, generator=self._generator).split(self.batch_size)
        return [slice(i, i + self.batch_size) for i in range(0, count, self.batch_size)]


def random_crop_flip(
    images: Tensor, padding: int = 4, *, generator: Generator | None = None
) -> Tensor:
    """Moves every image by up to `padding` pixels, zeros coming in, and mirrors half of them.

    Args:
        images: `(N, C, H, W)`.
        padding: The largest shift, in pixels.
        generator: Source of the randomness; torch's own if None.
    """
    shifted = _shift(F.pad(images, (padding,) * 4), padding, generator)
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(mirrored.view(-1, 1, 1, 1), shifted.flip(3), shifted)


def random_shift(images: Tensor, padding: int = 2, *, generator: Generator | None = None) -> Tensor:
    """Moves every image by up to `padding` pixels, the border pixels repeating.

    Repeating the border needs no knowledge of the background's value.

    Args:
        images: `(N, C, H, W)`.
        padding: The largest shift, in pixels.
        generator: Source of the randomness; torch's own if None.
    """
    return _shift(F.pad(images, (padding,) * 4, mode="replicate"), padding, generator)


def _shift(padded: Tensor, padding: int, generator: Generator | None) -> Tensor:
    """Cuts one window at random out of every image, smaller by `padding` on each side."""
    count, _, height, width = padded.shape
    # Every window there is, as a view: (N, C, 2 padding + 1, 2 padding + 1, H, W).
    windows = padded.unfold(2, height - 2 * padding, 1).unfold(3, width - 2 * padding, 1)
    top, left = torch.randint(2 * padding + 1, (2, count), generator=generator)
    return windows[torch.arange(count), :, top, left]
