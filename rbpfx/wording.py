"""Settings in words: the same words in every process, and others where the settings are others.

Reports show them, and checkpoints are refused by them if they are of another call. Code is told by
its name, as it may be corrected while a training is interrupted; but a lambda has no name.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import partial
from inspect import ismethod
from types import CodeType, FunctionType
from typing import Any

import numpy as np
from torch import Tensor, nn

from rbpfx.checkpoints.fingerprint import fingerprint
from rbpfx.training.strategy import Strategy

LONG = 1000
"""Words of more characters than this are told by their beginning and a checksum (ours)."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None), enum.Enum, np.generic)
_CODE = (type, FunctionType, partial)


def in_words(settings: object) -> str:
    """A setting in words.

    Args:
        settings: A dataclass is told by what differs from its defaults, any other object by its
            class and its attributes, a function by its name and the plain values that it
            was made with, a lambda by its code as well, a tensor by a checksum. A strategy is its
            class: how work is spread is no part of what is done.

    Returns:
        Words that hold no addresses.
    """
    return _Wording().of(settings)


class _Wording:
    """One description, in which every object is told once, as they may refer to each other."""

    def __init__(self) -> None:
        self._told: dict[int, object] = {}

    def of(self, value: Any) -> str:
        if isinstance(value, _PLAIN):
            return repr(value)
        if isinstance(value, (Tensor, np.ndarray)):
            return f"{type(value).__name__}#{_checksum_of(value)}"
        if isinstance(value, (list, tuple, set, frozenset, Mapping)):
            return _shortened(self._container(value))
        if isinstance(value, type):
            return _name(value)
        name = _name(value)
        if id(value) in self._told or isinstance(value, Strategy):
            return name
        self._told[id(value)] = value
        if isinstance(value, partial):
            return _shortened(self._call("partial", [value.func, *value.args], value.keywords))
        if isinstance(value, FunctionType):
            return _shortened(self._function(value, name))
        if is_dataclass(value):
            return _shortened(self._dataclass(value, name))
        if ismethod(value) or not hasattr(value, "__dict__"):
            text = name if callable(value) else repr(value)
            return name if " at 0x" in text else text
        return _shortened(self._call(name, [], dict(_members(value))))

    def _container(self, value: Any) -> str:
        if isinstance(value, Mapping):
            pairs = (f"{self.of(key)}: {self.of(item)}" for key, item in value.items())
            return f"{{{', '.join(pairs)}}}"
        items = [self.of(item) for item in value]
        if isinstance(value, (set, frozenset)):  # their order is another in every process
            return f"{{{', '.join(sorted(items))}}}"
        return f"[{', '.join(items)}]"

    def _call(self, name: str, args: Iterable[Any], named: Mapping[str, Any]) -> str:
        words = [self.of(value) for value in args]
        words += [f"{key}={self.of(value)}" for key, value in named.items()]
        return f"{name}({', '.join(words)})"

    def _dataclass(self, value: Any, name: str) -> str:
        words = []
        for field in fields(value):
            member = self.of(getattr(value, field.name))
            # By their words: tensors cannot be asked whether they are equal.
            if member != in_words(_default(field)):
                words.append(f"{field.name}={member}")
        return f"{name}({', '.join(words)})"

    def _function(self, function: FunctionType, name: str) -> str:
        if function.__name__ == "<lambda>":
            defaults = self.of([function.__defaults__, function.__kwdefaults__])
            name = f"{name}#{_digest([*self._code(function.__code__), defaults])}"
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        made_with = {key: value for key, cell in cells for value in _content(cell)}
        return self._call(name, [], made_with) if made_with else name

    def _code(self, code: CodeType) -> Iterator[str]:
        """What code does, without the places of its lines."""
        yield code.co_code.hex()
        yield from code.co_names
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield from self._code(constant)
            else:
                yield self.of(constant)


def _members(value: Any) -> Iterator[tuple[str, Any]]:
    """What tells an object from others of its class; of a module not what torch adds to it."""
    if not isinstance(value, nn.Module):
        yield from vars(value).items()
        return
    for name, member in vars(value).items():
        if not name.startswith("_") and name != "training":
            yield name, member
    for members in (value._parameters, value._buffers, value._modules):
        yield from members.items()


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _content(cell: Any) -> Iterator[Any]:
    """The value of a cell of a closure if it is a setting: a number, a name or code."""
    try:
        content = cell.cell_contents
    except ValueError:  # nothing yet
        return
    if isinstance(content, (*_PLAIN, *_CODE)):
        yield content


def _name(value: Any) -> str:
    """The qualified name of code; of other objects that of their class, without its module."""
    name, module = getattr(value, "__qualname__", None), getattr(value, "__module__", None)
    if name is None:
        return type(value).__qualname__
    return f"{module}.{name}" if module else str(name)


def _checksum_of(value: Tensor | np.ndarray[Any, Any]) -> str:
    if isinstance(value, Tensor):
        return fingerprint(value)
    return _digest([value.dtype.str, str(value.shape), repr(value.tolist())])


def _shortened(words: str) -> str:
    return words if len(words) <= LONG else f"{words[: LONG // 2]}...#{_digest([words])}"


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]


__all__ = ["in_words"]
