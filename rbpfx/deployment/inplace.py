"""Work in place: activations and arithmetic write into an operand that nobody reads any more.

The memory layout of the deployed network is not the one it was captured in: what was a copy may be
a view, and the other way round. So nothing is concluded from the captured values. An operator
either is known to return memory of its own, or may share memory with everything it reads.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from rbpfx.deployment.activations import activation_of
from rbpfx.deployment.nodes import are_alike
from rbpfx.graph.calls import modifies_in_place, module_of

_ARITHMETIC: dict[Any, Any] = {
    **dict.fromkeys((operator.add, torch.add, "add"), operator.iadd),
    **dict.fromkeys((operator.mul, torch.mul, "mul"), operator.imul),
    **dict.fromkeys((operator.sub, torch.sub, "sub"), operator.isub),
    **dict.fromkeys((operator.truediv, torch.div, "div"), operator.itruediv),
}
_COMMUTATIVE = (operator.iadd, operator.imul)
_NEW_MEMORY = (torch.cat, F.layer_norm, F.group_norm, F.batch_norm, F.linear, F.conv2d, F.gelu)
_LAYERS = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._BatchNorm,
    nn.Linear,
    nn.LayerNorm,
    nn.GroupNorm,
)


class Sharing:
    """Which values may live in the same memory, and when they are read.

    Args:
        gm: The graph.
        layers: Modules that return memory of their own, besides torch's.
    """

    def __init__(self, gm: fx.GraphModule, layers: tuple[type[nn.Module], ...] = ()) -> None:
        self._gm = gm
        self._layers = (*_LAYERS, *layers)
        self._of: dict[fx.Node, set[fx.Node]] = {}
        self._foreign: set[fx.Node] = set()
        self._place = {node: place for place, node in enumerate(gm.graph.nodes)}
        self._written: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in gm.graph.nodes:
            self._add(node)

    def _add(self, node: fx.Node) -> None:
        self._of[node] = {node}
        if node.op in ("placeholder", "get_attr"):
            self._foreign.add(node)
        elif node.op == "output" or not self._is_new(node):
            for source in node.all_input_nodes:
                self.unite(node, source)

    def _is_new(self, node: fx.Node) -> bool:
        if modifies_in_place(node, self._gm):
            return False
        if node.op == "call_module":
            return isinstance(module_of(node, self._gm), self._layers) or self._is_activation(node)
        return node.target in _NEW_MEMORY or node.target in _ARITHMETIC or self._is_activation(node)

    def _is_activation(self, node: fx.Node) -> bool:
        return activation_of(self._gm, node) is not None

    def unite(self, one: fx.Node, other: fx.Node) -> None:
        """Note that two values share memory."""
        if self._of[one] is not self._of[other]:
            together = self._of[one] | self._of[other]
            for node in together:
                self._of[node] = together

    def apart(self, one: object, other: object) -> bool:
        """Whether two arguments certainly share no memory."""
        both = isinstance(one, fx.Node) and isinstance(other, fx.Node)
        return not both or self._of[one] is not self._of[other]  # type: ignore[index]

    def may_be_overwritten(self, value: fx.Node, user: fx.Node) -> bool:
        """Whether the memory of a value is the network's own, and nobody reads it after `user`."""
        holders = self._of[value]
        if not holders.isdisjoint(self._foreign):
            return False
        last = self._place[user]
        readers = (reader for holder in holders for reader in holder.users)
        return all(self._place[reader] <= last for reader in readers)

    def is_untouched(self, value: fx.Node, after: fx.Node, before: fx.Node) -> bool:
        """Whether no operator between two others writes into the memory of a value."""
        start, stop = self._place[after], self._place[before]
        return not any(
            start < self._place[node] < stop and modifies_in_place(node, self._gm)
            for holder in self._of[value]
            for node in holder.users
        )


def work_in_place(gm: fx.GraphModule, layers: tuple[type[nn.Module], ...] = ()) -> None:
    """Write results into operands where nothing can notice; the graph is changed in place.

    Args:
        gm: The graph, in eval mode.
        layers: Modules that return memory of their own, besides torch's.
    """
    sharing = Sharing(gm, layers)
    for node in gm.graph.nodes:
        if not modifies_in_place(node, gm):
            _activate_in_place(gm, node, sharing)
            _combine_in_place(node, sharing)


def _activate_in_place(gm: fx.GraphModule, node: fx.Node, sharing: Sharing) -> None:
    activation = activation_of(gm, node)
    if activation is None or activation.in_place is None:
        return
    (operand,) = node.all_input_nodes
    if _is_writable(operand, node) and sharing.may_be_overwritten(operand, node):
        node.op, node.target = "call_function", activation.in_place
        node.args, node.kwargs = (operand, *activation.scalars), {}
        sharing.unite(node, operand)


def _combine_in_place(node: fx.Node, sharing: Sharing) -> None:
    function = _ARITHMETIC.get(node.target) if node.op.startswith("call") else None
    if function is None or len(node.args) != 2 or node.kwargs:
        return
    pairs = [node.args, node.args[::-1]] if function in _COMMUTATIVE else [node.args]
    for operand, other in pairs:
        if (
            isinstance(operand, fx.Node)
            and _is_writable(operand, node)
            and sharing.apart(operand, other)
            and sharing.may_be_overwritten(operand, node)
        ):
            node.op, node.target, node.args = "call_function", function, (operand, other)
            sharing.unite(node, operand)
            return


def _is_writable(operand: fx.Node, node: fx.Node) -> bool:
    """Whether the result of a node fits into an operand, which is not an expanded value."""
    return are_alike(operand, node) and 0 not in operand.meta["val"].stride()
