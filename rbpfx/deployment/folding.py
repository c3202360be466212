"""Folding: per-channel scales and shifts go into the layer whose result they are applied to.

BatchNorm in eval mode, the layer scale of a ConvNeXt and the frozen BatchNorm of a detector all
multiply every channel by a constant and add another. Where nothing else reads what the layer
before computes, its weights and its bias can do that. In between there may be permutations of the
axes, which the channel axis is followed through.
"""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from rbpfx.deployment.nodes import (
    LINEAR,
    are_alike,
    constant_of,
    replace,
    set_module,
    with_weights,
)
from rbpfx.graph.calls import module_of

_CONVOLUTIONS: dict[type, int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
_TRANSPOSED: dict[type, int] = {nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2, nn.ConvTranspose3d: 3}
_AXES_AFTER_CHANNELS: dict[type, int] = {**dict.fromkeys(LINEAR, 0), **_CONVOLUTIONS, **_TRANSPOSED}
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_ARITHMETIC = {
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul", "mul_"), "mul"),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div, "div", "div_"), "div"),
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), "add"),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, "sub", "sub_"), "sub"),
}
_BATCH_NORM_ARGUMENTS = "input running_mean running_var weight bias training momentum eps".split()


@dataclass(frozen=True)
class Affine:
    """`scale * x + shift` along one axis.

    Attributes:
        source: x.
        axis: The axis of x along which the constants lie; None for a single number.
        scale: (C,) or (), float64.
        shift: (C,) or (), float64.
    """

    source: fx.Node
    axis: int | None
    scale: Tensor
    shift: Tensor


def fold_affine(gm: fx.GraphModule) -> None:
    """Fold scales and shifts into the layers before them; the graph is changed in place."""
    for node in list(gm.graph.nodes):
        affine = _affine_of(gm, node)
        layer = None if affine is None else _layer_before(gm, affine)
        if affine is None or layer is None:
            continue
        module = module_of(layer, gm)
        assert module is not None
        set_module(gm, layer, _folded(module, affine.scale, affine.shift))
        replace(node, affine.source)


def _layer_before(gm: fx.GraphModule, affine: Affine) -> fx.Node | None:
    """The layer whose channels the affine map scales, if nobody else reads its result."""
    node, axis = affine.source, affine.axis
    while len(node.users) == 1:
        module = module_of(node, gm)
        if module is not None:
            trailing = _AXES_AFTER_CHANNELS.get(type(module))
            if trailing is None:
                return None
            channels = node.meta["val"].ndim - 1 - trailing
            return node if axis is None or axis == channels else None
        order = _permutation(node)
        if order is None:
            return None
        axis = axis if axis is None else order[axis]
        node = node.all_input_nodes[0]
    return None


def _permutation(node: fx.Node) -> list[int] | None:
    """Which axis of its input every axis of a permuted value is."""
    name = str(getattr(node.target, "__name__", node.target))
    if name not in ("permute", "transpose") or node.kwargs:
        return None
    ndim = node.meta["val"].ndim
    given = cast(Any, node.args[1:])
    axes = [int(a) % ndim for a in (given[0] if isinstance(given[0], (tuple, list)) else given)]
    if name == "permute":
        return axes
    order = list(range(ndim))
    order[axes[0]], order[axes[1]] = axes[1], axes[0]
    return order


def _affine_of(gm: fx.GraphModule, node: fx.Node) -> Affine | None:
    """The affine map that a node is, if it is one."""
    module = module_of(node, gm)
    if isinstance(module, _BATCH_NORMS) and type(module) in _BATCH_NORMS:
        statistics = (module.running_mean, module.running_var, module.weight, module.bias)
        return _batch_norm(node.all_input_nodes[0], *statistics, module.eps)
    if node.target is F.batch_norm:
        given = {**dict(zip(_BATCH_NORM_ARGUMENTS, node.args, strict=False)), **node.kwargs}
        if given.get("training", False) is not False:
            return None
        mean, variance, weight, bias = (
            constant_of(gm, given.get(name)) for name in _BATCH_NORM_ARGUMENTS[1:5]
        )
        eps = float(cast(float, given.get("eps", 1e-5)))
        return _batch_norm(node.all_input_nodes[0], mean, variance, weight, bias, eps)
    kind = _ARITHMETIC.get(node.target) if node.op.startswith("call") else None
    return None if kind is None else _arithmetic(gm, node, kind)


def _batch_norm(
    source: fx.Node,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Affine | None:
    if mean is None or variance is None:
        return None  # the statistics of the batch
    scale = (variance.double() + eps).rsqrt()
    scale = scale if weight is None else scale * weight.double()
    shift = -mean.double() * scale
    return Affine(source, 1, scale, shift if bias is None else shift + bias.double())


def _arithmetic(gm: fx.GraphModule, node: fx.Node, kind: str) -> Affine | None:
    if len(node.args) != 2 or node.kwargs:
        return None
    constants = [constant_of(gm, arg) for arg in node.args]
    first = constants[0] is None
    source, constant = node.args[not first], constants[first]
    if constants.count(None) != 1 or constant is None or not isinstance(source, fx.Node):
        return None
    if not (first or kind in ("add", "mul")) or not _keeps_kind(source, node):
        return None
    axis = _channel_axis(constant, node.meta["val"].ndim)
    if axis is not None and axis < 0:
        return None
    value = constant.detach().double().flatten()
    value = value[0] if axis is None else value
    one, zero = torch.ones_like(value), torch.zeros_like(value)
    if kind in ("mul", "div"):
        return Affine(source, axis, value if kind == "mul" else 1 / value, zero)
    return Affine(source, axis, one, value if kind == "add" else -value)


def _keeps_kind(source: fx.Node, node: fx.Node) -> bool:
    """Whether a value and what is computed from it have the same shape and type."""
    return are_alike(source, node) and bool(node.meta["val"].is_floating_point())


def _channel_axis(constant: Tensor, ndim: int) -> int | None:
    """The only axis along which a constant varies; None if it does not, -1 for more than one."""
    long = [axis for axis, size in enumerate(constant.shape) if size != 1]
    if not long:
        return None
    return long[0] + ndim - constant.ndim if len(long) == 1 else -1


def _folded(module: nn.Module, scale: Tensor, shift: Tensor) -> nn.Module:
    """A copy of a layer that computes `scale * layer(x) + shift`; computed in float64."""
    weight, bias = cast(Tensor, module.weight).detach(), cast(Tensor | None, module.bias)
    twin = copy.copy(module)
    twin._parameters = dict(module._parameters)
    outputs = _output_channels(module)
    scale, shift = (t.to(weight.device).expand(outputs) for t in (scale, shift))
    folded = weight.double() * _aligned(module, scale)
    shift = shift if bias is None else shift + bias.detach().double() * scale
    return with_weights(twin, folded.to(weight.dtype), shift.to(weight.dtype))


def _output_channels(module: nn.Module) -> int:
    name = "out_features" if isinstance(module, nn.Linear) else "out_channels"
    return int(getattr(module, name))


def _aligned(module: nn.Module, scale: Tensor) -> Tensor:
    """(C,) brought to where the output channels are in a layer's weight."""
    weight = cast(Tensor, module.weight)
    ones = (1,) * (weight.ndim - 2)
    if type(module) not in _TRANSPOSED:
        return scale.reshape(-1, 1, *ones)
    inputs, groups = weight.shape[0], cast(int, module.groups)
    by_group = scale.reshape(groups, 1, -1).expand(groups, inputs // groups, -1)
    return by_group.reshape(inputs, -1, *ones)
