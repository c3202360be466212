"""Where data come from: `imagefolder:`, `torchvision:`, `digits` and `module.path:loader`."""

from __future__ import annotations

import importlib
import inspect
import logging
from ast import literal_eval
from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass
from operator import length_hint
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from rbpfx.cli.augment import AUGMENTATIONS, Augmented
from rbpfx.cli.console import Console
from rbpfx.cli.imports import call, find_object
from rbpfx.cli.models import Preset
from rbpfx.demo import digits_loaders
from rbpfx.errors import InputError
from rbpfx.graph.capture import call_with, evaluating
from rbpfx.saving.examples import describe_inputs, require_savable
from rbpfx.training.task import Loader, main_output, split_pair

logger = logging.getLogger(__name__)

_FOLDERS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test")}


@dataclass(frozen=True)
class DataOptions:
    """How data are read.

    Attributes:
        batch_size: Examples in a batch.
        workers: Processes that read.
        image_size: Side of the images in pixels; None for that of the model's preset.
        val_share: Share of the examples that is held out where the data have no such part.
        seed: Seed of that choice.
        augment: How training images are changed: a name in `AUGMENTATIONS`.
    """

    batch_size: int = 64
    workers: int = 0
    image_size: int | None = None
    val_share: float = 0.1
    seed: int = 0
    augment: str = next(iter(AUGMENTATIONS))


@dataclass(frozen=True)
class Data:
    """Batches to train and to validate with.

    Attributes:
        train: Training batches.
        val: Validation batches, if there are any.
        classes: Number of classes, if the data tell.
    """

    train: Loader
    val: Loader | None = None
    classes: int | None = None


class Batches:
    """A loader whose failures are errors of the data, and whose long passes show a bar.

    Args:
        loader: The loader.
        console: Where the bar goes.
        title: What the bar says; None for no bar.
    """

    def __init__(self, loader: Loader, console: Console, title: str | None = None) -> None:
        self.loader = loader
        self.dataset = getattr(loader, "dataset", None)
        self.console = console
        self.title = title

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        try:
            if self.title is None:
                yield from self.loader
            else:
                total = length_hint(self.loader) or None
                yield from self.console.steps(self.loader, self.title, total=total, unit="batch")
        except Exception as error:
            raise InputError(f"the data cannot be read: {error}") from error


def open_data(text: str, options: DataOptions, preset: Preset | None, console: Console) -> Data:
    """The data that the user names.

    Args:
        text: `imagefolder:DIR`, `torchvision:NAME?root=DIR`, `digits` or `module.path:loader`.
        options: How they are read.
        preset: How the model wants its images.
        console: Where bars go.

    Raises:
        InputError: There are no such data.
    """
    kind, _, rest = text.partition(":")
    if AUGMENTATIONS[options.augment] and kind not in ("imagefolder", "torchvision"):
        raise InputError(
            f"--augment {options.augment} goes with imagefolder: and torchvision: data; a loader "
            "of yours can change its batches itself"
        )
    if text == "digits":
        train, val = digits_loaders(options.batch_size, options.seed)
        data = Data(train, val, classes=10)
    elif kind == "imagefolder" and rest:
        data = _image_folder(Path(rest), options, preset)
    elif kind == "torchvision" and rest:
        data = _torchvision(text, rest, options, preset)
    elif rest:
        data = _own(text)
    else:
        raise InputError(
            f"{text!r} is a folder; write imagefolder:{text}"
            if Path(text).is_dir()
            else f"{text!r} names no data; write imagefolder:DIR, torchvision:CIFAR10?root=DIR, "
            "digits or module.path:loader"
        )
    val_loader = None if data.val is None else Batches(data.val, console, "validation")
    return Data(Batches(data.train, console), val_loader, data.classes)


def first_inputs(data: Data) -> Any:
    """What a model is called with for the first batch.

    Raises:
        InputError: There is no batch, or it is no (input, target) pair.
    """
    return split_pair(_first_batch(data))[0]


def check_fit(model: nn.Module, data: Data) -> None:
    """Check what would otherwise fail after hours: labels, and inputs that cannot be saved.

    Raises:
        InputError: There are more classes than the model has outputs.
        SaveError: The inputs cannot be described in plan.json.
    """
    inputs, target = split_pair(_first_batch(data))
    require_savable(describe_inputs(inputs))
    try:
        with evaluating(model), torch.no_grad():
            scores = main_output(call_with(model, inputs))
    except Exception as error:
        shapes = tuple(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
        raise InputError(
            f"the model does not run on the data's first batch (inputs {shapes}): {error}"
        ) from error
    labels = data.classes
    if labels is None and isinstance(target, Tensor) and not target.is_floating_point():
        labels = int(target.max()) + 1
    if labels is None or scores.ndim < 2:
        return
    if labels > scores.shape[1]:
        raise InputError(
            f"the data have {labels} classes and the model has {scores.shape[1]} outputs; give a "
            f"model that was trained on these data, for example with ?num_classes={labels}"
        )
    if data.classes is not None and labels < scores.shape[1]:
        logger.warning(
            "the data have %d classes and the model has %d outputs; are the labels the same?",
            labels,
            scores.shape[1],
        )


def _first_batch(data: Data) -> Any:
    batch = next(iter(data.train), None)
    if batch is None:
        raise InputError("the data have no batch")
    return batch


# -- sources -----------------------------------------------------------------------------------


def _image_folder(folder: Path, options: DataOptions, preset: Preset | None) -> Data:
    from torchvision.datasets import ImageFolder

    if not folder.is_dir():
        raise InputError(f"there is no folder {str(folder)!r}")
    if preset is None and options.image_size is None:
        raise InputError(
            "the model does not say how large its images are; give --image-size, for example 224"
        )
    transform = _transform(options, preset)

    def opened(place: Path) -> Any:
        try:
            return ImageFolder(str(place), transform)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"{str(place)!r} is no image folder, with a folder of images for every class: "
                f"{error}"
            ) from error

    parts = {
        part: next((folder / name for name in names if (folder / name).is_dir()), None)
        for part, names in _FOLDERS.items()
    }
    if parts["train"] is None:
        return _split(opened(folder), options)
    train = opened(parts["train"])
    if parts["val"] is None:
        return _split(train, options)
    val = opened(parts["val"])
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        raise InputError(
            f"{parts['train']} and {parts['val']} have different classes: {odd[0]!r} is only in one"
        )
    return _loaders(train, val, options)


def _torchvision(text: str, rest: str, options: DataOptions, preset: Preset | None) -> Data:
    datasets = importlib.import_module("torchvision.datasets")
    name, _, query = rest.partition("?")
    kind = getattr(datasets, name, None)
    if name not in datasets.__all__ or not isinstance(kind, type):
        raise InputError(f"torchvision has no data set {name!r}; for example CIFAR10 or Flowers102")
    arguments = {key: _value(value) for key, value in parse_qsl(query)}
    known = inspect.signature(kind).parameters
    arguments["transform"] = _transform(options, preset)

    def opened(**part: Any) -> Any:
        try:
            return kind(**{**arguments, **part})
        except Exception as error:
            raise InputError(f"{text} cannot be opened: {error}{_remedy(text, known)}") from error

    if "train" in known:
        return _loaders(opened(train=True), opened(train=False), options)
    if "split" in known and "split" not in arguments:
        try:
            val = opened(split="val")
        except InputError:
            val = opened(split="test")
        return _loaders(opened(split="train"), val, options)
    return _split(opened(), options)


def _remedy(text: str, known: Any) -> str:
    lacks = [f"{n}={v}" for n, v in (("root", "DIR"), ("download", "True")) if f"{n}=" not in text]
    useful = [pair for pair in lacks if pair.partition("=")[0] in known]
    return f". Perhaps add {' and '.join(useful)} (torchvision:NAME?root=DIR&...)" if useful else ""


def _own(text: str) -> Data:
    loaders = find_object(text)
    if isinstance(loaders, type) or (callable(loaders) and not hasattr(loaders, "__iter__")):
        loaders = call(text, loaders)
    train, val = loaders if isinstance(loaders, tuple) and len(loaders) == 2 else (loaders, None)
    for loader in (train, val):
        if loader is not None and (not hasattr(loader, "__iter__") or isinstance(loader, Iterator)):
            raise InputError(
                f"{text} gives a {type(loader).__name__}; it must be a loader that can be gone "
                "through repeatedly, a pair (train, val) of them, or a function that returns one"
            )
    return Data(train, val)


# -- data sets ---------------------------------------------------------------------------------


def _split(dataset: Any, options: DataOptions) -> Data:
    """Hold a share of a data set out for validation."""
    held_out = round(options.val_share * len(dataset))
    if held_out == 0:
        return _loaders(dataset, None, options)
    order = torch.randperm(
        len(dataset), generator=torch.Generator().manual_seed(options.seed)
    ).tolist()
    train, val = Subset(dataset, order[held_out:]), Subset(dataset, order[:held_out])
    data = _loaders(train, val, options)
    return Data(data.train, data.val, _classes(dataset))


def _loaders(train: Any, val: Any, options: DataOptions) -> Data:
    def loader(dataset: Any, training: bool) -> Loader:
        return DataLoader(
            dataset,
            options.batch_size,
            shuffle=training,
            num_workers=options.workers,
            # A last batch of one example has no variance that BatchNorm could use.
            drop_last=training and len(dataset) >= options.batch_size,
            persistent_workers=options.workers > 0,
        )

    if not len(train):
        raise InputError("there are no training examples; lower --val-share")
    augmented = Augmented(train, options.augment)
    val_loader = None if val is None else loader(val, False)
    return Data(loader(augmented, True), val_loader, _classes(train))


def _classes(dataset: Any) -> int | None:
    classes = getattr(dataset, "classes", None)
    return len(classes) if isinstance(classes, Sized) else None


def _transform(options: DataOptions, preset: Preset | None) -> Callable[[Any], Tensor]:
    """Images as the model wants them; without a preset values from 0 to 1."""
    from torchvision.transforms import v2

    if preset is not None:
        channels, side, _ = preset.size
        transform = preset.transform(options.image_size or side)
        convert = {1: [v2.Grayscale(1)], 3: [v2.RGB()]}.get(channels, [])
        return v2.Compose([*convert, transform])  # type: ignore[no-any-return]
    crop = options.image_size
    resized = [] if crop is None else [v2.Resize(crop, antialias=True), v2.CenterCrop(crop)]
    tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()]
    return v2.Compose([*resized, *tensor])  # type: ignore[no-any-return]


def _value(text: str) -> Any:
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError):
        return text


__all__ = ["Data", "DataOptions", "check_fit", "first_inputs", "open_data"]
