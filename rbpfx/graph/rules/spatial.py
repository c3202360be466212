"""Operators on the trailing spatial axes, channel by channel: pooling, interpolation."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torchvision import ops  # noqa: F401  (loads the operators of torchvision)

from rbpfx.graph.operands import Labels
from rbpfx.graph.propagation import Propagation
from rbpfx.graph.provenance import Label
from rbpfx.graph.rules.base import Rule, argument, register, shape_of, tensor_input
from rbpfx.graph.rules.combine import broadcast


class Spatial(Rule):
    """Mixes positions within a channel, never channels.

    Args:
        spatial_dims: How many trailing axes are mixed; None for all after the channel axis.
    """

    def __init__(self, spatial_dims: int | None) -> None:
        self.spatial_dims = spatial_dims

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Hand the label on, for every result, and follow no mixed axis."""
        label = state.label(tensor_input(node))
        mixed = label.ndim - 2 if self.spatial_dims is None else self.spatial_dims
        spatial = set(range(label.ndim - mixed, label.ndim))
        label = state.collapse(label, spatial, "spatial axis of a pooling or interpolation")
        value = node.meta["val"]
        if isinstance(value, Tensor):
            return Label(shape_of(node), label.blocks)
        return tuple(Label(tuple(v.shape), label.blocks) for v in value)


class MaxUnpool(Rule):
    """Puts the elements of every channel back to where a pooling found them.

    Args:
        spatial_dims: How many trailing axes are mixed.
    """

    def __init__(self, spatial_dims: int) -> None:
        self.spatial_dims = spatial_dims

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Tie the channels of the values to those of their places."""
        sources, shape = [tensor_input(node), argument(node, 1, "indices")], shape_of(node)
        spatial = set(range(len(shape) - self.spatial_dims, len(shape)))
        reason = f"spatial axis of {node.name!r}"
        labels = [state.collapse(state.label(n), spatial, reason) for n in sources]
        return broadcast(state, [label.with_shape(shape) for label in labels], shape)


class Sampled(Rule):
    """Reads every channel at computed places: `grid_sample`, `roi_align`, `roi_pool`."""

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Follow the channels alone; places are no channels."""
        source, *places = node.all_input_nodes
        for place in places:
            state.pin(state.labels.get(place), f"places where {node.name!r} reads")
        label = state.label(source)
        rest = set(range(label.ndim)) - {1}
        blocks = state.collapse(label, rest, f"axis that {node.name!r} mixes").blocks
        value = node.meta["val"]
        if isinstance(value, Tensor):
            return Label(shape_of(node), blocks)
        return tuple(Label(tuple(v.shape), blocks) for v in value)


for _n in (1, 2, 3):
    _rule = Spatial(_n)
    for _name in ("max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool", "lp_pool"):
        for _function in (f"{_name}{_n}d", f"{_name}{_n}d_with_indices"):
            for _home in (F, torch):
                if hasattr(_home, _function):
                    register(_rule, getattr(_home, _function))
    register(MaxUnpool(_n), getattr(nn, f"MaxUnpool{_n}d"), getattr(F, f"max_unpool{_n}d"))
    for _name in ("MaxPool", "AvgPool", "AdaptiveMaxPool", "AdaptiveAvgPool", "LPPool"):
        register(_rule, getattr(nn, f"{_name}{_n}d"))
register(Spatial(None), F.interpolate, F.upsample, nn.Upsample)
register(Spatial(None), nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d)
register(Sampled(), F.grid_sample, torch.grid_sampler)
register(Sampled(), torch.ops.torchvision.roi_align, torch.ops.torchvision.roi_pool)
