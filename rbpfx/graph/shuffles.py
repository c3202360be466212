"""Shuffles: values that are only moved need not be sliced.

`x.view(n, g, c // g, h, w).transpose(1, 2).reshape(n, c, h, w)` follows one axis of channels as
two. What a plan leaves of two axes is a tensor only if the same channels go in every row; to
insist on it would couple all groups of a ShuffleNet. But nothing is computed between the views:
all that matters is where every channel ends up. A *shuffle* is such a stretch of the graph, from
a value of single axes to values of single axes. Where a plan leaves something ragged in between,
`rewrite` emits one `index_select` in its place, or runs it at its original width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from rbpfx.graph.provenance import Atoms, Block, Identities, Keep, Label
from rbpfx.graph.rules.base import Rule, find_rule, shape_of, tensor_input

if TYPE_CHECKING:
    from rbpfx.graph.operands import Labels
    from rbpfx.graph.propagation import Propagation
    from rbpfx.graph.slicing import Slicing


@dataclass(frozen=True, eq=False)
class Shuffle:
    """A stretch of the graph in which elements are only moved.

    Attributes:
        source: The value that enters it.
        interior: The values on the way, every one after the one it is computed from.
        blocks: The joint blocks of the interior.
        orders: Value that leaves it -> the axis of the source of which it holds a selection, and
            the positions; None for values that differ from the source in any other way, or if
            the model asks for sizes on the way.
    """

    source: fx.Node
    interior: tuple[fx.Node, ...]
    blocks: tuple[Block, ...]
    orders: dict[fx.Node, tuple[int, Atoms] | None]

    def is_ragged(self, keep: Keep) -> bool:
        """Whether some value on the way cannot be sliced."""
        return any(not _is_rectangular(keep[block.atoms]) for block in self.blocks)

    def rewrite(self, state: Slicing) -> None:
        """Emit what moves the channels that are left."""
        if None in self.orders.values():
            self._at_original_width(state)
            return
        for node, order in self.orders.items():
            assert order is not None
            dim, positions = order
            keep = state.kept_along(state.label(self.source), dim)
            chosen = (np.cumsum(keep) - 1)[positions[keep[positions]]]
            selected = state.select(state.twin(node), state.twin(self.source), dim, chosen)
            state.replace(node, selected)
        for node in reversed(self.interior):
            state.gm.graph.erase_node(state.twin(node))

    def _at_original_width(self, state: Slicing) -> None:
        """Put something in place of the removed channels, and take it out at the exits."""
        for node in self.interior:
            if self.source in node.all_input_nodes:
                state.widen(node, self.source)
        for node in self.orders:
            state.narrow(node)

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The operators that it consists of."""
        return (*self.interior, *self.orders)


def find_shuffles(state: Propagation) -> list[Shuffle]:
    """All shuffles of a graph that has been walked."""
    found: list[Shuffle] = []
    for source in state.gm.graph.nodes:
        label = state.labels.get(source)
        if isinstance(label, Label) and not _is_joint(label):
            for first in source.users:
                if _is_joint(state.labels.get(first)):
                    found.extend(_shuffle(source, first, state))
    return found


def _shuffle(source: fx.Node, first: fx.Node, state: Propagation) -> Iterator[Shuffle]:
    """The shuffle that begins with `first`, if it ends."""
    interior: list[fx.Node] = []
    exits: list[fx.Node] = []
    asked = False
    waiting = [(source, first)]
    while waiting:
        moved, node = waiting.pop()
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(node.meta.get("val"))):
            asked = True  # for a size
            continue
        if _moving_rule(node, state) is None or tensor_input(node) is not moved:
            return
        if _is_joint(state.labels[node]):
            interior.append(node)
            waiting.extend((node, user) for user in node.users)
        elif isinstance(state.labels[node], Label):
            exits.append(node)
        else:
            return
    blocks = tuple(b for node in interior for b in _joint_blocks(state.labels[node]))
    orders = dict.fromkeys(exits) if asked else _orders(source, interior, exits, state)
    yield Shuffle(source, tuple(interior), blocks, orders)


def _moving_rule(node: fx.Node, state: Propagation) -> Rule | None:
    """The rule of an operator that only moves elements."""
    rule = find_rule(node, state.gm)
    return rule if rule is not None and rule.moves(node) else None


def _orders(
    source: fx.Node, interior: list[fx.Node], exits: list[fx.Node], state: Propagation
) -> dict[fx.Node, tuple[int, Atoms] | None]:
    """How the exits permute one axis of the source: walk the stretch with every index followed."""
    probe = copy.copy(state)
    probe.identities, probe.unit = Identities(), "channel"
    label = Label(
        shape_of(source),
        tuple(
            Block((dim,), probe.identities.new(size))
            for dim, size in enumerate(shape_of(source))
            if size > 1
        ),
    )
    probe.labels = {source: label}
    for node in (*interior, *exits):
        rule = _moving_rule(node, state)
        assert rule is not None
        probe.labels[node] = rule.propagate(node, probe)
    return {node: _order(label, probe.labels[node]) for node in exits}


def _order(source: Label, label: Labels) -> tuple[int, Atoms] | None:
    """The one axis that differs, and the position in `source` of each of its indices."""
    if not isinstance(label, Label) or label.ndim != source.ndim:
        return None
    differs = None
    for dim, size in enumerate(label.shape):
        before, after = source.block(dim), label.block(dim)
        if before is None or after is None:
            if source.shape[dim] == size == 1:
                continue
            return None
        if len(after.dims) > 1 or not np.isin(after.atoms, before.atoms).all():
            return None
        if np.array_equal(before.atoms, after.atoms):
            continue
        if differs is not None:
            return None
        differs = dim, after.atoms - before.atoms[0]
    return differs


def _is_rectangular(keep: Keep) -> bool:
    """Whether what is kept is all combinations of some indices of every axis."""
    axes = range(keep.ndim)
    product = np.ones((1,) * keep.ndim, dtype=bool)
    for axis in axes:
        others = tuple(a for a in axes if a != axis)
        product = product & keep.any(axis=others, keepdims=True)
    return bool((product == keep).all())


def _joint_blocks(labels: Labels) -> Iterator[Block]:
    for label in labels if isinstance(labels, tuple) else (labels,):
        for block in label.blocks if label is not None else ():
            if len(block.dims) > 1:
                yield block


def _is_joint(labels: Labels) -> bool:
    return any(True for _ in _joint_blocks(labels))


__all__ = ["Shuffle", "find_shuffles"]
