"""Decompositions equal what they stand for, in every option and in both modes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rbpfx.graph.decompositions import (
    DECOMPOSITIONS,
    multi_head_attention,
    multi_head_attention_forward,
)
from rbpfx.testing import randomize
from tests.graph.laws import assert_close
from tests.graph.rules.test_attention import BATCH, EMBED, HEADS, TOKENS, WIDTH
from tests.graph.rules.test_attention import check as check_laws

QUERIES, KEYS = TOKENS, 4


def attention(**options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(EMBED, HEADS, **options).double()
    randomize(module)
    return module


def tokens(module: nn.MultiheadAttention, length: int, size: int, batched: bool = True) -> Tensor:
    shape = (BATCH, length, size) if module.batch_first else (length, BATCH, size)
    torch.manual_seed(length)
    return torch.randn(shape if batched else (length, size), dtype=torch.float64)


def check(module: nn.MultiheadAttention, *inputs: Tensor, **options: Any) -> None:
    for mode in (True, False):
        module.train(mode)
        results = []
        for call in (module, lambda *a, **k: multi_head_attention(module, *a, **k)):
            torch.manual_seed(7)
            output, weights = call(*inputs, **options)
            results.append((output, *(() if weights is None else (weights,))))
        assert_close(*results, f"{options}", tolerance=1e-12)


MODULES: list[dict[str, Any]] = [
    {},
    {"batch_first": True},
    {"bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True, "batch_first": True},
    {"add_bias_kv": True, "add_zero_attn": True},
    {"kdim": 7, "vdim": 9},
    {"kdim": 7, "vdim": 9, "bias": False, "add_zero_attn": True, "batch_first": True},
]


@pytest.mark.parametrize("options", MODULES, ids=str)
@pytest.mark.parametrize("batched", [True, False])
def test_every_kind_of_module(options: dict[str, Any], batched: bool) -> None:
    module = attention(**options)
    query = tokens(module, QUERIES, EMBED, batched)
    key = tokens(module, KEYS, options.get("kdim", EMBED), batched)
    value = tokens(module, KEYS, options.get("vdim", EMBED), batched)
    for need, average in itertools.product((True, False), (True, False)):
        check(module, query, key, value, need_weights=need, average_attn_weights=average)


@pytest.mark.parametrize("batch_first", [True, False])
def test_shared_inputs(batch_first: bool) -> None:
    module = attention(batch_first=batch_first)
    x, y = tokens(module, QUERIES, EMBED), tokens(module, KEYS, EMBED)
    for need in (True, False):
        check(module, x, x, x, need_weights=need)
        check(module, x, y, y, need_weights=need)
        check(module, x, x, x * 2, need_weights=need)


def masks() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    padding = draw(BATCH, KEYS) > 0.3
    padding[:, 0] = False
    return [
        {"attn_mask": draw(QUERIES, KEYS)},
        {"attn_mask": (draw(QUERIES, KEYS) > 0) & torch.tensor([False, True, True, True])},
        {"attn_mask": draw(BATCH * HEADS, QUERIES, KEYS)},
        {"key_padding_mask": padding},
        {"key_padding_mask": draw(BATCH, KEYS), "attn_mask": draw(QUERIES, KEYS)},
        {"key_padding_mask": padding, "attn_mask": draw(BATCH * HEADS, QUERIES, KEYS) > 9.0},
        {"key_padding_mask": padding, "attn_mask": draw(QUERIES, KEYS), "is_causal": True},
    ]


@pytest.mark.parametrize("mask", masks(), ids=lambda m: "+".join(m))
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True}], ids=str)
@pytest.mark.parametrize("need_weights", [True, False])
def test_masks(mask: dict[str, Any], options: dict[str, Any], need_weights: bool) -> None:
    module = attention(**options)
    query, key = tokens(module, QUERIES, EMBED), tokens(module, KEYS, EMBED)
    check(module, query, key, key, need_weights=need_weights, **mask)


def test_causal_hint_and_unbatched_masks() -> None:
    module = attention(batch_first=True)
    x = tokens(module, QUERIES, EMBED)
    causal = nn.Transformer.generate_square_subsequent_mask(QUERIES, dtype=torch.float64)
    for need in (True, False):
        check(module, x, x, x, attn_mask=causal, is_causal=True, need_weights=need)
    row = tokens(module, QUERIES, EMBED, batched=False)
    padding = torch.tensor([False, False, True, False, True])
    check(module, row, row, row, key_padding_mask=padding)
    check(module, row, row, row, attn_mask=torch.randn(HEADS, QUERIES, QUERIES).double())
    for call in (module, lambda *a, **k: multi_head_attention(module, *a, **k)):
        with pytest.raises(RuntimeError, match="attn_mask"):
            call(x, x, x, is_causal=True)


def test_dropout_draws_the_same() -> None:
    module = attention(dropout=0.4)
    x = tokens(module, QUERIES, EMBED)
    check(module, x, x, x, need_weights=False)
    for mode in (True, False):
        module.train(mode)
        torch.manual_seed(1)
        output, weights = multi_head_attention(module, x, x, x)
        assert weights is not None
        assert bool((weights == 0).any()) == mode
        assert torch.isfinite(output).all()


def test_the_functional_form() -> None:
    module = attention()
    query, key = tokens(module, QUERIES, EMBED), tokens(module, KEYS, EMBED)
    arguments = (EMBED, HEADS, module.in_proj_weight, module.in_proj_bias, None, None, False, 0.0)
    out = (module.out_proj.weight, module.out_proj.bias)
    static = torch.randn(BATCH * HEADS, KEYS, EMBED // HEADS).double()
    q, k, v = module.in_proj_weight.chunk(3)
    separate = {"q_proj_weight": q, "k_proj_weight": k, "v_proj_weight": v}
    for options in (
        {},
        {"need_weights": False},
        {"static_k": static, "static_v": static * 2},
        {"use_separate_proj_weight": True, **separate},
    ):
        expected, actual = (
            function(query, key, key, *arguments, *out, **options)  # type: ignore[operator]
            for function in (F.multi_head_attention_forward, multi_head_attention_forward)
        )
        for a, b in zip(expected, actual, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert_close(a, b, str(options), tolerance=1e-12)


def test_the_tables_name_them() -> None:
    assert DECOMPOSITIONS[nn.MultiheadAttention] is multi_head_attention
    assert DECOMPOSITIONS[F.multi_head_attention_forward] is multi_head_attention_forward


# -- in a captured network ---------------------------------------------------------------------


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention` between two layers."""

    def __init__(self, need_weights: bool, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(EMBED, EMBED)
        self.attention = nn.MultiheadAttention(EMBED, HEADS, batch_first=True, **options)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=self.need_weights)[0]


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_multihead_attention(need_weights: bool, options: dict[str, Any]) -> None:
    model = SelfAttention(need_weights, **options)
    compiled = check_laws(model, groups={"attention.in_proj_weight": HEADS})
    kept = len(compiled.plan.kept.get("attention.in_proj_weight", range(HEADS)))
    assert compiled.sliced.get_parameter("attention.in_proj_weight").shape[0] == 3 * kept * WIDTH
    assert compiled.sliced.get_submodule("attention.out_proj").in_features == kept * WIDTH


class CrossAttention(nn.Module):
    """Queries from one input, keys and values from another."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(EMBED, HEADS, **options)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = x.transpose(0, 1), y.transpose(0, 1)
        return self.attention(x, y, y)[0].transpose(0, 1)


@pytest.mark.parametrize("options", [{}, {"kdim": 7, "vdim": 7}], ids=str)
def test_cross_attention(options: dict[str, Any]) -> None:
    x = torch.randn(BATCH, TOKENS, EMBED).double()
    y = torch.randn(BATCH, 4, options.get("kdim", EMBED)).double()
    name = "attention.q_proj_weight" if options else "attention.in_proj_weight"
    check_laws(CrossAttention(**options), x, y, groups={name: HEADS})


@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_layers(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(
        EMBED, HEADS, 16, dropout=0.0, batch_first=True, norm_first=norm_first
    )
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    groups = {"layers.0.self_attn.in_proj_weight": HEADS, "layers.0.linear1": 16}
    groups |= {name.replace(".0.", ".1."): size for name, size in groups.items()}
    check_laws(model, groups=groups)
