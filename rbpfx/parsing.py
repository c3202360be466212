"""JSON from strangers, bounded before anything is made of it; and texts of strangers in errors."""

from __future__ import annotations

import json
from math import isfinite
from reprlib import Repr
from typing import Any

MAX_PLAN_BYTES = 2**24
"""Most bytes of JSON that are read (ours); parsed, they take 30 times as much at worst."""
MAX_DEPTH = 128
"""Deepest nesting of lists and objects in it (ours)."""
MAX_DIGITS = 32
"""Most characters of a number in it (ours; a float64 has 24 at most)."""

_REPR = Repr()
_REPR.maxstring = _REPR.maxother = 240  # ours
quoted = _REPR.repr
"""A value as it would be written in Python, without control characters, cut to a line or two."""


def parse_json(text: str | bytes) -> Any:
    """The content of JSON; numbers are finite, no object says a name twice, texts are Unicode.

    Raises:
        ValueError: It is no JSON, or larger or deeper than the limits; says what is wrong.
    """
    if len(text) > MAX_PLAN_BYTES:
        raise ValueError(f"it is larger than {MAX_PLAN_BYTES} bytes")
    try:
        content = json.loads(
            text if isinstance(text, str) else text.decode(),  # no other encoding is guessed
            parse_int=_whole,
            parse_float=_finite,
            parse_constant=_finite,
            object_pairs_hook=_distinct,
        )
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    _require_shallow(content)
    json.dumps(content, ensure_ascii=False).encode()  # half a character: no file could hold it
    return content


_TOO_DEEP = f"lists and objects are nested more than {MAX_DEPTH} deep"


def _require_shallow(content: Any) -> None:
    level = [content]
    for _ in range(MAX_DEPTH + 1):
        containers = [value for value in level if isinstance(value, (dict, list))]
        if not containers:
            return
        level = [
            entry
            for value in containers
            for entry in (value.values() if isinstance(value, dict) else value)
        ]
    raise ValueError(_TOO_DEEP)


def _whole(text: str) -> int:
    return int(_short(text))


def _finite(text: str) -> float:
    value = float(_short(text))
    if not isfinite(value):
        raise ValueError(f"{text} is no number in JSON")
    return value


def _short(text: str) -> str:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number has {len(text)} characters, which is more than {MAX_DIGITS}")
    return text


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("an object says a name twice")
    return content


__all__ = ["MAX_PLAN_BYTES", "parse_json", "quoted"]
