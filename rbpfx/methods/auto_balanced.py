"""Auto-Balanced Filter Pruning: move the capacity of a layer into the filters that stay.

Ding, Ding, Han and Tang, "Auto-Balanced Filter Pruning for Efficient Convolutional Neural
Networks", AAAI 2018. No noise: weak filters are penalised and strong ones strengthened, so that
the two forces balance to zero in every group; then the weak ones are cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rbpfx.errors import RbpfxError
from rbpfx.graph.groups import Analysis, ChannelGroup
from rbpfx.methods.base import Gate, Method
from rbpfx.methods.weights import UnitWeights, in_scope, require_scope

SMALLEST = 1e-6
"""Importance of a filter, as a share of the strongest, below which it counts as this."""


def balance(importance: Tensor, keep: Tensor) -> Tensor:
    """The coefficients lambda of the auto-balanced regulariser.

    `1 + log(theta / M_i)` for filters to prune and `-1 - log(M_i / theta)` for those to keep,
    with theta the smallest importance M among those to keep.

    Args:
        importance: M, the L1 norm of every filter, `(size,)`.
        keep: Which filters are to stay, boolean `(size,)`.

    Returns:
        `(size,)`, at least 1 where a filter goes and at most -1 where it stays.
    """
    strongest = importance.max().clamp_min(torch.finfo(importance.dtype).tiny)
    importance = importance.clamp_min(SMALLEST * strongest)
    ratio = importance / importance[keep].min()
    # A filter to prune may be stronger than theta, if the target changed its mind.
    return torch.where(keep, -1 - ratio.log().clamp_min(0), 1 - ratio.log().clamp_max(0))


class AutoBalancedGate(Gate):
    """Multipliers of 1, and a regulariser on the filters of the group.

    Args:
        group: The channel group.
        scope: How importances of different groups are compared; see `in_scope`.
    """

    keep: Tensor
    coefficients: Tensor

    def __init__(self, group: ChannelGroup, scope: str) -> None:
        super().__init__(group.size, group.foldable)
        self.scope = scope
        self.register_buffer("keep", torch.ones(group.size, dtype=torch.bool))
        self.register_buffer("coefficients", torch.zeros(group.size))

    def bind(self, noisy: nn.Module, analysis: Analysis) -> None:
        """Find the filters.

        Raises:
            RbpfxError: The group's channels come from no filters.
        """
        self.weights = UnitWeights(noisy, analysis, analysis.group(self.group))
        # Flattened features, for example, are produced elsewhere: there the readers count.
        self.filters = self.weights.filters or self.weights.readers
        if not self.filters:
            raise RbpfxError(f"group {self.group!r} has no weights to balance; exclude it")

    @torch.no_grad()
    def choose(self, keep: Tensor) -> None:
        """Take which filters the target keeps, and set the coefficients."""
        self.keep.copy_(keep)
        self.coefficients.copy_(balance(self.weights.power_sum(self.filters, 1.0), self.keep))

    def penalty(self, strength: float, examples: int) -> Tensor:
        """`alpha S_P + tau S_R`, filter by filter, `(size,)`; `strength` is alpha.

        tau = -alpha S_P / S_R, a constant in the gradient, makes the sum zero.
        """
        if self.keep.all():
            return super().penalty(strength, examples)
        terms = self.coefficients * self.weights.power_sum(self.filters, 2.0)
        with torch.no_grad():
            tau = -terms[~self.keep].sum() / terms[self.keep].sum()
        return strength * torch.where(self.keep, tau * terms, terms)

    @torch.no_grad()
    def score(self) -> Tensor:
        """L1 norm of a unit's filters, `(size,)`."""
        return in_scope(self.weights.power_sum(self.filters, 1.0), self.scope)


@dataclass(frozen=True)
class AutoBalanced(Method):
    """Auto-Balanced Filter Pruning (Ding et al., AAAI 2018).

    It needs a target, which says how many filters go. The publication leaves widths to the user
    and does not state alpha, as far as we could find: the same share of every group, and the value
    of `strength`, are ours.

    Attributes:
        scope: "local" keeps the same share of every group, "global" compares importances
            divided by the group's mean, "l2" by their norm.
        strength: alpha, with a target too.

    Raises:
        RbpfxError: There is no such scope.
    """

    scope: str = "local"
    name = "auto-balanced"
    decides = False
    strength = 0.01
    budgeted_strength = None
    cost_weighted = False

    def __post_init__(self) -> None:
        require_scope(self.scope)

    def gate(self, group: ChannelGroup) -> Gate:
        """A gate of ones with a regulariser on the filters."""
        return AutoBalancedGate(group, self.scope)
