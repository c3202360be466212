"""Modules and functions that capture opens up, written as the operators they stand for.

`nn.MultiheadAttention` hides several contractions in one call, and checks that its heads fill the
embedding. Spelled out, every contraction is a node of the graph where multipliers can sit, and
heads may go. Results equal torch's to rounding.

`DECOMPOSITIONS` maps a module class to a function of the module and its arguments, and a function
to one of the same arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def multi_head_attention(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`module(query, key, ...)` for an `nn.MultiheadAttention`."""
    return _attention(
        (query, key, value),
        module.num_heads,
        packed_weight=module.in_proj_weight,
        weights=(module.q_proj_weight, module.k_proj_weight, module.v_proj_weight),
        bias=module.in_proj_bias,
        extra=(module.bias_k, module.bias_v),
        add_zero_attn=module.add_zero_attn,
        project=module.out_proj,
        dropout=module.dropout,
        training=module.dropout > 0.0 and module.training,
        key_padding_mask=key_padding_mask,
        need_weights=need_weights,
        attn_mask=attn_mask,
        average_attn_weights=average_attn_weights,
        is_causal=is_causal,
        batch_first=module.batch_first,
    )


def multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`F.multi_head_attention_forward` of the same arguments."""
    return _attention(
        (query, key, value),
        num_heads,
        packed_weight=None if use_separate_proj_weight else in_proj_weight,
        weights=(q_proj_weight, k_proj_weight, v_proj_weight),
        bias=in_proj_bias,
        extra=(bias_k, bias_v),
        static=(static_k, static_v),
        add_zero_attn=add_zero_attn,
        project=lambda x: F.linear(x, out_proj_weight, out_proj_bias),
        dropout=dropout_p,
        training=training,
        key_padding_mask=key_padding_mask,
        need_weights=need_weights,
        attn_mask=attn_mask,
        average_attn_weights=average_attn_weights,
        is_causal=is_causal,
    )


def _attention(
    inputs: tuple[Tensor, Tensor, Tensor],
    num_heads: int,
    *,
    packed_weight: Tensor | None,
    weights: tuple[Tensor | None, Tensor | None, Tensor | None],
    bias: Tensor | None,
    extra: tuple[Tensor | None, Tensor | None],
    add_zero_attn: bool,
    project: Callable[[Tensor], Tensor],
    dropout: float,
    training: bool,
    key_padding_mask: Tensor | None,
    need_weights: bool,
    attn_mask: Tensor | None,
    average_attn_weights: bool,
    is_causal: bool,
    static: tuple[Tensor | None, Tensor | None] = (None, None),
    batch_first: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Multi-head attention, step by step; arguments as in torch, `static` and `extra` in pairs."""
    if is_causal and attn_mask is None:
        raise RuntimeError("is_causal is a hint about attn_mask, which is missing")
    batched = inputs[0].dim() == 3
    if not batched:
        inputs = _each(inputs, lambda x: x.unsqueeze(0))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    elif not batch_first:
        inputs = _each(inputs, lambda x: x.transpose(0, 1))
    query, key, value = _projections(inputs, packed_weight, weights, bias)
    causal = is_causal and key_padding_mask is None and not need_weights
    mask = None if causal else _as_float(attn_mask, query.dtype)
    padding = _as_float(key_padding_mask, query.dtype)
    key, value = (_extended(x, one) for x, one in zip((key, value), extra, strict=True))
    # (N, tokens, heads * head_dim) -> (N, heads, tokens, head_dim)
    query, key, value = (
        x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query, key, value)
    )
    key, value = (
        x if fixed is None else fixed.unflatten(0, (-1, num_heads))
        for x, fixed in zip((key, value), static, strict=True)
    )
    added = int(extra[0] is not None) + int(add_zero_attn)
    if add_zero_attn:
        key, value = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))
    mask = _merged_mask(mask, padding, num_heads, added)
    if need_weights:
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
        scores = torch.softmax(scores if mask is None else scores + mask, dim=-1)
        if dropout > 0.0:
            scores = F.dropout(scores, dropout, training=training)
        mixed = scores @ value
    else:
        rate = dropout if training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, mask, rate, causal)
    result = project(mixed.transpose(1, 2).flatten(2))
    shown = None
    if need_weights:
        shown = scores.mean(dim=1) if average_attn_weights else scores
    if not batched:
        return result.squeeze(0), None if shown is None else shown.squeeze(0)
    return (result if batch_first else result.transpose(0, 1)), shown


def _each(
    inputs: tuple[Tensor, Tensor, Tensor], function: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply a function to three inputs, once to those that are the same."""
    done = {id(x): function(x) for x in {id(x): x for x in inputs}.values()}
    query, key, value = (done[id(x)] for x in inputs)
    return query, key, value


def _projections(
    inputs: tuple[Tensor, Tensor, Tensor],
    packed_weight: Tensor | None,
    weights: tuple[Tensor | None, Tensor | None, Tensor | None],
    bias: Tensor | None,
) -> tuple[Any, ...]:
    """Queries, keys and values; in one step where they come from the same input."""
    query, key, value = inputs
    if packed_weight is not None:
        if query is key and key is value:
            return tuple(F.linear(query, packed_weight, bias).chunk(3, dim=-1))
        weights = packed_weight.chunk(3)  # type: ignore[assignment]
    biases = (None, None, None) if bias is None else bias.chunk(3)
    return tuple(F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True))  # type: ignore[arg-type]


def _as_float(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask that is added to scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)


def _extended(tokens: Tensor, one: Tensor | None) -> Tensor:
    """Tokens (N, S, E) with one more, (1, 1, E), behind them."""
    if one is None:
        return tokens
    return torch.cat([tokens, one.expand(tokens.shape[0], -1, -1)], dim=1)


def _merged_mask(
    mask: Tensor | None, padding: Tensor | None, num_heads: int, added: int
) -> Tensor | None:
    """Attention mask and key padding as one, for scores of shape (N, heads, L, S + added)."""
    if mask is not None:
        if mask.dim() == 3:
            mask = mask.unflatten(0, (-1, num_heads))
        mask = F.pad(mask, (0, added)) if added else mask
    if padding is not None:
        padding = F.pad(padding, (0, added)) if added else padding
        padding = padding.unsqueeze(1).unsqueeze(1)
        mask = padding if mask is None else mask + padding
    return mask


DECOMPOSITIONS: dict[type[nn.Module] | Callable[..., Any], Callable[..., Any]] = {
    nn.MultiheadAttention: multi_head_attention,
    F.multi_head_attention_forward: multi_head_attention_forward,
}
