"""Operators that pick by positions held in tensors, that write, and that make up tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from tests.graph.generator import Builder, Function, operator


@operator(1.5)
def gathering(b: Builder, x: int) -> int | None:
    shape = b.shape(x)
    n, last = len(shape), shape[-1]
    axis = b.rng.choice([1, n - 1])
    channels = [b.rng.randrange(shape[1]) for _ in range(4)]
    places = [b.rng.randrange(last) for _ in range(3)]
    second = min(1, shape[2 if n == 3 else 1] - 1)
    functions: list[tuple[Function, Any]] = [
        (lambda v, i: v[:, i], channels),
        (lambda v, i: v.index_select(1, i), channels),
        (lambda v, i: torch.index_select(v, -1, i), places),
        (lambda v, i: v[..., i], places),
        (lambda v, i: v[:, :, i] if n == 3 else v[..., i], [places, places]),
        (lambda v, i: v[:, 0, ..., i] if n > 2 else v[..., i], places),
        (lambda v, i: v[v.shape[0] - v.shape[0] :, :, i] if n == 3 else v[:, i], [0, second]),
    ]
    if b.rng.random() < 0.6:
        function, positions = b.rng.choice(functions)
        name = f"positions{len(b.program.steps)}"
        b.program.register_buffer(name, torch.tensor(positions))
        result = b.add(lambda m, v: function(v, getattr(m, name)), x)
        if result is None:
            delattr(b.program, name)
        return result
    computed: list[Function] = [
        lambda v: v.index_select(axis, v.flatten(0)[:3].abs().long() % shape[axis]),
        lambda v: v.gather(axis, v.argsort(axis)),
        lambda v: torch.take_along_dim(v, v.argsort(dim=-1)[..., :2], dim=-1),
        lambda v: v.gather(-1, (v > 0).long() % last),
        lambda v: v[..., [0, last - 1]],
    ]
    function = b.rng.choice(computed)
    return b.add(lambda m, v: function(v), x)


@operator(1)
def scattering(b: Builder, x: int) -> int | None:
    """Writes and adds by positions along one axis."""
    n, last = len(b.shape(x)), b.shape(x)[-1]
    axis = b.rng.choice([1, n - 1, n - 1])
    functions: list[Function] = [
        lambda v: v.scatter(axis, v.argsort(axis), v * 0.5),
        lambda v: torch.scatter_add(torch.zeros_like(v), -1, (v > 0).long() % last, v),
        lambda v: v.scatter_reduce(axis, v.argsort(axis), v.sin(), reduce="amax"),
        lambda v: v.index_add(axis, torch.tensor([1, 0]), v.narrow(axis, 0, 2).cos()),
        lambda v: torch.index_copy(v, -1, torch.tensor([last - 1]), v[..., :1]),
        lambda v: v.index_fill(axis, torch.tensor([0]), 0.3),
    ]
    function = b.rng.choice(functions)
    return b.add(lambda m, v: function(v), x)


@operator(1.5)
def position_bias(b: Builder, x: int) -> int | None:
    """A table of biases, one column per channel, picked by positions."""
    shape = b.shape(x)
    if len(shape) != 4:
        return None
    table = b.parameter(torch.rand(5, shape[1]))
    name = f"position_index{len(b.program.steps)}"
    positions = torch.arange(shape[2] * shape[3]).reshape(shape[2], shape[3]) % 5
    b.program.register_buffer(name, positions)

    def bias(m: Any, v: Any) -> Any:
        picked = getattr(m, table)[getattr(m, name).view(-1)]
        picked = picked.view(*getattr(m, name).shape, -1).permute(2, 0, 1)
        return v + picked.contiguous().unsqueeze(0)

    def embedded(m: Any, v: Any) -> Any:
        return v + F.embedding(getattr(m, name), getattr(m, table)).permute(2, 0, 1)

    return b.add(b.rng.choice([bias, embedded]), x)


@operator(1.5)
def picked(b: Builder, x: int) -> int | None:
    shape = b.shape(x)
    n = len(shape)
    if n < 3:
        return None
    functions: list[Function] = [
        lambda v: v.select(2, 0),
        lambda v: torch.select(v, dim=1, index=-1),
        lambda v: v.unbind(2)[-1],
        lambda v: torch.stack(torch.unbind(v, -1)[:2], 2),
        lambda v: torch.stack([v, v.tanh()], dim=2).sum(2),
        lambda v: torch.stack([v, v.cos()], dim=1).flatten(1, 2) if n < 5 else v,
        lambda v: torch.stack([v, v.cos()], dim=2).flatten(1, 2) if n < 5 else v,
        lambda v: v.mT if n > 3 else v.transpose(-1, -2),
        lambda v: v.detach() * 0.1 + v.data,
    ]
    if shape[1] % 2 == 0:
        functions += [
            lambda v: v.unflatten(1, (2, -1))[:, 1],
            lambda v: v.unflatten(1, (-1, 2))[:, :, 0],
            lambda v: torch.mul(*v.unflatten(1, (2, -1)).unbind(1)),
            lambda v: v.unflatten(1, (-1, 2)).select(2, 1),
        ]
    function = b.rng.choice(functions)
    return b.add(lambda m, v: function(v), x)


@operator(3)
def assignment(b: Builder, x: int) -> int | None:
    """Writes into a value."""
    target = b.writable(x)
    if target is None:
        return None
    x, shape = target, b.shape(target)
    others = [i for i in range(len(b.values)) if b.shape(i) == shape]
    a, c = sorted(b.rng.sample(range(shape[1] + 1), 2))

    def spatial(v: Any, w: Any) -> None:
        v[..., 1:] = w[..., 1:]

    def channels(v: Any, w: Any) -> None:
        v[:, a:c] = w[:, a:c]

    def strided(v: Any, w: Any) -> None:
        v[:, ::2] = w[:, ::2] * 2

    def number(v: Any, w: Any) -> None:
        v[:, 1] = 0.5

    def broadcast(v: Any, w: Any) -> None:
        v[:, -2:] = w[:, :1]

    def listed(v: Any, w: Any) -> None:
        v[:, [0, 1]] = w[:, :2]

    def copied(v: Any, w: Any) -> None:
        v[:, a:c].copy_(w[:, a:c])

    def zeroed(v: Any, w: Any) -> None:
        v[..., -1].zero_()

    def filled(v: Any, w: Any) -> None:
        v.fill_(0.3)

    def masked(v: Any, w: Any) -> None:
        v.masked_fill_(w > 0, 0.2)

    write = b.rng.choice(
        [spatial, channels, strided, number, broadcast, listed, copied, zeroed, filled, masked]
    )

    def apply(m: Any, v: Any, w: Any) -> Any:
        write(v, w * 1.0)
        return v

    result = b.add(apply, x, b.rng.choice(others))
    if result is not None:
        b.values[x] = b.values[result]
        return b.add(lambda m, v: torch.sin(v), result)
    return None


@operator(1)
def constants(b: Builder, x: int) -> int | None:
    shape = b.shape(x)
    rest, n = shape[2:], len(shape)
    functions: list[Function] = [
        lambda v: v + torch.ones(v.shape, dtype=v.dtype),
        lambda v: torch.cat([v, v.new_zeros(v.shape[0], 2, *rest)], 1),
        lambda v: torch.cat([torch.zeros(v.shape[0], 2, *rest, dtype=v.dtype), v], dim=1),
        lambda v: v * v.new_full((1, v.size(1), *[1] * (n - 2)), 0.7),
        lambda v: torch.where(v > 0, v, torch.full(v.size(), 0.1, dtype=v.dtype)),
        lambda v: v * v.new_ones(v.size(1), *[1] * (n - 2)) + torch.zeros((), dtype=v.dtype),
        lambda v: v + torch.arange(shape[-1], dtype=v.dtype) * 0.1,
    ]
    function = b.rng.choice(functions)
    return b.add(lambda m, v: function(v), x)
