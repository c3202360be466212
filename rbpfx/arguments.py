"""Whether the arguments of `prune` are of the right kind: all are looked at before any work."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from numbers import Integral, Real
from reprlib import repr as short
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from rbpfx.errors import InputError, RbpfxError
from rbpfx.graph.device import device_of
from rbpfx.graph.tracer import LeafModule
from rbpfx.networks import require_model
from rbpfx.target import Target
from rbpfx.training.finetune import FineTune
from rbpfx.training.schedule import Recursion
from rbpfx.training.settings import Training

SETTINGS: Mapping[str, tuple[type[Any], str, str]] = {
    "target": (Target, "macs", "macs=0.5"),
    "recursion": (Recursion, "epochs", "epochs=3"),
    "recovery": (FineTune, "epochs", "epochs=3"),
    "training": (Training, "precision", "precision='bfloat16'"),
}
"""Argument -> its class, the field that a bare value is meant for, and an example."""

FUNCTIONS = {
    "loss_fn": ("loss_fn(output, target)", "torch.nn.functional.cross_entropy"),
    "forward": ("forward(model, batch)", "lambda model, batch: loss"),
    "metric": ("metric(model, val_loader)", "lambda model, loader: error_rate"),
    "callback": ("callback(progress)", "print"),
}
"""Argument -> how it is called, and an example."""


def check_arguments(model: object, loader: object, **given: object) -> None:
    """Complain of what is of the wrong kind.

    Args:
        model: What is pruned.
        loader: Training batches.
        **given: Other arguments of `prune`, those named in this file among them.

    Raises:
        InputError: Names the argument, what was given, and what to give instead.
    """
    require_model(model)
    _require_loader("loader", loader)
    if given.get("val_loader") is not None:
        _require_loader("val_loader", given["val_loader"])
    for name, (call, example) in FUNCTIONS.items():
        value = given.get(name)
        if isinstance(value, type):
            raise InputError(
                f"{name} is the class {value.__name__}; give {name}={_called(value)}()"
            )
        if value is not None and not callable(value):
            raise InputError(
                f"{name}={short(value)} cannot be called as {call}; for example {name}={example}"
            )
    for name, (kind, _, _) in SETTINGS.items():
        value = given.get(name)
        if value is not None and not isinstance(value, kind):
            raise InputError(f"{name}={short(value)} is no {_called(kind)}; {_meant(name, value)}")
    for name, wanted, words in (
        ("distill", bool, "True or False"),
        ("seed", Integral, "a whole number"),
        ("checkpoint_interval", Real, "a number of seconds, for example 300.0"),
        ("checkpoint_dir", (str, os.PathLike), "the path of a directory"),
    ):
        value = given.get(name)
        optional = name == "checkpoint_dir" and value is None
        if name in given and not optional and not isinstance(value, wanted):
            raise InputError(f"{name}={short(value)} must be {words}")


def _require_loader(name: str, loader: object) -> None:
    """A loader can be gone through more than once, batch by batch."""
    kind = type(loader).__name__
    if isinstance(loader, Iterator):
        raise InputError(
            f"the {name} is a {kind}, which can be gone through only once; "
            "pass a DataLoader or a list"
        )
    if isinstance(loader, Dataset) and not hasattr(loader, "__iter__"):
        raise InputError(
            f"the {name} is a {kind}, a data set of single examples; pass "
            "torch.utils.data.DataLoader(dataset, batch_size=...) for batches of them"
        )
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise InputError(
            f"the {name} is {short(loader)}, which yields no batches; pass a DataLoader or a list "
            "of (input, target) batches"
        )


def known_leaves(model: nn.Module, leaf_modules: object) -> tuple[LeafModule, ...]:
    """The modules to keep whole, each of which the model has.

    Args:
        model: The model.
        leaf_modules: Module classes and qualified names.

    Raises:
        InputError: One matches no module.
    """
    if isinstance(leaf_modules, (str, type)) or not isinstance(leaf_modules, Iterable):
        word = leaf_modules.__name__ if isinstance(leaf_modules, type) else short(leaf_modules)
        raise InputError(
            f"leaf_modules={word} must be a list of module classes and names: leaf_modules=[{word}]"
        )
    leaves = tuple(leaf_modules)
    modules = dict(model.named_modules(remove_duplicate=False))
    for leaf in leaves:
        if isinstance(leaf, nn.Module):
            raise InputError(
                f"leaf_modules holds a module, a {type(leaf).__name__}; give its class, or its "
                "name in model.named_modules()"
            )
        if isinstance(leaf, type):
            if not any(isinstance(module, leaf) for module in modules.values()):
                raise InputError(
                    f"leaf_modules: the model has no module of the class {leaf.__name__}; "
                    f"there are: {_some(sorted({type(m).__name__ for m in modules.values()}))}"
                )
        elif leaf not in modules:
            raise InputError(
                f"leaf_modules: no module of the model is called {leaf!r}; there are: "
                f"{_some(filter(None, modules))}"
            )
    return leaves


def usable_device(device: Any, model: nn.Module) -> torch.device:
    """Where to work: the device that was asked for, or that of the model.

    Raises:
        InputError: It is not there.
    """
    if device is None:
        return device_of(model)
    own = f"leave it out to work where the model is ({device_of(model)})"
    try:
        wanted = torch.device(device)
        torch.empty(0, device=wanted)
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"device={device!r} cannot be used: {reason} Or {own}.") from error
    if wanted.type == "meta":
        raise InputError(f"device={device!r} holds no values; {own}")
    return wanted


def as_number(value: Any) -> float:
    """What a metric returns, as a number.

    Raises:
        InputError: It is none.
    """
    if isinstance(value, (Tensor, np.ndarray)) and np.prod(value.shape) == 1:
        value = value.item()
    if isinstance(value, Real):
        return float(value)
    entry = next(iter(value), None) if isinstance(value, Mapping) else None
    remedy = "" if entry is None else f"; return one of its values, for example result[{entry!r}]"
    raise InputError(
        f"metric(model, val_loader) must return one number, not {short(value)}{remedy}"
    )


def _meant(name: str, value: object) -> str:
    """What may have been meant by a value in the place of settings."""
    kind, field, example = SETTINGS[name]
    options: Mapping[str, object] = {field: value}
    if isinstance(value, Mapping):
        options = value
    elif value is kind:
        options = {}
    try:
        kind(**options)
    except (TypeError, ValueError, RbpfxError):
        return f"for example {name}={_called(kind)}({example})"
    words = ", ".join(f"{key}={entry!r}" for key, entry in options.items())
    return f"did you mean {name}={_called(kind)}({words})?"


def _called(kind: type[Any]) -> str:
    """How users call a class."""
    prefixes = {"rbpfx": "rbpfx.", "torch.nn": "nn."}
    module = f"{kind.__module__}."
    prefix = next((p for start, p in prefixes.items() if module.startswith(f"{start}.")), "")
    return f"{prefix}{kind.__name__}"


def _some(names: Iterable[str], most: int = 20) -> str:
    listed = list(names)
    return ", ".join(listed[:most]) + (", ..." if len(listed) > most else "")


__all__ = ["as_number", "check_arguments", "known_leaves", "usable_device"]
