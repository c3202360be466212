"""Channel provenance: which channel every index of every axis of a tensor belongs to.

The identity of a channel is an integer, its *atom*. A `Label` carries the atoms of one tensor;
`Identities` hands out atoms, ties them together and pins them. Both are plain numpy and know
nothing of torch: operators are described with them in `rbpfx.graph.rules`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Atoms: TypeAlias = npt.NDArray[np.int64]
Keep: TypeAlias = npt.NDArray[np.bool_]
Index: TypeAlias = int | slice | Atoms


@dataclass(frozen=True, eq=False)
class Block:
    """Atoms over one or several axes that are followed jointly.

    One axis is the rule; several arise where one axis of channels is viewed as two, for example
    `(groups, channels per group)`.

    Attributes:
        dims: The axes, ascending.
        atoms: Array with one axis per entry of `dims`.
    """

    dims: tuple[int, ...]
    atoms: Atoms

    def aligned(self, dims: Sequence[int]) -> Atoms:
        """The atoms as an array over `dims` (a superset, ascending), size 1 where not followed."""
        shape = [self.atoms.shape[self.dims.index(d)] if d in self.dims else 1 for d in dims]
        return self.atoms.reshape(shape)

    def moved(self, where: dict[int, int]) -> Block:
        """The same block after axis `d` has become axis `where[d]`."""
        dims = [where[d] for d in self.dims]
        order = sorted(range(len(dims)), key=dims.__getitem__)
        return Block(tuple(sorted(dims)), self.atoms.transpose(order))


@dataclass(frozen=True, eq=False)
class Label:
    """The provenance of one tensor: its shape and disjoint blocks of followed axes.

    Axes in no block (batch, space, tokens) are not followed: they are always kept whole.
    """

    shape: tuple[int, ...]
    blocks: tuple[Block, ...] = ()

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def block(self, dim: int) -> Block | None:
        """The block that follows axis `dim`, if any."""
        dim %= self.ndim
        return next((b for b in self.blocks if dim in b.dims), None)

    def without(self, *dims: int) -> tuple[Block, ...]:
        """The blocks that touch none of the axes `dims`."""
        return tuple(b for b in self.blocks if not set(dims) & set(b.dims))

    def with_shape(self, shape: Sequence[int]) -> Label:
        """The same blocks on a tensor whose other axes have changed size."""
        return Label(tuple(shape), self.blocks)

    def permuted(self, order: Sequence[int]) -> Label:
        """Label of `tensor.permute(order)`."""
        order = [d % self.ndim for d in order]
        where = {old: new for new, old in enumerate(order)}
        return Label(
            tuple(self.shape[d] for d in order), tuple(b.moved(where) for b in self.blocks)
        )

    def unsqueezed(self, dim: int) -> Label:
        """Label of `tensor.unsqueeze(dim)`."""
        dim %= self.ndim + 1
        where = {d: d + (d >= dim) for d in range(self.ndim)}
        return Label(
            (*self.shape[:dim], 1, *self.shape[dim:]), tuple(b.moved(where) for b in self.blocks)
        )

    def indexed(self, dim: int, index: Index) -> Label:
        """Label of the tensor after `index` (an int, a slice or positions) on axis `dim`.

        An int removes the axis. The atoms it selects stay in use: pin them before.
        """
        dim %= self.ndim
        drops = isinstance(index, int)
        where = {d: d - (drops and d > dim) for d in range(self.ndim)}
        blocks = []
        for block in self.blocks:
            if dim in block.dims:
                axis = block.dims.index(dim)
                atoms = block.atoms[(slice(None),) * axis + (index,)]
                dims = tuple(d for d in block.dims if not (drops and d == dim))
                if not dims:
                    continue
                block = Block(dims, atoms)
            blocks.append(block.moved(where))
        size = () if drops else (len(np.arange(self.shape[dim])[index]),)
        return Label((*self.shape[:dim], *size, *self.shape[dim + 1 :]), tuple(blocks))


class Identities:
    """Hands out atoms, ties them together, pins them.

    Ties are collected and solved in bulk: analysing a network costs a few vectorised passes
    over all of its channels, not one Python step per channel.
    """

    def __init__(self) -> None:
        self._count = 0
        self._ties: list[tuple[Atoms, Atoms]] = []
        self._pins: list[tuple[Atoms, str]] = []

    def new(self, count: int) -> Atoms:
        """`count` fresh atoms."""
        self._count += count
        return np.arange(self._count - count, self._count, dtype=np.int64)

    def tie(self, first: Atoms, second: Atoms) -> None:
        """Make `first` and `second` (broadcast against each other) one channel, index by index."""
        if first is not second:
            if first.shape != second.shape:
                first, second = np.broadcast_arrays(first, second)
            self._ties.append((first.ravel(), second.ravel()))

    def pin(self, atoms: Atoms, reason: str) -> None:
        """Keep these atoms whole, and remember why."""
        if atoms.size:
            self._pins.append((atoms.ravel(), reason))

    def solve(self) -> Solution:
        """Resolve all ties and pins collected so far."""
        channel = np.arange(self._count, dtype=np.int64)
        if self._ties:
            first = np.concatenate([a for a, _ in self._ties])
            second = np.concatenate([b for _, b in self._ties])
            channel = _components(self._count, first, second)
        reason = np.zeros(self._count, dtype=np.int64)
        for code, (atoms, _) in reversed(list(enumerate(self._pins, start=1))):
            reason[channel[atoms]] = code
        reason = reason[channel]
        texts = ("", *(text for _, text in self._pins))
        return Solution(channel, reason > 0, reason, texts)


@dataclass(frozen=True, eq=False)
class Solution:
    """The outcome of `Identities.solve`.

    Attributes:
        channel: For every atom, the representative of the channel it belongs to, `(atoms,)`.
        pinned: For every atom, whether its channel must stay, `(atoms,)`.
        reason: For every atom, the place in `texts` of the first reason to pin it, `(atoms,)`.
        texts: The reasons; the first one is empty.
    """

    channel: Atoms
    pinned: Keep
    reason: Atoms
    texts: tuple[str, ...]

    def reasons(self, atoms: Atoms) -> list[str]:
        """Why these atoms stay, every reason once."""
        return list(dict.fromkeys(self.texts[code] for code in np.unique(self.reason[atoms])))


def _components(count: int, first: Atoms, second: Atoms) -> Atoms:
    """Connected components: for every vertex the smallest vertex of its component.

    Min-label hooking with pointer jumping (Shiloach and Vishkin, J. Algorithms 3, 1982), every
    round one vectorised pass over the edges that still join two labels.
    """
    label = np.arange(count, dtype=np.int64)
    while True:
        a, b = label[first], label[second]
        open_edges = a != b
        if not open_edges.any():
            return label
        first, second = first[open_edges], second[open_edges]
        a, b = a[open_edges], b[open_edges]
        np.minimum.at(label, np.maximum(a, b), np.minimum(a, b))
        while True:
            jumped = label[label]
            if (jumped == label).all():
                break
            label = jumped
