"""Operators on one tensor, element by element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tests.graph.generator import Builder, Function, operator

_ACTIVATIONS: list[Function] = [
    lambda v: F.gelu(v),
    lambda v: torch.tanh(v),
    lambda v: v.sigmoid(),
    lambda v: torch.relu(v) + 0.5,
    lambda v: F.softplus(v),
    lambda v: v.cos(),
    lambda v: F.leaky_relu(v, negative_slope=0.2),
    lambda v: torch.clamp(v, -1.0, 1.5),
    lambda v: 1.0 - v,
    lambda v: -v,
    lambda v: (v * 0.5) ** 2,
    lambda v: v.mul(0.7).add(0.2),
    lambda v: v.clamp(max=1.0).exp().contiguous(),
    lambda v: torch.sigmoid(input=v),
    lambda v: F.hardswish(v),
    lambda v: F.silu(v, inplace=False).to(v.dtype).type_as(v),
]


_MODULES: list[Callable[[], nn.Module]] = [
    nn.ReLU,
    nn.Sigmoid,
    nn.Hardsigmoid,
    nn.GELU,
    nn.Softplus,
    nn.Identity,
    lambda: nn.ELU(0.5),
]


@operator(2.5)
def activation(b: Builder, x: int) -> int | None:
    if b.rng.random() < 0.4:
        return b.call(b.rng.choice(_MODULES)(), x)
    function = b.rng.choice(_ACTIVATIONS)
    return b.add(lambda m, v: function(v), x)


@operator(2)
def in_place(b: Builder, x: int) -> int | None:
    """Later steps may read the value from before; they see it changed."""
    target = b.writable(x)
    if target is None:
        return None
    x = target
    functions: list[Function] = [
        lambda v: F.relu(v, inplace=True),
        lambda v: v.relu_(),
        lambda v: v.add_(0.3).mul_(1.2),
        lambda v: F.leaky_relu_(v, 0.1),
    ]
    if b.rng.random() < 0.4:
        layer = nn.ReLU(inplace=True)
        name = b.module(layer)
        result = b.add(lambda m, v: m.get_submodule(name)(v), x)
    else:
        function = b.rng.choice(functions)
        result = b.add(lambda m, v: function(v), x)
    if result is not None:
        b.values[x] = b.values[result]
    return result


@operator(2)
def in_place_on_slice(b: Builder, x: int) -> int | None:
    """Changes a part of a value through a view of it."""
    target = b.writable(x)
    if target is None or b.shape(target)[1] < 4:
        return None
    x = target
    part = b.rng.choice([slice(1, 3), slice(None, None, 2), slice(-2, None)])
    result = b.add(lambda m, v: v[:, part].mul_(0.5), x)
    return None if result is None else b.add(lambda m, v: torch.sin(v), x)


@operator(1)
def prelu(b: Builder, x: int) -> int | None:
    size = b.rng.choice([1, b.shape(x)[1]])
    if b.rng.random() < 0.6:
        return b.call(nn.PReLU(size), x)
    slope = b.parameter(torch.rand(size))
    return b.add(lambda m, v: F.prelu(v, getattr(m, slope)), x)


@operator(0.8)
def dropout(b: Builder, x: int) -> int | None:
    rate = b.program.dropout_rate
    if b.rng.random() < 0.5:
        return b.call(nn.Dropout(rate), x)
    return b.add(lambda m, v: F.dropout(v, p=rate, training=m.training), x)


@operator(1)
def size_arithmetic(b: Builder, x: int) -> int | None:
    def unpacked(v: Any) -> Any:
        _, c = v.shape[:2]
        return v * c**-0.5

    functions: list[Function] = [
        lambda v: v * v.shape[1] ** -0.5,
        lambda v: v / v.size(-1),
        lambda v: v * (2.0 / v.size()[1]),
        unpacked,
        lambda v: v - 1.0 / v.shape[-1],
        lambda v: v.mul(v.size(dim=1) * 0.1),
        lambda v: v.reshape(v.shape) + 0.1,
        lambda v: v.view(v.size()) * 0.9,
    ]
    function = b.rng.choice(functions)
    return b.add(lambda m, v: function(v.contiguous()), x)
