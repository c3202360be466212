"""Recursive Bayesian Pruning: closed forms against numerical integration, moments of the noise."""

import math
from dataclasses import asdict
from typing import Any

import pytest
import torch
from scipy import integrate

from rbpfx import RBP
from rbpfx.methods.rbp import RBPGate, gaussian_dropout_kl

RATES = [1e-4, 0.01, 0.05, 0.3, 0.5, 0.7, 0.95, 0.99, 0.9999]
STRENGTHS = [1e-3, 0.5, 10.0, 1e3, 1e6]


def fresh(size: int, foldable: bool = True, **settings: Any) -> RBPGate:
    return RBPGate(size, foldable, **{**asdict(RBP()), **settings})


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("strength", STRENGTHS)
def test_kl_equals_numerical_integration(rate: float, strength: float) -> None:
    gate = 1 - rate
    deviation = math.sqrt(rate * gate)
    epsilon = 1 / math.sqrt(2 * strength)

    def integrand(z: float) -> float:
        # theta = gate + deviation * z; q(theta) d theta = phi(z) dz
        theta = gate + deviation * z
        log_q = -0.5 * z * z - math.log(deviation * math.sqrt(2 * math.pi))
        log_p = -0.5 * (theta / epsilon) ** 2 - math.log(epsilon * math.sqrt(2 * math.pi))
        return math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi) * (log_q - log_p)

    expected, _ = integrate.quad(integrand, -12, 12, epsabs=1e-12, epsrel=1e-12, limit=200)
    logit = torch.tensor(math.log(gate / rate), dtype=torch.float64)
    assert gaussian_dropout_kl(logit, strength).item() == pytest.approx(expected, rel=1e-9)


def test_kl_is_never_negative_and_smallest_near_epsilon_squared() -> None:
    strength = 1e3  # epsilon^2 = 5e-4
    logit = torch.linspace(-20, 20, 4001, dtype=torch.float64)
    kl = gaussian_dropout_kl(logit, strength)
    assert (kl >= 0).all()
    assert torch.sigmoid(logit[kl.argmin()]).item() == pytest.approx(5e-4, rel=0.05)


@pytest.mark.parametrize("logit", [-60.0, -20.0, 0.0, 20.0, 60.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kl_and_its_gradient_are_finite_at_the_ends(logit: float, dtype: torch.dtype) -> None:
    parameter = torch.tensor(logit, dtype=dtype, requires_grad=True)
    kl = gaussian_dropout_kl(parameter, 1e4)
    kl.backward()
    assert torch.isfinite(kl)
    assert torch.isfinite(parameter.grad)


def test_kl_gradient_by_finite_differences() -> None:
    logit = torch.linspace(-5, 5, 11, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gaussian_dropout_kl(x, 30.0), logit)


def test_samples_have_the_moments_of_dropout() -> None:
    torch.manual_seed(0)
    rates = torch.tensor([0.05, 0.3, 0.5, 0.9])
    gate = fresh(4)
    with torch.no_grad():
        gate.gate_logit.copy_(torch.log((1 - rates) / rates))
    draws = gate.sample(200_000)
    tolerance = 5 * (rates * (1 - rates) / len(draws)).sqrt()
    assert ((draws.mean(0) - (1 - rates)).abs() < tolerance).all()
    assert torch.allclose(draws.var(0), rates * (1 - rates), rtol=0.02)


def test_gradient_reaches_the_rate_through_mean_and_deviation() -> None:
    gate = fresh(3)
    torch.manual_seed(0)
    gate.sample(8).square().sum().backward()
    assert gate.gate_logit.grad is not None
    assert (gate.gate_logit.grad != 0).all()


def test_initial_rate_and_threshold_are_those_of_the_method() -> None:
    gate = fresh(5, initial_rate=0.2, threshold=0.9)
    assert torch.allclose(gate.mean(), torch.full((5,), 0.8))
    assert not gate.needed().any()
    assert RBP(initial_rate=0.2).initial_rate == 0.2


def test_a_hardened_gate_is_constant() -> None:
    gate = fresh(4)
    gate.harden(torch.tensor([True, False, True, False]))
    gate.train()
    multipliers = gate(torch.zeros(7, 3))
    assert torch.equal(multipliers, gate(torch.zeros(7, 3)))
    assert multipliers.shape == (1, 4)
    assert (multipliers[0, [1, 3]] == 0).all()
    assert torch.allclose(multipliers[0, [0, 2]], torch.tensor(0.95))


def test_a_gate_that_cannot_be_folded_hardens_to_one() -> None:
    gate = fresh(2, foldable=False)
    gate.harden(torch.tensor([True, False]))
    assert gate(None).tolist() == [[1.0, 0.0]]
