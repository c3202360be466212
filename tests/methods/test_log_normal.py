"""The truncated log-normal: closed forms against integration with 40 digits."""

import itertools
import math
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rbpfx.methods import log_normal

EPS = 1e-8
MUS = [-20.0, -20 + EPS, -19.9, -17.0, -10.0, -5.5, -1.0, -0.01, -EPS, 0.0]
LOG_SIGMAS = [-20.0, -17.0, -12.0, -7.0, -5.0, -2.0, 0.0, 0.7, 2.0, 3.5, 5.0]
GRID = list(itertools.product(MUS, LOG_SIGMAS))


def integrals(mu: float, log_sigma: float) -> dict[str, mpmath.mpf]:
    """Composite Gauss-Legendre in the standardised variable with 40 digits; no closed form."""
    with mpmath.workdps(40):
        sigma = mpmath.exp(mpmath.mpf(log_sigma))
        low, high = max((-20 - mpmath.mpf(mu)) / sigma, -13), min(-mpmath.mpf(mu) / sigma, 13)
        z = [mpmath.mpf(x) for x in np.linspace(0, 1, 81)]
        steps = [low + (high - low) * x for x in z]
        h = (steps[1] - steps[0]) / 2
        nodes, weights = np.polynomial.legendre.leggauss(8)
        points = [(a + h + h * mpmath.mpf(x), h * mpmath.mpf(w)) for a in steps[:-1]
                  for x, w in zip(nodes, weights, strict=True)]  # fmt: skip
        density = [w * mpmath.exp(-x * x / 2) for x, w in points]
        total = mpmath.fsum(density)
        excess = [mpmath.expm1(sigma * x) for x, _ in points]
        mean = mpmath.fsum(d * e for d, e in zip(density, excess, strict=True)) / total
        variance = mpmath.fsum(
            d * (e - mean) ** 2 for d, e in zip(density, excess, strict=True)
        ) / total  # fmt: skip
        # q(t) = exp(-z^2 / 2) / (sigma total); the prior is 1 / 20
        square = mpmath.fsum(d * x * x for d, (x, _) in zip(density, points, strict=True)) / total
        return {
            "kl_to_log_uniform": -square / 2 - mpmath.log(sigma * total) + mpmath.log(20),
            "mean": mpmath.exp(mpmath.mpf(mu)) * (1 + mean),
            "log_snr": mpmath.log((1 + mean) / mpmath.sqrt(variance)),
        }


FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "kl_to_log_uniform": log_normal.kl_to_log_uniform,
    "mean": log_normal.mean,
    "log_snr": log_normal.log_snr,
}


@pytest.mark.parametrize("mu", MUS)
def test_closed_forms_equal_numerical_integration(mu: float) -> None:
    for log_sigma in LOG_SIGMAS:
        arguments = torch.tensor([mu, log_sigma], dtype=torch.float64)
        for name, expected in integrals(mu, log_sigma).items():
            found = FUNCTIONS[name](*arguments).item()
            # a mean is small by itself; the others pass through 0
            slack = 0 if name == "mean" else 1e-12
            assert found == pytest.approx(float(expected), rel=1e-11, abs=slack), (name, log_sigma)


def test_a_narrow_density_has_the_moments_of_a_half_or_a_whole_normal() -> None:
    log_sigma = torch.full((3,), -20.0, dtype=torch.float64)
    mu = torch.tensor([-20.0, -10.0, 0.0], dtype=torch.float64)
    half = math.sqrt(1 - 2 / math.pi)
    expected = [20 - math.log(half), 20.0, 20 - math.log(half)]
    assert log_normal.log_snr(mu, log_sigma).tolist() == pytest.approx(expected, rel=1e-9)


def test_the_mean_is_the_published_formula_where_that_can_be_evaluated() -> None:
    mu, log_sigma = (
        torch.tensor([-3.0, -1.0, 0.0]).double(),
        torch.tensor([-1.0, 0.0, 0.5]).double(),
    )
    sigma = log_sigma.exp()
    phi, alpha, beta = torch.special.ndtr, (-20 - mu) / sigma, -mu / sigma
    inside = phi(beta) - phi(alpha)
    expected = torch.exp(mu + sigma**2 / 2) * (phi(sigma - alpha) - phi(sigma - beta)) / inside
    assert torch.allclose(log_normal.mean(mu, log_sigma), expected, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients_are_finite_everywhere(name: str, dtype: torch.dtype) -> None:
    fine = torch.cat([torch.linspace(-20, 0, 81), torch.tensor([-1e-4, -1e-8, -20 + 2e-6])])
    mu, log_sigma = torch.meshgrid(
        fine.to(dtype), torch.linspace(-20, 5, 101, dtype=dtype), indexing="ij"
    )
    mu, log_sigma = mu.clone().requires_grad_(), log_sigma.clone().requires_grad_()
    values = FUNCTIONS[name](mu, log_sigma)
    values.sum().backward()
    assert values.dtype == dtype
    for tensor in (values, mu.grad, log_sigma.grad):
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_float32_is_float64_rounded(name: str) -> None:
    grid = torch.tensor([(m, s) for m, s in GRID], dtype=torch.float32).T
    narrow, wide = FUNCTIONS[name](*grid), FUNCTIONS[name](*grid.double())
    assert torch.equal(narrow, wide.float())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_by_finite_differences(name: str) -> None:
    mu = torch.tensor([-19.0, -10.0, -5.0, -1.0, -0.1], dtype=torch.float64)
    mu, log_sigma = (
        x.flatten() for x in torch.meshgrid(mu, torch.linspace(-2, 4, 7).double(), indexing="ij")
    )
    arguments = (mu.clone().requires_grad_(), log_sigma.clone().requires_grad_())
    assert torch.autograd.gradcheck(FUNCTIONS[name], arguments, eps=1e-5, atol=1e-5, rtol=1e-4)


@settings(max_examples=100, deadline=None)
@given(st.floats(-300, 300), st.floats(1e-3, 300))
def test_probability_between_two_points(low: float, width: float) -> None:
    high = low + width
    ends = torch.tensor([low, high], dtype=torch.float64, requires_grad=True)
    found = log_normal.log_probability_between(*ends)
    (gradient,) = torch.autograd.grad(found, ends)
    with mpmath.workdps(60):
        near, far = (low, high) if low > 0 else (-high, -low)
        root = mpmath.sqrt(2)
        if low < 0 < high:
            exact = mpmath.erf(high / root) - mpmath.erf(low / root)
        else:
            exact = mpmath.erfc(near / root) - mpmath.erfc(far / root)
        expected = float(mpmath.log(exact / 2))
        slope = float(mpmath.npdf(high) / (exact / 2))
    assert found.item() == pytest.approx(expected, rel=1e-9, abs=1e-14)
    assert gradient[1].item() == pytest.approx(slope, rel=1e-5, abs=1e-14)


@pytest.mark.parametrize("far", [1e4, 1e10])
def test_the_gradient_of_a_far_tail_is_finite(far: float) -> None:
    ends = torch.tensor([-2 * far, -far], dtype=torch.float64, requires_grad=True)
    found = log_normal.log_probability_between(*ends)
    found.backward()
    assert found.item() == pytest.approx(-0.5 * far**2, rel=1e-6)
    assert ends.grad[1].item() == pytest.approx(far, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_and_their_gradients_stay_in_range(dtype: torch.dtype) -> None:
    grid = torch.tensor(GRID, dtype=dtype).T.clone().requires_grad_()
    draws = log_normal.sample(grid[0], grid[1], 2000)
    draws.sum().backward()
    assert (draws >= torch.tensor(-20.0, dtype=dtype).exp()).all()
    assert (draws <= 1).all()
    assert torch.isfinite(grid.grad).all()


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_the_ends_of_the_uniform_variable_give_finite_gradients(
    end: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = torch.tensor(GRID).T.clone().requires_grad_()
    u = math.nextafter(1, 0) if end else 0.0
    largest = torch.full((1, len(GRID)), u).clamp(max=1 - 2**-24)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: largest)
    draws = log_normal.sample(grid[0], grid[1], 1)
    draws.sum().backward()
    assert torch.isfinite(draws).all()
    assert torch.isfinite(grid.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_have_the_mean_and_the_quantiles(dtype: torch.dtype) -> None:
    pairs = [(0.0, -5.0), (-20.0, -1.0), (-20.0, 3.0), (-10.0, 1.0), (-0.5, 0.0), (0.0, 5.0)]
    mu, log_sigma = torch.tensor(pairs, dtype=dtype).T
    draws = log_normal.sample(mu, log_sigma, 40_000).double()
    deviation = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - log_normal.mean(mu, log_sigma)).abs() < 5 * deviation).all()
    mu, sigma = mu.double(), log_sigma.double().exp()
    between = log_normal.log_probability_between
    full = between((-20 - mu) / sigma, -mu / sigma)
    for share in (0.1, 0.5, 0.9):
        quantile = draws.quantile(share, dim=0).log()
        below = (between((-20 - mu) / sigma, (quantile - mu) / sigma) - full).exp()
        assert torch.allclose(below, torch.full_like(below, share), atol=0.01)


def test_the_gradient_through_draws_is_that_of_the_mean() -> None:
    pairs = [(0.0, -2.0), (-0.5, 0.0), (-2.0, 1.0), (0.0, 4.0), (-20.0, 2.0)]
    arguments = torch.tensor(pairs, dtype=torch.float64)
    rows = arguments.repeat(40_000, 1).requires_grad_()  # one draw each: the spread is seen
    log_normal.sample(rows[:, 0], rows[:, 1], 1).sum().backward()
    gradients = rows.grad.reshape(40_000, len(pairs), 2)
    arguments.requires_grad_()
    log_normal.mean(arguments[:, 0], arguments[:, 1]).sum().backward()
    error = gradients.std(0) / math.sqrt(len(gradients))
    assert ((gradients.mean(0) - arguments.grad).abs() < 5 * error).all()
