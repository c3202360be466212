"""The definitions that generated source needs: imports, and rbpfx's own functions written out.

A module from `to_source` shall run without rbpfx. What its code uses is imported where it is
public elsewhere; functions and classes of rbpfx are copied, with all that they use in turn.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import sys
from math import isfinite
from types import ModuleType
from typing import Any

import torch

from rbpfx.errors import SaveError


class Definitions:
    """Collects what generated source has to import and define.

    Attributes:
        imports: Lines of imports.
        sources: Name -> source of a definition, those that others need first.
    """

    def __init__(self) -> None:
        self.imports: set[str] = set()
        self.sources: dict[str, str] = {}
        self._objects: dict[str, Any] = {}

    def import_lines(self) -> list[str]:
        """The imports in the usual order."""
        return sorted(self.imports, key=lambda line: (line.startswith("from"), line))

    def reference(self, value: Any, name: str | None = None) -> str:
        """Make a function, class or module usable; returns the name it has.

        Args:
            value: What is used.
            name: The name by which code uses it already; by default its own.

        Raises:
            SaveError: It can neither be imported nor copied.
        """
        own = str(getattr(value, "__name__", name))
        name = name or own.rpartition(".")[2]
        if self._objects.setdefault(name, value) is not value:
            raise SaveError(f"two things are called {name!r} in the source of the network")
        if getattr(builtins, name, None) is value:
            return name
        if value is torch.nn:
            self.imports.add("from torch import nn")
        elif isinstance(value, ModuleType):
            self.imports.add(f"import {own}" if own == name else f"import {own} as {name}")
        elif _is_ours(value):
            self._define(value)
            if name != own:
                self.sources.setdefault(name, f"{name} = {own}")
        elif inspect.isroutine(value) or isinstance(value, type):
            self._import(value, own, name)
        else:
            self.sources.setdefault(name, f"{name} = {literal(value)}")
        return name

    def _import(self, value: Any, own: str, name: str) -> None:
        module = getattr(value, "__module__", None)
        try:
            found = getattr(importlib.import_module(str(module)), own, None)
        except ImportError:
            found = None
        if found is not value or module == "__main__":
            raise SaveError(
                f"the network uses {own!r} of {module!r}, which cannot be imported from there: "
                "define it at the top of a module"
            )
        line = f"from {module} import {own}"
        self.imports.add(line if own == name else f"{line} as {name}")

    def _define(self, value: Any) -> None:
        if value.__name__ in self.sources:
            return
        source = inspect.getsource(value)
        lines = source.splitlines()
        start = next(i for i, line in enumerate(lines) if line.startswith(("def ", "class ")))
        source = "\n".join(lines[start:])  # decorators matter for tracing only
        known = vars(sys.modules[value.__module__])
        for used in _names(source):
            if used in known and known[used] is not value:
                self.reference(known[used], used)
        self.sources[value.__name__] = source


def literal(value: Any) -> str:
    """A number, a text or a sequence as Python code; `repr` writes infinities as names."""
    if isinstance(value, float) and not isfinite(value):
        return f'float("{value}")'
    if type(value) in (list, tuple):
        entries = ", ".join(map(literal, value))
        if isinstance(value, list):
            return f"[{entries}]"
        return f"({entries},)" if len(value) == 1 else f"({entries})"
    return repr(value)


def _is_ours(value: Any) -> bool:
    return str(getattr(value, "__module__", "")).partition(".")[0] == "rbpfx"


def _names(source: str) -> list[str]:
    """The names that a definition uses when it runs; those of annotations are not needed."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for part in ("annotation", "returns"):
            if getattr(node, part, None) is not None:
                setattr(node, part, None)
    return sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)})


__all__ = ["Definitions", "literal"]
