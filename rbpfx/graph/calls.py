"""Calls in a graph: what they modify, and how to add one that survives pickling."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import fx, nn
from torch._ops import OpOverload


def call_leaf(
    graph: fx.Graph,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
) -> fx.Node:
    """Append a call of a function of ours that re-tracing must not look into.

    Unpickling a `GraphModule` traces its code again; the mark makes that code wrap the function.
    """
    node = graph.call_function(function, args, kwargs)
    node.meta["is_wrapped"] = True
    return node


def submodule(root: nn.Module, target: str) -> nn.Module:
    """`root.get_submodule(target)` without its checks, which cost more than the analysis."""
    for name in target.split(".") if target else ():
        module = root._modules[name]
        assert module is not None
        root = module
    return root


def module_of(node: object, gm: fx.GraphModule) -> nn.Module | None:
    """The module that a node calls; None for other nodes, and what is no node."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    return submodule(gm, str(node.target))


def modifies_in_place(node: fx.Node, root: nn.Module) -> bool:
    """Whether an operator changes its first argument.

    Args:
        node: A call of any kind.
        root: The module whose submodules `call_module` nodes name.
    """
    if node.op == "call_module":
        return bool(getattr(submodule(root, str(node.target)), "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    if isinstance(node.target, OpOverload):
        return bool(node.target._schema.is_mutable)
    name = str(getattr(node.target, "__name__", node.target))
    if name == "setitem" or name in _AUGMENTED:
        return True
    if name.endswith("_") and not name.endswith("__"):
        return name != "requires_grad_"
    return bool(node.kwargs.get("inplace") or _positional_inplace(node))


_AUGMENTED = frozenset(
    f"i{name}" for name in "add sub mul truediv floordiv mod pow matmul and or xor".split()
)


def _positional_inplace(node: fx.Node) -> Any:
    """The argument called `inplace` where it is given by position."""
    if True not in [a for a in node.args if isinstance(a, bool)] or not callable(node.target):
        return False
    try:
        names = list(inspect.signature(node.target).parameters)
    except (TypeError, ValueError):
        return False
    position = names.index("inplace") if "inplace" in names else len(node.args)
    return position < len(node.args) and node.args[position]
