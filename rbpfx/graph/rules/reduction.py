"""Reductions: sums, means, norms, extrema over any axes.

To a sum, a mean or a norm a channel that is zero contributes nothing: it reads the channels, and
they may go. Every other reduction over channels keeps them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, fx

from rbpfx.graph.operands import Labels
from rbpfx.graph.propagation import Propagation, unfollowed
from rbpfx.graph.provenance import Label
from rbpfx.graph.rules.base import (
    Rule,
    argument,
    operator_name,
    register,
    shape_of,
    tensor_input,
    value_of,
)
from rbpfx.graph.rules.combine import COMBINE
from rbpfx.graph.slicing import Slicing


def keep_whole(
    node: fx.Node, state: Propagation, label: Label, dims: Iterable[int], reason: str
) -> Label:
    """Label of a value after an operator that mixes what lies along `dims`, and keeps the axes.

    The channels along them stay. A weight computed from parameters may still be sliced behind the
    operator, so it is followed no further.
    """
    mixed = set(dims)
    if not state.is_activation(node):
        return state.collapse(label, mixed, reason)
    whole = tuple(block for block in label.blocks if mixed.issuperset(block.dims))
    return Label(label.shape, (*state.collapse(label, mixed, reason).blocks, *whole))


def read_along(node: fx.Node, state: Propagation, label: Label, dims: Iterable[int]) -> Label:
    """Label of a value after an operator to which zeros along `dims` mean nothing.

    One followed axis is read, the one with most channels; others among `dims` stay whole. What is
    computed from parameters alone is not read either: there are no channels to be silenced yet.

    Args:
        node: The operator.
        state: The walk.
        label: The label of its first argument, as the operator sees it.
        dims: The axes.
    """
    source = tensor_input(node)
    mixed = {d % label.ndim for d in dims}
    single = [b for b in label.blocks if len(b.dims) == 1 and b.dims[0] in mixed]
    readable = state.is_activation(source) and source.meta["val"].is_floating_point()
    chosen = max(single, key=lambda b: len(b.atoms), default=None) if readable else None
    rest = Label(label.shape, tuple(b for b in label.blocks if b is not chosen))
    rest = keep_whole(node, state, rest, mixed, over_channels(node, state))
    if chosen is None:
        return rest
    state.read(node, source, chosen.dims[0], label=label)
    return Label(label.shape, (*rest.blocks, chosen))


def over_channels(node: fx.Node, state: Propagation) -> str:
    """The reason why channels that an operator mixes stay."""
    return f"{operator_name(node, state.gm)} over channels ({node.name!r})"


class Reduce(Rule):
    """Ends the axes it reduces over; channels reduced over stay.

    Args:
        dim: Position of the argument that names the axes.
        default: The axis that a call without one means; None for all of them.
    """

    def __init__(self, dim: int = 1, default: int | None = None) -> None:
        self.dim = dim
        self.default = default

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Follow the axes that stay, in every result."""
        label = state.label(tensor_input(node))
        reduced = self.reduced(node, label.ndim)
        return without_axes(node, self.mixed(node, state, label, reduced), reduced)

    def mixed(self, node: fx.Node, state: Propagation, label: Label, reduced: set[int]) -> Label:
        """Label of the input with what the reduction says of the axes it ends."""
        return keep_whole(node, state, label, reduced, over_channels(node, state))

    def reduced(self, node: fx.Node, ndim: int) -> set[int]:
        """The axes that end."""
        dims = value_of(argument(node, self.dim, "dim", self.default))
        if isinstance(dims, int) and not isinstance(dims, bool):
            dims = (dims,)
        # A number of degrees of freedom or a flag in that place: no axes were given.
        named = dims if isinstance(dims, (tuple, list)) else ()
        return {int(value_of(d)) % ndim for d in named} or set(range(ndim))


class Sum(Reduce):
    """`sum`, and norms of order one and more: zeros add nothing, so channels may go."""

    def mixed(self, node: fx.Node, state: Propagation, label: Label, reduced: set[int]) -> Label:
        """Read one axis of channels."""
        return read_along(node, state, label, reduced)


class Norm(Sum):
    """Vector norms: below order one the gradient at a zero is no zero."""

    def mixed(self, node: fx.Node, state: Propagation, label: Label, reduced: set[int]) -> Label:
        """Read one axis of channels if the order is at least one."""
        name = "ord" if node.target is torch.linalg.vector_norm else "p"
        order = value_of(argument(node, 1, name, 2))
        if order == "fro" or (isinstance(order, (int, float)) and order >= 1):
            return super().mixed(node, state, label, reduced)
        return keep_whole(node, state, label, reduced, over_channels(node, state))


class LinalgNorm(Norm):
    """`torch.linalg.norm`: a norm of vectors, or one of matrices, which keeps the channels."""

    def mixed(self, node: fx.Node, state: Propagation, label: Label, reduced: set[int]) -> Label:
        """Read one axis of channels if the norm is one of vectors."""
        order = value_of(argument(node, 1, "ord"))
        if order is None or order == "fro":
            return read_along(node, state, label, reduced)
        if len(reduced) == 1 and isinstance(order, (int, float)) and order >= 1:
            return read_along(node, state, label, reduced)
        return keep_whole(node, state, label, reduced, over_channels(node, state))


class Quantile(Reduce):
    """`quantile`: for several of them the result has an axis of its own, in front."""

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """A reduction, and the axis."""
        label = state.label(tensor_input(node))
        reduced = self.reduced(node, label.ndim)
        label = self.mixed(node, state, label, reduced)
        which = value_of(argument(node, 1, "q"))
        several = isinstance(which, Tensor) and which.ndim > 0
        shape = shape_of(node)
        if several:
            return _ended(label, reduced, shape[1:]).unsqueezed(0).with_shape(shape)
        return _ended(label, reduced, shape)


class Difference(Reduce):
    """`diff`: the axis becomes shorter; what it is lengthened by before is not followed."""

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Follow the other axes."""
        if any(argument(node, i, name) is not None for i, name in ((3, "prepend"), (4, "append"))):
            state.pin_call(node, f"{operator_name(node, state.gm)} of several values")
            return unfollowed(node)
        return super().propagate(node, state)


class Mean(Sum):
    """`mean`: a sum, divided by the original number of channels."""

    def rewrite(self, node: fx.Node, state: Slicing) -> None:
        """Scale the mean over the channels that are left."""
        label = state.label(tensor_input(node))
        left = 1.0
        for dim, size in state.changed_sizes(label).items():
            if dim in self.reduced(node, label.ndim):
                left *= size / label.shape[dim]
        if left != 1:
            twin = state.twin(node)
            with state.gm.graph.inserting_after(twin):
                scaled = state.gm.graph.call_function(operator.mul, (twin, left))
            twin.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)


class Extremum(Reduce):
    """`max`, `min`: over one axis, over all, or of two tensors element by element."""

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """A reduction, unless there is a second tensor."""
        if isinstance(value_of(argument(node, 1, "other")), Tensor):
            return COMBINE.propagate(node, state)
        return super().propagate(node, state)


def without_axes(node: fx.Node, label: Label, reduced: set[int]) -> Labels:
    """Labels of the results: the axes that stay, moved up unless the reduced ones are kept."""
    value = node.meta["val"]
    if isinstance(value, Tensor):
        return _ended(label, reduced, value.shape)
    return tuple(_ended(label, reduced, v.shape) for v in value)


def _ended(label: Label, reduced: set[int], shape: Sequence[int]) -> Label:
    """A label of this shape after some axes have ended, which may be kept."""
    stay = [d for d in range(label.ndim) if d not in reduced]
    where = {old: new for new, old in enumerate(stay)}
    blocks = tuple(b for b in label.blocks if reduced.isdisjoint(b.dims))
    if len(shape) < label.ndim:
        blocks = tuple(b.moved(where) for b in blocks)
    return Label(tuple(shape), blocks)


def _register(rule: Rule, names: str) -> None:
    for name in names.split():
        if hasattr(torch, name):
            register(rule, getattr(torch, name))
        if hasattr(Tensor, name):
            register(rule, name)


_register(Sum(), "sum nansum")
_register(Mean(), "mean")
_register(Norm(dim=2), "norm")
register(Norm(dim=2), torch.linalg.vector_norm)
register(LinalgNorm(dim=2), torch.linalg.norm)
_register(Reduce(), "amax amin aminmax logsumexp prod any all count_nonzero argmax argmin")
_register(Reduce(), "var std var_mean std_mean median nanmedian nanmean")
_register(Reduce(default=-1), "mode")
_register(Reduce(dim=2, default=-1), "topk kthvalue")
_register(Quantile(dim=2), "quantile nanquantile")
_register(Difference(dim=2, default=-1), "diff")
_register(Extremum(), "max min")
