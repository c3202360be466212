"""Normalisations.

One that treats every channel on its own (BatchNorm, InstanceNorm) lets channels pass. One that
mixes channels is asked what the analysis was asked for: "freeze" keeps them, "exact" reads them
and emits a normalisation over the original count, "sliced" lets them pass although it is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

from rbpfx.graph import exact_norms
from rbpfx.graph.calls import call_leaf, module_of
from rbpfx.graph.operands import Labels
from rbpfx.graph.propagation import Propagation
from rbpfx.graph.provenance import Atoms, Block, Label
from rbpfx.graph.rules.base import (
    Rule,
    argument,
    register,
    set_argument,
    setting,
    tensor_input,
    value_of,
)
from rbpfx.graph.rules.generic import PerChannel
from rbpfx.graph.rules.reduction import keep_whole, over_channels, read_along
from rbpfx.graph.slicing import Slicing

_TENSORS = ("running_mean", "running_var", "weight", "bias")
_TORCH_TENSORS = ("weight", "bias", "running_mean", "running_var")


class BatchNorm(PerChannel):
    """Statistics, scale and shift belong to the channels.

    Args:
        tensors: The per-channel tensors in the order in which a functional call takes them.
    """

    def __init__(self, *tensors: str) -> None:
        super().__init__(*tensors, mixes=True, size="num_features")


class InstanceNorm(BatchNorm):
    """As BatchNorm, for every example; the modules also take one example without batch axis."""

    def channel_dim(self, node: fx.Node, ndim: int, gm: fx.GraphModule) -> int:
        """The channel axis: in front of the spatial ones, of which the module's class tells."""
        module = module_of(node, gm)
        classes = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
        spatial = [n for n, cls in enumerate(classes, start=1) if isinstance(module, cls)]
        return ndim - spatial[0] - 1 if spatial else 1


class Mixing(Rule):
    """A normalisation over channels: what the options ask for.

    Args:
        parameters: Names of the parameters, which functional calls take from position 2 on; `eps`
            comes next.
        eps: Its default.
        exact_module: The class that `rewrite` emits with `normalization="exact"`.
        exact_function: The same for functional calls.
        is_exact: Whether the operator is one of these already.
    """

    def __init__(
        self,
        parameters: tuple[str, ...],
        eps: float | None,
        exact_module: type[nn.Module],
        exact_function: Callable[..., Tensor],
        *,
        is_exact: bool = False,
    ) -> None:
        self.parameters = parameters
        self.eps = eps
        self.exact_module = exact_module
        self.exact_function = exact_function
        self.is_exact = is_exact

    def statistics(self, node: fx.Node, state: Propagation, label: Label, dims: set[int]) -> Label:
        """Label of the result of statistics over `dims`."""
        if self.is_exact or state.normalization == "exact":
            return read_along(node, state, label, dims)
        if state.normalization == "freeze":
            reason = f"{over_channels(node, state)} (normalization='exact' would let them go)"
            return keep_whole(node, state, label, dims, reason)
        entangled = tuple(b for b in label.blocks if len(b.dims) > 1)
        passing = tuple(b for b in label.blocks if len(b.dims) == 1)
        for block in passing:
            if dims.issuperset(block.dims):
                name = str(node.target) if node.op == "call_module" else node.name
                known = state.inexact.get(name, block.atoms[:0])
                state.inexact[name] = np.concatenate([known, block.atoms])
        entangled = state.collapse(Label(label.shape, entangled), dims, "normalised").blocks
        return Label(label.shape, (*passing, *entangled))

    def bind(self, node: fx.Node, state: Propagation, axes: list[Atoms]) -> None:
        """Say that weight and bias are indexed by these channels."""
        for position, name in enumerate(self.parameters, start=2):
            operand = state.operand(node, position, name)
            if operand is not None:
                for dim, atoms in enumerate(axes):
                    operand.bind(dim, atoms)

    def emitted_module(self, node: fx.Node, state: Slicing) -> Any:
        """The module of the emitted call; without parameters, one of its own.

        All calls of a module with a weight keep the same channels.
        """
        twin = state.twin(node)
        module = module_of(twin, state.gm)
        if module is not None and not any(True for _ in module.parameters()):
            return state.own_module(twin)
        return module

    def emit_exact(self, node: fx.Node, state: Slicing, sizes: tuple[int, ...], count: int) -> None:
        """Call the exact function in place of torch's."""
        twin = state.twin(node)
        tensors = [argument(twin, i, name) for i, name in enumerate(self.parameters, start=2)]
        eps = argument(twin, 2 + len(tensors), "eps", self.eps)
        with state.gm.graph.inserting_before(twin):
            args = (tensor_input(twin), sizes, *tensors, eps, count)
            state.replace(node, call_leaf(state.gm.graph, self.exact_function, args))

    def original_count(self, node: fx.Node, gm: fx.GraphModule, default: int) -> int:
        """How many entries or channels the statistics are over before anything has gone."""
        if self.is_exact:
            return int(setting(node, gm, 3 + len(self.parameters), "original_count", None))
        return default


class LayerNorm(Mixing):
    """LayerNorm and RMSNorm: statistics over the last axes."""

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Bind the parameters to the axes that are normalised."""
        label = state.label(tensor_input(node))
        dims = self._dims(node, label.ndim, state.gm)
        label = self.statistics(node, state, label, set(dims))
        reason = f"{over_channels(node, state)} that are not followed"
        self.bind(node, state, [state.axis(label, dim, reason) for dim in dims])
        return label

    def rewrite(self, node: fx.Node, state: Slicing) -> None:
        """Name the new sizes; where channels were read, divide by the original count."""
        label = state.label(node)
        changed = state.changed_sizes(label)
        dims = self._dims(node, label.ndim, state.source)
        if changed.keys().isdisjoint(dims):
            return
        shape = tuple(changed.get(d, label.shape[d]) for d in dims)
        count = self.original_count(node, state.source, prod(label.shape[d] for d in dims))
        exact = state.is_read(node)
        module = self.emitted_module(node, state)
        if module is not None:
            module.normalized_shape = shape
            if exact:
                exact_norms.take_over(module, self.exact_module, count)
        elif exact:
            self.emit_exact(node, state, shape, count)
        else:
            set_argument(state.twin(node), 1, "normalized_shape", shape)

    def _dims(self, node: fx.Node, ndim: int, gm: fx.GraphModule) -> list[int]:
        shape = value_of(setting(node, gm, 1, "normalized_shape", ()))
        return list(range(ndim - len(shape), ndim))


class GroupNorm(Mixing):
    """GroupNorm: statistics over runs of channels, and over all other axes but the batch's.

    With several groups that stay apart, a unit is a whole normalisation group: when it goes, no
    other group notices.
    """

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Bind the parameters to the channels."""
        label = state.label(tensor_input(node))
        spatial = set(range(2, label.ndim))
        label = keep_whole(node, state, label, spatial, over_channels(node, state))
        groups = len(self._sizes(node, label, state.gm))
        exact = self.is_exact or state.normalization == "exact"
        if exact or groups == 1:
            label = self.statistics(node, state, label, {1})
        channels = state.axis(label, 1, f"{over_channels(node, state)} that are not followed")
        if not exact:
            by_group = channels.reshape(groups, -1)
            if groups > 1:
                state.identities.tie(by_group[:, 1:], by_group[:, :1])
        self.bind(node, state, [channels])
        return Label(label.shape, (*label.without(1), Block((1,), channels)))

    def rewrite(self, node: fx.Node, state: Slicing) -> None:
        """Name the groups that are left; of a part of one, say how large it was."""
        label = state.label(node)
        keep = state.kept_along(label, 1)
        if keep.all():
            return
        before = self._sizes(node, label, state.source)
        parts = np.split(keep, np.cumsum(before)[:-1])
        sizes = tuple(int(part.sum()) for part in parts if part.any())
        count = self.original_count(node, state.source, max(before))
        plain = not state.is_read(node) or all(size == count for size in sizes)
        module = self.emitted_module(node, state)
        if module is not None:
            module.num_channels, module.num_groups = sum(sizes), len(sizes)
            if not plain or self.is_exact:
                module.group_sizes = sizes
                exact_norms.take_over(module, self.exact_module, count)
        elif not plain or self.is_exact:
            self.emit_exact(node, state, sizes, count)
        else:
            set_argument(state.twin(node), 1, "num_groups", len(sizes))

    def _sizes(self, node: fx.Node, label: Label, gm: fx.GraphModule) -> tuple[int, ...]:
        """Channels of every group."""
        if self.is_exact:
            return tuple(setting(node, gm, 1, "group_sizes", ()))
        groups = int(value_of(setting(node, gm, 1, "num_groups", 1)))
        return (label.shape[1] // groups,) * groups


class Normalize(Rule):
    """`F.normalize`: divides by a norm along an axis, to which zeros add nothing."""

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Read the axis and hand it on."""
        label = state.label(tensor_input(node))
        dims = value_of(argument(node, 2, "dim", 1))
        dims = {d % label.ndim for d in ((dims,) if isinstance(dims, int) else dims)}
        if argument(node, 1, "p", 2.0) >= 1:
            return read_along(node, state, label, dims)
        return keep_whole(node, state, label, dims, over_channels(node, state))


class LocalResponseNorm(Rule):
    """Divides by what neighbouring channels hold: all of them stay."""

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Hand the label on."""
        label = state.label(tensor_input(node))
        return keep_whole(node, state, label, {1}, over_channels(node, state))


register(BatchNorm(*_TENSORS), nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
register(BatchNorm(*_TENSORS), F.batch_norm, FrozenBatchNorm2d)
register(BatchNorm(*_TORCH_TENSORS), torch.batch_norm)
register(
    InstanceNorm(*_TENSORS),
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    F.instance_norm,
)
register(InstanceNorm(*_TORCH_TENSORS), torch.instance_norm)
_LAYER_NORM = (("weight", "bias"), 1e-5, exact_norms.ExactLayerNorm, exact_norms.layer_norm)
_RMS_NORM = (("weight",), None, exact_norms.ExactRMSNorm, exact_norms.rms_norm)
_GROUP_NORM = (("weight", "bias"), 1e-5, exact_norms.ExactGroupNorm, exact_norms.group_norm)
register(LayerNorm(*_LAYER_NORM), nn.LayerNorm, F.layer_norm, torch.layer_norm)
register(LayerNorm(*_LAYER_NORM, is_exact=True), *_LAYER_NORM[2:])
register(LayerNorm(*_RMS_NORM), nn.RMSNorm, F.rms_norm, torch.rms_norm)
register(LayerNorm(*_RMS_NORM, is_exact=True), *_RMS_NORM[2:])
register(GroupNorm(*_GROUP_NORM), nn.GroupNorm, F.group_norm, torch.group_norm)
register(GroupNorm(*_GROUP_NORM, is_exact=True), *_GROUP_NORM[2:])
register(Normalize(), F.normalize)
register(LocalResponseNorm(), nn.LocalResponseNorm, F.local_response_norm)
