"""Operators that take a part of an axis, or add to it: slices, chunk, split, pad."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from rbpfx.graph.calls import module_of
from rbpfx.graph.operands import Labels
from rbpfx.graph.propagation import Propagation, unfollowed
from rbpfx.graph.provenance import Atoms, Block, Keep, Label
from rbpfx.graph.rules.base import (
    Rule,
    argument,
    register,
    set_argument,
    setting,
    shape_of,
    tensor_input,
    value_of,
)
from rbpfx.graph.rules.combine import broadcast
from rbpfx.graph.rules.gathering import (
    index_items,
    pick_by_tensors,
    select_by_tensors,
    written_out,
)
from rbpfx.graph.slicing import Slicing


class GetItem(Rule):
    """`x[...]` with ints, slices, None and Ellipsis; also picks from tuples of tensors."""

    def moves(self, node: fx.Node) -> bool:
        """Nothing but moving."""
        return True

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Index the atoms like the data; a channel picked by an int stays."""
        source = tensor_input(node)
        labels = state.labels.get(source)
        if isinstance(labels, tuple):
            index = value_of(node.args[1])
            return labels[index] if isinstance(index, (int, slice)) else unfollowed(node)
        if not isinstance(labels, Label):
            return unfollowed(node)
        items = index_items(node.args[1], labels.ndim)
        if items is None:
            return pick_by_tensors(node, state, labels)
        return _indexed(node, state, labels, items)

    def rewrite(self, node: fx.Node, state: Slicing) -> None:
        """Write the new bounds; positions that are no range any more become an index_select."""
        label = state.labels.get(tensor_input(node))
        if not isinstance(label, Label) or not state.changed_sizes(label):
            return
        items = index_items(node.args[1], label.ndim)
        if items is None:
            select_by_tensors(node, state)
            return
        twin = state.twin(node)
        written, selections = _rewritten(items, twin, label, state)
        source = tensor_input(twin)
        for dim, chosen in selections:
            source = state.select(twin, source, dim, chosen)
        twin.args = (source, tuple(written))


def _indexed(
    node: fx.Node, state: Propagation, label: Label, items: list[int | slice | None]
) -> Label:
    """Label of a tensor indexed by ints, slices and None."""
    dim = 0
    for item in items:
        if item is None:
            label = label.unsqueezed(dim)
        elif isinstance(item, int):
            label = picked(node, state, label, dim, item).indexed(dim, item)
            continue
        elif item != slice(None):
            label = label.indexed(dim, item)
        dim += 1
    return label


def picked(node: fx.Node, state: Propagation, label: Label, dim: int, *indices: int) -> Label:
    """The label before some indices are picked by their number, so that they must stay.

    Of a joint block the axis must stay as a whole: it is tied along it (the heads of queries, keys
    and values that are one tensor, for example).
    """
    block = label.block(dim)
    if block is None:
        return label
    reason = f"picked by its number ({node.name!r})"
    if len(block.dims) > 1:
        return state.collapse(label, {dim % label.ndim}, reason)
    state.identities.pin(block.atoms[list(indices)], reason)
    return label


def _rewritten(
    items: list[int | slice | None], twin: fx.Node, label: Label, state: Slicing
) -> tuple[list[Any], list[tuple[int, Atoms]]]:
    """An index after channels have gone: its entries, and selections that come before it."""
    index = twin.args[1]
    written = written_out(index if isinstance(index, tuple) else (index,), label.ndim)
    source_dim, selections = 0, []
    for position, item in enumerate(items):
        if item is None:
            continue
        keep = state.kept_along(label, source_dim)
        if not keep.all():
            place = np.cumsum(keep) - 1
            if isinstance(item, int):
                written[position] = int(place[item])
            elif item != slice(None):
                wanted = np.arange(len(keep))[item]
                chosen = place[wanted[keep[wanted]]]
                if (np.diff(chosen) == 1).all():
                    first = int(chosen[0]) if len(chosen) else 0
                    written[position] = slice(first, first + len(chosen))
                else:
                    written[position] = slice(None)
                    selections.append((source_dim, chosen))
        source_dim += 1
    return written, selections


class SetItem(Rule):
    """`x[...] = y` with ints, slices, None and Ellipsis."""

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Tie what is written to what it is written into."""
        target, value = tensor_input(node), node.args[2]
        label = state.labels.get(target)
        if not isinstance(label, Label):
            return None
        items = index_items(node.args[1], label.ndim)
        if items is None or not all(_is_range(item) for item in items):
            for source in node.all_input_nodes:
                state.pin(state.labels.get(source), f"written by positions ({node.name!r})")
            return None
        region = _indexed(node, state, label, items)
        if isinstance(value, fx.Node) and isinstance(value.meta["val"], Tensor):
            broadcast(state, [region, state.label(value)], region.shape)
        return None

    def rewrite(self, node: fx.Node, state: Slicing) -> None:
        """Write the new bounds."""
        label = state.labels.get(tensor_input(node))
        if not isinstance(label, Label) or not state.changed_sizes(label):
            return
        items = index_items(node.args[1], label.ndim)
        if items is not None:
            twin = state.twin(node)
            written, _ = _rewritten(items, twin, label, state)
            twin.update_arg(1, tuple(written))


def _is_range(item: int | slice | None) -> bool:
    return not isinstance(item, slice) or item.step in (None, 1)


class Narrow(Rule):
    """`narrow(dim, start, length)`: a slice."""

    def moves(self, node: fx.Node) -> bool:
        """Nothing but moving."""
        return True

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Index the atoms like the data."""
        dim, start, length = self._range(node)
        label = state.label(tensor_input(node))
        return label.indexed(dim, slice(start, start + length))

    def rewrite(self, node: fx.Node, state: Slicing) -> None:
        """Write the new bounds."""
        dim, start, length = self._range(node)
        keep = state.kept_along(state.label(tensor_input(node)), dim)
        if not keep.all():
            twin = state.twin(node)
            bounds = (int(keep[:start].sum()), int(keep[start : start + length].sum()))
            twin.args = (tensor_input(twin), dim, *bounds)
            twin.kwargs = {}

    def _range(self, node: fx.Node) -> tuple[int, int, int]:
        names = ("dim", "start", "length")
        dim, start, length = (
            int(value_of(argument(node, position, name)))
            for position, name in enumerate(names, start=1)
        )
        shape = shape_of(tensor_input(node))
        dim %= len(shape)
        return dim, start % shape[dim], length


class Split(Rule):
    """chunk, split, tensor_split, hsplit: an axis falls into consecutive parts.

    Args:
        dim: The axis of an operator that takes none; its last one, if it has no such axis.
    """

    def __init__(self, dim: int | None = None) -> None:
        self.dim = dim

    def moves(self, node: fx.Node) -> bool:
        """Nothing but moving."""
        return True

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Give every part its atoms."""
        label = state.label(tensor_input(node))
        dim = self._dim(node)
        parts, start = [], 0
        for part in node.meta["val"]:
            size = part.shape[dim]
            parts.append(label.indexed(dim, slice(start, start + size)))
            start += size
        return tuple(parts)

    def rewrite(self, node: fx.Node, state: Slicing) -> None:
        """Become a split by the new sizes of the parts."""
        label = state.label(tensor_input(node))
        dim = self._dim(node) % label.ndim
        keep = state.kept_along(label, dim)
        if keep.all():
            return
        sizes, start = [], 0
        for part in node.meta["val"]:
            sizes.append(int(keep[start : start + part.shape[dim]].sum()))
            start += part.shape[dim]
        twin = state.twin(node)
        with state.gm.graph.inserting_before(twin):
            split = state.gm.graph.call_function(torch.split, (tensor_input(twin), sizes, dim))
        state.replace(node, split)

    def _dim(self, node: fx.Node) -> int:
        if self.dim is not None:
            return min(self.dim, len(shape_of(tensor_input(node))) - 1)
        return int(value_of(argument(node, 2, "dim", 0)))


class GatedHalves(Rule):
    """`glu`: one half of an axis times the sigmoid of the other, unit by unit.

    Where a channel goes its gate goes too, so that the halves stay halves.
    """

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Tie the two halves."""
        label = state.label(tensor_input(node))
        dim = int(value_of(setting(node, state.gm, 1, "dim", -1))) % label.ndim
        half = label.shape[dim] // 2
        halves = [label.indexed(dim, slice(0, half)), label.indexed(dim, slice(half, None))]
        return broadcast(state, halves, shape_of(node))


class Select(Rule):
    """`select`: one index of an axis, which ends."""

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Index the atoms like the data; a channel picked by an int stays."""
        label, dim, index = self._place(node, state)
        return picked(node, state, label, dim, index).indexed(dim, index)

    def rewrite(self, node: fx.Node, state: Slicing) -> None:
        """Write the new index."""
        label, dim, index = self._place(node, state)
        keep = state.kept_along(label, dim)
        if not keep.all():
            twin = state.twin(node)
            twin.args = (tensor_input(twin), dim, int(keep[:index].sum()))
            twin.kwargs = {}

    def _place(self, node: fx.Node, state: Propagation | Slicing) -> tuple[Label, int, int]:
        label = state.label(tensor_input(node))
        dim = int(value_of(argument(node, 1, "dim"))) % label.ndim
        return label, dim, int(value_of(argument(node, 2, "index"))) % label.shape[dim]


class Unbind(Rule):
    """`unbind`: every index of an axis, which ends; channels along it stay."""

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Index the atoms like the data."""
        label = state.label(tensor_input(node))
        dim = int(value_of(argument(node, 1, "dim", 0))) % label.ndim
        label = picked(node, state, label, dim, *range(label.shape[dim]))
        return tuple(label.indexed(dim, index) for index in range(label.shape[dim]))


class Pad(Rule):
    """`F.pad`: constant padding of a followed axis adds channels that hold the constant."""

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """New channels on both sides; other kinds of padding pin the axes they pad."""
        label = state.label(tensor_input(node))
        constant = _is_constant(node, state.gm)
        blocks = []
        for block in label.blocks:
            amounts = _amounts(node, state.gm, label).items()
            padded = {d: amount for d, amount in amounts if d in block.dims and any(amount)}
            if not padded:
                blocks.append(block)
            elif len(block.dims) > 1 or not constant:
                state.identities.pin(block.atoms, f"padding of followed axes ({node.name!r})")
            else:
                blocks.append(Block(block.dims, self._padded(block, padded, state)))
        return Label(shape_of(node), tuple(blocks))

    def _padded(
        self, block: Block, padded: dict[int, tuple[int, int]], state: Propagation
    ) -> Atoms:
        left, right = padded[block.dims[0]]
        inner = block.atoms[max(-left, 0) : len(block.atoms) - max(-right, 0)]
        new = state.identities.new
        return np.concatenate([new(max(left, 0)), inner, new(max(right, 0))])

    def rewrite(self, node: fx.Node, state: Slicing) -> None:
        """Pad by the number of new channels that are left."""
        source, result = state.label(tensor_input(node)), state.label(node)
        twin = state.twin(node)
        amounts = _amounts(node, state.source, source)
        changed = state.changed_sizes(source).keys() | state.changed_sizes(result).keys()
        changed &= amounts.keys()
        if not changed:
            return
        module = state.own_module(twin)
        flat = list(argument(twin, 1, "pad") if module is None else _padding(module))
        for dim in changed:
            left, right = amounts[dim]
            before = state.kept_along(source, dim)
            after = state.kept_along(result, dim)
            start = 2 * (source.ndim - 1 - dim)
            flat[start] = _kept_padding(left, before, after)
            flat[start + 1] = _kept_padding(right, before[::-1], after[::-1])
        if module is None:
            set_argument(twin, 1, "pad", tuple(flat))
        else:
            module.padding = tuple(flat)  # type: ignore[assignment]


def _kept_padding(amount: int, before: Keep, after: Keep) -> int:
    """How much of the padding of one side is left, counted from that side."""
    return int(after[:amount].sum()) if amount > 0 else -int(before[:-amount].sum())


def _amounts(node: fx.Node, gm: fx.GraphModule, label: Label) -> dict[int, tuple[int, int]]:
    """Axis -> padding before and after, for the axes the call names."""
    module = module_of(node, gm)
    given = argument(node, 1, "pad") if module is None else _padding(module)
    pad = [int(value_of(p)) for p in given]
    return {label.ndim - 1 - i // 2: (pad[i], pad[i + 1]) for i in range(0, len(pad), 2)}


def _padding(module: nn.Module) -> tuple[int, ...]:
    return tuple(module.padding)  # type: ignore[arg-type]


def _is_constant(node: fx.Node, gm: fx.GraphModule) -> bool:
    module = module_of(node, gm)
    if module is None:
        return bool(argument(node, 2, "mode", "constant") == "constant")
    return isinstance(module, (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d))


register(SetItem(), operator.setitem)
register(Select(), torch.select, "select")
register(Unbind(), torch.unbind, "unbind")
register(GetItem(), operator.getitem)
register(GatedHalves(), nn.GLU, F.glu)
register(Narrow(), torch.narrow, "narrow")
_SPLITS = "chunk split split_with_sizes tensor_split unsafe_chunk unsafe_split "
_SPLITS += "unsafe_split_with_sizes"
for _name in _SPLITS.split():
    register(Split(), getattr(torch, _name), _name)
for _dim, _name in enumerate(("vsplit", "hsplit", "dsplit")):
    register(Split(_dim), getattr(torch, _name), _name)
register(Pad(), F.pad)
for _n in (1, 2, 3):
    for _kind in ("ZeroPad", "ConstantPad", "ReflectionPad", "ReplicationPad", "CircularPad"):
        register(Pad(), getattr(nn, f"{_kind}{_n}d"))
