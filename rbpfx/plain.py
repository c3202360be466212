"""Dataclasses as plain JSON types, and back with every value checked."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from math import isfinite, nan
from reprlib import repr as short
from typing import Any, get_args, get_origin, get_type_hints

from rbpfx.errors import LoadError


def to_plain(value: Any) -> Any:
    """Plain JSON types; numbers that JSON lacks, like infinity, become None."""
    if is_dataclass(value) and not isinstance(value, type):
        return to_plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): to_plain(entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_plain(entry) for entry in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def from_plain(hint: Any, plain: Any, place: str = "value") -> Any:
    """The value of a type that `to_plain` made plain.

    Args:
        hint: A dataclass, a builtin scalar, or a dict, list, tuple or optional of them.
        plain: What JSON gave; it may come from strangers.
        place: What it is called in errors.

    Raises:
        LoadError: It is of another type.
    """
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if hint is Any:
        return plain
    if kind is types.UnionType:
        return None if plain is None else from_plain(inner[0], plain, place)
    if is_dataclass(kind) and isinstance(plain, dict):
        return _dataclass(kind, plain, place)
    if kind is dict and isinstance(plain, dict):
        return {
            _key(inner[0], key, place): from_plain(inner[1], entry, f"{place}.{key}")
            for key, entry in plain.items()
        }
    if kind is list and isinstance(plain, list):
        return [from_plain(inner[0], entry, place) for entry in plain]
    if kind is tuple and isinstance(plain, list):
        hints = [inner[0]] * len(plain) if inner[-1] is Ellipsis else inner
        if len(hints) == len(plain):
            return tuple(from_plain(h, p, place) for h, p in zip(hints, plain, strict=True))
    if kind is float and (plain is None or type(plain) in (int, float)):
        try:
            return nan if plain is None else float(plain)
        except OverflowError:
            pass
    if kind in (int, str, bool) and type(plain) is kind:
        return plain
    raise LoadError(f"{place} is {short(plain)}, and should be {hint}")


def _dataclass(kind: Any, plain: dict[str, Any], place: str) -> Any:
    hints = get_type_hints(kind)
    values = {}
    for entry in fields(kind):
        if entry.name in plain:
            values[entry.name] = from_plain(
                hints[entry.name], plain[entry.name], f"{place}.{entry.name}"
            )
        elif entry.default is MISSING and entry.default_factory is MISSING:
            raise LoadError(f"{place} has no entry {entry.name!r}")
    return kind(**values)


def _key(hint: Any, key: str, place: str) -> Any:
    try:
        return hint(key)
    except ValueError as error:
        raise LoadError(f"{place} has the key {short(key)}, which is no {hint.__name__}") from error


__all__ = ["from_plain", "to_plain"]
