"""Auto-Balanced Filter Pruning: the two forces balance, and move capacity."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rbpfx import AutoBalanced, RbpfxError, analyze, insert_noise, noise_gates, trace
from rbpfx.methods.auto_balanced import AutoBalancedGate, balance
from tests.toy import ShortcutNet, stripes

INPUTS = stripes()[0][0]


@pytest.fixture
def bound() -> tuple[nn.Module, AutoBalancedGate]:
    torch.manual_seed(0)
    gm = trace(ShortcutNet(), INPUTS)
    noisy = insert_noise(gm, analyze(gm), AutoBalanced())
    gate = next(g for g in noise_gates(noisy) if g.group == "conv1")
    assert isinstance(gate, AutoBalancedGate)
    return noisy, gate


def test_the_published_coefficients() -> None:
    importance = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    keep = torch.tensor([False, False, True, True])
    log2 = torch.log(torch.tensor(2.0, dtype=torch.float64))
    expected = torch.stack([1 + 2 * log2, 1 + log2, -1 - 0 * log2, -1 - log2])
    assert torch.allclose(balance(importance, keep), expected)


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=20), st.data())
def test_coefficients_are_finite_and_signed(importance: list[float], data: st.DataObject) -> None:
    values = torch.tensor(importance, dtype=torch.float64)
    keep = torch.zeros(len(values), dtype=torch.bool)
    keep[values.argmax()] = True
    for index in data.draw(st.sets(st.integers(0, len(values) - 1))):
        keep[index] = True
    coefficients = balance(values, keep)
    assert torch.isfinite(coefficients).all()
    assert (coefficients[keep] <= -1).all()
    assert (coefficients[~keep] >= 1).all()


def test_the_penalty_sums_to_zero_and_pushes_apart(bound) -> None:
    noisy, gate = bound
    keep = gate.score() > gate.score().median()
    gate.choose(keep)
    penalty = gate.penalty(0.1, 1)
    assert penalty.shape == (8,)
    assert penalty.sum().abs() < 1e-5 * penalty.abs().sum()
    penalty.sum().backward()
    weight = noisy.conv1.weight
    growth = -(weight.grad * weight).sum((1, 2, 3))  # of the norm, along the descent
    assert (growth[keep] > 0).all()
    assert (growth[~keep] < 0).all()


def test_nothing_is_added_while_all_filters_stay(bound) -> None:
    _, gate = bound
    assert (gate.penalty(1.0, 1) == 0).all()
    gate.choose(torch.ones(8, dtype=torch.bool))
    assert (gate.penalty(1.0, 1) == 0).all()


def test_training_moves_the_capacity(bound) -> None:
    """By the penalty alone, the share of the filters to prune falls steadily."""
    noisy, gate = bound
    keep = gate.score() > gate.score().median()
    gate.choose(keep)
    optimizer = torch.optim.SGD([noisy.conv1.weight], 0.05)

    def weak_share() -> float:
        norms = noisy.conv1.weight.detach().abs().sum((1, 2, 3))
        return float(norms[~keep].sum() / norms.sum())

    shares = [weak_share()]
    for _ in range(5):
        for _ in range(20):
            optimizer.zero_grad()
            gate.penalty(0.1, 1).sum().backward()
            optimizer.step()
        shares.append(weak_share())
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.5 * shares[0]


def test_multipliers_are_one(bound) -> None:
    _, gate = bound
    assert (gate(INPUTS) == 1).all()
    gate.harden(torch.arange(8) < 3)
    assert gate(None).tolist() == [[1.0] * 3 + [0.0] * 5]


def test_scope() -> None:
    with pytest.raises(RbpfxError, match="scope must be one of"):
        AutoBalanced(scope="everywhere")
