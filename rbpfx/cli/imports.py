"""Objects that users name as `module.path:name`. Naming one runs the code of its module."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import reduce
from typing import Any, TypeVar

from rbpfx.errors import LoadError

T = TypeVar("T")


def find_object(text: str) -> Any:
    """The object that `module.path:name` names.

    The module is looked for in the current directory as well, which comes first.

    Raises:
        LoadError: There is no such module or name, or the module cannot be imported.
    """
    module, _, path = text.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        owner = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise LoadError(
            f"{text!r}: there is no module {error.name!r}, neither in the current directory nor "
            "among the installed packages"
        ) from error
    except Exception as error:
        raise LoadError(f"{text!r}: importing {module} failed: {_described(error)}") from error
    try:
        return reduce(getattr, path.split("."), owner)
    except AttributeError as error:
        hint = did_you_mean(str(error.name), dir(error.obj))
        raise LoadError(f"{text!r}: {error}{hint}") from error


def call(text: str, function: Callable[[], T]) -> T:
    """The result of a function of the user.

    Raises:
        LoadError: It raised something.
    """
    try:
        return function()
    except Exception as error:
        raise LoadError(f"calling {text} failed: {_described(error)}") from error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """What to add to an error about an unknown name: those that look like it, if there are any."""
    close = get_close_matches(name, list(known))
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


__all__ = ["call", "did_you_mean", "find_object"]
