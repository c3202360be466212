"""Bayesian Model Reduction for Structured pruning: the evidence decides, there is no threshold.

Wright, Igel and Selvan, "BMRS: Bayesian Model Reduction for Structured Pruning", NeurIPS 2024,
arXiv 2406.01345. Noise and training are those of Structured Bayesian Pruning. The decision
compares the evidence of the trained model with that of a model whose prior switches the unit off:
`dF = log E_q[reduced prior / prior]`, and the unit goes where dF >= 0.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from math import log, pi
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rbpfx.errors import RbpfxError
from rbpfx.graph.groups import ChannelGroup
from rbpfx.methods.base import Method, NoiseGate
from rbpfx.methods.log_normal import HIGH, LOW, log_probability_between, widen
from rbpfx.methods.sbp import SBP, SBPGate

if TYPE_CHECKING:
    from rbpfx.training.schedule import Recursion

REDUCED_SIGMA = 1e-6
"""Scale of the reduced log-normal prior, nearly a point mass at exp(LOW)."""
MANTISSA_BITS = 23
"""Of a float32: the reduced uniform prior starts at 2^-23, the relative rounding error."""


def delta_f_n(mu: Tensor, log_sigma: Tensor) -> Tensor:
    """Gain in log evidence if the prior becomes a log-normal at exp(LOW) (BMRS_N).

    The product of two normal densities is `N(LOW; mu, S) N(t; m, v)` with
    `S = sigma^2 + sigma_p^2`, so that

        dF = log[Z_m (HIGH - LOW) / (Z_q Z_p)] - log(S) / 2 - (mu - LOW)^2 / (2 S) - log(2 pi) / 2

    which is the published formula with its quadratic terms combined, as they cancel to a few
    digits, and with the last term, which follows from the integral (a public implementation
    leaves it out, which moves its threshold to -0.92 nats). The reduced prior is centred on the
    lower end, so Z_p = 1/2.

    Args:
        mu: Location of the posterior, any shape.
        log_sigma: Its log scale, same shape.

    Returns:
        dF in nats, same shape: finite, at least -2e14.
    """
    location, sigma = widen(mu, log_sigma)
    total = sigma.square() + REDUCED_SIGMA**2
    ratio = sigma / REDUCED_SIGMA
    log_z_q = log_probability_between((LOW - location) / sigma, (HIGH - location) / sigma)
    # (LOW - m) / sqrt(v) and (HIGH - m) / sqrt(v), with m and v written out: both are sums of
    # terms of one sign, whereas m itself agrees with LOW to up to sixteen digits
    below = (LOW - location) / ratio / total.sqrt()
    above = ((HIGH - LOW) * ratio + (HIGH - location) / ratio) / total.sqrt()
    log_z = log_probability_between(below, above) - log_z_q - log(0.5)
    distance = 0.5 * (location - LOW).square() / total
    return (log_z + log(HIGH - LOW) - 0.5 * torch.log(2 * pi * total) - distance).to(mu.dtype)


def delta_f_u(mu: Tensor, log_sigma: Tensor, bits: int) -> Tensor:
    """Gain in log evidence if the prior becomes log-uniform on [2^-23, 2^-bits] (BMRS_U).

    `log[(Phi((b' - mu) / sigma) - Phi((a' - mu) / sigma)) / Z] - log[(b' - a') / (b - a)]`: how
    much more of the posterior than of the prior lies where a multiplier is lost in rounding.

    Args:
        mu: Location of the posterior, any shape.
        log_sigma: Its log scale, same shape.
        bits: The multiplier counts as zero below 2^-bits.

    Returns:
        dF in nats, same shape: finite, at least -1e20.
    """
    location, sigma = widen(mu, log_sigma)
    low, high = -MANTISSA_BITS * log(2), -bits * log(2)
    reduced = log_probability_between((low - location) / sigma, (high - location) / sigma)
    full = log_probability_between((LOW - location) / sigma, (HIGH - location) / sigma)
    return (reduced - full - log((high - low) / (HIGH - LOW))).to(mu.dtype)


class BMRSGate(SBPGate):
    """The noise of Structured Bayesian Pruning, decided by the evidence.

    While a budget is being trained for, units count as open by their signal-to-noise ratio, as in
    SBP: the evidence for a unit stays overwhelming until shortly before it turns, and would give
    the projection no hold.

    Args:
        size: Number of units.
        foldable: Whether the hardened mean may differ from 1.
    """

    def __init__(self, size: int, foldable: bool = True) -> None:
        super().__init__(
            size, foldable, initial_log_sigma=SBP.initial_log_sigma, threshold=SBP.threshold
        )

    @abstractmethod
    def delta_f(self) -> Tensor:
        """Gain in log evidence if the unit is switched off, `(size,)`."""

    def score(self) -> Tensor:
        """Log evidence for the unit, -dF, `(size,)`."""
        return -self.delta_f().detach()

    def needed(self) -> Tensor:
        """Whether switching the unit off loses evidence, `(size,)`."""
        return self.score() > 0


class BMRSNGate(BMRSGate):
    """Reduces to a log-normal prior at exp(LOW)."""

    def delta_f(self) -> Tensor:
        """Gain in log evidence, `(size,)`."""
        return delta_f_n(*self.posterior())


class BMRSUGate(BMRSGate):
    """Reduces to a log-uniform prior on [2^-23, 2^-bits].

    Args:
        size: Number of units.
        foldable: Whether the hardened mean may differ from 1.
        bits: The multiplier counts as zero below 2^-bits.
    """

    def __init__(self, size: int, foldable: bool = True, *, bits: int) -> None:
        super().__init__(size, foldable)
        self.bits = bits

    def delta_f(self) -> Tensor:
        """Gain in log evidence, `(size,)`."""
        return delta_f_u(*self.posterior(), self.bits)


class _BMRS(Method):
    """Both variants decide at the end of every epoch, as published."""

    strength = 1.0

    def recursion(self) -> Recursion:
        """A decision after every epoch."""
        from rbpfx.training.schedule import Recursion

        return Recursion(decisions="epoch")


@dataclass(frozen=True)
class BMRSN(_BMRS):
    """BMRS with an approximate point mass as the reduced prior. Cautious.

    Wright et al., NeurIPS 2024, arXiv 2406.01345.
    """

    name = "bmrs-n"

    def gate(self, group: ChannelGroup) -> NoiseGate:
        """Truncated log-normal noise for the units of a group."""
        return BMRSNGate(group.size, group.foldable)


@dataclass(frozen=True)
class BMRSU(_BMRS):
    """BMRS with a log-uniform distribution over negligible multipliers as the reduced prior.

    Wright et al., NeurIPS 2024, arXiv 2406.01345.

    Attributes:
        bits: A multiplier counts as zero below 2^-bits; 8 and 4 are published, and 4 removes more.

    Raises:
        RbpfxError: `bits` is not from 0 to 22.
    """

    bits: int = 8
    name = "bmrs-u"

    def __post_init__(self) -> None:
        if not 0 <= self.bits < MANTISSA_BITS:
            raise RbpfxError(f"bits must be from 0 to {MANTISSA_BITS - 1}, not {self.bits}")

    def gate(self, group: ChannelGroup) -> NoiseGate:
        """Truncated log-normal noise for the units of a group."""
        return BMRSUGate(group.size, group.foldable, bits=self.bits)
