"""Scaled dot-product attention: two contractions with a softmax over the keys in between."""

from __future__ import annotations

import numpy as np
from torch import fx
from torch.nn import functional as F

from rbpfx.graph.operands import Labels
from rbpfx.graph.propagation import Propagation
from rbpfx.graph.provenance import Label
from rbpfx.graph.rules.base import Rule, argument, register, set_argument, shape_of, value_of
from rbpfx.graph.rules.combine import broadcast
from rbpfx.graph.rules.contraction import (
    Factor,
    Letters,
    contract,
    contraction_macs,
)
from rbpfx.graph.slicing import Slicing

_MASK, _IS_CAUSAL, _SCALE, _ENABLE_GQA = 3, 5, 6, 7


class Attention(Rule):
    """`F.scaled_dot_product_attention`, (..., heads, tokens, head_dim).

    Queries and keys are contracted over `head_dim`, the scores and the values over the keys'
    tokens; heads are a batch axis of both, and the values' own `head_dim` passes through.
    """

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Contract, collapse what the softmax mixes, contract again."""
        query, key, value = _operands(node)
        score_macs, value_macs = _macs(node)
        queries = Factor(state.label(query), _letters(query, "q", "d"), query)
        keys = Factor(_repeated(node, key, state), _letters(key, "k", "d"), None)
        batch = _batch(max(len(queries.letters), len(keys.letters)))
        scores = contract(state, node, [queries, keys], (*batch, "q", "k"), score_macs)
        mask = argument(node, _MASK, "attn_mask")
        if isinstance(mask, fx.Node):
            scores = broadcast(state, [scores, state.label(mask)], scores.shape, "attention mask")
        if value_of(argument(node, _IS_CAUSAL, "is_causal", False)):
            scores = state.collapse(scores, {scores.ndim - 2}, "tokens under a causal mask")
        scores = state.collapse(scores, {scores.ndim - 1}, "softmax of attention")
        weights = Factor(scores, (*batch, "q", "k"), None)
        values = Factor(_repeated(node, value, state), _letters(value, "k", "v"), None)
        return contract(state, node, [weights, values], (*batch, "q", "v"), value_macs)

    def rewrite(self, node: fx.Node, state: Slicing) -> None:
        """Write the scale of the original head width where the heads become narrower."""
        query = _operands(node)[0]
        label = state.label(query)
        narrower = label.ndim - 1 in state.changed_sizes(label)
        if narrower and argument(node, _SCALE, "scale") is None:
            scale = shape_of(query)[-1] ** -0.5
            set_argument(state.twin(node), _SCALE, "scale", scale)

    def macs(self, node: fx.Node, gm: fx.GraphModule) -> int:
        """Those of both contractions, masked scores included."""
        return sum(_macs(node))


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
    names = ("query", "key", "value")
    query, key, value = (argument(node, place, name) for place, name in enumerate(names))
    return query, key, value


def _repeats(node: fx.Node) -> int:
    """How many query heads share a key/value head."""
    query, key, _ = _operands(node)
    if not value_of(argument(node, _ENABLE_GQA, "enable_gqa", False)):
        return 1
    return shape_of(query)[-3] // shape_of(key)[-3]


def _repeated(node: fx.Node, source: fx.Node, state: Propagation) -> Label:
    """The label of keys or values with every head repeated for its query heads."""
    label = state.label(source)
    repeats = _repeats(node)
    if repeats == 1 or label.shape[-3] == 1:  # a single head serves any number of queries
        return label
    return label.indexed(-3, np.repeat(np.arange(label.shape[-3]), repeats))


def _batch(ndim: int) -> Letters:
    """Letters of the axes in front of the last two."""
    return tuple(str(place) for place in range(-ndim, -2))


def _letters(value: fx.Node, tokens: str, features: str) -> Letters:
    return (*_batch(len(shape_of(value))), tokens, features)


def _macs(node: fx.Node) -> tuple[int, int]:
    operands = _operands(node)
    query, key, value = (shape_of(n) for n in operands)
    if _repeats(node) > 1:
        key, value = (_with_heads(shape, query[-3]) for shape in (key, value))
    letters = [_letters(n, *x) for n, x in zip(operands, ("qd", "kd", "kv"), strict=True)]
    scores = contraction_macs([query, key], letters[:2])
    weights = (*query[:-1], key[-2])
    values = contraction_macs([weights, value], [(*letters[0][:-1], "k"), letters[2]])
    return scores, values


def _with_heads(shape: tuple[int, ...], heads: int) -> tuple[int, ...]:
    return (*shape[:-3], heads, *shape[-2:])


register(Attention(), F.scaled_dot_product_attention)
