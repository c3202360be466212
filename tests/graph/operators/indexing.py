"""Operators that take a part of an axis or add to it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.graph.generator import Builder, Function, operator


@operator(2)
def split(b: Builder, x: int) -> int | None:
    shape = b.shape(x)
    axis = b.rng.choice([1, 1, 1, -1])
    size = shape[axis]
    if size < 4:
        return None
    cut = b.rng.randint(1, size - 1)
    functions: list[Function] = [
        lambda v: v.chunk(2, dim=axis),
        lambda v: torch.chunk(v, 2, axis),
        lambda v: torch.split(v, [cut, size - cut], dim=axis),
        lambda v: v.split((size + 1) // 2, axis),
        lambda v: torch.tensor_split(v, 2, dim=axis),
    ]
    function = b.rng.choice(functions)
    if b.rng.random() < 0.2:
        return b.add(lambda m, v: torch.cat(function(v), axis), x)
    return b.add(lambda m, v: function(v), x, outputs=2)


@operator(2)
def slicing(b: Builder, x: int) -> int | None:
    shape = b.shape(x)
    size = shape[1]
    if size < 4:
        return None
    a, c = sorted(b.rng.sample(range(size + 1), 2))
    functions: list[Function] = [
        lambda v: v[:, a:c],
        lambda v: v[:, ::2],
        lambda v: v[:, 1::3],
        lambda v: v[:, -3:],
        lambda v: v[:, :-2],
        lambda v: v[..., 1:],
        lambda v: v[..., ::2],
        lambda v: v.narrow(1, a, c - a),
        lambda v: torch.narrow(v, dim=1, start=-2, length=2),
        lambda v: v[:, 2],
        lambda v: v[..., 0],
        lambda v: v[:, : v.shape[1] // 2],
        lambda v: v[:, None, 1:].squeeze(1),
        lambda v: v[:, v.size(1) // 2 :] * 0.5,
        lambda v: v[:, [0, 2]],
    ]
    function = b.rng.choice(functions)
    return b.add(lambda m, v: function(v), x)


@operator(1.5)
def padding(b: Builder, x: int) -> int | None:
    shape = b.shape(x)
    if len(shape) < 3:
        return None
    left, right = b.rng.choice([(1, 1), (0, 3), (2, 0), (-1, -1), (0, -2), (3, -1), (-2, 2)])
    if shape[1] + min(left, 0) + min(right, 0) < 1:
        return None
    spatial = (0, 0) * (len(shape) - 2)
    value = b.rng.choice([0.0, 0.7])
    functions: list[Function] = [
        lambda v: F.pad(v, (*spatial, left, right)),
        lambda v: F.pad(v, (*spatial, left, right), value=value),
        lambda v: F.pad(v, (1, 0, *spatial[2:], left, right), "constant", value),
        lambda v: F.pad(v, (1, 1)),
        lambda v: F.pad(v, pad=(v.shape[-1] // 2, 0), mode="constant", value=1.0),
    ]
    if len(shape) == 3:
        functions.append(lambda v: F.pad(v[..., :], (1, 1), mode="replicate"))
    if len(shape) == 4:
        functions += [
            lambda v: F.pad(v[:, :, ::2, ::2], (0, 0, 0, 0, max(left, 0), max(right, 0))),
            nn.ZeroPad2d(1),
            nn.ReflectionPad2d((1, 0, 0, 0)) if shape[-1] > 1 else nn.ConstantPad2d(1, 0.5),
        ]
    function = b.rng.choice(functions)
    if isinstance(function, nn.Module):
        return b.call(function, x)
    return b.add(lambda m, v: function(v), x)
