"""Loaders of images: shapes, statistics, batches and augmentation."""

import argparse
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks._data import (
    CIFAR_JPEG_FILE,
    CIFAR_MEAN,
    CIFAR_STD,
    TensorLoader,
    add_data_argument,
    cifar10,
    mnist,
    random_crop_flip,
    random_shift,
)

SEED = 0


def numbered(count: int) -> tuple[Tensor, Tensor]:
    """Images that are constant at their label."""
    labels = torch.arange(count)
    return labels.view(-1, 1, 1, 1).expand(-1, 1, 2, 2).float(), labels


@pytest.mark.parametrize("data_file", ["MNIST/raw"], indirect=True)
def test_mnist_is_normalised(data_file: Path) -> None:
    data = mnist(data_file)
    assert data.name == "MNIST"
    assert data.train_images.shape == (60_000, 1, 28, 28)
    assert data.test_images.shape == (10_000, 1, 28, 28)
    assert data.train_images.dtype == torch.float32
    assert data.train_labels.dtype == data.test_labels.dtype == torch.int64
    assert abs(data.train_images.mean()) < 1e-2
    assert abs(data.train_images.std() - 1) < 1e-2
    assert data.test_labels.unique().tolist() == list(range(10))


@pytest.fixture
def jpeg_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a small JPEG archive: image i has the grey level 10 i and the label i."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arrays = {}
    for part, count in (("train", 6), ("test", 4)):
        files = []
        for level in range(count):
            buffer = io.BytesIO()
            Image.new("RGB", (32, 32), (10 * level,) * 3).save(buffer, "JPEG")
            files.append(np.frombuffer(buffer.getvalue(), np.uint8))
        arrays[f"jpeg_{part}"] = np.concatenate(files)
        arrays[f"offsets_{part}"] = np.cumsum([0, *map(len, files)])
        arrays[f"labels_{part}"] = np.arange(count, dtype=np.uint8)
    np.savez(tmp_path / CIFAR_JPEG_FILE, **arrays)
    return tmp_path


def test_jpeg_cifar10_is_decoded_and_normalised(jpeg_archive: Path) -> None:
    data = cifar10(jpeg_archive)
    assert data.name == "CIFAR-10 (JPEG)"
    assert data.train_images.shape == (6, 3, 32, 32)
    assert data.train_images.is_contiguous()
    assert data.test_labels.tolist() == [0, 1, 2, 3]
    mean, std = torch.tensor(CIFAR_MEAN), torch.tensor(CIFAR_STD)
    for level, image in enumerate(data.train_images):
        expected = ((10 * level / 255 - mean) / std).view(3, 1, 1).expand(3, 32, 32)
        torch.testing.assert_close(image, expected, atol=0.02, rtol=0)


def test_jpeg_cifar10_is_decoded_once(jpeg_archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cifar10(jpeg_archive)
    monkeypatch.delattr("benchmarks._data._decode")
    for before, after in zip(first[1:], cifar10(jpeg_archive)[1:], strict=True):
        assert torch.equal(before, after)
    assert not list((jpeg_archive / "cache").rglob("*.part"))


def test_jpeg_cifar10_needs_a_folder() -> None:
    with pytest.raises(ValueError, match="data_dir"):
        cifar10(jpeg=True)


def test_data_argument_defaults_to_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RBPFX_DATA", "somewhere")
    parser = argparse.ArgumentParser()
    add_data_argument(parser)
    assert parser.parse_args([]).data_dir == Path("somewhere")
    assert parser.parse_args(["--data-dir", "there"]).data_dir == Path("there")


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("count", "batches"), [(6, 2), (7, 3)])
def test_loader_yields_every_example_once(shuffle: bool, count: int, batches: int) -> None:
    loader = TensorLoader(*numbered(count), batch_size=3, shuffle=shuffle)
    seen = []
    for images, labels in loader:
        assert torch.equal(images[:, 0, 0, 0], labels.float())
        seen.append(labels)
    assert len(seen) == len(loader) == batches
    assert len(loader.dataset) == count
    assert torch.cat(seen).sort().values.tolist() == list(range(count))


def test_loader_order_follows_the_generator() -> None:
    def epochs() -> list[list[int]]:
        order = torch.Generator().manual_seed(SEED)
        loader = TensorLoader(*numbered(50), 50, shuffle=True, generator=order)
        return [labels.tolist() for _ in range(2) for _, labels in loader]

    first, second = epochs()
    assert first != second
    assert epochs() == [first, second]


def test_loader_augments_every_batch() -> None:
    images = torch.rand(4, 3, 8, 8)
    generator = torch.Generator().manual_seed(SEED)
    loader = TensorLoader(images, torch.arange(4), 4, augment=random_crop_flip, generator=generator)
    (augmented, _), (again, _) = *loader, *loader
    assert augmented.shape == images.shape
    assert not torch.equal(augmented, images)
    assert not torch.equal(augmented, again)


def shifted_windows(image: Tensor, padding: int, mode: str) -> list[Tensor]:
    """All images that a shift by up to `padding` pixels can give, one by one."""
    height, width = image.shape[1:]
    padded = torch.nn.functional.pad(image[None], (padding,) * 4, mode=mode)[0]
    return [
        padded[:, top : top + height, left : left + width]
        for top in range(2 * padding + 1)
        for left in range(2 * padding + 1)
    ]


def test_random_shift_gives_every_window() -> None:
    image = torch.rand(2, 5, 6)
    generator = torch.Generator().manual_seed(SEED)
    shifted = random_shift(image.expand(300, -1, -1, -1), 1, generator=generator)
    windows = torch.stack(shifted_windows(image, 1, "replicate"))
    matches = (shifted[:, None] == windows).flatten(2).all(2)
    assert torch.equal(matches.sum(1), torch.ones(300, dtype=torch.int64))
    assert matches.any(0).all()


def test_random_crop_flip_gives_every_window_and_its_mirror_image() -> None:
    image = torch.rand(3, 6, 5)
    generator = torch.Generator().manual_seed(SEED)
    cropped = random_crop_flip(image.expand(400, -1, -1, -1), 1, generator=generator)
    windows = torch.stack(shifted_windows(image, 1, "constant"))
    windows = torch.cat([windows, windows.flip(3)])
    matches = (cropped[:, None] == windows).flatten(2).all(2)
    assert torch.equal(matches.sum(1), torch.ones(400, dtype=torch.int64))
    assert matches.any(0).all()
