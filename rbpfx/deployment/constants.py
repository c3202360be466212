"""Constant folding: what is computed from parameters and buffers alone is computed once.

Standardised or parametrised weights, position tables that are sliced, masks, scales of a frozen
BatchNorm. Convolutions and linear maps that get their weights as arguments then become layers.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from rbpfx.deployment.nodes import constant_of, copied, free_name, with_weights
from rbpfx.graph.aliasing import Memory
from rbpfx.graph.calls import modifies_in_place, module_of
from rbpfx.graph.tracer import FACTORIES

_RANDOM = frozenset(
    "rand randn randint randperm rand_like randn_like randint_like dropout bernoulli multinomial "
    "empty empty_like".split()
)
_CONVOLUTIONS = {F.conv1d: nn.Conv1d, F.conv2d: nn.Conv2d, F.conv3d: nn.Conv3d}


def fold_constants(gm: fx.GraphModule) -> None:
    """Replace every value that no input reaches by a buffer; the graph is changed in place."""
    memory = Memory(gm)
    values: dict[fx.Node, Any] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            if not memory.writes(node):
                values[node] = attrgetter(str(node.target))(gm)
        elif _is_pure(node, gm) and all(n in values for n in node.all_input_nodes):
            if not memory.writes(node):
                values[node] = _evaluate(gm, node, values)
    for node, value in values.items():
        if node.op == "get_attr" or all(user in values for user in node.users):
            continue
        if isinstance(value, Tensor):
            name = free_name(gm, node.name)
            gm.register_buffer(name, value.detach())
            with gm.graph.inserting_before(node):
                constant = copied(gm.graph.get_attr(name), node)
            constant.meta.pop("is_wrapped", None)
            node.replace_all_uses_with(constant)
    for node in reversed(list(values)):
        if not node.users:
            gm.graph.erase_node(node)


def _is_pure(node: fx.Node, gm: fx.GraphModule) -> bool:
    """Whether a node may be computed now: a function of its arguments, and of nothing else."""
    module = module_of(node, gm)
    if module is not None:  # a parametrisation, say; those of users may do anything
        return type(module).__module__.startswith("torch.nn.")
    if node.op not in ("call_function", "call_method") or modifies_in_place(node, gm):
        return False
    name = str(getattr(node.target, "__name__", node.target))
    made_of_nothing = not node.all_input_nodes and node.target not in FACTORIES
    return not (name in _RANDOM or made_of_nothing or node.is_impure())


def _evaluate(gm: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: values[n])
    module = module_of(node, gm)
    with torch.no_grad():
        if module is not None:
            return module(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)


def make_layers(gm: fx.GraphModule) -> None:
    """Turn convolutions and linear maps with constant weights into modules of their own."""
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        make = _linear if node.target is F.linear else _convolution
        if node.target is not F.linear and node.target not in _CONVOLUTIONS:
            continue
        layer = make(gm, node)
        if layer is None:
            continue
        name = free_name(gm, node.name)
        gm.add_module(name, layer)
        with gm.graph.inserting_before(node):
            call = copied(gm.graph.call_module(name, (node.all_input_nodes[0],)), node)
        node.replace_all_uses_with(call)
        gm.graph.erase_node(node)


def _arguments(node: fx.Node, names: str) -> dict[str, Any]:
    return {**dict(zip(names.split(), node.args, strict=False)), **node.kwargs}


def _linear(gm: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    given = _arguments(node, "input weight bias")
    tensors = _weights(gm, given)
    if tensors is None or tensors[0].ndim != 2:
        return None
    outputs, inputs = tensors[0].shape
    layer = nn.Linear(inputs, outputs, tensors[1] is not None, device="meta")
    return with_weights(layer, *tensors)


def _convolution(gm: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    given = _arguments(node, "input weight bias stride padding dilation groups")
    tensors = _weights(gm, given)
    settings = {k: given[k] for k in ("stride", "padding", "dilation", "groups") if k in given}
    if tensors is None or any(isinstance(v, fx.Node) for v in tree_leaves(settings)):
        return None
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    weight, bias = tensors
    outputs, inputs, *kernel = weight.shape
    kind = cast(Any, _CONVOLUTIONS)[node.target]
    inputs *= settings.get("groups", 1)
    layer = kind(inputs, outputs, tuple(kernel), bias=bias is not None, device="meta", **settings)
    return with_weights(layer, weight, bias)


def _weights(gm: fx.GraphModule, given: dict[str, Any]) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a functional call, if they are constants and the input is none."""
    weight, bias = given["weight"], given.get("bias")
    tensors = [constant_of(gm, value) for value in (weight, bias)]
    if tensors[0] is None or (bias is not None and tensors[1] is None):
        return None
    return tensors[0], tensors[1]
