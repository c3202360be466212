"""MacKay's evidence framework: Gaussian noise whose prior precision is estimated from the data.

MacKay, "Bayesian Interpolation", Neural Computation 4(3), 1992, for the fixed point; Tipping,
JMLR 1, 2001, for one precision per unit; Li, Mao, Zhang and Huai, UAI 2016, for pruning networks
with it. They prune single weights; here the noise sits on channels. The multiplier of a unit has
the posterior `N(m, s^2)` and the prior `N(0, 1 / alpha)`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rbpfx.errors import RbpfxError
from rbpfx.graph.groups import ChannelGroup
from rbpfx.methods.base import Method, NoiseGate, Phase
from rbpfx.methods.log_normal import hold

PRECISION_LOW, PRECISION_HIGH = 1e-6, 1e9
"""What alpha is clipped to."""
LOG_LOW, LOG_HIGH = -10.0, 0.0
"""What log m and log s are clamped to; 1 / s^2 stays within the range of alpha.

Only their ratio says how needed a unit is. Where nothing normalises the activations, noise that
may exceed the unit it sits on makes the training diverge (LeNet-300-100 did, at s up to e^3).
"""


def gaussian_kl(mean: Tensor, log_std: Tensor, precision: Tensor) -> Tensor:
    """KL( N(m, s^2) || N(0, 1 / alpha) ) = `[alpha (m^2 + s^2) - 1 - log(alpha s^2)] / 2`.

    With `x = log(alpha s^2)` the part of s is `exp(x) - 1 - x`, which expm1 keeps accurate.

    Args:
        mean: m, any shape.
        log_std: log s, same shape.
        precision: alpha, positive, same shape.

    Returns:
        KL in nats, same shape.
    """
    x = torch.log(precision) + 2 * log_std
    return 0.5 * (precision * mean.square() + torch.expm1(x) - x)


def relevance(mean: Tensor, log_std: Tensor, precision: Tensor) -> Tensor:
    """Gamma = `1 - alpha s^2` clipped to [0, 1]: how far the data determine a unit (MacKay 1992).

    Args:
        mean: m, any shape; gamma depends on it through alpha only.
        log_std: log s, same shape.
        precision: alpha, same shape.

    Returns:
        gamma, same shape; `m^2 / (m^2 + s^2)` at the fixed point of alpha.
    """
    return (1 - precision * torch.exp(2 * log_std)).clamp(0, 1)


def next_precision(mean: Tensor, log_std: Tensor, precision: Tensor) -> Tensor:
    """One damped step of MacKay's fixed point `alpha <- gamma / m^2`.

    The plain step has the slope `-s^2 / m^2` in log alpha at its fixed point
    `alpha = 1 / (m^2 + s^2)`: it oscillates, and between 0 and infinity, where the noise is
    larger than the mean, that is for every unit worth removing. A step of `m^2 / (m^2 + s^2)` of
    the way in log alpha has slope 0 there and converges from everywhere. (Derived.)

    Args:
        mean: m, any shape.
        log_std: log s, same shape.
        precision: alpha, same shape.

    Returns:
        The next alpha in [PRECISION_LOW, PRECISION_HIGH], same shape.
    """
    square = mean.square()
    gamma = relevance(mean, log_std, precision)
    target = (gamma / square.clamp(min=torch.finfo(square.dtype).tiny)).clamp(
        PRECISION_LOW, PRECISION_HIGH
    )
    share = square / (square + torch.exp(2 * log_std))
    log_precision = torch.log(precision)
    step = share * (torch.log(target) - log_precision)
    return torch.exp(log_precision + step).clamp(PRECISION_LOW, PRECISION_HIGH)


class MacKayGate(NoiseGate):
    """Gaussian noise with a mean, a deviation and an estimated prior precision per unit.

    The mean is kept as its logarithm. A linear one would be carried across 0 and open the unit
    again when a budget pushes it far in one step.

    Args:
        size: Number of units.
        foldable: Whether the hardened mean may differ from 1.
        initial_log_std: log s at the start.

    Attributes:
        precision: alpha, `(size,)`.
    """

    precision: Tensor

    def __init__(self, size: int, foldable: bool = True, *, initial_log_std: float) -> None:
        super().__init__(size, foldable)
        self.log_mean = nn.Parameter(torch.zeros(size))
        self.log_std = nn.Parameter(torch.full((size,), initial_log_std))
        _, log_std = self.posterior()
        fixed_point = 1 / (1 + torch.exp(2 * log_std.detach()))
        self.register_buffer("precision", fixed_point)

    def posterior(self) -> tuple[Tensor, Tensor]:
        """m, positive, and log s, both within their ranges, `(size,)` each."""
        return self._log_mean().exp(), hold(self.log_std, LOG_LOW, LOG_HIGH)

    def sample(self, rows: int) -> Tensor:
        """`m + s n` with n standard normal, `(rows, size)`."""
        mean, log_std = self.posterior()
        noise = torch.randn(rows, self.size, dtype=mean.dtype, device=mean.device)
        return mean + log_std.exp() * noise

    def mean(self) -> Tensor:
        """m, `(size,)`."""
        return self._log_mean().exp()

    def penalty(self, strength: float, examples: int) -> Tensor:
        """KL at the present alpha per unit and example, `(size,)`; 1 is the evidence bound."""
        return strength * gaussian_kl(*self.posterior(), self.precision) / examples

    def pressure(self) -> Tensor:
        """KL at the fixed point of alpha, `log(1 + m^2 / s^2) / 2`, `(size,)`.

        It falls with m towards 0 and with a growing s: all of it closes units.
        """
        return 0.5 * torch.nn.functional.softplus(2 * self._log_snr())

    def openness(self, sharpness: float) -> Tensor:
        """Ours: `r^s / (1 + r^s)`, r = m / s, s the sharpness, `(size,)`; gamma at s = 2."""
        return torch.sigmoid(sharpness * self._log_snr())

    def score(self) -> Tensor:
        """Log of the signal-to-noise ratio m / s, `(size,)`."""
        return self._log_snr().detach()

    def needed(self) -> Tensor:
        """Gamma above 1/2 at the fixed point of alpha, `(size,)`.

        That is a signal-to-noise ratio above 1, as in Structured Bayesian Pruning. The published
        rule was not found; this one is ours.
        """
        return self.score() > 0

    def update(self) -> None:
        """One step of alpha; log m and log s back into their range, as gradients end there."""
        if self.phase is Phase.NOISY:
            with torch.no_grad():
                mean, log_std = self.posterior()
                self.log_mean.copy_(self._log_mean())
                self.log_std.copy_(log_std)
                self.precision.copy_(next_precision(mean, log_std, self.precision))

    def _log_mean(self) -> Tensor:
        return hold(self.log_mean, LOG_LOW, LOG_HIGH)

    def _log_snr(self) -> Tensor:
        """log(m / s), `(size,)`."""
        return self._log_mean() - hold(self.log_std, LOG_LOW, LOG_HIGH)


@dataclass(frozen=True)
class MacKay(Method):
    """MacKay's evidence framework on channels (MacKay 1992; Li et al., UAI 2016, on weights).

    Attributes:
        initial_log_std: log s at the start, in [-10, 0]; the value is ours.
        strength: Weight of the divergence in the evidence lower bound; 1 is the bound itself.

    Raises:
        RbpfxError: `initial_log_std` lies outside of its interval.
    """

    initial_log_std: float = -3.0
    name = "mackay"
    strength = 1.0

    def __post_init__(self) -> None:
        if not LOG_LOW <= self.initial_log_std <= LOG_HIGH:
            raise RbpfxError(
                f"MacKay(initial_log_std={self.initial_log_std}) must lie in "
                f"[{LOG_LOW:g}, {LOG_HIGH:g}]"
            )

    def gate(self, group: ChannelGroup) -> NoiseGate:
        """Gaussian noise for the units of a group."""
        return MacKayGate(group.size, group.foldable, initial_log_std=self.initial_log_std)
