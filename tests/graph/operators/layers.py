"""Layers with weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.graph.generator import Builder, Function, conv, divisors, operator


def _any_conv(b: Builder, x: int, transposed: bool) -> int | None:
    shape = b.shape(x)
    if len(shape) < 3:
        return None
    n, channels = len(shape) - 2, shape[1]
    kind = b.rng.choice(["plain", "plain", "grouped", "depthwise"])
    groups = 1
    if kind == "grouped":
        groups = b.rng.choice(divisors(channels) or [1])
    elif kind == "depthwise":
        groups = channels
    width = channels * b.rng.choice([1, 1, 2]) if groups == channels else None
    width = width or groups * b.rng.choice([2, 3, 4]) if groups > 1 else b.rng.choice([4, 6, 8])
    kernel = b.rng.choice([1, 3])
    bias = b.rng.random() < 0.7
    options = {"stride": b.rng.choice([1, 1, 2]), "padding": kernel // 2, "groups": groups}
    layer = conv(n, transposed)(channels, width, kernel, bias=bias, **options)
    if b.rng.random() < 0.7:
        return b.call(layer, x, fresh=True)
    weight = b.parameter(layer.weight.detach())
    offset = b.parameter(layer.bias.detach(), "bias") if bias else None
    home = b.rng.choice([F, torch])
    function = getattr(home, f"conv_transpose{n}d" if transposed else f"conv{n}d")

    def apply(m: Any, v: Any) -> Any:
        return function(v, getattr(m, weight), getattr(m, offset) if offset else None, **options)

    return b.add(apply, x, fresh=True)


@operator(4)
def convolution(b: Builder, x: int) -> int | None:
    return _any_conv(b, x, transposed=False)


@operator(1.5)
def transposed_convolution(b: Builder, x: int) -> int | None:
    return _any_conv(b, x, transposed=True)


@operator(2)
def linear(b: Builder, x: int) -> int | None:
    layer = nn.Linear(b.shape(x)[-1], b.rng.choice([4, 6, 8]), bias=b.rng.random() < 0.7)
    if b.rng.random() < 0.7 or layer.bias is None:
        return b.call(layer, x, fresh=True)
    weight, bias = b.parameter(layer.weight.detach()), b.parameter(layer.bias.detach(), "bias")
    return b.add(lambda m, v: F.linear(v, getattr(m, weight), bias=getattr(m, bias)), x)


@operator(2)
def batch_norm(b: Builder, x: int) -> int | None:
    shape = b.shape(x)
    cls = nn.BatchNorm1d if len(shape) < 4 else {4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    kind = b.rng.choice(["affine", "affine", "plain", "untracked", "functional"])
    if kind != "functional":
        layer = cls(shape[1], affine=kind == "affine", track_running_stats=kind != "untracked")
        return b.call(layer, x, fresh=True)
    number = len(b.program.steps)
    for name in ("running_mean", "running_var"):
        b.program.register_buffer(f"{name}{number}", torch.ones(shape[1]))
    scale, bias = b.parameter(torch.ones(shape[1])), b.parameter(torch.zeros(shape[1]), "bias")

    def apply(m: Any, v: Any) -> Any:
        mean, var = getattr(m, f"running_mean{number}"), getattr(m, f"running_var{number}")
        tensors = (mean, var, getattr(m, scale), getattr(m, bias))
        return F.batch_norm(v, *tensors, training=m.training)

    return b.add(apply, x)


@operator(1)
def shared_call(b: Builder, x: int) -> int | None:
    """Call a module a second time."""
    known = [name for name, shape in b.called if shape[1:] == b.shape(x)[1:]]
    if not known:
        return None
    name = b.rng.choice(known)
    return b.add(lambda m, v: m.get_submodule(name)(v), x)


@operator(1.5)
def tied_weight(b: Builder, x: int) -> int | None:
    """A new layer over an old layer's weight."""
    for name, shape in reversed(b.called):
        old = b.program.get_submodule(name)
        if shape[1:] == b.shape(x)[1:] and type(old) in (nn.Conv2d, nn.Linear):
            if isinstance(old, nn.Linear):
                new: nn.Module = nn.Linear(old.in_features, old.out_features)
            else:
                options = {"stride": old.stride, "padding": old.padding, "groups": old.groups}
                new = nn.Conv2d(old.in_channels, old.out_channels, old.kernel_size, **options)
            new.weight = old.weight
            return b.call(new, x)
    return None


@operator(0.8)
def computed_weight(b: Builder, x: int) -> int | None:
    """Weights that are the result of operators, or that have another use."""
    features = b.shape(x)[-1]
    weight, scale = b.parameter(torch.randn(6, features) * 0.3), b.parameter(torch.rand(6, 1))
    functions: list[Function] = [
        lambda m, v: F.linear(v, getattr(m, weight) * getattr(m, scale)),
        lambda m, v: F.linear(v, getattr(m, weight)) + getattr(m, weight).mean(),
        lambda m, v: F.linear(v, getattr(m, weight).tanh()),
        lambda m, v: F.linear(v, getattr(m, weight).t().contiguous().t()),
        lambda m, v: F.linear(F.linear(v, getattr(m, weight)), getattr(m, weight).t()),
        lambda m, v: F.linear(v, getattr(m, weight), getattr(m, scale)[:, 0]),
        lambda m, v: F.linear(v, torch.cat([getattr(m, weight), getattr(m, weight)[1:3]])),
        lambda m, v: F.linear(v, getattr(m, weight)[::2]),
    ]
    if b.rng.random() < 0.2:
        layer = nn.Linear(features, 6)
        nn.utils.parametrize.register_parametrization(layer, "weight", _Doubled())
        return b.call(layer, x)
    return b.add(b.rng.choice(functions), x)


class _Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2.0
