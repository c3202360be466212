"""Operators that mix positions of a channel, or reduce over them."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.graph.generator import Builder, Function, operator


@operator(1.5)
def pooling(b: Builder, x: int) -> int | None:
    shape = b.shape(x)
    n = len(shape) - 2
    if n < 1 or min(shape[2:]) < 3:
        return None
    kind = b.rng.choice(["Max", "Avg", "AdaptiveAvg", "AdaptiveMax", "function", "indices"])
    if kind.startswith("Adaptive"):
        return b.call(getattr(nn, f"{kind}Pool{n}d")(b.rng.choice([1, 2])), x)
    if kind == "function":
        function = getattr(F, b.rng.choice([f"max_pool{n}d", f"avg_pool{n}d"]))
        return b.add(lambda m, v: function(v, 3, stride=2, padding=1), x)
    if kind == "indices":
        function = getattr(F, f"max_pool{n}d")
        return b.add(lambda m, v: function(v, 2, return_indices=True)[0], x)
    return b.call(getattr(nn, f"{kind}Pool{n}d")(3, stride=b.rng.choice([1, 2]), padding=1), x)


@operator(0.8)
def interpolate(b: Builder, x: int) -> int | None:
    shape = b.shape(x)
    if len(shape) < 3 or shape[-1] > 8:
        return None
    modes = {3: "linear", 4: "bilinear", 5: "trilinear"}
    functions: list[Function] = [
        lambda v: F.interpolate(v, scale_factor=2),
        lambda v: F.interpolate(v, size=v.shape[2:], mode=modes[len(shape)]),
        lambda v: F.interpolate(v, size=[s + 1 for s in shape[2:]], mode="nearest"),
    ]
    function = b.rng.choice(functions)
    return b.add(lambda m, v: function(v), x)


@operator(1.2)
def reduction(b: Builder, x: int) -> int | None:
    shape = b.shape(x)
    if len(shape) < 3:
        return None
    dims = b.rng.choice([(2,), (-1,), tuple(range(2, len(shape))), (1,)])
    keep = b.rng.random() < 0.5
    functions: list[Function] = [
        lambda v: v.mean(dims, keepdim=keep),
        lambda v: torch.sum(v, dim=dims, keepdim=keep) * 0.3,
        lambda v: torch.amax(v, dims, keep),
        lambda v: v.mean(axis=dims, keepdims=keep),
        lambda v: v.logsumexp(dims, keepdim=keep),
    ]
    function = b.rng.choice(functions)
    return b.add(lambda m, v: function(v), x)
