"""Small steps that several passes take: constants, modules and users of nodes."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter

import torch
from torch import Tensor, fx, nn

from rbpfx.graph.calls import module_of, submodule

LINEAR = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)


def module_calls(gm: fx.GraphModule, *kinds: type[nn.Module]) -> Iterator[fx.Node]:
    """The calls of modules of exactly these classes, in order; the graph may change meanwhile."""
    for node in list(gm.graph.nodes):
        if type(module_of(node, gm)) in kinds:
            yield node


def constant_of(gm: fx.GraphModule, value: object) -> Tensor | None:
    """The parameter, buffer or number that an argument stands for; None for anything else."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.tensor(float(value), dtype=torch.float64)
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    found = attrgetter(str(value.target))(gm)
    return found if isinstance(found, Tensor) else None


def free_name(gm: fx.GraphModule, stem: str) -> str:
    """A name that no attribute of the root has."""
    stem = stem.replace(".", "_")
    count = 0
    while hasattr(gm, f"{stem}_{count}" if count else stem):
        count += 1
    return f"{stem}_{count}" if count else stem


def set_module(gm: fx.GraphModule, node: fx.Node, module: nn.Module) -> None:
    """Let a node call another module: in the place of its own, or beside it if others call that."""
    name = str(node.target)
    if sum(n.op == "call_module" and n.target == name for n in gm.graph.nodes) > 1:
        name = free_name(gm, node.name)
        gm.add_module(name, module)
        node.target = name
    else:
        parent, _, child = name.rpartition(".")
        setattr(submodule(gm, parent), child, module)


def replace(node: fx.Node, value: fx.Node) -> None:
    """Let everybody read `value` instead of a node, and erase that."""
    node.replace_all_uses_with(value)
    node.graph.erase_node(node)


def are_alike(*nodes: fx.Node) -> bool:
    """Whether values are tensors of one shape and one type."""
    values = [node.meta.get("val") for node in nodes]
    tensors = [value for value in values if isinstance(value, Tensor)]
    return len(tensors) == len(nodes) and len({(t.shape, t.dtype) for t in tensors}) == 1


def copied(call: fx.Node, like: fx.Node) -> fx.Node:
    """A new node with the metadata of the one whose value it computes."""
    call.meta = {**like.meta, **call.meta}
    return call


def with_weights(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Give a layer its weight and its bias, as constants."""
    for name, value in (("weight", weight), ("bias", bias)):
        frozen = None if value is None else nn.Parameter(value.detach(), requires_grad=False)
        setattr(layer, name, frozen)
    return layer.eval()
