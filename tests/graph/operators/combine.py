"""Operators that combine several tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tests.graph.generator import BATCH, Builder, Function, operator


@operator(1)
def layer_scale(b: Builder, x: int) -> int | None:
    """A bare parameter or buffer that meets an axis by broadcasting."""
    shape = b.shape(x)
    axis = b.rng.choice([1, len(shape) - 1])
    sizes = [shape[d] if d == axis else 1 for d in range(axis, len(shape))]
    if b.rng.random() < 0.5:
        name = b.parameter(torch.rand(sizes), "scale")
    else:
        name = f"constant{len(b.program.steps)}"
        b.program.register_buffer(name, torch.rand(sizes))
    functions: list[Function] = [
        lambda v, w: v * w,
        lambda v, w: v + w,
        lambda v, w: torch.where(v > w, v, w * 0.1),
        lambda v, w: v + w * torch.tensor([0.5]),
        lambda v, w: torch.maximum(v, w),
        lambda v, w: v.clamp(max=w),
    ]
    function = b.rng.choice(functions)
    return b.add(lambda m, v: function(v, getattr(m, name)), x)


@operator(0.6)
def position_embedding(b: Builder, x: int) -> int | None:
    name = b.parameter(torch.randn(1, *b.shape(x)[1:]) * 0.3)
    return b.add(lambda m, v: v + getattr(m, name), x)


_BINARY: list[Function] = [
    lambda v, w: v + w,
    lambda v, w: v - w,
    lambda v, w: v * torch.sigmoid(w),
    lambda v, w: v / (w.abs() + 1.0),
    lambda v, w: torch.add(v, w, alpha=0.5),
    lambda v, w: v.mul(w.tanh()),
    lambda v, w: torch.minimum(v, w) if hasattr(torch, "minimum") else v + w,
    lambda v, w: torch.lerp(v, w, 0.3),
    lambda v, w: torch.addcmul(v, v, w, value=0.1),
    lambda v, w: v.where(w > 0, w),
]


@operator(3)
def binary(b: Builder, x: int) -> int | None:
    """Two values whose shapes broadcast."""
    fitting = []
    for other in range(len(b.values)):
        try:
            shape = torch.broadcast_shapes(b.shape(x), b.shape(other))
        except RuntimeError:
            continue
        if shape[0] == BATCH and len(b.shape(other)) == len(b.shape(x)):
            fitting.append(other)
    if not fitting:
        return None
    function = b.rng.choice(_BINARY)
    same = b.rng.choice(fitting)
    return b.add(lambda m, v, w: function(v, w), x, same)


@operator(2)
def residual(b: Builder, x: int) -> int | None:
    """x + f(x), in place or not."""
    shape = b.shape(x)
    if len(shape) != 4:
        return None
    width = b.rng.choice([4, 6])
    inner = b.call(nn.Conv2d(shape[1], width, 3, padding=1, bias=False), x)
    if inner is None:
        return None
    normed = b.call(nn.BatchNorm2d(width), inner)
    assert normed is not None
    active = b.call(nn.ReLU(inplace=True), normed)
    assert active is not None
    outer = b.call(nn.Conv2d(width, shape[1], 1), active)
    assert outer is not None

    def add(m: Any, v: Any, w: Any) -> Any:
        v += w
        return v

    if b.rng.random() < 0.5:
        return b.add(add, outer, x)
    return b.add(lambda m, v, w: v + w, x, outer)


@operator(1.2)
def squeeze_excite(b: Builder, x: int) -> int | None:
    shape = b.shape(x)
    if len(shape) != 4:
        return None
    first = b.module(nn.Conv2d(shape[1], 4, 1))
    second = b.module(nn.Conv2d(4, shape[1], 1))
    mean = b.rng.choice(
        [
            lambda v: v.mean((2, 3), keepdim=True),
            lambda v: torch.mean(v, dim=(-2, -1), keepdim=True),
            lambda v: F.adaptive_avg_pool2d(v, 1),
        ]
    )

    def gate(m: Any, v: Any) -> Any:
        hidden = F.relu(m.get_submodule(first)(mean(v)))
        return v * m.get_submodule(second)(hidden).sigmoid()

    return b.add(gate, x)


@operator(1)
def attention_map(b: Builder, x: int) -> int | None:
    """A map over space that is written out for every channel."""
    shape = b.shape(x)
    ones = [1] * (len(shape) - 2)

    def spread(function: Function) -> Function:
        return lambda m, v: v * function(v.mean(1, keepdim=True).sigmoid())

    functions: list[Function] = [
        lambda w: w.expand(-1, shape[1], *shape[2:]),
        lambda w: torch.broadcast_to(w, (w.shape[0], *shape[1:])),
        lambda w: w.repeat(1, shape[1], *ones),
        lambda w: torch.tile(w, (shape[1], *ones)),
        lambda w: w.repeat_interleave(shape[1], dim=1),
    ]
    return b.add(spread(b.rng.choice(functions)), x)


@operator(1.5)
def concatenation(b: Builder, x: int) -> int | None:
    shape = b.shape(x)
    axis = b.rng.choice([1, 1, 1, len(shape) - 1])

    def rest(other: tuple[int, ...]) -> tuple[int, ...]:
        return other[:axis] + other[axis + 1 :]

    others = [i for i in range(len(b.values)) if rest(b.shape(i)) == rest(shape)]
    others = [i for i in others if len(b.shape(i)) == len(shape)]
    chosen = [x, *b.rng.choices(others, k=b.rng.choice([1, 2]))]
    b.rng.shuffle(chosen)
    negative = axis - len(shape)
    functions: list[Function] = [
        lambda vs: torch.cat(vs, axis),
        lambda vs: torch.cat(tuple(vs), dim=negative),
        lambda vs: torch.concat(vs, axis=axis),
    ]
    function = b.rng.choice(functions)
    return b.add(lambda m, *vs: function(list(vs)), *chosen)
