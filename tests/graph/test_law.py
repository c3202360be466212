"""The law of the compiler on random networks: sliced equals masked, forward and backward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx

from rbpfx.graph import gates
from rbpfx.graph.capture import trace
from rbpfx.graph.groups import analyze
from rbpfx.graph.propagation import Propagation
from rbpfx.graph.provenance import Identities, Label
from rbpfx.graph.rules import (
    base,
    combine,
    convolution,
    elementwise,
    indexing,
    movement,
    normalization,
    reduction,
    softmax,
    spatial,
)
from rbpfx.testing.laws import SAME
from tests.graph.generator import random_inputs, random_program
from tests.graph.laws import (
    Snapshot,
    assert_close,
    check_again,
    check_close,
    check_costs,
    check_identity,
    check_law,
    check_multipliers,
    check_pickle,
    check_statistics,
    compile_random,
)
from tests.graph.operators import OPERATORS

QUICK = range(150)
MANY = range(1000, 4000)


def unit_of(seed: int) -> str:
    return "feature" if seed % 2 else "channel"


def normalization_of(seed: int) -> str:
    return "exact" if seed % 3 == 0 else "freeze"


def check(seed: int, length: int, *, everything: bool) -> None:
    """The laws on the network of a seed: all of them, or the main ones and a turn of the others."""
    model = random_program(seed, length=length)
    inputs = random_inputs(model)
    user_model = Snapshot.of(model)
    options = {"unit": unit_of(seed), "normalization": normalization_of(seed)}
    compiled = compile_random(model, inputs, seed, **options)
    graph = Snapshot.of(compiled.gm)
    check_law(compiled, inputs, train=False)
    check_law(compiled, inputs, train=True)
    turn = seed % 5
    if everything or turn == 0:
        check_law(compiled, random_inputs(model, batch=2, seed=1), train=False)
        check_statistics(compiled, inputs)
    if everything or turn == 1:
        check_identity(compiled, inputs)
        check_multipliers(compiled, inputs, seed)
    if everything or turn == 2:
        check_close(compiled, inputs)
    if everything or turn == 3:
        check_again(compiled, inputs, seed)
    if everything or turn == 4:
        check_costs(compiled)
        check_pickle(compiled, inputs)
    graph.check(compiled.gm)
    user_model.check(model)


@pytest.mark.parametrize("seed", QUICK)
def test_laws_on_a_random_network(seed: int) -> None:
    check(seed, 4 + seed % 9, everything=False)


@pytest.mark.slow
@pytest.mark.parametrize("seed", MANY)
def test_all_laws_on_many_random_networks(seed: int) -> None:
    check(seed, 5 + seed % 20, everything=True)


@pytest.mark.parametrize("seed", range(200, 230))
def test_trace_equals_the_module_in_both_modes(seed: int) -> None:
    model = random_program(seed, dropout=0.4)
    inputs = random_inputs(model)
    gm = compile_random(model, inputs, seed).gm
    for mode in (False, True):
        results = []
        for network in (model, gm):
            torch.manual_seed(seed)
            results.append(network.train(mode)(*(x.clone() for x in inputs)))
        assert_close(*results, "trace", tolerance=SAME)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(gm.get_buffer(name), buffer, rtol=SAME, atol=SAME)


@pytest.mark.parametrize("kind", sorted(OPERATORS))
def test_every_operator_alone(kind: str) -> None:
    """Between layers, every operator of the generator obeys the law."""
    layers = ["convolution", "linear"]
    for seed in range(2):
        model = random_program(seed, length=6, only=[kind, *layers])
        inputs = random_inputs(model)
        compiled = compile_random(model, inputs, seed)
        check_law(compiled, inputs, train=seed % 2 == 0)


def test_the_random_networks_are_worth_testing() -> None:
    """Most have something to prune, and every operator occurs often enough."""
    occurs: Counter[str] = Counter()
    prunable = 0
    for seed in QUICK:
        model = random_program(seed, length=4 + seed % 9)
        occurs.update(set(model.operators))
        if seed % 3 == 0:
            prunable += bool(analyze(trace(model, random_inputs(model))).groups)
    assert prunable > 0.7 * len(QUICK) / 3
    assert min(occurs[name] for name in OPERATORS) >= 3, occurs


# -- the law can fail ---------------------------------------------------------------------


def wrong_reduction(node: fx.Node, state: Propagation) -> Any:
    """Reduce over channels without pinning them."""
    label = state.label(node.args[0])
    return Label(tuple(node.meta["val"].shape), ()) if label.blocks else label


def swapped_concatenation(propagate: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(self: Any, node: fx.Node, state: Propagation) -> Any:
        label = propagate(self, node, state)
        blocks = tuple(type(b)(b.dims, b.atoms[::-1].copy()) for b in label.blocks)
        return Label(label.shape, blocks)

    return wrong


def nothing(*args: Any, **kwargs: Any) -> None:
    return None


def kept_label(self: Any, node: fx.Node, state: Propagation) -> Any:
    return Label(tuple(node.meta["val"].shape), state.label(node.args[0]).blocks)


Mutation = Callable[[pytest.MonkeyPatch], None]
MUTATIONS: dict[str, tuple[Mutation, list[str]]] = {
    "cumsum treated as element-wise": (
        lambda m: m.setitem(base._REGISTRY, "cumsum", elementwise.ELEMENTWISE),
        ["cumulative_sum"],
    ),
    "reduction that does not pin": (
        lambda m: m.setattr(
            reduction.Reduce, "propagate", lambda self, n, s: wrong_reduction(n, s)
        ),
        ["reduction"],
    ),
    "mean over fewer channels": (
        lambda m: m.setattr(reduction.Mean, "rewrite", nothing),
        ["channel_reduction", "spatial_attention"],
    ),
    "normalisation treated as element-wise": (
        lambda m: m.setattr(normalization.Mixing, "statistics", lambda s, n, state, x, d: x),
        ["layer_norm"],
    ),
    "GroupNorm that keeps its groups": (
        lambda m: m.setattr(normalization.GroupNorm, "rewrite", nothing),
        ["group_norm"],
    ),
    "softmax treated as element-wise": (
        lambda m: m.setattr(softmax.Along, "propagate", kept_label),
        ["softmax"],
    ),
    "concatenation in the wrong order": (
        lambda m: m.setattr(
            combine.Concatenate,
            "propagate",
            swapped_concatenation(combine.Concatenate.propagate),
        ),
        ["concatenation"],
    ),
    "addition that ties nothing": (
        lambda m: m.setattr(combine, "broadcast", lambda s, labels, shape: labels[0]),
        ["binary", "residual"],
    ),
    "BatchNorm that keeps its parameters": (
        lambda m: m.setattr(normalization.BatchNorm, "propagate", kept_label),
        ["batch_norm"],
    ),
    "split that is not rewritten": (
        lambda m: m.setattr(indexing.Split, "rewrite", nothing),
        ["split"],
    ),
    "slice that is not rewritten": (
        lambda m: m.setattr(indexing.GetItem, "rewrite", nothing),
        ["slicing"],
    ),
    "padding that is not rewritten": (
        lambda m: m.setattr(indexing.Pad, "rewrite", nothing),
        ["padding", "layer_scale"],
    ),
    "padding that keeps the wrong side": (
        lambda m: m.setattr(indexing, "_kept_padding", lambda n, before, after: n),
        ["padding", "layer_scale"],
    ),
    "sizes that follow the channels": (
        lambda m: m.setattr(elementwise.Glimpse, "rewrite", nothing),
        ["size_arithmetic"],
    ),
    "view that is not rewritten": (
        lambda m: m.setattr(movement.Reshape, "rewrite", nothing),
        ["group_view", "expansion"],
    ),
    "permutation that is ignored": (
        lambda m: m.setattr(movement.Permute, "propagate", kept_label),
        ["permutation"],
    ),
    "groups that are not tied": (
        lambda m: m.setattr(convolution, "tie_groups", nothing),
        ["convolution", "transposed_convolution"],
    ),
    "depthwise convolution that keeps its groups": (
        lambda m: m.setattr(convolution.Convolution, "rewrite", nothing),
        ["convolution"],
    ),
    "spatial axes that are followed": (
        lambda m: m.setattr(spatial.Spatial, "propagate", kept_label),
        ["pooling", "permutation"],
    ),
    "identities that are not tied": (
        lambda m: m.setattr(Identities, "tie", nothing),
        ["binary"],
    ),
    "mask that misses a read": (
        lambda m: m.setattr(gates._Inserter, "_multiply", nothing),
        ["activation"],
    ),
    "indices that are off by one": (
        lambda m: m.setattr(
            "rbpfx.graph.slicing.np.flatnonzero", lambda a: np.roll(a, 1).nonzero()[0]
        ),
        ["activation"],
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_law_notices_a_wrong_rule(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate, kinds = MUTATIONS[name]
    mutate(monkeypatch)
    for seed in range(300):
        model = random_program(seed, length=7, only=[*kinds, "convolution", "linear"])
        if not set(kinds) <= set(model.operators):
            continue
        inputs = random_inputs(model)
        try:
            check_law(compile_random(model, inputs, seed), inputs, train=seed % 2 == 0)
        except Exception:
            monkeypatch.undo()
            check_law(compile_random(model, inputs, seed), inputs, train=seed % 2 == 0)
            return
    pytest.fail("300 random networks did not notice")
