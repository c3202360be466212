"""Metadata: the value that the example inputs give every node, as fake tensors.

Nothing is computed and no memory is needed. The value of a node is in `node.meta["val"]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map

from rbpfx.errors import InputError
from rbpfx.graph.calls import submodule
from rbpfx.graph.copying import copy_model
from rbpfx.graph.shapes import call_value, module_value


def fake_mode() -> FakeTensorMode:
    """A mode for the fake tensors of one graph; tensors of the same memory share theirs."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_inputs(mode: FakeTensorMode, value: Any) -> Any:
    """Fake tensors like the tensors of a (nested) value, whatever mode they come from."""

    def fake(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        with mode:
            return torch.empty_strided(
                leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device
            )

    return tree_map(fake, value)


def record_metadata(gm: fx.GraphModule, values: list[Any] | None = None) -> None:
    """Write `node.meta["val"]` on every node.

    Args:
        gm: The graph to annotate.
        values: Values for the placeholders in order. By default the shapes, dtypes and devices
            that the placeholders' metadata holds already.

    Raises:
        InputError: An operator rejects the shapes; names the node.
    """
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    given = [n.meta["val"] for n in placeholders] if values is None else values
    mode = fake_mode()
    for node, value in zip(placeholders, given, strict=True):
        node.meta["val"] = fake_inputs(mode, value)
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            continue
        try:
            node.meta["val"] = compute(node, gm, mode)
        except Exception as error:
            shapes = [tuple(v.shape) if isinstance(v, Tensor) else v for v in given]
            raise InputError(
                f"the model does not run on inputs of shape {shapes}: node {node.name!r}: {error}"
            ) from error


def follow_examples(gm: fx.GraphModule) -> frozenset[fx.Node]:
    """The nodes whose axis 0 has one entry for every example of the batch.

    A size alone does not tell: eight tokens look like eight examples. So the graph is asked for
    the sizes of a batch with one example more; its metadata stay as they are.

    Args:
        gm: A graph with metadata. The first axis of its first tensor holds the examples.

    Returns:
        The nodes; none if the graph takes no other batch.
    """
    before = {node: node.meta["val"] for node in gm.graph.nodes}
    given = [before[node] for node in gm.graph.nodes if node.op == "placeholder"]
    examples = next(filter(None, map(_length, given)), 0)
    try:
        record_metadata(gm, [_with_another(value, examples) for value in given])
        after = {node: node.meta["val"] for node in gm.graph.nodes}
    except InputError:
        return frozenset()
    finally:
        for node, value in before.items():
            node.meta["val"] = value
    return frozenset(
        node
        for node in before
        if _length(before[node]) == examples and _length(after[node]) == examples + 1
    )


def _with_another(value: Any, examples: int) -> Any:
    """A nest of fake tensors for a batch with one example more."""

    def longer(leaf: Any) -> Any:
        return (
            leaf.new_empty((examples + 1, *leaf.shape[1:])) if _length(leaf) == examples else leaf
        )

    return tree_map(longer, value)


def _length(value: Any) -> int | None:
    """The size of axis 0 of a tensor that has one."""
    return int(value.shape[0]) if isinstance(value, Tensor) and value.ndim else None


def compute(node: fx.Node, root: nn.Module, mode: FakeTensorMode) -> Any:
    """The value of a node in eval mode from the values of its inputs."""
    args = map_arg(node.args, lambda n: n.meta["val"])
    kwargs = map_arg(node.kwargs, lambda n: n.meta["val"])
    if node.op == "output":
        return args[0]
    if node.op == "get_attr":
        value = _fetch(root, str(node.target))
        return mode.from_tensor(value) if isinstance(value, Tensor) else value
    module = submodule(root, str(node.target)) if node.op == "call_module" else None
    if module is not None:
        value = module_value(module, args, kwargs)
    else:
        value = call_value(node.target, args, kwargs)
    if value is not None:
        return value
    with mode, torch.no_grad():
        if module is not None:
            return _call(_faked(module, mode), module, args, kwargs, mode)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return _call(node.target, node.target, args, kwargs, mode)


def _fetch(root: nn.Module, name: str) -> Any:
    value: Any = root
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _call(
    fake: Callable[..., Any], real: Callable[..., Any], args: Any, kwargs: Any, mode: FakeTensorMode
) -> Any:
    """Call with fake tensors; code of users that asks for their data gets tensors of ones."""
    try:
        return fake(*args, **kwargs)
    except Exception as refusal:
        if not isinstance(real, (nn.Module, FunctionType)) or _is_of_torch(real):
            raise
        try:
            with unset_fake_temporarily():
                args, kwargs = tree_map(_ones, (args, kwargs))
                real = copy_model(real, {}).eval() if isinstance(real, nn.Module) else real
                result = real(*args, **kwargs)
        except Exception:
            raise refusal from None
        return tree_map(lambda v: mode.from_tensor(v) if isinstance(v, Tensor) else v, result)


def _is_of_torch(called: nn.Module | FunctionType) -> bool:
    home = called if isinstance(called, FunctionType) else type(called)
    return (home.__module__ or "").startswith("torch.")


def _faked(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The module in eval mode with fake parameters: far quicker to call than one with real ones."""

    def fake(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
        return {name: t if t is None else mode.from_tensor(t) for name, t in tensors.items()}

    twin = module.__new__(type(module))
    twin.__dict__ = {
        **module.__dict__,
        "training": False,
        "_parameters": fake(module._parameters),
        "_buffers": fake(module._buffers),
        "_modules": {
            name: child if child is None else _faked(child, mode)
            for name, child in module._modules.items()
        },
    }
    return twin


def _ones(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.ones(value.shape, dtype=value.dtype, device=value.device)
