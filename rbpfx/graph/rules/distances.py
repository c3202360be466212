"""Similarities and distances: two values compared along an axis, which ends.

A channel that is zero in both of them adds nothing to a product, to a norm or to a difference, so
the axis is a read of either. Were only one of the two masked, the norm of the other one would still
count the channel.
"""

from __future__ import annotations

import torch
from torch import fx, nn
from torch.nn import functional as F

from rbpfx.graph.operands import Labels
from rbpfx.graph.propagation import Propagation
from rbpfx.graph.provenance import Label
from rbpfx.graph.rules.base import Rule, argument, register, setting, value_of
from rbpfx.graph.rules.combine import broadcast
from rbpfx.graph.rules.reduction import over_channels, without_axes


class Comparison(Rule):
    """Compares two values along one axis; this one: `cosine_similarity`."""

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Read the axis of both values, tie all others."""
        sources = [argument(node, place, name) for place, name in enumerate(("x1", "x2"))]
        labels = [state.label(source) for source in sources]
        shape = torch.broadcast_shapes(*(label.shape for label in self.side_by_side(labels)))
        dim = self.dim(node, state) % len(shape) - len(shape)  # one value may have fewer axes
        labels = [state.separate(label, {dim + label.ndim}) for label in labels]
        reason = self.obstacle(node, state)
        if reason is not None or not all(_spans(label, dim, shape[dim]) for label in labels):
            reason = reason or over_channels(node, state)
            labels = [state.collapse(label, {dim + label.ndim}, reason) for label in labels]
        product = broadcast(state, self.side_by_side(labels), shape, over_channels(node, state))
        if product.block(dim) is not None:
            for source, label in dict(zip(sources, labels, strict=True)).items():
                state.read(node, source, dim, label=label)
        return without_axes(node, product, {dim + len(shape)})

    def dim(self, node: fx.Node, state: Propagation) -> int:
        """The axis, counted in the broadcast shape."""
        return int(value_of(setting(node, state.gm, 2, "dim", 1)))

    def obstacle(self, node: fx.Node, state: Propagation) -> str | None:
        """Why a zero in both values is no nothing, if so."""
        return None

    def side_by_side(self, labels: list[Label]) -> list[Label]:
        """The two labels as they broadcast."""
        return labels


def _spans(label: Label, dim: int, size: int) -> bool:
    """Whether a value is followed along an axis, of which it has all indices."""
    return dim + label.ndim >= 0 and label.shape[dim] == size and label.block(dim) is not None


class Distance(Comparison):
    """`pairwise_distance`: the norm of a difference, to each entry of which it adds `eps`.

    Args:
        order: The module's name of the order.
    """

    def __init__(self, order: str) -> None:
        self.order = order

    def dim(self, node: fx.Node, state: Propagation) -> int:
        """The last axis."""
        return -1

    def obstacle(self, node: fx.Node, state: Propagation) -> str | None:
        """An `eps` counts the channels; below order one the gradient at a zero is no zero."""
        if value_of(setting(node, state.gm, 3, "eps", 1e-6)) != 0:
            return f"{node.name!r} adds eps to the difference of every channel (eps=0 lets them go)"
        order = value_of(setting(node, state.gm, 2, self.order, 2.0))
        return None if order >= 1 else over_channels(node, state)


class PairsOfRows(Distance):
    """`cdist`: distances of every row of the one value to every row of the other."""

    def obstacle(self, node: fx.Node, state: Propagation) -> str | None:
        """Orders below one."""
        order = value_of(argument(node, 2, "p", 2.0))
        return None if order >= 1 else over_channels(node, state)

    def side_by_side(self, labels: list[Label]) -> list[Label]:
        """`(..., rows, 1, channels)` and `(..., 1, rows, channels)`."""
        first, second = labels
        return [first.unsqueezed(-2), second.unsqueezed(-3)]


register(Comparison(), nn.CosineSimilarity, F.cosine_similarity, torch.cosine_similarity)
register(Distance("norm"), nn.PairwiseDistance)
register(Distance("p"), F.pairwise_distance, torch.pairwise_distance)
register(PairsOfRows("p"), torch.cdist)
