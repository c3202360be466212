"""BMRS: the change of evidence against integration with 40 digits, and the rule it gives."""

import itertools
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import mpmath
import pytest
import torch

from rbpfx.errors import RbpfxError
from rbpfx.methods.bmrs import BMRSN, BMRSU, BMRSNGate, BMRSUGate, delta_f_n, delta_f_u

MUS = [-20.0, -20 + 1e-8, -19.0, -10.0, -5.5, -0.01, -1e-8, 0.0]
LOG_SIGMAS = [-20.0, -14.0, -10.0, -5.0, -1.0, 1.0, 3.0, 5.0]
LOG_2 = mpmath.log(2)
Log = Callable[[mpmath.mpf], mpmath.mpf]


def fresh(size: int, foldable: bool = True, **settings: Any) -> BMRSUGate:
    return BMRSUGate(size, foldable, **{**asdict(BMRSU()), **settings})


def log_integral(f: Log, low: mpmath.mpf, high: mpmath.mpf, peaks: list[tuple]) -> mpmath.mpf:
    """log of the integral of exp(f), cut at multiples of each peak's width around it."""
    cuts = {low, high}
    for centre, width in peaks:
        cuts |= {centre + k * width for k in (-30, -12, -6, -3, 0, 3, 6, 12, 30)}
    points = sorted(t for t in cuts if low <= t <= high)
    top = max(f(t) for t in points)
    return top + mpmath.log(mpmath.quad(lambda t: mpmath.exp(f(t) - top), points, maxdegree=5))


def expected(mu: float, log_sigma: float, bits: int | None) -> float:
    """log E_q[reduced / prior]; bits is None for the log-normal prior."""
    with mpmath.workdps(40):
        a, b, mean = mpmath.mpf(-20), mpmath.mpf(0), mpmath.mpf(mu)
        sigma, small = mpmath.exp(mpmath.mpf(log_sigma)), mpmath.mpf("1e-6")
        log_q: Log = lambda t: -(((t - mean) / sigma) ** 2) / 2  # noqa: E731
        log_z_q = log_integral(log_q, a, b, [(mean, sigma)])
        if bits is None:
            log_p: Log = lambda t: -(((t - a) / small) ** 2) / 2  # noqa: E731
            log_z_p = log_integral(log_p, a, b, [(a, small)])
            v = 1 / (1 / sigma**2 + 1 / small**2)
            centre = v * (mean / sigma**2 + a / small**2)
            product: Log = lambda t: log_q(t) + log_p(t)  # noqa: E731
            log_both = log_integral(product, a, b, [(centre, mpmath.sqrt(v))])
            return float(log_both - log_z_p - log_z_q + mpmath.log(b - a))
        low, high = -23 * LOG_2, -bits * LOG_2
        # where the density is steep at the end nearer to mu, it falls by e within this length
        end = min(max(mean, low), high)
        length = min(sigma, sigma**2 / abs(end - mean)) if end != mean else sigma
        log_inside = log_integral(log_q, low, high, [(end, length)])
        return float(log_inside - log_z_q - mpmath.log((high - low) / (b - a)))


@pytest.mark.parametrize("mu", MUS)
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_change_of_evidence_equals_numerical_integration(mu: float, bits: int | None) -> None:
    for log_sigma in LOG_SIGMAS:
        arguments = torch.tensor([mu, log_sigma], dtype=torch.float64)
        found = delta_f_n(*arguments) if bits is None else delta_f_u(*arguments, bits)
        wanted = expected(mu, log_sigma, bits)
        assert found.item() == pytest.approx(wanted, rel=1e-11, abs=1e-12), log_sigma


@pytest.mark.parametrize("function", [delta_f_n, partial(delta_f_u, bits=8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_finite_everywhere(
    function: Callable[..., torch.Tensor], dtype: torch.dtype
) -> None:
    fine = torch.cat([torch.linspace(-20, 0, 81), torch.tensor([-1e-4, -1e-8, -20 + 2e-6])])
    mu, log_sigma = torch.meshgrid(
        fine.to(dtype), torch.linspace(-20, 5, 101, dtype=dtype), indexing="ij"
    )
    mu, log_sigma = mu.clone().requires_grad_(), log_sigma.clone().requires_grad_()
    values = function(mu, log_sigma)
    torch.sigmoid(-values).sum().backward(retain_graph=True)
    values.sum().backward()
    for tensor in (values, mu.grad, log_sigma.grad):
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("function", [delta_f_n, partial(delta_f_u, bits=8)])
def test_gradients_by_finite_differences(function: Callable[..., torch.Tensor]) -> None:
    mu = torch.tensor([-19.0, -10.0, -5.0, -0.1], dtype=torch.float64)
    mu, log_sigma = (
        x.flatten() for x in torch.meshgrid(mu, torch.linspace(0, 4, 5).double(), indexing="ij")
    )
    arguments = (mu.clone().requires_grad_(), log_sigma.clone().requires_grad_())
    assert torch.autograd.gradcheck(function, arguments, eps=1e-5, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("function", [delta_f_n, partial(delta_f_u, bits=8)])
def test_a_flat_posterior_gains_nothing(function: Callable[..., torch.Tensor]) -> None:
    # E_p[reduced / p] = 1 for every reduced prior
    flat = function(torch.tensor(-10.0).double(), torch.tensor(5.0).double())
    assert abs(flat.item()) < 0.01


def test_evidence_crosses_zero_as_the_mass_moves_to_the_lower_end() -> None:
    mu = torch.linspace(0, -20, 201, dtype=torch.float64)
    gain = delta_f_n(mu, torch.zeros(201, dtype=torch.float64))
    assert (gain.diff() > 0).all()
    assert gain[0] < 0 < gain[-1]
    # where the density at the lower end equals that of the prior, N says neither yes nor no
    even = mu[gain.abs().argmin()]
    density = torch.exp(-0.5 * (even + 20) ** 2) / (2 * torch.pi) ** 0.5
    assert density.item() == pytest.approx(1 / 20, rel=0.15)


def test_fewer_bits_remove_more_units() -> None:
    mu, log_sigma = torch.tensor([-4.0]), torch.tensor([0.0])
    assert delta_f_u(mu, log_sigma, 8) < 0 < delta_f_u(mu, log_sigma, 4)


@pytest.mark.parametrize("gate", [BMRSNGate(3), fresh(3), fresh(3, bits=4)])
def test_the_gate_decides_by_the_evidence(gate: BMRSNGate | BMRSUGate) -> None:
    assert gate.needed().all()
    middle = -19.0 if isinstance(gate, BMRSNGate) else -10.0
    with torch.no_grad():
        gate.mu.copy_(torch.tensor([0.0, middle, -1.0]))
        gate.log_sigma.copy_(torch.tensor([-5.0, 1.0, -2.0]))
    assert gate.needed().tolist() == [True, False, True]
    assert torch.equal(gate.score() > 0, gate.needed())
    gate.harden(gate.needed())
    assert (gate.constants != 0).tolist() == [True, False, True]


def test_a_unit_without_signal_loses_its_evidence_under_the_uniform_variant() -> None:
    gate = fresh(1)
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.05)
    for _ in range(250):
        optimizer.zero_grad()
        gate.penalty(1.0, 1).sum().backward()
        optimizer.step()
        gate.update()
    assert not gate.needed().any()


def test_the_order_of_scores_survives_extreme_noise() -> None:
    scores = []
    for gate, log_sigma in itertools.product([BMRSNGate(3), fresh(3)], [-20.0, -5.0]):
        with torch.no_grad():
            gate.mu.copy_(torch.tensor([0.0, -1.0, -2.0]))
            gate.log_sigma.fill_(log_sigma)
        scores.append(gate.score())
    for score in scores:
        assert torch.isfinite(score).all()
        assert (score.diff() < 0).all()


@pytest.mark.parametrize("bits", [-1, 23, 40])
def test_an_empty_interval_is_refused(bits: int) -> None:
    with pytest.raises(RbpfxError, match="bits"):
        BMRSU(bits=bits)


@pytest.mark.parametrize("method", [BMRSN(), BMRSU()])
def test_it_decides_after_every_epoch(method: BMRSN | BMRSU) -> None:
    assert method.recursion().decisions == "epoch"
