"""Reference rankings: magnitude, BatchNorm scale, first-order Taylor, random.

They learn nothing, so that they need a target, and cut at once (one-shot) unless a recursion is
asked for: then group after group is cut while the weights train on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from rbpfx.errors import RbpfxError
from rbpfx.graph.groups import Analysis, ChannelGroup
from rbpfx.methods.base import Gate, Method, Phase
from rbpfx.methods.weights import UnitWeights, in_scope, require_scope


class MagnitudeGate(Gate):
    """Ranks units by the norm of all weights that go with them.

    Args:
        group: The channel group.
        power: p of the Lp norm.
        scope: See `in_scope`.
    """

    def __init__(self, group: ChannelGroup, power: float, scope: str) -> None:
        super().__init__(group.size, group.foldable)
        self.power = power
        self.scope = scope

    def bind(self, noisy: nn.Module, analysis: Analysis) -> None:
        """Find the weights of the units."""
        self.weights = UnitWeights(noisy, analysis, analysis.group(self.group))

    @torch.no_grad()
    def score(self) -> Tensor:
        """Lp norm over the filters that produce a unit and the weights that read it, `(size,)`."""
        members = self.weights.filters + self.weights.readers
        norm = self.weights.power_sum(members, self.power).pow(1 / self.power)
        return in_scope(norm, self.scope)


class BatchNormScaleGate(Gate):
    """Ranks units by the scales of the BatchNorm layers on them.

    Args:
        group: The channel group.
        scope: See `in_scope`.
    """

    def __init__(self, group: ChannelGroup, scope: str) -> None:
        super().__init__(group.size, group.foldable)
        self.scope = scope

    def bind(self, noisy: nn.Module, analysis: Analysis) -> None:
        """Find the scales.

        Raises:
            RbpfxError: No BatchNorm scales the group's channels.
        """
        self.weights = UnitWeights(noisy, analysis, analysis.group(self.group))
        if not self.weights.scales:
            raise RbpfxError(
                f"no BatchNorm layer with a scale lies on the channels of group {self.group!r}, "
                "so that method='bn-scale' cannot rank them; exclude the group by the target, or "
                "take method='magnitude'"
            )

    @torch.no_grad()
    def score(self) -> Tensor:
        """Sum of |gamma| over the layers on a unit, `(size,)`."""
        return in_scope(self.weights.power_sum(self.weights.scales, 1.0), self.scope)


class TaylorGate(Gate):
    """Ranks units by how much the loss would change, to first order, if they were 0.

    The derivative of the loss with respect to a multiplier that is 1 is the sum of gradient times
    activation over all reads of the unit.

    Args:
        group: The channel group.
        scope: See `in_scope`.
    """

    changes: Tensor

    def __init__(self, group: ChannelGroup, scope: str) -> None:
        super().__init__(group.size, group.foldable)
        self.scope = scope
        self.register_buffer("changes", torch.zeros(group.size))

    def forward(self, reference: Tensor | None) -> Tensor:
        """Ones, `(N, size)`, that remember their gradient; constants once hardened."""
        if self.phase is Phase.HARDENED or not torch.is_grad_enabled():
            return super().forward(reference)
        rows = 1 if reference is None else reference.shape[0]
        ones = self.constants.new_ones(rows, self.size).requires_grad_()
        ones.register_hook(self._observe)
        return ones * self.alive

    def _observe(self, gradient: Tensor) -> None:
        # The loss is a mean over the batch: times N, this is the gradient of each example's.
        changes = gradient.detach().abs().sum(0) * len(gradient) / self.loss_scale
        if isinstance(self.loss_scale, Tensor):  # too large a scale; the step is skipped as well
            changes = torch.where(changes.isfinite().all(), changes, 0)
        self.changes += changes.to(self.changes)

    def average(self, mean: Callable[[Tensor], Tensor]) -> None:
        """Average the sums of all processes."""
        self.changes.copy_(mean(self.changes))

    def score(self) -> Tensor:
        """Sum over the examples of |gradient x activation|, `(size,)`."""
        return in_scope(self.changes, self.scope)


class RandomGate(Gate):
    """Ranks units at random.

    Args:
        group: The channel group.
    """

    draw: Tensor

    def __init__(self, group: ChannelGroup) -> None:
        super().__init__(group.size, group.foldable)
        self.register_buffer("draw", torch.rand(group.size))

    def score(self) -> Tensor:
        """A random order; one threshold keeps the same share of every group, `(size,)`."""
        return in_scope(self.draw, "local")


class Ranking(Method):
    """A method that only ranks."""

    decides: ClassVar[bool] = False
    trains: ClassVar[bool] = False


@dataclass(frozen=True)
class Magnitude(Ranking):
    """Lp norm of the weights of a coupled group (Li et al., ICLR 2017, arXiv 1608.08710).

    Rows of the filters that produce a channel and columns of the weights that read it count
    alike, as in DepGraph (Fang et al., CVPR 2023, arXiv 2301.12900).

    Attributes:
        power: p of the norm.
        scope: "local" keeps the same share of every group, "global" compares norms divided by
            the group's mean, "l2" by their norm.

    Raises:
        RbpfxError: There is no such scope, or `power` is not positive.
    """

    power: float = 2.0
    scope: str = "local"
    name = "magnitude"

    def __post_init__(self) -> None:
        require_scope(self.scope)
        if not self.power > 0:
            raise RbpfxError(f"Magnitude(power={self.power}) must be positive")

    def gate(self, group: ChannelGroup) -> Gate:
        """A gate of ones that ranks by weights."""
        return MagnitudeGate(group, self.power, self.scope)


@dataclass(frozen=True)
class BatchNormScale(Ranking):
    """BatchNorm scales (Liu et al., Network Slimming, ICCV 2017, arXiv 1708.06519), not sparsified.

    Attributes:
        scope: How groups are compared: "global", as published, "local" or "l2".

    Raises:
        RbpfxError: There is no such scope.
    """

    scope: str = "global"
    name = "bn-scale"

    def __post_init__(self) -> None:
        require_scope(self.scope)

    def gate(self, group: ChannelGroup) -> Gate:
        """A gate of ones that ranks by BatchNorm scales."""
        return BatchNormScaleGate(group, self.scope)


@dataclass(frozen=True)
class Taylor(Ranking):
    """First-order Taylor expansion of the loss (Molchanov et al., ICLR 2017, arXiv 1611.06440).

    Attributes:
        scope: How groups are compared: "l2", as published, "global" or "local".

    Raises:
        RbpfxError: There is no such scope.
    """

    scope: str = "l2"
    name = "taylor"
    observes = True

    def __post_init__(self) -> None:
        require_scope(self.scope)

    def gate(self, group: ChannelGroup) -> Gate:
        """A gate of ones that watches its gradient."""
        return TaylorGate(group, self.scope)


@dataclass(frozen=True)
class Random(Ranking):
    """No information at all: what a ranking has to beat. Drawn from torch's generator."""

    name = "random"

    def gate(self, group: ChannelGroup) -> Gate:
        """A gate of ones with a random order."""
        return RandomGate(group)
