"""Operators that rearrange axes: reshape, flatten, permute, squeeze, expand, ..."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from math import gcd
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from rbpfx.graph.operands import Labels
from rbpfx.graph.propagation import Propagation, unfollowed
from rbpfx.graph.provenance import Atoms, Block, Label
from rbpfx.graph.rules.base import (
    Rule,
    argument,
    asks_for_examples,
    call_on,
    register,
    setting,
    shape_of,
    tensor_input,
    value_of,
)
from rbpfx.graph.rules.combine import broadcast, repeated
from rbpfx.graph.slicing import Slicing


def reshape(state: Propagation, label: Label, shape: Sequence[int], reason: str) -> Label:
    """Label of `tensor.reshape(shape)`.

    The axes fall into runs of equal size before and after; within a run, atoms are reshaped like
    the data. Of two blocks that fall into one run only one is followed on.
    """
    runs = _runs(label.shape, tuple(shape))
    for old, _ in runs:
        label = _without_repetitions(state, label, old, reason)
        label = _merged_with_unfollowed(state, label, old, reason)
        label = _one_block(state, label, old, reason)
    blocks = [] if state.unit == "channel" else _flattened_channels(state, label, shape, runs)
    for block in label.blocks:
        touched = [run for run in runs if set(run[0]) & set(block.dims)]
        old = [d for before, _ in touched for d in before]
        new = [d for _, after in touched for d in after]
        full = np.broadcast_to(block.aligned(old), [label.shape[d] for d in old])
        atoms = full.reshape([shape[d] for d in new])
        varies = [a for a in range(atoms.ndim) if (atoms != atoms.take([0], axis=a)).any()]
        if varies:
            index = tuple(slice(None) if a in varies else 0 for a in range(atoms.ndim))
            blocks.append(Block(tuple(new[a] for a in varies), atoms[index]))
        else:
            state.identities.pin(block.atoms, "only one channel")
    return Label(tuple(shape), tuple(blocks))


def _without_repetitions(
    state: Propagation, label: Label, old: Sequence[int], reason: str
) -> Label:
    """End mere repetitions that a reshape merges with other axes, which may hold channels."""
    long = {d for d in old if label.shape[d] > 1}
    mere = [block for block in label.blocks if state.is_repetition(block)]
    ended = {d for b in mere for d in b.dims if d in old and not long <= set(b.dims)}
    return state.collapse(label, ended, f"{reason} merges repetitions with others")


def _merged_with_unfollowed(
    state: Propagation, label: Label, old: Sequence[int], reason: str
) -> Label:
    """End joint blocks along axes of a run that a reshape merges with axes not followed.

    In a pixel shuffle by views, for example, the channels stay and their subpixels end. Heads do
    not end where they become examples, or are followed by their own copies.
    """
    inside = [d for block in label.blocks for d in block.dims if d in old]
    others = [d for d in old if d not in inside and label.shape[d] > 1]
    if not inside or not others or 0 in old or min(inside) < min(others):
        return label
    straddling = [b for b in label.blocks if set(b.dims) & set(old) and not set(b.dims) <= set(old)]
    dims = {d for block in straddling for d in block.dims if d in old}
    return state.collapse(label, dims, f"{reason} merges followed axes with others")


def _one_block(state: Propagation, label: Label, old: Sequence[int], reason: str) -> Label:
    """End all blocks but one of those that lie in a run: an index has one identity."""
    dims = sorted(d for block in label.blocks for d in block.dims if d in old)
    if not dims:
        return label
    followed = label.block(state.unit_axis(dims))
    assert followed is not None
    ended = set(dims) - set(followed.dims)
    return state.collapse(label, ended, f"{reason} mixes followed axes")


def _flattened_channels(
    state: Propagation,
    label: Label,
    shape: Sequence[int],
    runs: Sequence[tuple[list[int], list[int]]],
) -> list[Block]:
    """Axes that flatten several axes, none of them followed: one channel each, of many features."""
    followed = {d for block in label.blocks for d in block.dims}
    return [
        Block((new[0],), _one_channel(state, shape[new[0]]))
        for old, new in runs
        if not followed & set(old) and len(new) == 1 < len(old) and new != [0]
    ]


def _one_channel(state: Propagation, size: int) -> Atoms:
    """Positions of a flattened value that is not followed: one channel that stays.

    A linear layer that reads them may still treat them as features of their own.
    """
    atom = state.identities.new(1)
    state.identities.pin(atom, "flattened from axes that are not followed")
    return np.repeat(atom, size)


def _runs(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Split axes into the shortest runs that hold equally many elements before and after."""
    runs = []
    i = j = 0
    while i < len(old) or j < len(new):
        before: list[int] = []
        after: list[int] = []
        size_before = size_after = 1
        while not (before or after) or size_before != size_after:
            if i < len(old) and (size_before <= size_after or j == len(new)):
                before.append(i)
                size_before *= old[i]
                i += 1
            else:
                after.append(j)
                size_after *= new[j]
                j += 1
        runs.append((before, after))
    return runs


class Reshape(Rule):
    """reshape, view: the sizes of followed axes in the call are rewritten."""

    def moves(self, node: fx.Node) -> bool:
        """Nothing but moving, unless it reads the memory as another dtype."""
        return not isinstance(value_of(argument(node, 1, "dtype")), torch.dtype)

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Reshape the atoms like the data."""
        label = state.label(tensor_input(node))
        if isinstance(value_of(argument(node, 1, "dtype")), torch.dtype):
            state.pin(label, f"view as another dtype ({node.name!r})")
            return unfollowed(node)
        reason = f"reshape {node.name!r}"
        mixed = _merged_with_examples(node, label, state)
        label = state.collapse(label, mixed, f"{reason} merges channels with the examples")
        return reshape(state, label, shape_of(node), reason)

    def rewrite(self, node: fx.Node, state: Slicing) -> None:
        """Write the new sizes; leave -1 and sizes of other axes as they are."""
        label = state.label(node)
        new_sizes = state.changed_sizes(label)
        if not new_sizes:
            return
        twin = state.twin(node)
        sizes = sizes_of(given_sizes(twin), twin, label.ndim, state)
        for dim, size in new_sizes.items():
            sizes[dim] = rescaled(sizes[dim], size, label.shape[dim], twin, state)
        twin.args = (tensor_input(twin), tuple(sizes))
        twin.kwargs = {}


def _merged_with_examples(node: fx.Node, label: Label, state: Propagation) -> set[int]:
    """The followed axes that a reshape merges with the examples into an axis that is no batch axis.

    Such as `x.view(1, n * c, h, w)` for a convolution with one group per example. How many channels
    there are depends on the batch then, and no multiplier can sit on them. Heads that become
    examples themselves, on the first axis, are no such case.
    """
    shape = shape_of(node)
    if not shape or not label.shape or label.block(0) is not None:
        return set()
    if not state.is_activation(tensor_input(node)):
        return set()  # a weight
    # A single example adds nothing to the channels behind it: only what is asked for tells then.
    single = label.shape[0] == 1
    runs = [
        (old, new) for old, new in _runs(label.shape, shape) if 0 in old or (single and 1 in old)
    ]
    if shape[0] == 1 and not single:
        merged = [old for old, _ in runs]
    else:
        asked = asked_for_examples(node)
        merged = [old for old, new in runs if asked & set(new)]
    return {d for old in merged for d in old if label.block(d) is not None}


def asked_for_examples(node: fx.Node) -> set[int]:
    """The axes behind the first that a call wants as long as the batch."""
    given = given_sizes(node)
    sizes = given[0] if len(given) == 1 and isinstance(given[0], (tuple, list)) else given
    return {d for d, size in enumerate(sizes) if d and asks_for_examples(size)}


def given_sizes(node: fx.Node) -> Sequence[Any]:
    """All arguments behind the first, or the one that names sizes."""
    names = ("shape", "size", "repeats", "dims")
    named = next((node.kwargs[name] for name in names if name in node.kwargs), None)
    return node.args[1:] or (named,)


def sizes_of(given: Sequence[Any], twin: fx.Node, ndim: int, state: Slicing) -> list[Any]:
    """The sizes that a call is given, one per axis: numbers or nodes."""
    if len(given) == 1 and isinstance(given[0], (tuple, list)):
        return list(given[0])
    if len(given) == 1 and isinstance(given[0], fx.Node):
        if isinstance(value_of(given[0]), int):
            return [given[0]]
        with state.gm.graph.inserting_before(twin):
            return [
                state.gm.graph.call_function(operator.getitem, (given[0], dim))
                for dim in range(ndim)
            ]
    return list(given)


def rescaled(given: Any, new: int, old: int, twin: fx.Node, state: Slicing) -> Any:
    """A size that a call asks for, after channels have gone.

    One that is computed at run time (it may hold a batch size) shrinks by the same factor.
    """
    if not isinstance(given, fx.Node):
        return given if given == -1 else new
    factor = gcd(new, old)
    with state.gm.graph.inserting_before(twin):
        product = state.gm.graph.call_function(operator.mul, (given, new // factor))
        return state.gm.graph.call_function(operator.floordiv, (product, old // factor))


class ReshapeAs(Rule):
    """reshape_as, view_as: a reshape to the sizes of a tensor that may shrink otherwise."""

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Reshape the atoms like the data."""
        label = state.label(tensor_input(node))
        return reshape(state, label, shape_of(node), f"reshape {node.name!r}")

    def rewrite(self, node: fx.Node, state: Slicing) -> None:
        """Name the sizes where those of the other tensor are not the right ones any more."""
        label, other = state.label(node), state.label(argument(node, 1, "other"))
        own, others = state.changed_sizes(label), state.changed_sizes(other)
        if own == others:
            return
        twin = state.twin(node)
        graph = state.gm.graph
        with graph.inserting_before(twin):
            sizes = [
                own.get(d, label.shape[d])
                if d in own or d in others
                else graph.call_method("size", (argument(twin, 1, "other"), d))
                for d in range(label.ndim)
            ]
            reshaped = graph.call_method("reshape", (tensor_input(twin), tuple(sizes)))
        state.replace(node, reshaped)


class Flatten(Rule):
    """flatten, and unflatten with its sizes: a reshape that names axes."""

    def moves(self, node: fx.Node) -> bool:
        """Nothing but moving."""
        return True

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Reshape the atoms like the data."""
        label = state.label(tensor_input(node))
        return reshape(state, label, shape_of(node), f"flatten {node.name!r}")


class Unflatten(Flatten):
    """`unflatten`: one axis becomes several."""

    def rewrite(self, node: fx.Node, state: Slicing) -> None:
        """Write the new sizes of the unflattened axes."""
        new_sizes = state.changed_sizes(state.label(node))
        if not new_sizes:
            return
        twin = state.twin(node)
        module = state.own_module(twin)
        dim = int(value_of(setting(node, state.source, 1, "dim", 0)))
        dim %= len(shape_of(tensor_input(node)))
        name = "unflattened_size" if module is not None else "sizes"
        sizes = list(setting(twin, state.gm, 2, name, ()))
        for axis, size in new_sizes.items():
            if dim <= axis < dim + len(sizes):
                old = shape_of(node)[axis]
                sizes[axis - dim] = rescaled(sizes[axis - dim], size, old, twin, state)
        if module is not None:
            module.unflattened_size = tuple(sizes)  # type: ignore[assignment]
        else:
            twin.args = (tensor_input(twin), dim, tuple(sizes))
            twin.kwargs = {}


class Permute(Rule):
    """permute, transpose, movedim, ...: reads the permutation off strides."""

    def moves(self, node: fx.Node) -> bool:
        """Nothing but moving; an adjoint changes complex numbers."""
        return not node.meta["val"].is_complex()

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Move the atoms like the data."""
        label = state.label(tensor_input(node))
        # Running the very operator on a probe whose sizes are distinct gives the permutation
        # of every spelling, without parsing any.
        moved = call_on(node, state.gm, torch.empty([*range(2, 2 + label.ndim)], device="meta"))
        return label.permuted([size - 2 for size in moved.shape])


class Squeeze(Rule):
    """squeeze: axes of size one end."""

    def moves(self, node: fx.Node) -> bool:
        """Nothing but moving."""
        return True

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Drop the squeezed axes."""
        label = state.label(tensor_input(node))
        dims = _squeezed(node, label)
        label = state.collapse(label, set(dims), "only one channel")
        stay = [d for d in range(label.ndim) if d not in dims]
        where = {old: new for new, old in enumerate(stay)}
        return Label(shape_of(node), tuple(b.moved(where) for b in label.blocks))

    def rewrite(self, node: fx.Node, state: Slicing) -> None:
        """Name the axes, so that an axis of which one channel is left is not squeezed away."""
        label = state.label(tensor_input(node))
        if state.changed_sizes(label):
            twin = state.twin(node)
            twin.args = (tensor_input(twin), _squeezed(node, label))
            twin.kwargs = {}


def _squeezed(node: fx.Node, label: Label) -> tuple[int, ...]:
    dims = argument(node, 1, "dim")
    if dims is None:
        dims = range(label.ndim)
    elif isinstance(dims, int):
        dims = (dims,)
    return tuple(d % label.ndim for d in dims if label.shape[d] == 1)


class Unsqueeze(Rule):
    """unsqueeze: a new axis of size one."""

    def moves(self, node: fx.Node) -> bool:
        """Nothing but moving."""
        return True

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Insert the axis."""
        dim = argument(node, 1, "dim")
        return state.label(tensor_input(node)).unsqueezed(int(value_of(dim)))


class Expand(Reshape):
    """expand, broadcast_to: repeats axes of size one."""

    def moves(self, node: fx.Node) -> bool:
        """An element is repeated."""
        return False

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Follow the repetitions anew."""
        source = state.label(tensor_input(node))
        label = broadcast(state, [source], shape_of(node))
        return repeated(state, label, source.shape, asked_for_examples(node))


register(Reshape(), torch.reshape, "reshape", "view")
register(ReshapeAs(), "reshape_as", "view_as")
register(Flatten(), nn.Flatten, torch.flatten, "flatten", torch.ravel, "ravel")
register(Unflatten(), nn.Unflatten, torch.unflatten, "unflatten")
_PERMUTATIONS = "permute transpose swapaxes swapdims movedim moveaxis t adjoint".split()
register(Permute(), *_PERMUTATIONS, *(getattr(torch, name) for name in _PERMUTATIONS))
register(Squeeze(), torch.squeeze, "squeeze")
register(Unsqueeze(), torch.unsqueeze, "unsqueeze")
register(Expand(), "expand", torch.broadcast_to, "broadcast_to")
