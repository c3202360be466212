"""Data sources: batches as the model wants them, splits that hold, and faults that are named."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rbpfx import InputError, SaveError
from rbpfx.cli.console import Console
from rbpfx.cli.data import Data, DataOptions, check_fit, first_inputs, open_data
from rbpfx.cli.models import Preset

from .conftest import make_photos

OPTIONS = DataOptions(batch_size=4, image_size=16, val_share=0.25)
QUIET = Console(quiet=True)


def opened(text: str, options: DataOptions = OPTIONS, preset: Preset | None = None) -> Data:
    return open_data(text, options, preset, QUIET)


def labels(batches: object) -> list[int]:
    return sorted(int(label) for _, target in batches for label in target)  # type: ignore[attr-defined]


def test_an_image_folder_is_split(work: Path) -> None:
    make_photos(work / "photos", count=6)
    data = opened("imagefolder:photos")
    assert data.classes == 2
    assert first_inputs(data).shape == (4, 3, 16, 16)
    assert 0 <= float(first_inputs(data).min()) <= float(first_inputs(data).max()) <= 1
    assert data.val is not None
    held_out = [i for images, _ in data.val for i in images.flatten(1).tolist()]
    assert len(held_out) == 3
    again = [i for images, _ in opened("imagefolder:photos").val or () for i in images.flatten(1)]
    assert torch.equal(torch.tensor(held_out), torch.stack(again))
    seen = [i for _ in range(3) for images, _ in data.train for i in images.flatten(1).tolist()]
    assert not any(image in seen for image in held_out)


def test_an_image_folder_with_parts(work: Path) -> None:
    make_photos(work / "photos/train")
    make_photos(work / "photos/val", count=1)
    data = opened("imagefolder:photos")
    assert labels(data.train) == 4 * [0] + 4 * [1]
    assert labels(data.val) == [0, 1]


def test_nothing_may_be_held_out(work: Path) -> None:
    make_photos(work / "photos")
    assert opened("imagefolder:photos", replace(OPTIONS, val_share=0.0)).val is None


@pytest.mark.parametrize("channels", [1, 3])
def test_a_preset_prepares_the_images(channels: int, work: Path) -> None:
    make_photos(work / "photos")

    def transform(side: int) -> Callable[[object], Tensor]:
        def apply(image: object) -> Tensor:
            assert len(image.getbands()) == channels  # type: ignore[attr-defined]
            return torch.full((channels, side, side), 7.0)

        return apply

    preset = Preset((channels, 5, 5), transform)
    unsized = opened("imagefolder:photos", replace(OPTIONS, image_size=None), preset)
    assert torch.equal(first_inputs(unsized), torch.full((4, channels, 5, 5), 7.0))
    assert first_inputs(opened("imagefolder:photos", preset=preset)).shape[-1] == 16


def test_torchvision() -> None:
    data = opened("torchvision:FakeData?size=16&num_classes=3&image_size=(3,20,20)")
    assert first_inputs(data).shape == (4, 3, 16, 16)
    assert len(labels(data.val)) == 4


def test_digits() -> None:
    data = opened("digits")
    assert (data.classes, first_inputs(data).shape) == (10, (4, 1, 8, 8))


@pytest.mark.parametrize(
    ("text", "has_val"), [("nets:batches", False), ("nets:loader", False), ("nets:loaders", True)]
)
def test_loaders_of_the_user(text: str, has_val: bool, work: Path) -> None:
    data = opened(text)
    assert (data.val is not None) == has_val
    assert len(list(data.train)) == len(data.train) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("photos", "names no data; write imagefolder:DIR"),
        ("empty", "'empty' is a folder; write imagefolder:empty"),
        ("imagefolder:", "names no data"),
        ("imagefolder:nowhere", "there is no folder 'nowhere'"),
        ("imagefolder:empty", "is no image folder"),
        ("imagefolder:different", "have different classes: 'b' is only in one"),
        ("torchvision:CIFAR11", "no data set 'CIFAR11'"),
        ("torchvision:ImageFolder", "cannot be opened.*root=DIR"),
        ("torchvision:CIFAR10?root=nowhere", "cannot be opened.*download=True"),
        ("nets:once", "can be gone through repeatedly"),
        ("nets:number", "gives a int"),
    ],
)
def test_no_data(text: str, words: str, work: Path) -> None:
    (work / "empty").mkdir()
    make_photos(work / "different/train")
    make_photos(work / "different/val", classes="a")
    with pytest.raises(InputError, match=words):
        opened(text)


def test_sizes_of_images_have_to_be_known(work: Path) -> None:
    make_photos(work / "photos")
    with pytest.raises(InputError, match="--image-size"):
        opened("imagefolder:photos", replace(OPTIONS, image_size=None))


def test_failures_while_reading_are_errors_of_the_data(work: Path) -> None:
    with pytest.raises(InputError, match="the data cannot be read: bad sector"):
        list(opened("nets:broken").train)
    make_photos(work / "photos")
    (work / "photos/a/0.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="cannot identify image file"):
        list(opened("imagefolder:photos", replace(OPTIONS, val_share=0.0)).train)


@pytest.mark.parametrize("folder", ["photos", "photos/train"])
def test_training_images_are_augmented_and_others_are_not(folder: str, work: Path) -> None:
    make_photos(work / folder)
    make_photos(work / "photos/val", count=2) if folder == "photos/train" else None

    def images(data: Data, part: str) -> Tensor:
        return torch.cat([batch for batch, _ in getattr(data, part)])

    plain = opened("imagefolder:photos")
    torch.manual_seed(0)
    changed = opened("imagefolder:photos", replace(OPTIONS, augment="crop-flip"))
    assert torch.equal(images(changed, "val"), images(plain, "val"))
    assert images(changed, "train").shape == images(plain, "train").shape
    known = images(plain, "train")
    assert any(not (image == known).flatten(1).all(1).any() for image in images(changed, "train"))
    assert changed.classes == plain.classes == 2


@pytest.mark.parametrize("text", ["digits", "nets:loader"])
def test_only_images_that_we_read_are_augmented(text: str, work: Path) -> None:
    opened(text, replace(OPTIONS, augment="none"))
    with pytest.raises(InputError, match="--augment crop goes with imagefolder: and torchvision:"):
        opened(text, replace(OPTIONS, augment="crop"))


def classifier(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(4, outputs))


def pairs(labels: list[int], classes: int | None = None) -> Data:
    return Data([(torch.zeros(len(labels), 4), torch.tensor(labels))], classes=classes)


def test_labels_have_to_be_outputs() -> None:
    check_fit(classifier(3), pairs([0, 2]))
    for data in (pairs([0, 3]), pairs([0, 1], classes=4)):
        with pytest.raises(InputError, match="4 classes and the model has 3 outputs"):
            check_fit(classifier(3), data)


def test_too_many_outputs_are_suspicious(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_fit(classifier(3), pairs([0, 1]))
        assert not caplog.records
        check_fit(classifier(3), pairs([0, 1], classes=2))
    assert "the data have 2 classes and the model has 3 outputs" in caplog.text


def test_inputs_have_to_fit() -> None:
    with pytest.raises(InputError, match=r"does not run on the data's first batch .*\(1, 4\)"):
        check_fit(nn.Linear(5, 2), pairs([0]))
    with pytest.raises(InputError, match="no batch"):
        check_fit(nn.Linear(5, 2), Data([]))
    with pytest.raises(InputError, match="pairs"):
        check_fit(nn.Linear(5, 2), Data([torch.zeros(3, 4)]))
    with pytest.raises(SaveError, match="hold a slice"):
        check_fit(nn.Linear(5, 2), Data([((torch.zeros(3, 5), slice(2)), torch.zeros(3))]))
