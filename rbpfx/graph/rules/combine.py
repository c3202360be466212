"""Operators that combine several tensors element by element, with broadcasting."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from rbpfx.graph.modes import by_mode
from rbpfx.graph.operands import Labels
from rbpfx.graph.propagation import Propagation, unfollowed
from rbpfx.graph.provenance import Block, Label
from rbpfx.graph.rules.base import Rule, argument, register, shape_of, value_of

_SINGLE = "a single channel broadcast to many"


def broadcast(
    state: Propagation,
    labels: Sequence[Label],
    shape: Sequence[int],
    reason: str = "element-wise with a value that is not followed",
) -> Label:
    """Label of an element-wise combination: channels that meet become one channel."""
    ndim = len(shape)
    merged: list[Block] = []
    ended: set[int] = set()
    blocks = [block for label in labels for block in _behind(label, ndim)]
    # The result goes by the last one's atoms: by those of channels, where there are any.
    for block in sorted(blocks, key=state.is_repetition, reverse=True):
        if any(shape[d] != n for d, n in zip(block.dims, block.atoms.shape, strict=True)):
            state.identities.pin(block.atoms, _SINGLE)
            continue
        merged = _merge(state, merged, block, ended)
    whole = {
        d for block in merged for d in block.dims if any(_is_whole(x, d, ndim) for x in labels)
    }
    return state.collapse(Label(tuple(shape), tuple(merged)), whole | ended, reason)


def _behind(label: Label, ndim: int) -> list[Block]:
    """The blocks of a value of fewer axes, where broadcasting puts them."""
    where = {d: d + ndim - label.ndim for d in range(label.ndim)}
    return [block.moved(where) for block in label.blocks]


def repeated(
    state: Propagation, label: Label, before: Sequence[int], examples: Collection[int] = ()
) -> Label:
    """Label of a value that was repeated along axes of size one, or along new ones in front.

    Every repetition is as good as any other, so these axes are followed anew: there shall be as
    many as there are channels where they meet some.

    Args:
        state: The walk.
        label: The label of the result, which says nothing of these axes.
        before: The shape before.
        examples: Axes that hold the examples; the first one does in any case.
    """
    sizes = (*[1] * (label.ndim - len(before)), *before)
    dims = [d for d in range(1, label.ndim) if sizes[d] == 1 < label.shape[d]]
    dims = [d for d in dims if d not in examples]
    rest = state.collapse(label, dims, _SINGLE).blocks
    fresh = (Block((d,), state.repetition(label.shape[d])) for d in dims)
    return Label(label.shape, (*rest, *fresh))


def _merge(state: Propagation, blocks: list[Block], new: Block, ended: set[int]) -> list[Block]:
    """Add a block; tie it to every block that shares an axis and keep their common axes.

    Along the other axes they are tied now: these join `ended`, as no block may follow them.
    """
    apart = []
    for block in blocks:
        common = tuple(d for d in new.dims if d in block.dims)
        if not common:
            apart.append(block)
            continue
        dims = sorted({*block.dims, *new.dims})
        state.identities.tie(block.aligned(dims), new.aligned(dims))
        ended.update(set(dims) - set(common))
        index = tuple(slice(None) if d in common else 0 for d in new.dims)
        new = Block(common, new.atoms[index])
    return [*apart, new]


def _is_whole(label: Label, dim: int, ndim: int) -> bool:
    """Whether an operand has real extent along a followed axis without following it."""
    dim -= ndim - label.ndim
    return dim >= 0 and label.shape[dim] > 1 and label.block(dim) is None


class Combine(Rule):
    """Element-wise with several tensors: add, mul, where, expand_as, ... (any function)."""

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Tie the operands' channels together, index by index."""
        if not isinstance(node.meta.get("val"), Tensor):
            for source in node.all_input_nodes:
                state.pin(state.labels.get(source), f"{node.name!r} gives no tensor")
            return unfollowed(node)
        operands = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
        labels = [state.label(n) for n in operands]
        values = [x for x, n in zip(labels, operands, strict=True) if state.is_activation(n)]
        tables = [x for x, n in zip(labels, operands, strict=True) if not state.is_activation(n)]
        tables = [_without_minor_axes(state, table, values) for table in tables]
        return broadcast(state, [*values, *tables], shape_of(node))


def _without_minor_axes(state: Propagation, table: Label, values: list[Label]) -> Label:
    """A value made of parameters alone, pinned where it would end the units of an activation.

    A rotary embedding has one entry per position of a head: along (heads, head_dim) it would
    tie the heads together where heads are the units.
    """
    joint = [
        [d - label.ndim for d in block.dims]
        for label in values
        for block in label.blocks
        if len(block.dims) > 1
    ]
    minor = {d for dims in joint for d in dims if d != state.unit_axis(dims)}
    ended = {d + table.ndim for d in minor if d + table.ndim >= 0}
    return state.collapse(table, ended, "a table over the positions of a unit")


class ByMode(Rule):
    """The run-time choice between a value of train and a value of eval mode."""

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Tie the two together, channel by channel; (nested) results of the model stay whole."""
        choices = node.args[1:]
        values = [value_of(choice) for choice in choices]
        if all(isinstance(value, Tensor) and value.shape == values[0].shape for value in values):
            labels = [state.label(n) for n in choices if isinstance(n, fx.Node)]
            return broadcast(state, labels, shape_of(node))
        for source in node.all_input_nodes:
            state.pin(state.labels.get(source), "output of the model, chosen by mode")
        return unfollowed(node)


class BroadcastTensors(Rule):
    """`torch.broadcast_tensors`: every result has the channels of all operands."""

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Tie the operands' channels together."""
        values = node.meta["val"]
        labels = [state.label(source) for source in node.all_input_nodes]
        return (broadcast(state, labels, values[0].shape),) * len(values)


class Concatenate(Rule):
    """`torch.cat`: the axis of the result is the operands' axes one after the other.

    Args:
        dim: The axis of an operator that takes none (hstack); of values of one axis, the first.
    """

    def __init__(self, dim: int | None = None) -> None:
        self.dim = dim

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Concatenate along `dim`, tie along all other axes."""
        labels, shape = _sequence(argument(node, 0, "tensors"), state), shape_of(node)
        if any(label.ndim != len(shape) for label in labels):
            state.pin(tuple(labels), f"stacked along new axes ({node.name!r})")
            return unfollowed(node)
        given = self.dim if self.dim is not None else value_of(argument(node, 1, "dim", 0))
        dim = min(int(given), len(shape) - 1) % len(shape)
        joint = {d for label in labels for b in _over(label, dim) for d in b.dims} - {dim}
        if joint:
            ended = joint if state.attention == "positions" else {dim}
            labels = [state.collapse(label, ended, "concatenated") for label in labels]
        followed = any(label.block(dim) is not None for label in labels)
        axis = [state.axis(label, dim, "concatenated") for label in labels] if followed else []
        others = broadcast(
            state,
            [Label(_with(label.shape, dim, 1), label.without(dim)) for label in labels],
            _with(shape, dim, 1),
        )
        blocks = list(others.blocks)
        if followed:
            blocks.append(Block((dim,), np.concatenate(axis)))
        return Label(shape, tuple(blocks))


class Stack(Rule):
    """`torch.stack`: equals side by side along a new axis."""

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Insert the axis, tie along all others."""
        shape = shape_of(node)
        dim = int(value_of(argument(node, 1, "dim", 0))) % len(shape)
        labels = [label.unsqueezed(dim) for label in _sequence(argument(node, 0, "tensors"), state)]
        return broadcast(state, labels, _with(shape, dim, 1)).with_shape(shape)


def _sequence(tensors: Any, state: Propagation) -> list[Label]:
    """Labels of a sequence of tensors: nodes, or one node whose value is a sequence."""
    if not isinstance(tensors, fx.Node):
        return [state.label(node) for node in tensors]
    labels = state.labels.get(tensors)
    if isinstance(labels, tuple):
        return [label for label in labels if isinstance(label, Label)]
    return [Label(tuple(value.shape)) for value in tensors.meta["val"]]


def _over(label: Label, dim: int) -> list[Block]:
    return [block for block in label.blocks if dim in block.dims]


def _with(shape: Sequence[int], dim: int, size: int) -> tuple[int, ...]:
    return tuple(size if d == dim else n for d, n in enumerate(shape))


_FUNCTIONS = (
    "add sub subtract rsub mul multiply div divide true_divide floor_divide remainder fmod "
    "maximum minimum pow where atan2 lerp addcmul addcdiv eq ne lt le gt ge "
    "logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor logaddexp hypot xlogy "
    "masked_fill clamp clamp_min clamp_max clip expand_as copy fmax fmin copysign "
    "greater greater_equal less less_equal not_equal isclose float_power heaviside "
    "logaddexp2 ldexp arctan2 bitwise_left_shift bitwise_right_shift"
).split()
COMBINE = register(Combine())
for _name in _FUNCTIONS:
    if hasattr(torch, _name):
        register(COMBINE, getattr(torch, _name))
    if hasattr(Tensor, _name):
        register(COMBINE, _name)
    if hasattr(Tensor, f"{_name}_"):
        register(COMBINE, f"{_name}_")
for _name in "add sub mul truediv floordiv mod pow".split():
    register(COMBINE, getattr(operator, _name))
    register(COMBINE, getattr(operator, f"i{_name}"))
register(COMBINE, *(getattr(operator, _name) for _name in "eq ne lt le gt ge and_ or_ xor".split()))
register(ByMode(), by_mode)
register(BroadcastTensors(), torch.broadcast_tensors)
register(Concatenate(), torch.cat, torch.concat, torch.concatenate)
for _dim, _name in enumerate(("vstack", "hstack", "dstack")):
    register(Concatenate(_dim), getattr(torch, _name))
register(Stack(), torch.stack)
