"""Structured Bayesian Pruning: truncated log-normal noise under a log-uniform prior.

Neklyudov, Molchanov, Ashukha and Vetrov, "Structured Bayesian Pruning via Log-Normal
Multiplicative Noise", NIPS 2017, arXiv 1705.07283. The prior is flat over the orders of
magnitude of a multiplier: a unit that the data do not need drifts towards it, its noise grows, and
it goes when the noise is larger than the signal.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor, nn

from rbpfx.errors import RbpfxError
from rbpfx.graph.groups import ChannelGroup
from rbpfx.methods import log_normal
from rbpfx.methods.base import Method, NoiseGate, Phase


class SBPGate(NoiseGate):
    """Truncated log-normal noise with a location and a scale per unit.

    mu starts at its largest value, 0, where half of the normal density is cut off, as published.

    Args:
        size: Number of units.
        foldable: Whether the hardened mean may differ from 1.
        initial_log_sigma: Log scale at the start.
        threshold: A unit whose signal-to-noise ratio lies at or below is redundant.
    """

    def __init__(
        self, size: int, foldable: bool = True, *, initial_log_sigma: float, threshold: float
    ) -> None:
        super().__init__(size, foldable)
        self.threshold = threshold
        self.mu = nn.Parameter(torch.zeros(size))
        self.log_sigma = nn.Parameter(torch.full((size,), initial_log_sigma))

    def posterior(self) -> tuple[Tensor, Tensor]:
        """Mu and log sigma, clamped to where the formulas hold, `(size,)` each."""
        mu = log_normal.hold(self.mu, log_normal.LOW, log_normal.HIGH)
        low, high = log_normal.LOG_SIGMA_LOW, log_normal.LOG_SIGMA_HIGH
        return mu, log_normal.hold(self.log_sigma, low, high)

    def sample(self, rows: int) -> Tensor:
        """Draws in [exp(-20), 1], `(rows, size)`."""
        return log_normal.sample(*self.posterior(), rows)

    def mean(self) -> Tensor:
        """E[theta], `(size,)`."""
        return log_normal.mean(*self.posterior())

    def penalty(self, strength: float, examples: int) -> Tensor:
        """KL per unit and example, `(size,)`; a strength of 1 is the evidence lower bound."""
        return strength * self.pressure() / examples

    def pressure(self) -> Tensor:
        """The divergence from the log-uniform prior, `(size,)`; all of it closes units."""
        return log_normal.kl_to_log_uniform(*self.posterior())

    def openness(self, sharpness: float) -> Tensor:
        """`r^s / (1 + r^s)`, with r the SNR over its threshold and s the sharpness, `(size,)`.

        Ours: at s = 2 and a threshold of 1 it is `E[theta]^2 / E[theta^2]`, the share of the
        signal in the power of the multiplier.
        """
        return torch.sigmoid(sharpness * (self._log_snr() - log(self.threshold)))

    def score(self) -> Tensor:
        """Log of the signal-to-noise ratio, `(size,)`."""
        return self._log_snr().detach()

    def needed(self) -> Tensor:
        """Signal-to-noise ratio above the threshold, `(size,)`."""
        return self.score() > log(self.threshold)

    def update(self) -> None:
        """Bring the parameters back into their range: beyond it, they would get no gradient."""
        if self.phase is Phase.NOISY:
            with torch.no_grad():
                for parameter, value in zip(
                    (self.mu, self.log_sigma), self.posterior(), strict=True
                ):
                    parameter.copy_(value)

    def _log_snr(self) -> Tensor:
        return log_normal.log_snr(*self.posterior())


@dataclass(frozen=True)
class SBP(Method):
    """Structured Bayesian Pruning (Neklyudov et al., NIPS 2017, arXiv 1705.07283).

    Attributes:
        initial_log_sigma: Log scale of the noise at the start, in [-20, 5].
        threshold: A unit whose signal-to-noise ratio lies at or below is redundant; positive.
        strength: Weight of the divergence in the evidence lower bound; 1 is the bound itself.

    Raises:
        RbpfxError: A setting lies outside of its interval.
    """

    initial_log_sigma: float = -5.0
    threshold: float = 1.0
    name = "sbp"
    strength = 1.0

    def __post_init__(self) -> None:
        low, high = log_normal.LOG_SIGMA_LOW, log_normal.LOG_SIGMA_HIGH
        if not low <= self.initial_log_sigma <= high:
            raise RbpfxError(
                f"SBP(initial_log_sigma={self.initial_log_sigma}) must lie in [{low:g}, {high:g}]"
            )
        if not self.threshold > 0:
            raise RbpfxError(f"SBP(threshold={self.threshold}) must be positive")

    def gate(self, group: ChannelGroup) -> NoiseGate:
        """Truncated log-normal noise for the units of a group."""
        return SBPGate(
            group.size,
            group.foldable,
            initial_log_sigma=self.initial_log_sigma,
            threshold=self.threshold,
        )
