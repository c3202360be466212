"""Attention in every spelling: what its units are, and that heads go exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rbpfx.errors import RbpfxError
from rbpfx.graph.capture import trace
from rbpfx.graph.gates import apply_mask
from rbpfx.graph.groups import analyze
from rbpfx.graph.slicing import rewrite
from rbpfx.testing import random_plan, randomize
from tests.graph.laws import (
    Compiled,
    check_again,
    check_close,
    check_costs,
    check_law,
    check_pickle,
)

BATCH, TOKENS, HEADS, WIDTH = 2, 5, 3, 4
EMBED = HEADS * WIDTH


def check(
    model: nn.Module, *inputs: Tensor, groups: dict[str, int], attention: str = "heads"
) -> Compiled:
    """The groups are these, and several random plans obey all laws."""
    randomize(model.double().eval())
    inputs = inputs or (torch.randn(BATCH, TOKENS, EMBED).double(),)
    gm = trace(model, inputs)
    analysis = analyze(gm, attention=attention)
    assert {group.name: group.size for group in analysis.groups} == groups
    assert not analysis.unknown
    removed = 0
    for seed in range(3):
        plan = random_plan(analysis, seed)
        masked, sliced = apply_mask(gm, analysis, plan), rewrite(gm, analysis, plan)
        compiled = Compiled(gm, analysis, plan, masked, sliced, {"attention": attention})
        removed += compiled.removed
        for train in (False, True):
            check_law(compiled, inputs, train=train)
        check_costs(compiled)
        check_close(compiled, inputs)
        if seed == 0:
            check_again(compiled, inputs, seed)
            check_pickle(compiled, inputs)
    assert removed > 0 or not groups
    return compiled


class Attention(nn.Module):
    """Separate projections; a subclass says how heads are made and mixed."""

    def __init__(self, heads: int = HEADS, kv_heads: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.kv_heads = heads, kv_heads or heads
        self.q = nn.Linear(EMBED, heads * WIDTH)
        self.k = nn.Linear(EMBED, self.kv_heads * WIDTH)
        self.v = nn.Linear(EMBED, self.kv_heads * WIDTH)
        self.out = nn.Linear(heads * WIDTH, EMBED)

    def split(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        return x.view(n, length, -1, WIDTH).transpose(1, 2)

    def join(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        return self.out(self.join(self.mix(q, k, v)))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


Mixing = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


def attention(mix: Mixing, **options: Any) -> Attention:
    """An `Attention` with this way of mixing."""
    return type("Mixed", (Attention,), {"mix": mix})(**options)


def explicit(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return scores.softmax(-1) @ v


def with_einsum(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", q * q.shape[-1] ** -0.5, k)
    return torch.einsum("...qk,...kd->...qd", F.softmax(scores, dim=-1), v)


def with_bmm(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n, h, length, d = q.shape
    q, k, v = (x.reshape(n * h, length, -1) for x in (q, k, v))
    scores = torch.bmm(q * d**-0.5, k.transpose(1, 2))
    return torch.bmm(torch.softmax(scores, 2), v).view(n, h, length, -1)


def with_baddbmm(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n, h, _, d = q.shape
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    shift = self.out.bias[:1]
    scores = torch.baddbmm(shift, q, k.transpose(1, 2), alpha=d**-0.5)
    return torch.bmm(torch.softmax(scores, 2), v).unflatten(0, (n, h))


def causal(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query=q, key=k, value=v, is_causal=True)


def scaled(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.0, scale=0.3)


SPELLINGS: dict[str, Mixing] = {
    "sdpa": Attention.mix,
    "matmul": explicit,
    "einsum": with_einsum,
    "bmm": with_bmm,
    "baddbmm": with_baddbmm,
    "causal": causal,
    "scaled": scaled,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_unit_is_a_head(spelling: str) -> None:
    compiled = check(attention(SPELLINGS[spelling]), groups={"q": HEADS})
    (group,) = compiled.analysis.groups
    assert group.producers == ("q", "k", "v")
    assert [str(read.node.target) for read in group.reads] == ["out"]
    assert group.foldable


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_unit_is_a_position_of_every_head(spelling: str) -> None:
    model = attention(SPELLINGS[spelling])
    compiled = check(model, groups={"q": WIDTH, "v": WIDTH}, attention="positions")
    queries, values = compiled.analysis.groups
    assert queries.producers == ("q", "k") and values.producers == ("v",)
    assert values.foldable and not queries.foldable


def test_an_unknown_kind_of_unit_is_refused() -> None:
    gm = trace(Attention(), torch.zeros(BATCH, TOKENS, EMBED))
    with pytest.raises(RbpfxError, match="'heads', 'positions'"):
        analyze(gm, attention="tails")


# -- where heads come from ----------------------------------------------------------------


class Fused(nn.Module):
    """One projection for queries, keys and values, taken apart by `split`."""

    def __init__(self, split: Callable[[Tensor], Any], bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.split = split
        self.qkv = nn.Linear(EMBED, 3 * EMBED, bias=bias)
        self.out = nn.Linear(EMBED, EMBED)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.qkv(x))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))


def timm_style(qkv: Tensor) -> Any:
    n, length, _ = qkv.shape
    return qkv.reshape(n, length, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)


def by_index(qkv: Tensor) -> Any:
    n, length, _ = qkv.shape
    parts = qkv.reshape(n, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    return parts[0], parts[1], parts[2]


def by_chunk(qkv: Tensor) -> Any:
    parts = qkv.chunk(3, dim=-1)
    return tuple(p.unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in parts)


def per_head(qkv: Tensor) -> Any:
    """Queries, keys and values of a head side by side, as in GPT-NeoX."""
    n, length, _ = qkv.shape
    return qkv.view(n, length, HEADS, 3 * WIDTH).transpose(1, 2).chunk(3, dim=-1)


@pytest.mark.parametrize("split", [timm_style, by_index, by_chunk, per_head])
def test_fused_projections(split: Callable[[Tensor], Any]) -> None:
    compiled = check(Fused(split), groups={"qkv": HEADS})
    kept = len(compiled.plan.kept.get("qkv", range(HEADS)))
    assert compiled.sliced.get_submodule("qkv").out_features == 3 * kept * WIDTH


@pytest.mark.parametrize("split", [by_chunk, per_head])
def test_positions_of_fused_projections(split: Callable[[Tensor], Any]) -> None:
    groups = {"qkv": WIDTH, "qkv#2": WIDTH}
    check(Fused(split, bias=False), groups=groups, attention="positions")


def test_positions_of_a_stacked_projection_stay_aligned() -> None:
    """(3, heads, head_dim) has to stay a box, so queries, keys and values shrink alike."""
    check(Fused(timm_style), groups={"qkv": WIDTH}, attention="positions")


class Functional(nn.Module):
    """Weights as (in, out) parameters, in the manner of GPT-2's Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(EMBED, 3 * EMBED))
        self.bias = nn.Parameter(torch.randn(3 * EMBED))
        self.out = nn.Parameter(torch.randn(EMBED, EMBED))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        q, k, v = by_chunk(flat.view(*x.shape[:2], -1))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return torch.matmul(y, self.out)


def test_weights_as_parameters() -> None:
    compiled = check(Functional(), groups={"weight": HEADS})
    (group,) = compiled.analysis.groups
    assert group.foldable
    check(Functional(), groups={"weight": WIDTH, "weight#2": WIDTH}, attention="positions")


class HeadWeights(nn.Module):
    """Weights (heads, embed, head_dim), contracted by einsum; heads and positions are apart."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in "qkv":
            self.register_parameter(name, nn.Parameter(torch.randn(HEADS, EMBED, WIDTH)))
        self.o = nn.Parameter(torch.randn(HEADS, WIDTH, EMBED))

    def forward(self, x: Tensor) -> Tensor:
        q = torch.einsum("bnc,hcd->bhnd", x, self.q)
        k = torch.einsum("bnc,hcd->bhnd", x, self.k)
        v = torch.einsum("bnc,hcd->bhnd", x, self.v)
        return torch.einsum("bhnd,hde->bne", with_einsum(self, q, k, v), self.o)


def test_weights_with_an_axis_of_heads() -> None:
    groups = {"q": HEADS, "q[2]": WIDTH, "v[2]": WIDTH}
    compiled = check(HeadWeights(), groups=groups)
    heads = compiled.analysis.group("q")
    assert heads.producers == ("q", "k", "v") and heads.foldable


# -- what happens to heads ----------------------------------------------------------------


def expanded(x: Tensor, times: int) -> Tensor:
    n, heads, length, width = x.shape
    x = x[:, :, None, :, :].expand(n, heads, times, length, width)
    return x.reshape(n, heads * times, length, width)


def repeated_by_expand(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, expanded(k, 3), expanded(v, 3))


def repeated_by_interleaving(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return explicit(self, q, k.repeat_interleave(3, dim=1), torch.repeat_interleave(v, 3, 1))


def repeated_inside(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def broadcast_queries(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.unflatten(1, (k.shape[1], -1))
    return explicit(self, q, k.unsqueeze(2), v.unsqueeze(2)).flatten(1, 2)


GROUPED: list[Mixing] = [
    repeated_by_expand,
    repeated_by_interleaving,
    repeated_inside,
    broadcast_queries,
]


@pytest.mark.parametrize("mix", GROUPED)
def test_a_unit_is_a_key_value_head_with_its_query_heads(mix: Mixing) -> None:
    compiled = check(attention(mix, heads=6, kv_heads=2), groups={"q": 2})
    kept = len(compiled.plan.kept.get("q", range(2)))
    assert compiled.sliced.get_submodule("q").out_features == kept * 3 * WIDTH
    assert compiled.sliced.get_submodule("k").out_features == kept * WIDTH


@pytest.mark.parametrize("mix", GROUPED)
def test_positions_of_grouped_queries(mix: Mixing) -> None:
    model = attention(mix, heads=6, kv_heads=2)
    check(model, groups={"q": WIDTH, "v": WIDTH}, attention="positions")


def test_a_single_key_value_head_leaves_query_heads_free() -> None:
    model = attention(repeated_inside, heads=4, kv_heads=1)
    check(model, groups={"q": 4})
    check(model, groups={"q": WIDTH, "v": WIDTH}, attention="positions")


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def rotary(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    cos, sin = self.angles.cos(), self.angles.sin()
    return explicit(self, rotate(q, cos, sin), rotate(k, cos, sin), v)


@pytest.mark.parametrize("attention_unit", ["heads", "positions"])
def test_rotary_embeddings(attention_unit: str) -> None:
    model = attention(rotary)
    model.register_buffer("angles", torch.randn(TOKENS, WIDTH // 2).repeat(1, 2))
    pairs = {"q": WIDTH // 2, "v": WIDTH}
    groups = {"q": HEADS} if attention_unit == "heads" else pairs
    check(model, groups=groups, attention=attention_unit)


def normalized(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return explicit(self, self.norm(q), self.norm(k), v)


def test_queries_and_keys_normalized_over_the_head() -> None:
    model = attention(normalized)
    model.norm = nn.LayerNorm(WIDTH)
    check(model, groups={"q": HEADS})


def cosine(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    scores = scores * torch.clamp(self.logit_scale, max=3.0).exp() + self.sinks
    return scores.softmax(-1) @ v


def test_scales_per_head() -> None:
    model = attention(cosine)
    model.logit_scale = nn.Parameter(torch.randn(HEADS, 1, 1))
    model.sinks = nn.Parameter(torch.randn(HEADS, 1, 1))
    compiled = check(model, groups={"q": HEADS})
    kept = len(compiled.plan.kept.get("q", range(HEADS)))
    assert compiled.sliced.get_parameter("logit_scale").shape == (kept, 1, 1)


def biased(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = self.table[self.index.view(-1)].view(TOKENS, TOKENS, -1)
    return F.scaled_dot_product_attention(q, k, v, bias.permute(2, 0, 1).unsqueeze(0))


def test_relative_position_tables() -> None:
    model = attention(biased)
    model.table = nn.Parameter(torch.randn(2 * TOKENS - 1, HEADS))
    places = torch.arange(TOKENS)
    model.register_buffer("index", places[:, None] - places[None, :] + TOKENS - 1)
    compiled = check(model, groups={"q": HEADS})
    kept = len(compiled.plan.kept.get("q", range(HEADS)))
    assert compiled.sliced.get_parameter("table").shape == (2 * TOKENS - 1, kept)


def bucketed(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = self.buckets(self.index).permute([2, 0, 1]).unsqueeze(0)
    scores = torch.matmul(q, k.transpose(3, 2)) + bias
    return torch.matmul(F.softmax(scores.float().type_as(scores), dim=-1), v)


def test_embeddings_of_buckets() -> None:
    """The relative position bias of T5."""
    model = attention(bucketed)
    model.buckets = nn.Embedding(6, HEADS)
    model.register_buffer("index", torch.randint(0, 6, (TOKENS, TOKENS)))
    compiled = check(model, groups={"q": HEADS})
    assert compiled.analysis.groups[0].producers == ("q", "k", "v", "buckets")


def talking(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.transpose(-2, -1)).permute(0, 2, 3, 1)
    weights = self.before(scores).softmax(dim=-2)
    return self.after(weights).permute(0, 3, 1, 2) @ v


def test_talking_heads() -> None:
    """Scores are mixed across heads: three groups of heads, one read by each mixture."""
    model = attention(talking)
    model.before, model.after = nn.Linear(HEADS, 6), nn.Linear(6, HEADS)
    compiled = check(model, groups={"q": HEADS, "v": HEADS, "before": 6})
    reads = {g.name: [str(r.node.target) for r in g.reads] for g in compiled.analysis.groups}
    assert reads == {"q": ["before"], "before": ["after"], "v": ["out"]}


def talking_convolution(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return self.before(q @ k.transpose(-2, -1)).softmax(dim=-1) @ v


def test_talking_heads_by_convolution() -> None:
    model = attention(talking_convolution)
    model.before = nn.Conv2d(HEADS, HEADS, 1)
    check(model, groups={"q": HEADS, "v": HEADS})


def cross_covariance(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """XCiT: attention between the positions of a head, over tokens."""
    q, k, v = (x.transpose(-2, -1) for x in (q, k, v))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    scores = (q @ k.transpose(-2, -1)) * self.temperature
    return (scores.softmax(dim=-1) @ v).transpose(-2, -1)


def test_cross_covariance_attention() -> None:
    model = attention(cross_covariance)
    model.temperature = nn.Parameter(torch.ones(HEADS, 1, 1))
    check(model, groups={"q": HEADS})


def linear_attention(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys and values are contracted over tokens first."""
    q, k = F.elu(q) + 1, F.elu(k) + 1
    context = k.transpose(-2, -1) @ v
    total = torch.einsum("bhnd,bhd->bhn", q, k.sum(2))
    return torch.einsum("bhnd,bhde->bhne", q, context) / total.unsqueeze(-1)


def test_linear_attention() -> None:
    check(attention(linear_attention), groups={"q": HEADS})
    groups = {"q": WIDTH, "v": WIDTH}
    check(attention(linear_attention), groups=groups, attention="positions")


def gated(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """ConViT: a gate per head between content and position."""
    content = (q @ k.transpose(-2, -1)).softmax(dim=-1)
    position = self.place(self.relative).permute(0, 3, 1, 2).softmax(dim=-1)
    gate = self.gate.view(1, -1, 1, 1).sigmoid()
    weights = (1.0 - gate) * content + gate * position.expand(q.shape[0], -1, -1, -1)
    return (weights / weights.sum(dim=-1).unsqueeze(-1)) @ v


def test_gates_between_content_and_position() -> None:
    model = attention(gated)
    model.place, model.gate = nn.Linear(4, HEADS), nn.Parameter(torch.ones(HEADS))
    model.register_buffer("relative", torch.randn(1, TOKENS, TOKENS, 4))
    check(model, groups={"q": HEADS})


def pooled(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """MViT: heads become examples of a depthwise convolution over the tokens."""

    def pool(x: Tensor) -> Tensor:
        n, heads, length, width = x.shape
        x = self.pool(x.reshape(n * heads, length, width).transpose(1, 2))
        return self.norm(x.reshape(n, heads, width, -1).transpose(2, 3))

    return explicit(self, q, pool(k), pool(v)) + q


def test_heads_as_examples_of_a_convolution() -> None:
    model = attention(pooled)
    model.pool = nn.Conv1d(WIDTH, WIDTH, 3, stride=2, groups=WIDTH)
    model.norm = nn.LayerNorm(WIDTH)
    check(model, groups={"q": HEADS})


class WithoutKeyBias(nn.Module):
    """Swin v2 of torchvision: the part of the keys in the bias is set to zero, in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Linear(EMBED, 3 * EMBED), nn.Linear(EMBED, EMBED)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.qkv.bias.clone()
        length = bias.numel() // 3
        bias[length : 2 * length].zero_()
        qkv = F.linear(x, self.qkv.weight, bias)
        q, k, v = timm_style(qkv)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


def test_a_part_of_the_bias_set_to_zero() -> None:
    check(WithoutKeyBias(), groups={"qkv.weight": HEADS})
