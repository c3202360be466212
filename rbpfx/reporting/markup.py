"""HTML and SVG in which every text is escaped, wherever it comes from."""

from __future__ import annotations

import re
from html import escape


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def element(tag: str, /, *children: str, **attributes: object) -> Markup:
    """One element; children that are no `Markup`, and all attributes, are escaped.

    Args:
        tag: Its name.
        children: What it holds.
        attributes: An underscore stands for a hyphen, a trailing one is dropped (`class_`).
            Numbers are rounded to tenths; what is None is left out.
    """
    given = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(_text(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{tag}{given}>{join(*children)}</{tag}>")


def join(*parts: str) -> Markup:
    """Parts one after the other; those that are no `Markup` are escaped."""
    return Markup("".join(part if isinstance(part, Markup) else escape(part) for part in parts))


def shortened(name: str, length: int) -> str:
    """A name that is too long with its longest words abbreviated; numbers and dots stay."""
    words = re.findall("[A-Za-z]+|[^A-Za-z]+", name)
    while sum(map(len, words)) > length:
        place = max(range(len(words)), key=lambda i: len(words[i]) * words[i].isalpha())
        if not words[place].isalpha() or len(words[place]) == 1:
            break
        words[place] = words[place][:-1]
    name = "".join(words)
    if len(name) <= length:
        return name
    end = length * 2 // 3
    return f"{name[: length - end - 1]}…{name[-end:]}"


def _text(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)


__all__ = ["Markup", "element", "join", "shortened"]
