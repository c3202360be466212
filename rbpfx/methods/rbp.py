"""Recursive Bayesian Pruning: Gaussian dropout noise under a Dirac-like prior.

Zhou, Zhang, Wang and Tian, "Accelerate CNN via Recursive Bayesian Pruning", ICCV 2019,
arXiv 1812.00353. The multiplier of a unit with dropout rate r has the posterior
`N(1 - r, r (1 - r))`, the Gaussian with the moments of a Bernoulli(1 - r); the prior is
`N(0, eps^2)` with a tiny eps. The mean `1 - r` is called the *gate*.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rbpfx.errors import RbpfxError
from rbpfx.graph.groups import ChannelGroup
from rbpfx.methods.base import Method, NoiseGate


def gaussian_dropout_kl(gate_logit: Tensor, strength: float | Tensor) -> Tensor:
    """KL( N(g, g (1 - g)) || N(0, eps^2) ) with gate g = sigmoid(gate_logit).

    With `strength` = lambda = 1 / (2 eps^2) it is
    `lambda g - log(g (1 - g)) / 2 - log(2 lambda) / 2 - 1 / 2`, because mean^2 + variance = g:
    the prior is an L1 penalty of weight lambda on the gate against the entropy of the noise.
    (Derived from the model of arXiv 1812.00353.)

    Args:
        gate_logit: Logit of the gate, any shape.
        strength: lambda, positive.

    Returns:
        KL in nats, same shape.
    """
    strength = torch.as_tensor(strength, dtype=gate_logit.dtype, device=gate_logit.device)
    log_variance = F.logsigmoid(gate_logit) + F.logsigmoid(-gate_logit)
    prior = strength * torch.sigmoid(gate_logit)
    return prior - 0.5 * log_variance - 0.5 * torch.log(2 * strength) - 0.5


WEAKEST_PRIOR = 1.0
"""lambda under a budget, where the projection does the rest: a prior of variance 1/2."""


class RBPGate(NoiseGate):
    """Gaussian dropout noise with one learnt rate per unit.

    Args:
        size: Number of units.
        foldable: Whether the hardened mean may differ from 1.
        initial_rate: Dropout rate r at the start.
        threshold: A unit whose gate 1 - r lies below is redundant.
    """

    def __init__(
        self, size: int, foldable: bool = True, *, initial_rate: float, threshold: float
    ) -> None:
        super().__init__(size, foldable)
        self.threshold = threshold
        start = log((1 - initial_rate) / initial_rate)
        self.gate_logit = nn.Parameter(torch.full((size,), start))

    def sample(self, rows: int) -> Tensor:
        """`g + sqrt(g (1 - g)) n` with n standard normal, `(rows, size)`."""
        logit = self.gate_logit
        deviation = torch.exp(0.5 * (F.logsigmoid(logit) + F.logsigmoid(-logit)))
        noise = torch.randn(rows, self.size, dtype=logit.dtype, device=logit.device)
        return torch.sigmoid(logit) + deviation * noise

    def mean(self) -> Tensor:
        """The gate 1 - r, `(size,)`."""
        return torch.sigmoid(self.gate_logit)

    def penalty(self, strength: float, examples: int) -> Tensor:
        """KL per unit and example, `(size,)`; `strength` is lambda / N, in nats per example."""
        prior = strength * examples or WEAKEST_PRIOR
        return gaussian_dropout_kl(self.gate_logit, prior) / examples

    def pressure(self) -> Tensor:
        """The gate, whose L1 norm the prior penalises, `(size,)`."""
        return self.mean()

    def openness(self, sharpness: float) -> Tensor:
        """`g^s / (g^s + (1 - g)^s)` with sharpness s: the gate, closer to the 0 or 1 it becomes.

        A gate of 0.9 costs a whole unit once it is hardened, and one of 0.1 nothing. (Ours.)
        """
        return torch.sigmoid(sharpness * self.gate_logit)

    def score(self) -> Tensor:
        """The gate, `(size,)`."""
        return self.mean().detach()

    def needed(self) -> Tensor:
        """Gate above the threshold, `(size,)`."""
        return self.score() > self.threshold


@dataclass(frozen=True)
class RBP(Method):
    """Recursive Bayesian Pruning (Zhou et al., ICCV 2019, arXiv 1812.00353).

    The paper states neither the initial rate nor the threshold; both values are ours (see
    docs/experiments.md).

    Attributes:
        initial_rate: Dropout rate at the start, in (0, 1).
        threshold: A unit whose mean gate lies below is redundant, in [0, 1].
        strength: Price of the whole network in nats of training loss, of which every unit has the
            share that it has of the cost: lambda / N summed over all units.

    Raises:
        RbpfxError: A setting lies outside of its interval.
    """

    initial_rate: float = 0.05
    threshold: float = 0.5
    name = "rbp"
    strength = 2.0
    shares_strength = True
    budgeted_strength = 0.0
    noise_lr = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.initial_rate < 1:
            raise RbpfxError(f"RBP(initial_rate={self.initial_rate}) must lie in (0, 1)")
        if not 0 <= self.threshold <= 1:
            raise RbpfxError(f"RBP(threshold={self.threshold}) must lie in [0, 1]")

    def gate(self, group: ChannelGroup) -> NoiseGate:
        """Gaussian dropout noise for the units of a group."""
        return RBPGate(
            group.size, group.foldable, initial_rate=self.initial_rate, threshold=self.threshold
        )
