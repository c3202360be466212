"""Models by name: the original of a saved network from torchvision or timm, without weights.

The names may come from strangers: only registered builders are called, with few kinds of
arguments of bounded size, and nothing is downloaded.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, urlencode

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from rbpfx.errors import LoadError, RbpfxError
from rbpfx.parsing import quoted
from rbpfx.surroundings import generators_kept

# Argument -> its largest value (ours: what published models have, and some room).
_COUNTS = {"num_classes": 2**16, "in_chans": 2**10, "img_size": 2**12, "image_size": 2**12}
_FLAGS = frozenset({"aux_logits", "aux_loss"})
_NO_WEIGHTS = {"weights": None, "weights_backbone": None}


MAX_BYTES = 2**33
"""Most bytes of weights of a model that is built by name (ours)."""


_ALLOCATING = (torch.empty, torch.zeros, torch.ones)


class _EmptyOnMeta(TorchFunctionMode):
    """Makes tensors without memory, but for sequences of numbers that builders compute with."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of torch."""
        device = {"device": "meta"} if func in _ALLOCATING else {}
        return func(*args, **{**(kwargs or {}), **device})


@dataclass(frozen=True)
class Library:
    """A model of a library, such as `torchvision:resnet18?num_classes=10`.

    Attributes:
        library: "torchvision" or "timm".
        name: The model's name there.
        arguments: What its builder is called with.
    """

    library: str
    name: str
    arguments: Mapping[str, int | bool] = field(default_factory=dict)

    def __str__(self) -> str:
        query = f"?{urlencode(self.arguments)}" if self.arguments else ""
        return f"{self.library}:{self.name}{query}"

    @classmethod
    def parse(cls, text: str) -> Library:
        """Read `library:name?argument=value&...`.

        Raises:
            LoadError: It is nothing of this kind, or has an argument that is not allowed.
        """
        library, colon, rest = text.partition(":")
        name, question, query = rest.partition("?")
        if library not in _BUILDERS or not colon or not name:
            raise LoadError(
                f"{quoted(text)} names no model of a library; write for example "
                "'torchvision:resnet18?num_classes=10' or 'timm:resnet18'"
            )
        try:
            pairs = parse_qsl(query, strict_parsing=True, max_num_fields=16) if question else []
        except ValueError as error:
            raise LoadError(
                f"{quoted(text)}: the arguments cannot be read: {quoted(str(error))}"
            ) from error
        return cls(library, name, {key: _argument(key, value) for key, value in pairs})

    def build(self) -> nn.Module:
        """The model, with random weights; torch's random numbers are left as they were.

        Raises:
            LoadError: The library is missing or has no such model, or the model is very large.
        """
        skeleton = self.skeleton()
        size = sum(t.nbytes for t in (*skeleton.parameters(), *skeleton.buffers()))
        if size > MAX_BYTES:
            raise LoadError(
                f"{quoted(str(self))} has {size} bytes of weights, and models by name may have "
                f"{MAX_BYTES}; pass the model to rbpfx.load"
            )
        return self._made()

    def skeleton(self) -> nn.Module:
        """The model with parameters that have no memory.

        Raises:
            LoadError: As `build`, whatever the size.
        """
        with _EmptyOnMeta():
            return self._made()

    def _made(self) -> nn.Module:
        try:
            with generators_kept(torch.device("cpu")), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of builders, about initial values
                return _BUILDERS[self.library](self.name, dict(self.arguments))
        except RbpfxError:
            raise
        except Exception as error:
            raise LoadError(
                f"{quoted(str(self))} cannot be built: {quoted(str(error))}; pass the model to "
                "rbpfx.load"
            ) from error


def _argument(name: str, text: str) -> int | bool:
    if name in _FLAGS and text in ("True", "False"):
        return text == "True"
    if name in _COUNTS and text.isascii() and text.isdigit() and len(text) < 10:
        if 0 < int(text) <= _COUNTS[name]:
            return int(text)
    allowed = ", ".join((*(f"{n} up to {most}" for n, most in _COUNTS.items()), *sorted(_FLAGS)))
    raise LoadError(
        f"argument {quoted(name)}={quoted(text)} is not allowed; allowed are {allowed} (True or "
        "False). Pass the model to rbpfx.load instead"
    )


def _torchvision(name: str, arguments: dict[str, Any]) -> nn.Module:
    import torchvision

    if name not in torchvision.models.list_models():
        raise LoadError(f"torchvision has no model {quoted(name)}")
    builder = torchvision.models.get_model_builder(name)
    known = inspect.signature(builder).parameters
    no_weights = {key: value for key, value in _NO_WEIGHTS.items() if key in known}
    model: nn.Module = builder(**no_weights, **arguments)
    return model


def _timm(name: str, arguments: dict[str, Any]) -> nn.Module:
    try:
        timm: Any = importlib.import_module("timm")
    except ImportError as error:
        raise LoadError("the package timm is needed: pip install timm") from error
    if not timm.is_model(name):
        raise LoadError(f"timm has no model {quoted(name)}")
    model: nn.Module = timm.create_model(name, pretrained=False, **arguments)
    return model


_BUILDERS: dict[str, Callable[[str, dict[str, Any]], nn.Module]] = {
    "torchvision": _torchvision,
    "timm": _timm,
}


def candidates(model: nn.Module, inputs: Any) -> tuple[Library, ...]:
    """Models of libraries that a model may be an instance of; which it is, has to be checked.

    Args:
        model: Any model.
        inputs: Its example inputs.
    """
    module = type(model).__module__
    if module.startswith("torchvision.models."):
        return tuple(_torchvision_candidates(model))
    if module.startswith("timm.models."):
        return tuple(_timm_candidates(model, inputs))
    return ()


def _torchvision_candidates(model: nn.Module) -> Iterator[Library]:
    import torchvision

    kind = type(model)
    last = next(iter(reversed(list(model.parameters()))), None)
    arguments = {} if last is None or not last.ndim else {"num_classes": int(last.shape[0])}
    size = getattr(model, "image_size", None)
    if type(size) is int:
        arguments["image_size"] = size
    for name in torchvision.models.list_models():
        builder = torchvision.models.get_model_builder(name)
        built = inspect.signature(builder).return_annotation
        if getattr(built, "__name__", built) == kind.__name__:
            yield Library("torchvision", name, arguments)


def _timm_candidates(model: nn.Module, inputs: Any) -> Iterator[Library]:
    settings = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    name = settings.get("architecture") if isinstance(settings, dict) else None
    if not isinstance(name, str):
        return
    classes = getattr(model, "num_classes", None)
    arguments = {"num_classes": classes} if type(classes) is int and classes > 0 else {}
    yield Library("timm", name, arguments)
    images = [v for v in tree_leaves(inputs) if isinstance(v, Tensor) and v.ndim == 4]
    for image in images[:1]:
        channels = {**arguments, "in_chans": int(image.shape[1])}
        yield Library("timm", name, channels)
        yield Library("timm", name, {**channels, "img_size": int(image.shape[-1])})


__all__ = ["Library", "candidates"]
