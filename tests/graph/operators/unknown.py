"""Operators without a rule."""

from __future__ import annotations

import torch
from torch import nn

from tests.graph.generator import Builder, Function, operator


@operator(0.8)
def without_rule(b: Builder, x: int) -> int | None:
    """Operators that rbpfx does not know."""
    shape = b.shape(x)
    kind = b.rng.choice(["LayerNorm", "GroupNorm", "function"])
    if kind == "LayerNorm":
        return b.call(nn.LayerNorm(shape[-1]), x)
    if kind == "GroupNorm":
        return b.call(nn.GroupNorm(1, shape[1]), x)
    functions: list[Function] = [
        lambda v: torch.softmax(v, 1),
        lambda v: torch.matmul(v, v.transpose(-1, -2)) * 0.1 if len(shape) > 2 else v.flip(1),
        lambda v: v.roll(1, 1),
        lambda v: v @ v.transpose(-1, -2) * 0.1 if len(shape) > 2 else v.sort(1)[0],
        lambda v: torch.stack([v, v * 2], dim=1) if len(shape) < 5 else v.flip(-1),
        lambda v: v.repeat(1, 2, *(1 for _ in shape[2:])),
    ]
    function = b.rng.choice(functions)
    return b.add(lambda m, v: function(v), x)


@operator(0.5)
def cumulative_sum(b: Builder, x: int) -> int | None:
    """Another one, on its own so that a test can teach rbpfx a wrong rule for it."""
    return b.add(lambda m, v: v.cumsum(1) * 0.2, x)
