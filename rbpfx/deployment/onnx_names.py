"""Names in ONNX files: outputs are called as the result calls them, the free axis "batch"."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

BATCH = "batch"


def output_names(result: Any) -> list[str]:
    """A name for every tensor of a result, in order: its keys and fields, else "output"."""
    names: list[str] = []
    for name in _paths(result, ""):
        names.append(_free(name or "output", names))
    return names


def _paths(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, Tensor):
        yield path
    for key, child in _children(value):
        yield from _paths(child, f"{path}.{key}".strip("."))


def _children(value: Any) -> list[tuple[str, Any]]:
    """What a container holds; entries of tuples and lists have no names of their own."""
    if isinstance(value, Mapping):
        return [(str(key), child) for key, child in value.items()]
    if is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in fields(value)]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    return [("", child) for child in value] if isinstance(value, (tuple, list)) else []


def _free(name: str, taken: Any) -> str:
    count = 0
    while (f"{name}_{count}" if count else name) in taken:
        count += 1
    return f"{name}_{count}" if count else name


def name_values(model: Any, names: list[str]) -> None:
    """Name the outputs of an ONNX model, and the first axis of its inputs if there is one symbol.

    Args:
        model: An `onnx_ir.Model`, changed in place.
        names: One for every output; otherwise outputs keep the names that they have.
    """
    graph = model.graph
    values = [value for node in graph for value in node.outputs]
    if len(names) == len(graph.outputs):
        fixed = {value.name for value in graph.inputs} | set(graph.initializers)
        taken = fixed | {value.name for value in values}
        named: set[int] = set()
        for output, wanted in zip(graph.outputs, names, strict=True):
            if output.producer() is None or id(output) in named:
                continue  # an input or a constant as it is, or the same value once more
            named.add(id(output))
            name = _free(wanted, fixed)
            for value in values:  # torch's own names give way
                if value.name == name and value is not output:
                    value.name = _free(name, taken | set(names))
                    taken.add(value.name)
            output.name = name
            fixed.add(name)
    first = {str(v.shape[0]) for v in graph.inputs if v.shape and not isinstance(v.shape[0], int)}
    if len(first) == 1:
        for value in (*graph.inputs, *graph.outputs, *values):
            for axis, size in enumerate(value.shape or ()):
                if {str(size)} == first:
                    value.shape[axis] = BATCH
