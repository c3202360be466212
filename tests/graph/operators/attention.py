"""Contractions between values, and attention put together from random parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.graph.generator import Builder, Function, operator


@operator(1.5)
def product(b: Builder, x: int) -> int | None:
    """A value contracted with another one of its rank, over any axis."""
    shape = b.shape(x)
    if len(shape) < 3:
        return None
    same = [i for i in range(len(b.values)) if b.shape(i) == shape]
    other = b.rng.choice(same)
    scale = 0.3 / max(shape[1:])
    functions: list[Function] = [
        lambda v, w: v @ w.transpose(-1, -2),
        lambda v, w: torch.matmul(v.transpose(-1, -2), w),
        lambda v, w: v.flatten(2).transpose(1, 2).matmul(w.flatten(2)),
        lambda v, w: torch.bmm(v.flatten(2), w.flatten(2).mT),
        lambda v, w: torch.einsum("bc...,bd...->bcd", v, w),
        lambda v, w: torch.einsum("b...c,b...c->b...", v, w),
        lambda v, w: torch.einsum("bij...,bkj...->bik...", v, w),
        lambda v, w: torch.einsum("bc...,bc...,bc...->b...", v, w, v),
        lambda v, w: torch.einsum("ba...z,bc...z->bac...", v, w),
        lambda v, w: torch.einsum("nc...->n...c", v) + 0.1 * w.movedim(1, -1),
        lambda v, w: torch.baddbmm(v.flatten(2), v.flatten(2), w.flatten(2).mT @ w.flatten(2)),
    ]
    function = b.rng.choice(functions)
    return b.add(lambda m, v, w: function(v, w) * scale, x, other)


@operator(1.5)
def parameter_product(b: Builder, x: int) -> int | None:
    """Linear layers in other words; some share an axis with their input."""
    shape = b.shape(x)
    features = shape[-1]
    weight = b.parameter(torch.randn(features, 6) * 0.3)
    bias = b.parameter(torch.randn(6), "bias")
    row = b.parameter(torch.randn(features) * 0.3, "row")
    grouped = b.parameter(torch.randn(shape[1], features, 4) * 0.3, "grouped")
    channels = b.parameter(torch.randn(shape[1], 5) * 0.3, "channels")
    functions: list[Any] = [
        lambda m, v: v @ getattr(m, weight),
        lambda m, v: torch.matmul(v, getattr(m, weight)) + getattr(m, bias),
        lambda m, v: torch.einsum("...i,io->...o", v, getattr(m, weight)),
        lambda m, v: torch.einsum("bc...,co->bo...", v, getattr(m, channels)),
        lambda m, v: torch.einsum("b...i,i->b...i", v, getattr(m, row)) * 2,
        lambda m, v: torch.addmm(
            getattr(m, bias), v.reshape(-1, features), getattr(m, weight)
        ).reshape(*v.shape[:-1], 6),
        lambda m, v: v @ (getattr(m, weight) @ getattr(m, weight).t()),
    ]
    if len(shape) > 2:
        functions += [
            lambda m, v: torch.einsum("bc...i,cio->bc...o", v, getattr(m, grouped)),
            lambda m, v: torch.einsum("bc...i,cio->b...o", v, getattr(m, grouped)),
            lambda m, v: torch.matmul(v, getattr(m, row)).unsqueeze(-1) * v,
        ]
    return b.add(b.rng.choice(functions), x)


@operator(0.7)
def bilinear(b: Builder, x: int) -> int | None:
    shape = b.shape(x)
    others = [i for i in range(len(b.values)) if b.shape(i)[:-1] == shape[:-1]]
    other = b.rng.choice(others)
    layer = nn.Bilinear(shape[-1], b.shape(other)[-1], 5, bias=b.rng.random() < 0.5)
    name = b.module(layer)
    return b.add(lambda m, v, w: m.get_submodule(name)(v, w), x, other)


@operator(0.8)
def embedding(b: Builder, x: int) -> int | None:
    """Rows of a table, chosen by position or by the sign of a value, added to the last axis."""
    shape = b.shape(x)
    table = nn.Embedding(max(shape[-2], 2), shape[-1], padding_idx=b.rng.choice([None, 0]))
    name = b.module(table)
    index = f"places{len(list(b.program.buffers()))}"
    b.program.register_buffer(index, torch.arange(shape[-2]) % table.num_embeddings)
    functions: list[Any] = [
        lambda m, v: v + m.get_submodule(name)((v.detach()[..., 0] > 0).long()),
        lambda m, v: v * F.embedding((v[..., 0] > 0.1).long(), m.get_submodule(name).weight),
    ]
    if len(shape) > 2:
        functions += [
            lambda m, v: v + m.get_submodule(name)(getattr(m, index)),
            lambda m, v: v * m.get_submodule(name).weight[getattr(m, index)],
        ]
    return b.add(b.rng.choice(functions), x)


@operator(3)
def attention(b: Builder, x: int) -> int | None:
    """Self-attention over the axes between the first and the last."""
    shape = b.shape(x)
    if not _are_tokens(shape):
        return None
    embed, heads, width = shape[-1], b.rng.choice([2, 3, 4]), b.rng.choice([2, 4])
    groups = heads // b.rng.choice([n for n in (1, 2, 3) if heads % n == 0])
    project = _projections(b, embed, heads, groups, width)
    change = _change(b, heads, width)
    mix = _mixing(b, heads, groups)
    out = b.module(nn.Linear(heads * width, b.rng.choice([embed, 6])))
    residual = b.rng.random() < 0.3

    def apply(m: Any, v: Any) -> Any:
        tokens = v.flatten(1, -2)
        q, k, values = project(m, tokens)
        mixed = mix(m, change(m, q), change(m, k), values)
        joined = mixed.transpose(1, 2).reshape(v.shape[0], tokens.shape[1], -1)
        result = m.get_submodule(out)(joined)
        return result + tokens.mean(-1, keepdim=True) if residual else result

    return b.add(apply, x)


def _projections(b: Builder, embed: int, heads: int, groups: int, width: int) -> Any:
    """(N, tokens, embed) -> queries (N, heads, tokens, width), keys and values with `groups`."""
    if heads == groups and b.rng.random() < 0.5:
        fused = b.module(nn.Linear(embed, 3 * heads * width))
        order = b.rng.choice(["stacked", "index", "chunk", "interleaved"])

        def together(m: Any, v: Any) -> Any:
            n, length = v.shape[0], v.shape[1]
            qkv = m.get_submodule(fused)(v)
            if order == "chunk":
                parts = qkv.chunk(3, -1)
                return [p.view(n, length, heads, -1).transpose(1, 2) for p in parts]
            if order == "interleaved":
                return qkv.view(n, length, heads, -1).transpose(1, 2).chunk(3, dim=-1)
            stacked = qkv.reshape(n, length, 3, heads, width).permute(2, 0, 3, 1, 4)
            if order == "stacked":
                return stacked.unbind(0)
            return stacked[0], stacked[1], stacked[2]

        return together
    sizes = (heads, groups, groups)
    names = [b.module(nn.Linear(embed, n * width, bias=b.rng.random() < 0.5)) for n in sizes]

    def apart(m: Any, v: Any) -> Any:
        parts = (m.get_submodule(name)(v) for name in names)
        return [p.unflatten(-1, (-1, width)).transpose(1, 2) for p in parts]

    return apart


def _change(b: Builder, heads: int, width: int) -> Any:
    """What happens to queries and keys before they meet."""
    kind = b.rng.choice(["nothing", "nothing", "rotary", "norm", "unit length", "gain", "elu"])
    gain = b.parameter(torch.rand(width) + 0.5, "gain")
    norm = b.module(nn.LayerNorm(width))

    def rotated(v: Any, angle: Any) -> Any:
        first, second = v[..., : width // 2], v[..., width // 2 :]
        return v * angle.cos() + torch.cat([-second, first], dim=-1) * angle.sin()

    functions: dict[str, Any] = {
        "nothing": lambda m, v: v,
        "rotary": lambda m, v: rotated(v, getattr(m, gain)),
        "norm": lambda m, v: m.get_submodule(norm)(v),
        "unit length": lambda m, v: F.normalize(v, dim=-1),
        "gain": lambda m, v: v * getattr(m, gain),
        "elu": lambda m, v: F.elu(v) + 1,
    }
    return functions[kind]


def _mixing(b: Builder, heads: int, groups: int) -> Any:
    """Queries, keys and values become values (N, heads, tokens, width)."""
    times = heads // groups
    repeat = b.rng.choice(["expand", "interleave"]) if times > 1 else "no"
    kind = b.rng.choice(["sdpa", "causal", "explicit", "einsum", "bmm", "talking", "linear"])
    scale = b.parameter(torch.rand(heads, 1, 1), "scale")
    before, after = b.module(nn.Linear(heads, 4)), b.module(nn.Linear(4, heads))

    def repeated(v: Any) -> Any:
        if repeat == "interleave":
            return v.repeat_interleave(times, dim=1)
        if repeat == "expand":
            return v.unsqueeze(2).expand(-1, -1, times, -1, -1).flatten(1, 2)
        return v

    def mix(m: Any, q: Any, k: Any, v: Any) -> Any:
        if kind in ("sdpa", "causal") and times > 1:
            options = {"is_causal": kind == "causal"}
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
        k, v = repeated(k), repeated(v)
        if kind == "sdpa":
            bias = getattr(m, scale).expand(-1, q.shape[2], -1)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        if kind == "causal":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.4)
        if kind == "linear":
            return torch.einsum("bhnd,bhde->bhne", q, k.transpose(-2, -1) @ v) / q.shape[2]
        if kind == "bmm":
            weights = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).softmax(-1)
            return torch.bmm(weights, v.flatten(0, 1)).unflatten(0, (q.shape[0], -1))
        if kind == "einsum":
            weights = torch.einsum("bhid,bhjd->bhij", q, k).softmax(dim=-1)
            return torch.einsum("bhij,bhjd->bhid", weights, v)
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 * getattr(m, scale)
        if kind == "talking":
            scores = m.get_submodule(before)(scores.permute(0, 2, 3, 1)).softmax(2)
            return m.get_submodule(after)(scores).permute(0, 3, 1, 2) @ v
        return scores.softmax(dim=-1) @ v

    return mix


@operator(1.5)
def torch_attention(b: Builder, x: int) -> int | None:
    """`nn.MultiheadAttention` of a value with itself, or with another one."""
    heads = b.rng.choice([2, 3, 4])
    tokens = [i for i in range(len(b.values)) if _are_tokens(b.shape(i))]
    if x not in tokens or b.shape(x)[-1] % heads:
        return None
    other = x if b.rng.random() < 0.6 else b.rng.choice(tokens)
    embed, size = b.shape(x)[-1], b.shape(other)[-1]
    layer = nn.MultiheadAttention(
        embed,
        heads,
        bias=b.rng.random() < 0.7,
        add_bias_kv=b.rng.random() < 0.2,
        add_zero_attn=b.rng.random() < 0.2,
        kdim=None if size == embed else size,
        vdim=None if size == embed else size,
        batch_first=b.rng.random() < 0.7,
    )
    name = b.module(layer)
    need_weights = b.rng.random() < 0.5

    def apply(m: Any, v: Any, w: Any) -> Any:
        module = m.get_submodule(name)
        v, w = v.flatten(1, -2), w.flatten(1, -2)
        if not layer.batch_first:
            v, w = v.transpose(0, 1), w.transpose(0, 1)
        result: Tensor = module(v, w, w, need_weights=need_weights)[0]
        return result if layer.batch_first else result.transpose(0, 1)

    return b.add(apply, x, other)


def _are_tokens(shape: tuple[int, ...]) -> bool:
    return len(shape) > 2 and torch.Size(shape[1:-1]).numel() <= 64


@operator(1.5)
def transformer_layer(b: Builder, x: int) -> int | None:
    shape = b.shape(x)
    if not _are_tokens(shape) or shape[-1] % 2:
        return None
    layer = nn.TransformerEncoderLayer(
        shape[-1], 2, 8, dropout=0.0, batch_first=True, norm_first=b.rng.random() < 0.5
    )
    name = b.module(layer)
    return b.add(lambda m, v: m.get_submodule(name)(v.flatten(1, -2)), x)
