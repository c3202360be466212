"""Operators that take a part of an axis, or add to it: slices, chunk, split, pad."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.nn import functional as F

from rbpfx.graph.propagation import Labels, Propagation, unfollowed
from rbpfx.graph.provenance import Atoms, Block, Keep, Label
from rbpfx.graph.rules.base import (
    Rule,
    argument,
    module_of,
    register,
    set_argument,
    shape_of,
    tensor_input,
    value_of,
)
from rbpfx.graph.slicing import Slicing


class GetItem(Rule):
    """`x[...]` with ints, slices, None and Ellipsis; also picks from tuples of tensors."""

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Index the atoms like the data; a channel picked by an int stays."""
        source = tensor_input(node)
        labels = state.labels.get(source)
        if isinstance(labels, tuple):
            index = value_of(node.args[1])
            return labels[index] if isinstance(index, (int, slice)) else unfollowed(node)
        if not isinstance(labels, Label):
            return unfollowed(node)
        items = _items(node.args[1], labels.ndim)
        if items is None:
            state.pin(labels, f"advanced indexing ({node.name!r})")
            for other in node.all_input_nodes:
                state.pin(state.labels.get(other), f"used as an index ({node.name!r})")
            return unfollowed(node)
        label, dim = labels, 0
        for item in items:
            if item is None:
                label = label.unsqueezed(dim)
            elif isinstance(item, int):
                block = label.block(dim)
                if block is not None:
                    picked = block.atoms.take([item], axis=block.dims.index(dim))
                    state.identities.pin(picked, f"picked by its number ({node.name!r})")
                label = label.indexed(dim, item)
                continue
            elif item != slice(None):
                label = label.indexed(dim, item)
            dim += 1
        return label

    def rewrite(self, node: fx.Node, state: Slicing) -> None:
        """Write the new bounds; positions that are no range any more become an index_select."""
        label = state.labels.get(tensor_input(node))
        if not isinstance(label, Label) or not state.changed_sizes(label):
            return
        items = _items(node.args[1], label.ndim)
        assert items is not None
        twin = state.twin(node)
        given = twin.args[1] if isinstance(twin.args[1], tuple) else (twin.args[1],)
        written = _filled(given, label.ndim)
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
        source = tensor_input(twin)
        for dim, chosen in selections:
            source = state.select(twin, source, dim, chosen)
        twin.args = (source, tuple(written))


def _filled(index: Any, ndim: int) -> list[Any]:
    """An index written out: no Ellipsis, one entry per axis and per None."""
    items = list(index) if isinstance(index, tuple) else [index]
    used = sum(item is not None and item is not Ellipsis for item in items)
    rest = [slice(None)] * (ndim - used)
    places = [i for i, item in enumerate(items) if item is Ellipsis]
    if places:
        return [*items[: places[0]], *rest, *items[places[0] + 1 :]]
    return [*items, *rest]


def _items(index: Any, ndim: int) -> list[int | slice | None] | None:
    """The index with example values for nodes; None if it indexes by tensors or lists."""
    items: list[int | slice | None] = []
    for item in _filled(index, ndim):
        value = value_of(item)
        if isinstance(item, slice):
            value = slice(value_of(item.start), value_of(item.stop), value_of(item.step))
        if isinstance(value, bool) or not (value is None or isinstance(value, (int, slice))):
            return None
        items.append(value)
    return items


class Narrow(Rule):
    """`narrow(dim, start, length)`: a slice."""

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
    """chunk, split, tensor_split, unbind-free: an axis falls into consecutive parts."""

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
        return int(value_of(argument(node, 2, "dim", 0)))


class Pad(Rule):
    """`F.pad`: constant padding of a followed axis adds channels that hold the constant."""

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """New channels on both sides; other kinds of padding pin the axes they pad."""
        label = state.label(tensor_input(node))
        constant = _is_constant(node, state.gm)
        blocks = []
        for block in label.blocks:
            padded = {d: p for d, p in _amounts(node, state.gm, label).items() if d in block.dims}
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


class IndexSelect(Rule):
    """`index_select` with positions that are a buffer, as `rewrite` itself emits it."""

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Index the atoms like the data."""
        label = state.label(tensor_input(node))
        positions = self._positions(node, state.gm)
        if positions is None:
            state.pin(label, f"selection by computed positions ({node.name!r})")
            return unfollowed(node)
        return label.indexed(_select_dim(node), positions)

    def rewrite(self, node: fx.Node, state: Slicing) -> None:
        """Select the positions that are left."""
        dim = _select_dim(node)
        keep = state.kept_along(state.label(tensor_input(node)), dim)
        if keep.all():
            return
        wanted = self._positions(node, state.source)
        assert wanted is not None
        twin = state.twin(node)
        place = np.cumsum(keep) - 1
        chosen = place[wanted[keep[wanted]]]
        state.replace(node, state.select(twin, tensor_input(twin), dim, chosen))

    def _positions(self, node: fx.Node, gm: fx.GraphModule) -> Atoms | None:
        index = argument(node, 2, "index")
        buffers = dict(gm.named_buffers(remove_duplicate=False))
        if not isinstance(index, fx.Node) or index.op != "get_attr":
            return None
        buffer = buffers.get(str(index.target))
        return None if buffer is None else buffer.detach().cpu().numpy().astype(np.int64).ravel()


def _select_dim(node: fx.Node) -> int:
    return int(value_of(argument(node, 1, "dim")))


register(GetItem(), operator.getitem)
register(Narrow(), torch.narrow, "narrow")
register(Split(), torch.chunk, torch.split, torch.tensor_split, "chunk", "split", "tensor_split")
register(IndexSelect(), torch.index_select, "index_select")
register(Pad(), F.pad)
for _n in (1, 2, 3):
    for _kind in ("ZeroPad", "ConstantPad", "ReflectionPad", "ReplicationPad", "CircularPad"):
        register(Pad(), getattr(nn, f"{_kind}{_n}d"))
