"""Augmentation changes where things are in an image, never what they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rbpfx.cli.augment import AUGMENTATIONS, Augmented, mirrored, moved

IMAGE = 1 + torch.arange(3 * 16 * 24.0).reshape(3, 16, 24)


def drawn(change: object, count: int = 200) -> list[Tensor]:
    torch.manual_seed(0)
    return [change(IMAGE) for _ in range(count)]  # type: ignore[operator]


def test_moved_images_are_shifts_by_up_to_an_eighth() -> None:
    shifts = set()
    for image in drawn(moved):
        assert image.shape == IMAGE.shape
        inside = image[0].nonzero()
        corner = inside[0]
        value = image[0, corner[0], corner[1]] - 1  # which pixel came there
        down, right = int(corner[0] - value // 24), int(corner[1] - value % 24)
        shifts.add((down, right))
        rolled = IMAGE.roll((down, right), (1, 2))
        assert torch.equal(image, rolled.where(image > 0, 0))
        assert len(inside) == (16 - abs(down)) * (24 - abs(right))
    assert shifts == {(y, x) for y in range(-2, 3) for x in range(-3, 4)}


def test_half_of_the_images_are_mirrored() -> None:
    images = drawn(mirrored)
    flips = sum(torch.equal(image, IMAGE.flip(2)) for image in images)
    assert flips + sum(torch.equal(image, IMAGE) for image in images) == len(images)
    assert 70 < flips < 130


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_targets_stay(name: str) -> None:
    dataset = Augmented([(IMAGE, 3), (IMAGE, 4)], name)
    assert len(dataset) == 2
    assert [dataset[i][1] for i in range(2)] == [3, 4]
    assert (name == "none") == all(torch.equal(dataset[0][0], IMAGE) for _ in range(20))


def test_tiny_images_stay_where_they_are() -> None:
    assert all(torch.equal(moved(IMAGE[:, :7, :7]), IMAGE[:, :7, :7]) for _ in range(5))
