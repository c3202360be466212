"""Operators that pick by positions held in tensors: advanced indexing, gather, index_select.

Axes that are picked from stay whole, all others are followed. Only constant positions (a buffer,
a list) along one axis are followed themselves, as `rewrite` emits them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from rbpfx.graph.calls import submodule
from rbpfx.graph.operands import Labels
from rbpfx.graph.propagation import Propagation, unfollowed
from rbpfx.graph.provenance import Atoms, Label
from rbpfx.graph.rules.base import Rule, argument, register, shape_of, tensor_input, value_of
from rbpfx.graph.rules.combine import broadcast
from rbpfx.graph.slicing import Slicing

Item: TypeAlias = "int | slice | None"


def written_out(index: Any, ndim: int) -> list[Any]:
    """An index as one entry per axis (a mask has several) and per None, without Ellipsis."""
    items = list(index) if isinstance(index, tuple) else [index]
    used = sum(_axes_of(item) for item in items)
    rest = [slice(None)] * (ndim - used)
    places = [i for i, item in enumerate(items) if item is Ellipsis]
    if places:
        return [*items[: places[0]], *rest, *items[places[0] + 1 :]]
    return [*items, *rest]


def _axes_of(item: Any) -> int:
    """How many axes an entry of an index stands for."""
    value = value_of(item)
    if value is None or value is Ellipsis or isinstance(value, bool):
        return 0
    return int(value.ndim) if _is_mask(value) else 1


def _is_mask(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.bool, torch.uint8)


def index_items(index: Any, ndim: int) -> list[Item] | None:
    """The index with example values for nodes; None if it indexes by tensors, lists or flags."""
    items = [_example(item) for item in written_out(index, ndim)]
    if any(isinstance(i, bool) or not isinstance(i, (int, slice, type(None))) for i in items):
        return None
    return items


def _example(item: Any) -> Any:
    if isinstance(item, slice):
        return slice(value_of(item.start), value_of(item.stop), value_of(item.step))
    return map_aggregate(item, value_of) if isinstance(item, (list, tuple)) else value_of(item)


def pick_by_tensors(node: fx.Node, state: Propagation, label: Label) -> Labels:
    """Label of `x[...]` with tensors or lists in the index."""
    reason = f"picked by tensors ({node.name!r})"
    for other in node.all_input_nodes[1:]:
        state.pin(state.labels.get(other), f"used as an index ({node.name!r})")
    constant = _constant_pick(node, label, state.gm)
    if constant is not None:
        return label.indexed(*constant)
    items = [_example(item) for item in written_out(node.args[1], label.ndim)]
    if any(isinstance(item, bool) for item in items):
        state.pin(label, reason)
        return unfollowed(node)
    dim = 0
    for item in items:
        axes = range(dim, dim + _axes_of(item))
        if not (isinstance(item, slice) and _is_whole(item, label.shape[dim])):
            label = state.collapse(label, axes, reason)
        dim = axes.stop
    where = _where(items, label)
    return Label(shape_of(node), tuple(block.moved(where) for block in label.blocks))


def _is_whole(item: slice, size: int) -> bool:
    return item.indices(size) == (0, size, 1)


def _where(items: Sequence[Any], label: Label) -> dict[int, int]:
    """Followed axis -> where it is in the result: by indexing a probe of telling sizes."""
    telling = {dim: 1009 + dim for block in label.blocks for dim in block.dims}
    probe = torch.empty([telling.get(dim, 1) for dim in range(label.ndim)], device="meta")
    index: list[Any] = []
    for item in items:
        if item is None or isinstance(item, slice):
            index.append(item if item is None else slice(None))
        elif isinstance(item, int):
            index.append(0)
        else:
            # A mask picks like one list of positions for each of its axes.
            count = _axes_of(item)
            ndim = 1 if count != 1 or _is_mask(item) else torch.as_tensor(item).ndim
            index.extend([torch.zeros([1] * ndim, dtype=torch.long, device="meta")] * count)
    shape = probe[tuple(index)].shape
    return {dim: shape.index(size) for dim, size in telling.items()}


def select_by_tensors(node: fx.Node, state: Slicing) -> None:
    """Rewrite `x[...]` with tensors or lists in the index: select the positions that are left."""
    label = state.label(tensor_input(node))
    constant = _constant_pick(node, label, state.source)
    if constant is not None:
        _select(node, state, label, *constant)


def _constant_pick(node: fx.Node, label: Label, gm: fx.GraphModule) -> tuple[int, Atoms] | None:
    """The axis and the positions, if the index is one list or buffer along a followed axis."""
    items = written_out(node.args[1], label.ndim)
    places = [i for i, item in enumerate(items) if item != slice(None)]
    if len(places) != 1 or len(items) != label.ndim or label.block(places[0]) is None:
        return None
    (dim,) = places
    positions = _constant(items[dim], gm)
    return None if positions is None else (dim, positions % label.shape[dim])


def _constant(index: Any, gm: fx.GraphModule) -> Atoms | None:
    """Positions along one axis that no input of the model changes."""
    if isinstance(index, fx.Node):
        if index.op != "get_attr":
            return None
        owner, _, name = str(index.target).rpartition(".")
        buffer = submodule(gm, owner)._buffers.get(name)
        if buffer is None or buffer.ndim != 1 or buffer.dtype != torch.int64:
            return None
        return np.asarray(buffer.detach().cpu().numpy())
    if isinstance(index, (list, tuple)) and all(type(i) is int for i in index):
        return np.asarray(index, dtype=np.int64)
    return None


def _select(node: fx.Node, state: Slicing, label: Label, dim: int, wanted: Atoms) -> None:
    """Let a node select what is left of the positions it picked."""
    keep = state.kept_along(label, dim)
    if not keep.all():
        chosen = (np.cumsum(keep) - 1)[wanted[keep[wanted]]]
        twin = state.twin(node)
        state.replace(node, state.select(twin, tensor_input(twin), dim, chosen))


class IndexSelect(Rule):
    """`index_select`, with positions that are a buffer as `rewrite` itself emits it."""

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Index the atoms like the data."""
        label, dim = state.label(tensor_input(node)), self._dim(node)
        index = argument(node, 2, "index")
        state.pin(state.labels.get(index), f"used as an index ({node.name!r})")
        positions = _constant(index, state.gm)
        if positions is not None:
            return label.indexed(dim, positions)
        label = state.collapse(label, {dim}, f"selection by computed positions ({node.name!r})")
        return Label(shape_of(node), label.blocks)

    def rewrite(self, node: fx.Node, state: Slicing) -> None:
        """Select the positions that are left."""
        wanted = _constant(argument(node, 2, "index"), state.source)
        if wanted is not None:
            _select(node, state, state.label(tensor_input(node)), self._dim(node), wanted)

    def _dim(self, node: fx.Node) -> int:
        return int(value_of(argument(node, 1, "dim"))) % len(shape_of(tensor_input(node)))


class Gather(Rule):
    """`gather`, `take_along_dim`: every element by its own position along one axis.

    The index has an entry for every element of the result, so it has the channels of the input.

    Args:
        dim: Position of the argument that names the axis.
        index: Position of the index.
        name: Name of the index.
    """

    def __init__(self, dim: int, index: int, name: str) -> None:
        self.dim = dim
        self.index = index
        self.name = name

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Channels along the axis stay; all others are tied to those of the index."""
        index = argument(node, self.index, self.name)
        labels = [state.label(tensor_input(node)), state.label(index)]
        dim, shape = value_of(argument(node, self.dim, "dim")), shape_of(node)
        if dim is None or any(label.ndim != len(shape) for label in labels):
            dims = set(range(max(label.ndim for label in labels)))
        else:
            dims = {d for d, n in enumerate(shape) if any(label.shape[d] != n for label in labels)}
            dims.add(dim % len(shape))
        reason = f"picked by tensors ({node.name!r})"
        labels = [state.collapse(label, dims, reason) for label in labels]
        return broadcast(state, [label.with_shape(shape) for label in labels], shape)


register(IndexSelect(), torch.index_select, "index_select")
register(Gather(1, 2, "index"), torch.gather, "gather")
register(Gather(2, 1, "indices"), torch.take_along_dim, "take_along_dim")
