"""Operators that rearrange what lies along axes: flip, roll, repeat, shuffles of pixels, patches.

Some of them mean something else on a shorter axis (a roll, a shuffle of channel groups). Where
channels have gone they become an `index_select`, or run at the original width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from rbpfx.graph.operands import Labels
from rbpfx.graph.propagation import Propagation, unfollowed
from rbpfx.graph.provenance import Atoms, Block, Label
from rbpfx.graph.rules.base import (
    Rule,
    argument,
    call_on,
    register,
    set_argument,
    setting,
    shape_of,
    tensor_input,
    value_of,
)
from rbpfx.graph.rules.combine import repeated
from rbpfx.graph.rules.movement import asked_for_examples, given_sizes, rescaled, sizes_of
from rbpfx.graph.slicing import Slicing


class PerAxis(Rule):
    """Rearranges every axis by itself; new axes may come in front.

    Args:
        dims: Name of the argument without which the operator flattens its input, the third one.
    """

    def __init__(self, dims: str | None = None) -> None:
        self.dims = dims

    def moves(self, node: fx.Node) -> bool:
        """Nothing but moving."""
        return True

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Pick the atoms like the data."""
        label = state.label(tensor_input(node))
        if self.entangles(node):
            for source in node.all_input_nodes:
                state.pin(state.labels.get(source), f"moved across axes or by data ({node.name!r})")
            return unfollowed(node)
        offset = len(shape_of(node)) - label.ndim
        blocks = []
        for block in label.blocks:
            orders = [self.order(node, state.gm, dim, label.shape) for dim in block.dims]
            dims = tuple(dim + offset for dim in block.dims)
            blocks.append(Block(dims, block.atoms[np.ix_(*orders)]))
        return Label(shape_of(node), tuple(blocks))

    def entangles(self, node: fx.Node) -> bool:
        """Whether a call moves across axes, or by data."""
        computed = [n for n in node.all_input_nodes[1:] if isinstance(value_of(n), Tensor)]
        flattens = self.dims is not None and argument(node, 2, self.dims) in (None, ())
        return bool(computed) or flattens

    def rewrite(self, node: fx.Node, state: Slicing) -> None:
        """Select the right channels where the operator would move them otherwise now."""
        label, chosen = state.label(tensor_input(node)), self.chosen(node, state)
        if not chosen:
            return
        others = [dim for dim in range(label.ndim) if dim not in chosen]
        if label.shape == shape_of(node) and all(
            (self.order(node, state.source, dim, label.shape) == np.arange(label.shape[dim])).all()
            for dim in others
        ):
            twin = state.twin(node)
            value = tensor_input(twin)
            for dim, positions in chosen.items():
                value = state.select(twin, value, dim, positions)
            state.replace(node, value)
        else:
            state.widen(node, tensor_input(node))
            state.narrow(node)

    def chosen(self, node: fx.Node, state: Slicing) -> dict[int, Atoms]:
        """Axis -> the channels to select, where the operator would move others now."""
        label = state.label(tensor_input(node))
        chosen: dict[int, Atoms] = {}
        for dim, size in state.changed_sizes(label).items():
            keep = state.kept_along(label, dim)
            order = self.order(node, state.source, dim, label.shape)
            wanted = (np.cumsum(keep) - 1)[order[keep[order]]]
            left = tuple(size if d == dim else n for d, n in enumerate(label.shape))
            if not np.array_equal(self.order(node, state.source, dim, left), wanted):
                chosen[dim] = wanted
        return chosen

    def order(self, node: fx.Node, gm: fx.GraphModule, dim: int, shape: tuple[int, ...]) -> Atoms:
        """Which index of an axis every index of it in the result comes from: by running it."""
        probe = torch.arange(float(shape[dim]), device="cpu")
        result = call_on(
            node, gm, probe.reshape([-1 if d == dim else 1 for d in range(len(shape))])
        )
        axis = dim + result.ndim - len(shape)
        index = tuple(slice(None) if d == axis else 0 for d in range(result.ndim))
        return np.asarray(result[index].numpy().astype(np.int64))


class Repeat(PerAxis):
    """repeat, tile, repeat_interleave: what is one along an axis may become many.

    Args:
        dims: Name of the argument without which the operator flattens its input.
    """

    def moves(self, node: fx.Node) -> bool:
        """A repetition of one makes new channels."""
        after, before = shape_of(node), shape_of(tensor_input(node))
        single = (*[1] * (len(after) - len(before)), *before)
        return all(old > 1 or new == 1 for old, new in zip(single, after, strict=True))

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Pick the atoms like the data; follow mere repetitions anew."""
        label = super().propagate(node, state)
        if not isinstance(label, Label) or self.entangles(node):
            return label
        examples = asked_for_examples(node) if self.dims is None else ()
        return repeated(state, label, shape_of(tensor_input(node)), examples)

    def rewrite(self, node: fx.Node, state: Slicing) -> None:
        """Write the new numbers of repetitions."""
        label, source = state.label(node), state.label(tensor_input(node))
        offset = label.ndim - source.ndim
        grown = {
            dim: size
            for dim, size in state.changed_sizes(label).items()
            if dim < offset or source.shape[dim - offset] == 1
        }
        if not grown or self.chosen(node, state):
            super().rewrite(node, state)  # which narrows all axes, if any
            return
        twin = state.twin(node)
        if self.dims is not None:
            ((dim, size),) = grown.items()
            count = argument(twin, 1, "repeats")
            set_argument(twin, 1, "repeats", rescaled(count, size, label.shape[dim], twin, state))
            twin.kwargs = {k: value for k, value in twin.kwargs.items() if k != "output_size"}
            return
        counts = sizes_of(given_sizes(twin), twin, label.ndim, state)
        for dim, size in grown.items():
            place = dim - label.ndim
            counts[place] = rescaled(counts[place], size, label.shape[dim], twin, state)
        twin.args = (tensor_input(twin), tuple(counts))
        twin.kwargs = {}


class ChannelShuffle(PerAxis):
    """Interleaves groups of channels."""

    def order(self, node: fx.Node, gm: fx.GraphModule, dim: int, shape: tuple[int, ...]) -> Atoms:
        """Which index of an axis every index of it in the result comes from."""
        order = np.arange(shape[dim])
        groups = int(value_of(setting(node, gm, 1, "groups", 1)))
        if dim == 1 and shape[dim] % groups == 0:
            return order.reshape(groups, -1).T.ravel()
        return order if dim != 1 else order[:0]  # it does not run


class PixelShuffle(Rule):
    """Spreads the channels of a block over space: they stay together."""

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Tie the channels of every block."""
        factor = int(value_of(setting(node, state.gm, 1, "upscale_factor", 1)))
        return merge_channels(node, state, factor**2, tensor_input(node), -3)


class PixelUnshuffle(Rule):
    """Turns blocks of space into channels: every channel becomes several."""

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Repeat the channels."""
        factor = int(value_of(setting(node, state.gm, 1, "downscale_factor", 1)))
        return split_channels(node, state, factor**2, -3)


class Unfold(Rule):
    """`F.unfold`: patches; every channel becomes one per position of the kernel."""

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Repeat the channels."""
        source = tensor_input(node)
        dim = len(shape_of(source)) - 3
        count = shape_of(node)[-2] // shape_of(source)[dim]
        return split_channels(node, state, count, dim)


class Fold(Rule):
    """`F.fold`: sums up patches; what becomes one channel stays together."""

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Tie the positions of the kernel."""
        source = tensor_input(node)
        count = shape_of(source)[-2] // shape_of(node)[-3]
        return merge_channels(node, state, count, source, -2)


def split_channels(node: fx.Node, state: Propagation, count: int, dim: int) -> Label:
    """Every channel becomes `count` neighbours; the axes after `dim` are mixed."""
    label = state.label(tensor_input(node))
    dim %= label.ndim
    label = state.collapse(label, range(dim + 1, label.ndim), f"mixed by {node.name!r}")
    block = label.block(dim)
    if block is None:
        return Label(shape_of(node), label.blocks)
    atoms = np.repeat(block.atoms, count, axis=block.dims.index(dim))
    return Label(shape_of(node), (*label.without(dim), Block(block.dims, atoms)))


def merge_channels(
    node: fx.Node, state: Propagation, count: int, source: fx.Node, dim: int
) -> Label:
    """`count` neighbours become one channel; the axes after `dim` are mixed."""
    label = state.label(source)
    dim %= label.ndim
    label = state.collapse(label, range(dim + 1, label.ndim), f"mixed by {node.name!r}")
    if label.block(dim) is None:
        return Label(shape_of(node), label.blocks)
    atoms = state.axis(label, dim, f"mixed by {node.name!r}").reshape(-1, count)
    state.identities.tie(atoms, atoms[:, :1])
    return Label(shape_of(node), (*label.without(dim), Block((dim,), atoms[:, 0])))


class UnfoldAxis(Rule):
    """`Tensor.unfold`: windows along one axis, which end up on a new last axis."""

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Follow all other axes."""
        label = state.label(tensor_input(node))
        dim = int(value_of(argument(node, 1, "dimension"))) % label.ndim
        label = state.collapse(label, {dim}, f"windows over channels ({node.name!r})")
        return Label(shape_of(node), label.blocks)


class Rotate(Rule):
    """`rot90`: channels along the two axes stay."""

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Follow all other axes."""
        label = state.label(tensor_input(node))
        dims = {d % label.ndim for d in value_of(argument(node, 2, "dims", (0, 1)))}
        label = state.collapse(label, dims, f"rotation of channels ({node.name!r})")
        return Label(shape_of(node), label.blocks)


_PER_AXIS = PerAxis()
register(_PER_AXIS, torch.flip, torch.fliplr, torch.flipud, "flip", "fliplr", "flipud")
register(Repeat(), torch.tile, "tile", "repeat")
register(ChannelShuffle(), nn.ChannelShuffle, torch.channel_shuffle, F.channel_shuffle)
register(PerAxis("dims"), torch.roll, "roll")
register(Repeat("dim"), torch.repeat_interleave, "repeat_interleave")
register(PixelShuffle(), nn.PixelShuffle, F.pixel_shuffle)
register(PixelUnshuffle(), nn.PixelUnshuffle, F.pixel_unshuffle)
register(Unfold(), nn.Unfold, F.unfold)
register(Fold(), nn.Fold, F.fold)
register(UnfoldAxis(), "unfold")
register(Rotate(), torch.rot90, "rot90")
