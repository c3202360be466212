"""Operators that rearrange what lies along axes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tests.graph.generator import Builder, Function, divisors, operator


@operator(1.5)
def rearrangement(b: Builder, x: int) -> int | None:
    shape = b.shape(x)
    n = len(shape)
    axis, shift = b.rng.choice([1, 1, n - 1]), b.rng.choice([1, 2, -1])
    ones = [1] * (n - 2)
    functions: list[Function] = [
        lambda v: v.flip(axis),
        lambda v: torch.flip(v, dims=(1, -1) if n > 2 else (-1,)),
        lambda v: v.roll(shift, axis),
        lambda v: torch.roll(v, shifts=(shift, 1), dims=(axis, -1)),
        lambda v: v.repeat(1, 2, *ones),
        lambda v: torch.tile(v, (2, *ones)),
        lambda v: v.repeat_interleave(2, axis),
        lambda v: torch.repeat_interleave(v, 2, dim=axis),
        lambda v: torch.roll(v, shift),
        lambda v: torch.fliplr(v),
        lambda v: v.unfold(-1, min(2, v.shape[-1]), 1),
        lambda v: v.unfold(1, 2, 2) if shape[1] > 2 else v,
        lambda v: torch.rot90(v, 1, (-1, -2)) if n > 3 else v,
    ]
    return b.add(lambda m, v: function(v), x) if (function := b.rng.choice(functions)) else None


@operator(1.5)
def channel_shuffle(b: Builder, x: int) -> int | None:
    """As an operator and by views, with other movement in between."""
    shape = b.shape(x)
    c, rest = shape[1], shape[2:]
    if not divisors(c) or not rest:
        return None
    g = b.rng.choice(divisors(c))
    dims = range(3, len(shape) + 1)
    functions: list[Function] = [
        lambda v: torch.channel_shuffle(v, g),
        lambda v: F.channel_shuffle(v, g),
        nn.ChannelShuffle(g),
        lambda v: v.unflatten(1, (g, -1)).transpose(1, 2).flatten(1, 2),
        lambda v: v.unflatten(1, (g, -1)).permute(0, *dims, 2, 1).flatten(-2),
        lambda v: v.view(v.shape[0], g, c // g, *rest).flip(1).flatten(1, 2),
        lambda v: (
            v.reshape(v.shape[0] * c // 2, 2, -1).permute(1, 0, 2).flatten(1)[:, None]
            if c % 2 == 0
            else v
        ),
        lambda v: v.unflatten(1, (g, -1)).mT.flatten(1, 2) if len(shape) == 2 else v,
        lambda v: torch.cat(
            [
                part.flatten(1, 2)
                for part in v.unflatten(1, (g, -1)).transpose(1, 2).split(1, dim=1)
            ],
            1,
        ),
    ]
    function = b.rng.choice(functions)
    if isinstance(function, nn.Module):
        return b.call(function, x)
    return b.add(lambda m, v: function(v.contiguous()), x)


@operator(1.5)
def pixels(b: Builder, x: int) -> int | None:
    """Channels to space and back."""
    shape = b.shape(x)
    if len(shape) != 4:
        return None
    _, c, h, w = shape
    up = c % 4 == 0
    down = h % 2 == 0 and w % 2 == 0

    def by_views(v: Any) -> Any:
        v = v.reshape(v.shape[0], -1, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3)
        return v.reshape(v.shape[0], -1, 2 * h, 2 * w)

    def to_depth(v: Any) -> Any:
        v = v.reshape(v.shape[0], c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4)
        return v.reshape(v.shape[0], 4 * c, h // 2, w // 2)

    def patches(v: Any) -> Any:
        columns = F.unfold(v, 3, padding=1)
        if b_views:
            return columns.view(v.shape[0], c, 9, h, w).mean(2)
        return F.fold(columns * 0.5, (h, w), 3, padding=1)

    b_views = b.rng.random() < 0.5
    functions: list[Any] = [patches, lambda v: F.unfold(v, 2, stride=2) if down else v]
    if up:
        functions += [lambda v: F.pixel_shuffle(v, 2), nn.PixelShuffle(2), by_views]
    if down:
        functions += [lambda v: F.pixel_unshuffle(v, 2), nn.PixelUnshuffle(2), to_depth]
    function = b.rng.choice(functions)
    if isinstance(function, nn.Module):
        return b.call(function, x)
    return b.add(lambda m, v: function(v), x)
