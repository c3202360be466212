"""The truncated log-normal distribution, accurate from a point mass to the log-uniform limit.

`theta = exp(t)`, where t is a normal variable N(mu, sigma^2) truncated to [LOW, HIGH], as in
Neklyudov, Molchanov, Ashukha and Vetrov, "Structured Bayesian Pruning via Log-Normal
Multiplicative Noise", NIPS 2017, arXiv 1705.07283. With `z = (t - mu) / sigma`, z is standard
normal between `alpha = (LOW - mu) / sigma` and `beta = (HIGH - mu) / sigma`.

Every function takes mu in [LOW, HIGH] and log sigma in [LOG_SIGMA_LOW, LOG_SIGMA_HIGH]. Then
alpha <= 0 <= beta, and sigma spans eleven orders of magnitude: the formulas as they are printed
lose all digits at one end or the other. So what is per unit is computed in float64 and in a form
in which nothing cancels, and is rounded to the dtype of the parameters at the end.
"""

from __future__ import annotations

from functools import lru_cache
from math import e, log, pi, sqrt

import numpy as np
import torch
from torch import Tensor

LOW, HIGH = -20.0, 0.0
"""Where t is truncated."""
LOG_SIGMA_LOW, LOG_SIGMA_HIGH = -20.0, 5.0
"""What log sigma is clamped to."""

NODES = 64
"""Of the Gauss-Legendre rule: enough to integrate exp(-z^2 / 2) over [-FAR, FAR] to rounding."""
FAR = 12.0
"""Standard deviations after which nothing is left of the density, even weighted by theta^2."""


def hold(x: Tensor, low: float, high: float) -> Tensor:
    """Clamp to [low, high], with a gradient of 1 at the ends themselves, where parameters start.

    `torch.clamp` has a gradient of 0 there in some releases, and a parameter would never leave.

    Args:
        x: Any shape.
        low: Least value.
        high: Largest value.

    Returns:
        Clamped values, same shape.
    """
    return torch.where((x < low) | (x > high), x.detach().clamp(low, high), x)


def widen(mu: Tensor, log_sigma: Tensor) -> tuple[Tensor, Tensor]:
    """The parameters mu and sigma in float64, or as they are where the device has no float64.

    Args:
        mu: Location, any shape.
        log_sigma: Log scale, same shape.

    Returns:
        mu and sigma, same shape.
    """
    dtype = mu.dtype if mu.device.type == "mps" else torch.float64
    return mu.to(dtype), log_sigma.to(dtype).exp()


def normal_density(z: Tensor) -> Tensor:
    """Standard normal density, any shape."""
    return torch.exp(-0.5 * z * z) / sqrt(2 * pi)


def log_probability_between(low: Tensor, high: Tensor) -> Tensor:
    """log[Phi(high) - Phi(low)] for a standard normal variable.

    Around 0 both error functions have the same sign and are added; in a tail, the smaller tail
    probability is taken from the larger one, on the side where both are small.

    Args:
        low: Lower ends, any shape.
        high: Upper ends, above the lower ones, same shape.

    Returns:
        Log probabilities, same shape.
    """
    right = low > 0
    low, high = torch.where(right, -high, low), torch.where(right, -low, high)
    tail = high < 0
    # the branch not taken gets harmless numbers: its gradient is multiplied by 0, which must not
    # meet an infinity
    outer = _log_lower_tail(torch.where(tail, low, -2.0))
    inner = _log_lower_tail(torch.where(tail, high, -1.0))
    erf = torch.special.erf(torch.where(tail, 1.0, high) / sqrt(2))
    erf = erf - torch.special.erf(torch.where(tail, -1.0, low) / sqrt(2))
    return torch.where(tail, inner + _log_1m_exp(outer - inner), torch.log(0.5 * erf))


def _log_lower_tail(z: Tensor) -> Tensor:
    """Log Phi(z) for z < 0. `torch.special.log_ndtr` has infinite gradients far out."""
    return torch.log(0.5 * torch.special.erfcx(-z / sqrt(2))) - 0.5 * z * z


def _log_1m_exp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0: by expm1 near 0, by log1p elsewhere."""
    near = x > -log(2)
    by_expm1 = torch.log(-torch.expm1(torch.where(near, x, -0.5)))
    by_log1p = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, by_expm1, by_log1p)


def kl_to_log_uniform(mu: Tensor, log_sigma: Tensor) -> Tensor:
    """KL divergence from the log-uniform prior on [exp(LOW), exp(HIGH)].

    `-log sigma - log Z - (alpha phi(alpha) - beta phi(beta)) / (2 Z) + log(b - a)
    - log(2 pi e) / 2` (arXiv 1705.07283). As alpha <= 0 <= beta, the two products add up.

    Args:
        mu: Location, any shape.
        log_sigma: Log scale, same shape.

    Returns:
        KL in nats, same shape.
    """
    location, sigma = widen(mu, log_sigma)
    alpha, beta = (LOW - location) / sigma, (HIGH - location) / sigma
    log_z = log_probability_between(alpha, beta)
    ends = alpha * normal_density(alpha) - beta * normal_density(beta)
    entropy = torch.log(sigma) + log_z + 0.5 * ends / log_z.exp() + 0.5 * log(2 * pi * e)
    return (log(HIGH - LOW) - entropy).to(mu.dtype)


@lru_cache
def _gauss_legendre(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Nodes and log weights on [-1, 1], `(NODES,)` each."""
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    both = torch.tensor(np.stack([nodes, np.log(weights)]), dtype=dtype, device=device)
    return both[0], both[1]


def _mean_and_spread(mu: Tensor, log_sigma: Tensor) -> tuple[Tensor, Tensor]:
    """`E[theta] exp(-mu) - 1` and `Var[theta] / E[theta]^2`, by quadrature over z.

    The printed closed forms are differences of numbers that are equal to twenty digits when
    sigma is small, and products of exp(10 000) and exp(-10 000) when it is large. The integrals
    themselves are those of a smooth function over a short interval, where Gauss-Legendre is
    exact to rounding; and the variance as a mean of squares cannot cancel. (Ours.)

    Returns:
        Both as wide as `widen` makes them, same shape as the arguments.
    """
    location, sigma = widen(mu, log_sigma)
    low = ((LOW - location) / sigma).clamp(min=-FAR).unsqueeze(-1)
    high = ((HIGH - location) / sigma).clamp(max=FAR).unsqueeze(-1)
    nodes, log_weights = _gauss_legendre(sigma.device, sigma.dtype)
    z = 0.5 * (low + high) + 0.5 * (high - low) * nodes
    weights = torch.softmax(log_weights - 0.5 * z * z, dim=-1)
    excess = torch.expm1(sigma.unsqueeze(-1) * z)  # theta exp(-mu) - 1, accurate for tiny sigma
    mean = (weights * excess).sum(-1)
    variance = (weights * (excess - mean.unsqueeze(-1)).square()).sum(-1)
    return mean, variance / (1 + mean).square()


def mean(mu: Tensor, log_sigma: Tensor) -> Tensor:
    """E[theta], which is `exp(mu + sigma^2 / 2) [Phi(sigma - alpha) - Phi(sigma - beta)] / Z`.

    Args:
        mu: Location, any shape.
        log_sigma: Log scale, same shape.

    Returns:
        Means in (exp(LOW), exp(HIGH)), same shape.
    """
    excess, _ = _mean_and_spread(mu, log_sigma)
    return ((1 + excess) * torch.exp(mu.to(excess.dtype))).to(mu.dtype)


def log_snr(mu: Tensor, log_sigma: Tensor) -> Tensor:
    """Log of the signal-to-noise ratio `E[theta] / sqrt(Var[theta])`.

    Args:
        mu: Location, any shape.
        log_sigma: Log scale, same shape.

    Returns:
        Log ratios, same shape: about -log sigma for a small sigma, -log(3) when log-uniform.
    """
    _, spread = _mean_and_spread(mu, log_sigma)
    return (-0.5 * torch.log(spread)).to(mu.dtype)


def sample(mu: Tensor, log_sigma: Tensor, rows: int) -> Tensor:
    """Reparametrised draws by the inverse of the distribution function (arXiv 1705.07283).

    `t = mu + sigma ndtri(Phi(alpha) + u Z)` for u uniform. Above the median the same quantile is
    taken from the upper tail, where probabilities near 0 keep their digits.

    Args:
        mu: Location, `(size,)`.
        log_sigma: Log scale, `(size,)`.
        rows: Number of draws.

    Returns:
        Draws of theta in [exp(LOW), exp(HIGH)], `(rows, size)`.
    """
    location, sigma = widen(mu, log_sigma)
    below = torch.special.ndtr((LOW - location) / sigma)
    above = torch.special.ndtr((location - HIGH) / sigma)
    inside = log_probability_between((LOW - location) / sigma, (HIGH - location) / sigma).exp()
    # one number per draw, not per unit: from here on in the dtype of the parameters
    below, above, inside = (x.to(mu.dtype) for x in (below, above, inside))
    u = torch.rand(rows, *mu.shape, dtype=mu.dtype, device=mu.device)
    u = u.clamp(min=torch.finfo(mu.dtype).eps / 4)  # u = 0 is the end, where z may be infinite
    left, right = below + u * inside, above + (1 - u) * inside
    z = torch.special.ndtri(torch.minimum(left, right))
    z = torch.where(left <= right, z, -z)
    return torch.exp((mu + log_sigma.exp() * z).clamp(LOW, HIGH))
