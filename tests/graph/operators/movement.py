"""Operators that rearrange axes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.graph.generator import Builder, Function, divisors, operator


@operator(1.5)
def flatten(b: Builder, x: int) -> int | None:
    if len(b.shape(x)) < 3:
        return None
    functions: list[Function] = [
        lambda v: v.flatten(1),
        lambda v: torch.flatten(v, 1),
        lambda v: v.reshape(v.size(0), -1),
        lambda v: v.flatten(1, 2),
        lambda v: torch.flatten(v, start_dim=-2),
        lambda v: v.flatten(2),
    ]
    if b.rng.random() < 0.3:
        return b.call(nn.Flatten(), x)
    function = b.rng.choice(functions)
    return b.add(lambda m, v: function(v), x)


@operator(1)
def flatten_sizes(b: Builder, x: int) -> int | None:
    """Merge the channel axis with the next one by arithmetic on sizes, and take it apart."""
    shape = b.shape(x)
    if len(shape) < 3:
        return None
    tail = shape[3:]
    functions: list[Function] = [
        lambda v: v.reshape(v.shape[0], v.shape[1] * v.shape[2], *tail),
        lambda v: v.reshape(-1, v.size(1) * v.size(2), *tail),
        lambda v: (
            v.reshape(v.shape[0] * v.shape[1], *shape[2:])
            .mul(0.5)
            .reshape(v.shape[0], v.shape[1], *shape[2:])
        ),
        lambda v: v.reshape(v.shape[0], -1).sin().view(v.shape[0], shape[1], *shape[2:]),
        lambda v: v.flatten(1).unflatten(1, (v.shape[1], *shape[2:])),
    ]
    if b.rng.random() < 0.3:
        # Channels that become examples for a while, and are mixed by nothing.
        name = b.module(nn.Linear(shape[-1], 4))

        def folded(m: Any, v: Any) -> Any:
            n, c = v.shape[0], v.shape[1]
            rows = v.reshape(n * c, *shape[2:])
            return m.get_submodule(name)(rows).sigmoid().reshape(n, c, *shape[2:-1], 4)

        return b.add(folded, x)
    function = b.rng.choice(functions)
    return b.add(lambda m, v: function(v), x)


@operator(1.5)
def permutation(b: Builder, x: int) -> int | None:
    n = len(b.shape(x))
    if n < 3:
        return None
    order = [0, *b.rng.sample(range(1, n), n - 1)]
    functions: list[Function] = [
        lambda v: v.permute(*order),
        lambda v: torch.permute(v, order),
        lambda v: v.transpose(1, -1),
        lambda v: torch.transpose(v, 1, 2),
        lambda v: v.movedim(1, -1),
        lambda v: torch.swapaxes(v, -1, -2),
    ]
    function = b.rng.choice(functions)
    return b.add(lambda m, v: function(v), x)


@operator(1)
def unit_axes(b: Builder, x: int) -> int | None:
    n = len(b.shape(x))
    axis = b.rng.randint(1, n)
    functions: list[Function] = [
        lambda v: v.unsqueeze(axis),
        lambda v: torch.unsqueeze(v, axis - n - 1),
        lambda v: v.unsqueeze(axis).squeeze(axis),
        lambda v: v.squeeze(1),
        lambda v: torch.squeeze(v, -1),
        lambda v: v[:, :, None] if n == 2 else v.squeeze(),
    ]
    function = b.rng.choice(functions)
    return b.add(lambda m, v: function(v), x)


@operator(1.5)
def group_view(b: Builder, x: int) -> int | None:
    """(N, C, ...) as (N, g, C / g, ...), shuffled, and back."""
    shape = b.shape(x)
    if not divisors(shape[1]):
        return None
    g = b.rng.choice(divisors(shape[1]))
    rest = shape[2:]

    def shuffle(v: Any) -> Any:
        n, c = v.size(0), v.size(1)
        v = v.reshape(n, g, c // g, *rest).transpose(1, 2).contiguous()
        return v.view(n, c, *rest) if b_view else v.flatten(1, 2)

    b_view = b.rng.random() < 0.5
    scale = b.parameter(torch.rand(1, g, 1, *(1 for _ in rest)), "scale")
    functions: list[Function] = [
        lambda m, v: v.reshape(v.shape[0], g, -1, *rest),
        lambda m, v: v.reshape(v.shape[0], g, shape[1] // g, *rest),
        lambda m, v: v.unflatten(1, (g, -1)),
        lambda m, v: torch.unflatten(v, 1, (-1, g)),
        lambda m, v: shuffle(v),
        lambda m, v: shuffle(v),
        lambda m, v: (v.unflatten(1, (g, -1)) * getattr(m, scale)).flatten(1, 2),
        lambda m, v: v.unflatten(1, (g, -1)).sum(1),
        lambda m, v: v.unflatten(1, (g, -1))[:, 1:].flatten(1, 2),
    ]
    if b.rng.random() < 0.2:
        return b.call(nn.Unflatten(1, (g, shape[1] // g)), x)
    return b.add(b.rng.choice(functions), x)


@operator(0.8)
def expansion(b: Builder, x: int) -> int | None:
    shape = b.shape(x)
    if len(shape) < 3:
        return None
    rest = (3,) * (len(shape) - 2)
    dims = tuple(range(2, len(shape)))
    functions: list[Function] = [
        lambda v: v.mean(dims, keepdim=True).expand(-1, -1, *rest),
        lambda v: v.mean(dims, keepdim=True).expand(v.shape[0], v.shape[1], *rest),
        lambda v: v.mean(dims, keepdim=True).expand_as(v),
        lambda v: v.mean(dims, keepdim=True).expand(v.size()) + v,
        lambda v: v.mean(1, keepdim=True).expand_as(v),
        lambda v: torch.broadcast_to(v.amax(1, True), v.shape) * v,
        lambda v: v.mean(1, keepdim=True).expand(-1, shape[1], *shape[2:]),
    ]
    function = b.rng.choice(functions)
    return b.add(lambda m, v: function(v), x)
