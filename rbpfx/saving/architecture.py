"""What identifies an architecture: its tensors, and what its operators do on the example inputs.

A tensor is a name, a dtype and a shape. An operator is a line of text: its bare name, where its
inputs come from, its settings and the shapes of its results. Only operators on tensors count:
guards, sizes and the module paths of functions change with the version of torch, and are left out.
Numbers that are computed from sizes appear as the values that the example inputs give them.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from rbpfx.graph.calls import submodule
from rbpfx.graph.parts import captured_parts
from rbpfx.parsing import quoted

# A tensor that is no state of the model may come and go with the version of its library.
TensorEntry = tuple[str, str, tuple[int, ...]]


@dataclass(frozen=True)
class Architecture:
    """The identity of a captured network.

    Attributes:
        tensors: Name -> "parameter" or "buffer", dtype and shape, of all that is in the state.
        operators: One line for every operator on tensors, in order.
    """

    tensors: dict[str, TensorEntry]
    operators: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """The hash that identifies it."""
        text = repr((sorted(self.tensors.items()), self.operators))
        return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()

    def difference(self, other: Architecture) -> str | None:
        """What is first found to differ in `other`, in words; None if they are the same."""
        for name in {**self.tensors, **other.tensors}:
            mine, others = self.tensors.get(name), other.tensors.get(name)
            if mine != others:
                return f"{quoted(name)} is {_entry(mine)} there and {_entry(others)} here"
        pairs = zip_longest(self.operators, other.operators, fillvalue="missing")
        for index, (mine_line, other_line) in enumerate(pairs):
            if mine_line != other_line:
                return (
                    f"operator {index} is {quoted(mine_line)} there and {quoted(other_line)} here"
                )
        return None


def describe(gm: nn.Module) -> Architecture:
    """The architecture of a captured network, from `rbpfx.trace`."""
    operators = [
        line if not name else f"{name}: {line}"
        for name, part in captured_parts(gm).items()
        for line in _lines(part)
    ]
    return Architecture(state_table(gm), tuple(operators))


def state_table(model: nn.Module) -> dict[str, TensorEntry]:
    """The tensors in the state of a model."""
    return {
        name: (
            "parameter" if isinstance(tensor, nn.Parameter) else "buffer",
            str(tensor.dtype).removeprefix("torch."),
            tuple(tensor.shape),
        )
        for name, tensor in state_tensors(model)
    }


def state_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors in the state of a model under all of their names; no constants."""
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and leaf not in module._non_persistent_buffers_set:
                yield (f"{path}.{leaf}" if path else leaf), tensor


def _lines(gm: fx.GraphModule) -> Iterator[str]:
    names: dict[fx.Node, str] = {}
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if node.op == "output":
            yield f"output({_settings(node.args, names)})"
        elif any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
            names[node] = f"%{len(names)}"
            yield f"{names[node]} = {_operator(node, gm, names)} -> {_shapes(value)}"


def _operator(node: fx.Node, gm: fx.GraphModule, names: dict[fx.Node, str]) -> str:
    given = ", ".join(filter(None, (_settings(node.args, names), _keywords(node.kwargs, names))))
    if node.op == "call_module":
        module = submodule(gm, str(node.target))
        kind = f"{node.target}: {type(module).__name__}[{_keywords(constructed(module), names)}]"
        return f"{kind}({given})"
    if node.op == "placeholder":
        return "input"
    if node.op == "get_attr":
        return str(node.target)
    return f"{getattr(node.target, '__name__', node.target)}({given})"


def constructed(
    module: nn.Module, parameters: Mapping[str, inspect.Parameter] | None = None
) -> dict[str, Any]:
    """The arguments of a module's constructor that differ from their defaults, as far as known.

    A module of torch keeps them as attributes of the same name.

    Args:
        module: Any module.
        parameters: What its constructor takes, where the signature does not tell.
    """
    if parameters is None:
        parameters = inspect.signature(type(module).__init__).parameters
    return {
        name: value
        for name, parameter in parameters.items()
        if (value := _argument(module, name)) is not inspect.Parameter.empty
        and not (type(value) is type(parameter.default) and value == parameter.default)
    }


def _argument(module: nn.Module, name: str) -> Any:
    """An argument of a constructor, or `inspect.Parameter.empty` if nothing tells it."""
    if name in ("self", "device", "dtype") or name.startswith("_"):
        return inspect.Parameter.empty
    value = getattr(module, name, inspect.Parameter.empty)
    if name == "bias" and (value is None or isinstance(value, Tensor)):
        return value is not None
    return value if is_plain(value) else inspect.Parameter.empty


def is_plain(value: Any) -> bool:
    """Whether a value is a number, a text, None, or a sequence of such."""
    if isinstance(value, (tuple, list)):
        return all(is_plain(entry) for entry in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _keywords(values: dict[str, Any], names: dict[fx.Node, str]) -> str:
    return ", ".join(f"{name}={_setting(value, names)}" for name, value in sorted(values.items()))


def _settings(values: Any, names: dict[fx.Node, str]) -> str:
    return ", ".join(_setting(value, names) for value in values)


def _setting(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value] if value in names else _setting(value.meta.get("val"), names)
    if isinstance(value, (tuple, list)):
        return f"({_settings(value, names)})"
    if isinstance(value, dict):
        return f"{{{_keywords({str(k): v for k, v in value.items()}, names)}}}"
    if isinstance(value, slice):
        return f"[{_settings((value.start, value.stop, value.step), names)}]"
    if isinstance(value, torch.device):
        return "device"
    if callable(value):
        return str(getattr(value, "__name__", type(value).__name__))
    plain = value is None or isinstance(value, (bool, int, float, str, torch.dtype, type(...)))
    return repr(value) if plain else type(value).__name__


def _shapes(value: Any) -> str:
    tensors = (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors)


def _entry(entry: TensorEntry | None) -> str:
    return "missing" if entry is None else f"a {entry[0]} of {entry[1]} {tuple(entry[2])}"


__all__ = [
    "Architecture",
    "TensorEntry",
    "constructed",
    "describe",
    "is_plain",
    "state_table",
    "state_tensors",
]
