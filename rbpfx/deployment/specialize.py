"""Eval mode for good: what only training does leaves the graph, and so do operators without effect.

A captured graph serves both modes. Here the choices that depend on the mode are made, dropout and
its kind become what they are in eval mode (nothing), and what the results do not depend on goes:
auxiliary heads, and updates of memory that nobody reads.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torchvision.ops
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn import functional as F

from rbpfx.deployment.nodes import replace
from rbpfx.graph.aliasing import storages
from rbpfx.graph.calls import modifies_in_place, module_of
from rbpfx.graph.modes import TrainingMode, by_mode, evaluated_nodes, in_mode
from rbpfx.graph.values import assume

_WITHOUT_EFFECT = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
    torchvision.ops.StochasticDepth,
    torchvision.ops.DropBlock2d,
    torchvision.ops.DropBlock3d,
)
# Function -> where its `training` argument is, and the value that it has when it is left out.
_IN_TRAINING_ONLY = {
    **dict.fromkeys(
        (
            F.dropout,
            F.dropout1d,
            F.dropout2d,
            F.dropout3d,
            F.alpha_dropout,
            F.feature_alpha_dropout,
            torch.dropout,
        ),
        (2, True),
    ),
    torchvision.ops.stochastic_depth: (3, True),
}
_CHECKS = (assume, torch._assert)


def specialize(gm: fx.GraphModule) -> None:
    """Keep what eval mode computes, and only that; the graph is changed in place."""
    gm.eval()
    _choose_eval(gm)
    _drop_unread(gm)
    _drop_operators_without_effect(gm)
    _reshape_instead_of_view(gm)


def _choose_eval(gm: fx.GraphModule) -> None:
    for node in list(gm.graph.nodes):
        if node.target is by_mode:
            chosen = node.args[2]
        elif node.target is in_mode:
            _, training, name, target, *args = node.args
            chosen = target
            if not training:
                _call_in_place(node, str(name), (target, *args))
                continue
        elif isinstance(module_of(node, gm), TrainingMode):
            chosen = False
        else:
            continue
        for user in list(node.users):
            _substitute(user, node, chosen)
        gm.graph.erase_node(node)


def _call_in_place(node: fx.Node, name: str, args: tuple[Any, ...]) -> None:
    """Turn a node into the in-place method or operator of that name."""
    node.meta.pop("is_wrapped", None)
    node.args = args
    if hasattr(Tensor, name):
        node.op, node.target = "call_method", name
    else:
        node.target = getattr(operator, name)


def _substitute(user: fx.Node, node: fx.Node, value: Any) -> None:
    def swap(leaf: fx.Node) -> Any:
        return value if leaf is node else leaf

    user.args = map_arg(user.args, swap)
    user.kwargs = map_arg(user.kwargs, swap)


def _drop_unread(gm: fx.GraphModule) -> None:
    """Erase what the output does not depend on, but for checks of the inputs that it implies."""
    needed = evaluated_nodes(gm.graph)
    needed |= {n for n in gm.graph.nodes if n.op == "placeholder"}
    writes = [n for n in gm.graph.nodes if n.all_input_nodes and modifies_in_place(n, gm)]
    while True:
        read = {storage for node in needed for storage in storages(node)}
        added = [
            n
            for n in writes
            if n not in needed and not read.isdisjoint(storages(n.all_input_nodes[0]))
        ]
        if not added:
            break
        for node in added:
            needed |= _ancestors(node)
    for node in gm.graph.nodes:
        if node.target in _CHECKS and not any(_computes(n) for n in _ancestors(node) - needed):
            needed |= _ancestors(node)
    for node in reversed(list(gm.graph.nodes)):
        if node not in needed:
            gm.graph.erase_node(node)


def _computes(node: fx.Node) -> bool:
    """Whether a node makes a tensor, rather than asking for a size."""
    return isinstance(node.meta.get("val"), Tensor)


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.add(current)
            waiting.extend(current.all_input_nodes)
    return found


def _drop_operators_without_effect(gm: fx.GraphModule) -> None:
    for node in list(gm.graph.nodes):
        if not node.all_input_nodes or not (
            type(module_of(node, gm)) in _WITHOUT_EFFECT or _is_off(node) or _is_needless_copy(node)
        ):
            continue
        replace(node, node.all_input_nodes[0])


def _is_off(node: fx.Node) -> bool:
    """Whether a node is a dropout function that is called as in eval mode."""
    place, training = _IN_TRAINING_ONLY.get(node.target, (0, True))
    value: Any = training
    if "training" in node.kwargs or "train" in node.kwargs:
        value = node.kwargs.get("training", node.kwargs.get("train"))
    elif 0 < place < len(node.args):
        value = node.args[place]
    return place > 0 and value is False


def _is_needless_copy(node: fx.Node) -> bool:
    """Whether a node is a `contiguous()` that finds its input laid out as it wants."""
    if node.op != "call_method" or node.target != "contiguous" or node.kwargs:
        return False
    return len(node.args) == 1 and storages(node) == storages(node.all_input_nodes[0])


def _reshape_instead_of_view(gm: fx.GraphModule) -> None:
    """Views need a memory layout that the deployed network may not have."""
    for node in gm.graph.nodes:
        of_sizes = not any(isinstance(arg, torch.dtype) for arg in node.args)
        if node.op == "call_method" and node.target == "view" and of_sizes:
            node.target = "reshape"
