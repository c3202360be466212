"""Operators that write or add by positions held in tensors: index_add, scatter, ...

They are `gathering` the other way round. The axis that the positions are on stays whole; along all
others an element goes where it is, so that channels there pass.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from rbpfx.graph.operands import Labels
from rbpfx.graph.propagation import Propagation
from rbpfx.graph.rules.base import Rule, argument, register, shape_of, tensor_input, value_of
from rbpfx.graph.rules.combine import broadcast


class IndexWrite(Rule):
    """index_add, index_copy, index_fill, index_reduce: one position for every slab along an axis.

    Args:
        source: Name of what is written, the argument behind the axis and the positions.
    """

    def __init__(self, source: str) -> None:
        self.source = source

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Channels along the axis stay; all others are tied to those of what is written."""
        index = argument(node, 2, "index")
        state.pin(state.labels.get(index), f"used as an index ({node.name!r})")
        return _written(node, state, [tensor_input(node), argument(node, 3, self.source)])


class Scatter(Rule):
    """scatter, scatter_add, scatter_reduce: one position for every element that is written.

    The index has the shape of what is written, so it has its channels.
    """

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Channels along the axis stay; all others are tied to those of index and source."""
        source = argument(node, 3, "src", argument(node, 3, "value"))
        return _written(node, state, [tensor_input(node), argument(node, 2, "index"), source])


def _written(node: fx.Node, state: Propagation, operands: list[object]) -> Labels:
    """Label of a value into which others were written along one axis."""
    shape = shape_of(node)
    values = [n for n in operands if isinstance(n, fx.Node) and isinstance(value_of(n), Tensor)]
    labels = [state.label(n) for n in values if value_of(n).ndim]
    if not shape or any(label.ndim != len(shape) for label in labels):
        dims = set(range(len(shape)))
    else:
        # An index may be shorter than what it writes into: which channels it means is not followed.
        dims = {d for d, n in enumerate(shape) if any(label.shape[d] != n for label in labels)}
        dims.add(int(value_of(argument(node, 1, "dim"))) % len(shape))
    reason = f"written by tensors ({node.name!r})"
    labels = [state.collapse(label, dims, reason).with_shape(shape) for label in labels]
    return broadcast(state, labels, shape)


for _rule, _names in (
    (IndexWrite("source"), "index_add index_copy index_reduce"),
    (IndexWrite("value"), "index_fill"),
    (Scatter(), "scatter scatter_add scatter_reduce"),
):
    for _name in _names.split():
        register(_rule, getattr(torch, _name), _name, f"{_name}_")
