"""Remedies in the words of the command line, where errors of the library name a Python call."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from rbpfx.errors import LoadError

_IN_PYTHON = re.compile(r"[;.] pass the model to rbpfx\.load( instead)?$", re.IGNORECASE)

FACTORY = "name a function that makes the model instead: module.path:factory"
OPTION = "say where the model comes from: --model module.path:factory"
"""What to do about a model that cannot be built by its name: one named by an argument, and one
that a saved network names."""


@contextmanager
def advising(remedy: str) -> Iterator[None]:
    """Let errors about models that cannot be built by name say what the command line can do.

    Args:
        remedy: What to do.

    Raises:
        LoadError: The error, with this remedy in the place of the call in Python.
    """
    try:
        yield
    except LoadError as error:
        cause, replaced = _IN_PYTHON.subn("", str(error))
        if not replaced:
            raise
        raise LoadError(f"{cause}; {remedy}") from error


__all__ = ["FACTORY", "OPTION", "advising"]
