"""Where models come from: `torchvision:`, `timm:`, `hf:` and `module.path:factory`."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rbpfx.cli.imports import call, did_you_mean, find_object
from rbpfx.cli.remedies import FACTORY, advising
from rbpfx.cli.weights import load_weights
from rbpfx.errors import LoadError
from rbpfx.saving.library import Library

DEFAULT, NONE = "DEFAULT", "none"
"""Names for the published weights of a model, and for none."""

_FILES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")

Transform = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Preset:
    """The images that a model was published with.

    Attributes:
        size: Channels, height and width.
        transform: Makes, for an image side in pixels, what turns a PIL image into such a tensor.
    """

    size: tuple[int, int, int]
    transform: Callable[[int], Transform]


class ModelSource(ABC):
    """A model that the user names.

    Attributes:
        text: The name.
        brings_weights: Whether the model is trained if no weights are given.
    """

    text: str
    brings_weights: bool = False

    @abstractmethod
    def build(self) -> nn.Module:
        """The model, with random weights where it is known by its architecture.

        Raises:
            LoadError: It cannot be built.
        """

    @abstractmethod
    def pretrained(self, weights: str, progress: bool) -> nn.Module:
        """The model with weights that are published under a name.

        Args:
            weights: The name.
            progress: Whether to show the download.

        Raises:
            LoadError: There are none.
        """

    def preset(self) -> Preset | None:
        """How images are prepared for it, if that is known."""
        return None

    def example_inputs(self, model: nn.Module) -> Any:
        """Something to call the model with, or None if it is not known."""
        preset = self.preset()
        return None if preset is None else torch.zeros(1, *preset.size)


@dataclass(frozen=True)
class _Torchvision(ModelSource):
    text: str
    library: Library

    def build(self) -> nn.Module:
        import torchvision

        _require_known(self.text, self.library.name, torchvision.models.list_models())
        with advising(FACTORY):
            return self.library.build()

    def pretrained(self, weights: str, progress: bool) -> nn.Module:
        import torchvision

        _require_known(self.text, self.library.name, torchvision.models.list_models())
        names = torchvision.models.get_model_weights(self.library.name)
        if weights not in names.__members__:
            raise LoadError(
                f"{weights!r} is neither a file nor weights of {self.text}, which are: "
                f"{', '.join(names.__members__)} (or {DEFAULT})"
            )
        try:
            model: nn.Module = torchvision.models.get_model(
                self.library.name,
                weights=names[weights],
                progress=progress,
                **self.library.arguments,
            )
        except (ValueError, OSError, RuntimeError) as error:
            raise LoadError(f"the weights {weights} of {self.text}: {error}") from error
        return model

    def preset(self) -> Preset | None:
        import torchvision

        names = torchvision.models.get_model_weights(self.library.name).__members__
        weights: Any = names.get(DEFAULT)
        published: Any = None if weights is None else weights.transforms()
        if len(getattr(published, "crop_size", ())) != 1:  # no classifier of images
            return None
        side = int(self.library.arguments.get("image_size", published.crop_size[0]))
        ratio = published.resize_size[0] / published.crop_size[0]
        return Preset(
            (3, side, side),
            lambda side: weights.transforms(crop_size=side, resize_size=round(ratio * side)),
        )


@dataclass(frozen=True)
class _Timm(ModelSource):
    text: str
    library: Library

    def build(self) -> nn.Module:
        timm = _imported("timm", self.text)
        name = self.library.name
        _require_known(self.text, name, [name] if timm.is_model(name) else timm.list_models())
        with advising(FACTORY):
            return self.library.build()

    def pretrained(self, weights: str, progress: bool) -> nn.Module:
        if weights != DEFAULT:
            raise LoadError(
                f"{weights!r} is no file; published weights of timm are --weights {DEFAULT}, or "
                "those of a tag: timm:resnet18.a1_in1k"
            )
        timm = _imported("timm", self.text)
        classes = self._published().get("num_classes")
        if self.library.arguments.get("num_classes", classes) != classes:
            raise LoadError(
                f"the published weights of {self.text} have {classes} classes; give a --weights "
                "file of a network that was trained on yours"
            )
        try:
            model: nn.Module = timm.create_model(
                self.library.name, pretrained=True, **self.library.arguments
            )
        except Exception as error:
            raise LoadError(f"the weights of {self.text}: {error}") from error
        return model

    def preset(self) -> Preset | None:
        data = _imported("timm", self.text).data
        settings = data.resolve_data_config(pretrained_cfg=self._published())
        channels = int(self.library.arguments.get("in_chans", settings["input_size"][0]))
        side = int(self.library.arguments.get("img_size", settings["input_size"][-1]))
        for name in ("mean", "std"):
            if len(settings[name]) != channels:
                settings[name] = (sum(settings[name]) / len(settings[name]),) * channels

        def transform(side: int) -> Transform:
            made: Transform = data.create_transform(
                **{**settings, "input_size": (channels, side, side)}, is_training=False
            )
            return made

        return Preset((channels, side, side), transform)

    def _published(self) -> dict[str, Any]:
        """The settings that the weights were published with."""
        timm = _imported("timm", self.text)
        settings = timm.models.get_pretrained_cfg(self.library.name, allow_unregistered=True)
        return {} if settings is None else dict(settings.to_dict())


@dataclass(frozen=True)
class _HuggingFace(ModelSource):
    text: str
    name: str
    brings_weights = True

    def build(self) -> nn.Module:
        return self._made(lambda kind, config: kind(config))

    def pretrained(self, weights: str, progress: bool) -> nn.Module:
        if weights != DEFAULT:
            raise LoadError(f"{weights!r} is no file; leave --weights out for those of {self.text}")
        if not progress:
            _imported("transformers", self.text).utils.logging.disable_progress_bar()
        return self._made(lambda kind, config: kind.from_pretrained(self.name))

    def _made(self, make: Callable[[Any, Any], Any]) -> nn.Module:
        transformers = _imported("transformers", self.text)
        config = self._config()
        kind = getattr(transformers, next(iter(config.architectures or ()), ""), None)
        if kind is None:
            raise LoadError(f"{self.text} names no architecture that transformers has")
        try:
            model: nn.Module = make(kind, config)
        except Exception as error:
            raise LoadError(f"{self.text} cannot be built: {error}") from error
        return model

    def _config(self) -> Any:
        transformers = _imported("transformers", self.text)
        try:
            return transformers.AutoConfig.from_pretrained(self.name)
        except Exception as error:
            raise LoadError(f"{self.text} cannot be read: {error}") from error

    def preset(self) -> Preset | None:
        side = getattr(self._config(), "image_size", None)
        transformers = _imported("transformers", self.text)
        try:
            processor = transformers.AutoImageProcessor.from_pretrained(self.name)
        except Exception:  # a model of texts, or of images without a word on them
            return None
        size = dict(processor.size)
        side = side or size.get("height") or size.get("shortest_edge")
        if not isinstance(side, int):
            return None
        return Preset((3, side, side), lambda side: _Processor(processor, side))

    def example_inputs(self, model: nn.Module) -> Any:
        config = self._config()
        side, channels = (getattr(config, n, None) for n in ("image_size", "num_channels"))
        if isinstance(side, int):
            return torch.zeros(1, channels or 3, side, side)
        inputs = super().example_inputs(model)
        return inputs if inputs is not None else getattr(model, "dummy_inputs", None)


@dataclass(frozen=True)
class _Processor:
    """An image processor of transformers as a transform, for square images."""

    processor: Any
    side: int

    def __call__(self, image: Any) -> Tensor:
        size = {"height": self.side, "width": self.side}
        pixels: Tensor = self.processor(image, size=size, return_tensors="pt")["pixel_values"][0]
        return pixels


@dataclass(frozen=True)
class _Factory(ModelSource):
    text: str
    brings_weights = True

    def build(self) -> nn.Module:
        model = find_object(self.text)
        if callable(model) and not isinstance(model, nn.Module):
            model = call(self.text, model)
        if not isinstance(model, nn.Module):
            raise LoadError(f"{self.text} gives a {type(model).__name__}, not a torch.nn.Module")
        return model

    def pretrained(self, weights: str, progress: bool) -> nn.Module:
        raise LoadError(f"there is no file {weights!r}; names of weights go with torchvision: only")


def find_model(text: str) -> ModelSource:
    """The source that a user's text names.

    Raises:
        LoadError: It names none.
    """
    kind, colon, name = text.partition(":")
    if not colon or not kind or not name:
        raise LoadError(
            f"{text!r} names no model; write torchvision:resnet18, timm:resnet18, hf:owner/name "
            "or module.path:factory"
        )
    if kind in ("torchvision", "timm"):
        with advising(FACTORY):
            library = Library.parse(text)
        return (_Torchvision if kind == "torchvision" else _Timm)(text, library)
    return _HuggingFace(text, name) if kind == "hf" else _Factory(text)


def trained_model(source: ModelSource, weights: str | None, progress: bool = True) -> nn.Module:
    """A model with its trained weights.

    Args:
        source: Where it comes from.
        weights: A file, the name of published weights, "none" for random ones, or None.
        progress: Whether to show downloads.

    Raises:
        LoadError: The model cannot be built, the weights do not fit, or none are given though
            the model has none of its own.
    """
    if weights is None and not source.brings_weights:
        raise LoadError(
            f"{source.text} has random weights; give the trained ones: --weights FILE, or "
            f"--weights {DEFAULT} for the published ones (--weights {NONE} if random is meant)"
        )
    if weights == NONE or (weights is None and isinstance(source, _Factory)):
        return source.build()
    if weights is not None and (Path(weights).exists() or Path(weights).suffix in _FILES):
        model = source.build()
        load_weights(model, Path(weights))
        return model
    return source.pretrained(weights or DEFAULT, progress)


def _require_known(text: str, name: str, known: Iterable[str]) -> None:
    names = list(known)
    if name not in names:
        raise LoadError(f"{text}: there is no model {name!r}{did_you_mean(name, names)}")


def _imported(package: str, text: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise LoadError(f"{text} needs the package {package}: pip install {package}") from error


__all__ = ["DEFAULT", "NONE", "ModelSource", "Preset", "Transform", "find_model", "trained_model"]
