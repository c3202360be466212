"""MacKay's fixed point: the divergence, the precision it settles on, and the rule."""

import itertools
import math
from dataclasses import asdict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate

from rbpfx.methods.base import Phase
from rbpfx.methods.mackay import (
    PRECISION_HIGH,
    PRECISION_LOW,
    MacKay,
    MacKayGate,
    gaussian_kl,
    next_precision,
    relevance,
)

CASES = list(itertools.product([-2.0, 0.0, 1e-3, 1.0], [-8.0, -3.0, 0.0, 2.0], [1e-4, 1.0, 1e4]))


def fresh(size: int, foldable: bool = True, **settings: Any) -> MacKayGate:
    return MacKayGate(size, foldable, **{**asdict(MacKay()), **settings})


@pytest.mark.parametrize(("mean", "log_std", "precision"), CASES)
def test_kl_equals_numerical_integration(mean: float, log_std: float, precision: float) -> None:
    std = math.exp(log_std)

    def integrand(z: float) -> float:
        log_q = -0.5 * z * z - log_std
        log_p = -0.5 * precision * (mean + std * z) ** 2 + 0.5 * math.log(precision)
        return math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi) * (log_q - log_p)

    expected, _ = integrate.quad(integrand, -12, 12, epsabs=1e-12, epsrel=1e-12, limit=200)
    arguments = (torch.tensor(x, dtype=torch.float64) for x in (mean, log_std, precision))
    assert gaussian_kl(*arguments).item() == pytest.approx(expected, rel=1e-9, abs=1e-11)


def test_kl_gradient_by_finite_differences() -> None:
    mean = torch.linspace(-2, 2, 5, dtype=torch.float64, requires_grad=True)
    log_std = torch.linspace(-3, 1, 5, dtype=torch.float64, requires_grad=True)
    precision = torch.logspace(-2, 2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gaussian_kl, (mean, log_std, precision))


@settings(max_examples=60, deadline=None)
@given(st.floats(-3, 3), st.floats(-10, 3), st.floats(-6, 9))
def test_the_fixed_point_is_one_over_the_second_moment(
    m: float, log_s: float, start: float
) -> None:
    mean, log_std = (torch.tensor(x, dtype=torch.float64) for x in (m, log_s))
    second = mean**2 + torch.exp(2 * log_std)
    at_rest = (1 / second).clamp(PRECISION_LOW, PRECISION_HIGH)
    precision = torch.tensor(10.0**start, dtype=torch.float64)
    before = (precision / at_rest).log().abs()
    for _ in range(300):
        precision = next_precision(mean, log_std, precision)
        assert PRECISION_LOW <= precision <= PRECISION_HIGH
    if mean.abs() > log_std.exp():  # elsewhere steps are short: see below
        assert precision.item() == pytest.approx(at_rest.item(), rel=1e-6)
        if mean.abs() > 1e-4:
            gamma = relevance(mean, log_std, precision)
            assert gamma.item() == pytest.approx((mean**2 / second).item(), abs=1e-6)
    else:
        assert (precision / at_rest).log().abs() <= before + 1e-6 or precision < at_rest


@pytest.mark.parametrize("mean", [0.05, 0.1, 0.5, 0.99, 2.0])
def test_it_settles_where_the_plain_step_oscillates(mean: float) -> None:
    m, log_s = torch.tensor(mean, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    at_rest = 1 / (1 + mean**2)
    precision = torch.tensor([1e-6, 0.9, 1e9], dtype=torch.float64)
    for _ in range(12_000 if mean < 0.1 else 3000):
        precision = next_precision(m, log_s, precision)
    assert precision.tolist() == pytest.approx([at_rest] * 3, rel=1e-6)
    if mean < 1:  # the plain step really does go away from the fixed point
        plain = 0.99 * at_rest
        assert abs((1 - plain) / mean**2 - at_rest) > 0.01 * at_rest


def test_the_precision_stays_finite_at_zero_mean() -> None:
    mean, log_std = torch.zeros(3), torch.tensor([-10.0, 0.0, 3.0])
    precision = torch.tensor([PRECISION_LOW, 1.0, PRECISION_HIGH])
    assert torch.isfinite(next_precision(mean, log_std, precision)).all()
    gate = fresh(3)
    with torch.no_grad():
        gate.log_mean.copy_(torch.tensor([-100.0, 0.0, 100.0]))
        gate.log_std.copy_(torch.tensor([-30.0, 0.0, 30.0]))
    total = gate.penalty(1.0, 1) + gate.pressure() + gate.openness(3.0) + gate.score()
    total.sum().backward()
    for tensor in (total, gate.log_mean.grad, gate.log_std.grad):
        assert torch.isfinite(tensor).all()


def test_it_starts_at_the_fixed_point() -> None:
    gate = fresh(2)
    start = gate.precision.clone()
    assert torch.allclose(start, 1 / (1 + torch.exp(torch.tensor(-6.0))))
    gate.update()
    assert torch.allclose(gate.precision, start, rtol=1e-5)


def test_pressure_is_the_divergence_at_the_fixed_point() -> None:
    gate = fresh(3)
    with torch.no_grad():
        gate.log_mean.copy_(torch.tensor([0.1, 0.5, 1.0]).log())
        gate.log_std.copy_(torch.tensor([0.0, -3.0, -1.0]))
    precision = 1 / (gate.mean() ** 2 + torch.exp(2 * gate.log_std))
    expected = gaussian_kl(gate.mean(), gate.log_std, precision)
    assert torch.allclose(gate.pressure(), expected, rtol=1e-4)


def test_update_leaves_other_phases_alone() -> None:
    gate = fresh(1)
    with torch.no_grad():
        gate.log_mean.fill_(-0.7)
        gate.log_std.fill_(20.0)
    for phase in (Phase.WAITING, Phase.HARDENED):
        gate.phase = phase
        before = gate.precision.clone()
        gate.update()
        assert torch.equal(gate.precision, before)
        assert gate.log_std.item() == 20.0
    gate.phase = Phase.NOISY
    gate.update()
    assert not torch.equal(gate.precision, before)
    assert gate.log_std.item() == 0.0


def test_a_unit_without_signal_goes_and_one_with_a_signal_stays() -> None:
    gate = fresh(2)
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        lost = (gate(torch.empty(16, 1))[:, 1] - 1).square().mean()
        (100 * lost + gate.penalty(1.0, 1).sum()).backward()
        optimizer.step()
        gate.update()
    assert gate.needed().tolist() == [False, True]
    gamma = relevance(*gate.posterior(), gate.precision)
    assert gamma[0] < 0.1
    assert gamma[1] > 0.9


def test_rule_openness_and_hardening() -> None:
    gate = fresh(3)
    with torch.no_grad():
        gate.log_mean.copy_(torch.tensor([1.0, 0.5, 0.04]).log())
        gate.log_std.copy_(torch.tensor([-1.0, 0.0, -3.0]))
    second = gate.mean() ** 2 + torch.exp(2 * gate.log_std)
    gamma = gate.mean() ** 2 / second
    assert torch.allclose(gate.openness(2.0), gamma, rtol=1e-4)
    assert torch.equal(gate.needed(), gamma > 0.5)
    assert torch.equal(gate.openness(500.0) > 0.5, gate.needed())
    draws = gate.sample(100_000)
    assert torch.allclose(draws.mean(0), gate.mean(), atol=0.02)
    assert torch.allclose(draws.std(0).log(), gate.log_std, atol=0.02)
    gate.harden(gate.needed())
    assert gate(None).tolist() == [[1.0, 0.0, 0.0]]
