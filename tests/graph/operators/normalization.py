"""Operators that mix or normalise channels: norms, softmax, reductions, standardised weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tests.graph.generator import Builder, Function, conv, divisors, operator


@operator(1.5)
def layer_norm(b: Builder, x: int) -> int | None:
    """LayerNorm and RMSNorm over the last axes, as modules and functions."""
    shape = b.shape(x)
    axes = b.rng.choice([1, 1, 1, 2, len(shape) - 1])
    sizes = shape[-min(axes, len(shape) - 1) :]
    affine = b.rng.random() < 0.8
    kind = b.rng.choice(["layer", "rms", "bare", "channels_first", "F.layer", "F.rms"])
    if kind == "layer":
        return b.call(nn.LayerNorm(sizes, elementwise_affine=affine), x)
    if kind == "rms":
        return b.call(nn.RMSNorm(sizes, elementwise_affine=affine), x)
    if kind == "bare":
        return b.call(nn.LayerNorm(sizes, eps=0.1, bias=False), x)
    if kind == "channels_first":
        norm = b.module(nn.LayerNorm(shape[1], elementwise_affine=affine))
        return b.add(lambda m, v: m.get_submodule(norm)(v.movedim(1, -1)).movedim(-1, 1), x)
    weight, bias = b.parameter(torch.rand(sizes)), b.parameter(torch.rand(sizes), "bias")
    functions: list[Function] = [
        lambda m, v: F.layer_norm(v, v.shape[-len(sizes) :], getattr(m, weight), getattr(m, bias)),
        lambda m, v: F.layer_norm(v, sizes, getattr(m, weight) + 1.0, eps=0.01),
        lambda m, v: torch.layer_norm(v, sizes),
    ]
    if kind == "F.rms":
        functions = [
            lambda m, v: F.rms_norm(v, sizes, getattr(m, weight), 0.1),
            lambda m, v: F.rms_norm(v, sizes, weight=getattr(m, weight)),
            lambda m, v: torch.rms_norm(v, sizes),
        ]
    return b.add(b.rng.choice(functions), x)


@operator(1.5)
def group_norm(b: Builder, x: int) -> int | None:
    shape = b.shape(x)
    channels = shape[1]
    groups = b.rng.choice([1, *divisors(channels), channels])
    if shape[2:].count(1) == len(shape) - 2 and groups == channels:
        return None  # nothing but zeros would be left
    if b.rng.random() < 0.6:
        return b.call(nn.GroupNorm(groups, channels, affine=b.rng.random() < 0.8), x)
    weight, bias = b.parameter(torch.rand(channels)), b.parameter(torch.rand(channels), "bias")
    functions: list[Function] = [
        lambda m, v: F.group_norm(v, groups, getattr(m, weight), getattr(m, bias), 0.01),
        lambda m, v: F.group_norm(v, num_groups=groups, weight=getattr(m, weight)),
        lambda m, v: torch.group_norm(v, groups),
    ]
    return b.add(b.rng.choice(functions), x)


@operator(1)
def channel_norm(b: Builder, x: int) -> int | None:
    """InstanceNorm, local response normalisation, normalisation to unit length."""
    shape = b.shape(x)
    n = len(shape) - 2
    axis = b.rng.choice([1, 1, -1])
    functions: list[Function] = [
        lambda v: F.normalize(v, dim=axis),
        lambda v: F.normalize(v, p=1.0, dim=axis),
        lambda v: F.normalize(v, 3.0),
        lambda v: v / v.norm(dim=axis, keepdim=True).clamp(min=0.1),
        lambda v: v / (torch.linalg.vector_norm(v, dim=axis, keepdim=True) + 0.1),
        lambda v: v * torch.rsqrt(v.pow(2).mean(axis, keepdim=True) + 0.1),
        lambda v: (v - v.mean(axis, True)) / (v.var(axis, keepdim=True, correction=0) + 0.1).sqrt(),
    ]
    if n >= 1:
        functions.append(lambda v: F.local_response_norm(v, 3))
    if n >= 1 and max(shape[2:]) > 1 and b.rng.random() < 0.6:
        kind = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[n - 1]
        options = {name: b.rng.random() < 0.5 for name in ("affine", "track_running_stats")}
        if b.rng.random() < 0.7:
            return b.call(kind(shape[1], **options), x)
        weight = b.parameter(torch.rand(shape[1]))
        return b.add(lambda m, v: F.instance_norm(v, weight=getattr(m, weight)), x)
    function = b.rng.choice(functions)
    return b.add(lambda m, v: function(v), x)


@operator(1)
def softmax(b: Builder, x: int) -> int | None:
    """Softmax and others that mix along an axis and keep it."""
    axis = b.rng.choice([1, -1, 2 if len(b.shape(x)) > 2 else 1])
    functions: list[Function] = [
        lambda v: F.softmax(v, dim=axis),
        lambda v: v.softmax(axis),
        lambda v: torch.log_softmax(v, axis) * 0.3,
        lambda v: F.softmin(v, dim=axis),
        lambda v: v.cumsum(dim=axis) * 0.3,
        lambda v: v.sort(axis)[0],
        lambda v: v * v.softmax(axis).argmax(axis, keepdim=True).to(v.dtype),
        lambda v: torch.cummax(v, axis)[0],
    ]
    if b.rng.random() < 0.3:
        return b.call(b.rng.choice([nn.Softmax, nn.LogSoftmax, nn.Softmin])(dim=axis), x)
    function = b.rng.choice(functions)
    return b.add(lambda m, v: function(v), x)


@operator(1.5)
def channel_reduction(b: Builder, x: int) -> int | None:
    """Reductions over any axes, with one or several results."""
    n = len(b.shape(x))
    dims = sorted(b.rng.sample(range(1, n), b.rng.randint(1, n - 1)))
    axis, keep = b.rng.choice([1, -1, 1]), b.rng.random() < 0.7
    functions: list[Function] = [
        lambda v: v.sum(dims, keepdim=keep) * 0.2,
        lambda v: v.mean(dims, keepdim=keep),
        lambda v: torch.mean(v, axis, keepdim=keep),
        lambda v: v.mean(axis).unsqueeze(axis) * v,
        lambda v: v * v.mean(),
        lambda v: v + v.sum() * 0.01,
        lambda v: v * (v.norm() * 0.1).tanh(),
        lambda v: torch.norm(v, 2, axis, keep),
        lambda v: (v.var(axis, keepdim=keep, correction=0) + 0.1).sqrt(),
        lambda v: torch.var_mean(v, dims, correction=0, keepdim=True)[1] * v,
        lambda v: v.max(axis, keepdim=keep)[0],
        lambda v: torch.min(v, dim=axis, keepdim=keep).values,
        lambda v: v * torch.max(v, axis, keepdim=True).indices.to(v.dtype),
        lambda v: torch.max(v, v.mean(axis, keepdim=True)),
        lambda v: (v.abs() + 0.5).prod(axis, keepdim=keep).tanh(),
        lambda v: v * (v > 0).any(axis, keepdim=True),
        lambda v: v * (v > 0.5).sum(axis, keepdim=True),
        lambda v: v - v.median(),
        lambda v: v.logsumexp(dims, keepdim=keep),
    ]
    function = b.rng.choice(functions)
    return b.add(lambda m, v: function(v), x)


@operator(1)
def spatial_attention(b: Builder, x: int) -> int | None:
    """The gate of CBAM: mean and maximum over channels decide where to look."""
    shape = b.shape(x)
    if len(shape) != 4:
        return None
    name = b.module(nn.Conv2d(2, 1, 3, padding=1))
    only_mean = b.module(nn.Conv2d(1, 1, 3, padding=1))

    def cbam(m: Any, v: Any) -> Any:
        pooled = torch.cat([v.mean(1, keepdim=True), v.max(1, keepdim=True)[0]], dim=1)
        return v * m.get_submodule(name)(pooled).sigmoid()

    def mean(m: Any, v: Any) -> Any:
        return v * m.get_submodule(only_mean)(torch.mean(v, dim=1, keepdim=True)).sigmoid()

    return b.add(b.rng.choice([cbam, mean]), x)


@operator(1)
def standardized_weight(b: Builder, x: int) -> int | None:
    """A convolution with a weight whose rows are standardised in the graph."""
    shape = b.shape(x)
    if len(shape) != 4:
        return None
    width = b.rng.choice([4, 6])
    groups = b.rng.choice([1, 1, *divisors(shape[1])])
    width *= groups if width % groups else 1
    layer = conv(2)(shape[1], width, 3, padding=1, groups=groups)
    weight, bias = b.parameter(layer.weight.detach()), b.parameter(torch.rand(width), "bias")
    gain = b.parameter(torch.rand(width, 1, 1, 1), "gain")

    def by_batch_norm(m: Any) -> Any:
        w = getattr(m, weight)
        scale = (getattr(m, gain) * 0.7).view(-1)
        flat = w.reshape(1, width, -1)
        return F.batch_norm(flat, None, None, weight=scale, training=True, eps=0.1).reshape_as(w)

    def by_moments(m: Any) -> Any:
        w = getattr(m, weight)
        w = w - w.mean(dim=[1, 2, 3], keepdim=True)
        return w / (torch.var(w, dim=[1, 2, 3], keepdim=True, unbiased=False) + 0.1).sqrt()

    def by_norm(m: Any) -> Any:
        w = getattr(m, weight)
        return getattr(m, gain) * w / torch.linalg.vector_norm(w, dim=(1, 2, 3), keepdim=True)

    standardized = b.rng.choice([by_batch_norm, by_moments, by_norm])

    def apply(m: Any, v: Any) -> Any:
        return F.conv2d(v, standardized(m), getattr(m, bias), padding=1, groups=groups)

    return b.add(apply, x, fresh=True)
