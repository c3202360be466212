"""What a noise method is: a gate with a posterior, its KL, and a rule for what is redundant."""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import Enum

import torch
from torch import Tensor, nn

from rbpfx.graph.groups import ChannelGroup


class Phase(Enum):
    """Where a group is in the recursion."""

    WAITING = "waiting"
    """Not noisy yet: multipliers are 1."""
    NOISY = "noisy"
    """Drawn anew for every example in train mode, the mean in eval mode."""
    HARDENED = "hardened"
    """Constants: 0 for redundant units."""


class NoiseGate(nn.Module, ABC):
    """The noise of one channel group: a distribution over one multiplier per unit.

    Subclasses hold the parameters of the posterior and say how to draw from it, what its mean
    and its KL divergence from the prior are, and how needed each unit is.

    Args:
        size: Number of units.
        foldable: Whether a multiplier other than 1 may stay after hardening.

    Attributes:
        group: Name of the channel group, set by `insert_noise`.
        phase: Where the group is in the recursion.
    """

    constants: Tensor

    def __init__(self, size: int, foldable: bool) -> None:
        super().__init__()
        self.size = size
        self.foldable = foldable
        self.group = ""
        self.phase = Phase.NOISY
        self.register_buffer("constants", torch.ones(size))

    def forward(self, reference: Tensor | None) -> Tensor:
        """Multipliers for one call.

        Args:
            reference: A tensor with the examples on axis 0; None for one draw for all of them.

        Returns:
            `(N, size)` while noisy in train mode with a reference, else `(1, size)`.
        """
        if self.phase is Phase.WAITING:
            return torch.ones_like(self.constants).unsqueeze(0)
        if self.phase is Phase.HARDENED:
            return self.constants.unsqueeze(0)
        if not self.training:
            return self.mean().unsqueeze(0)
        return self.sample(1 if reference is None else reference.shape[0])

    def harden(self, keep: Tensor) -> None:
        """End the noise: 0 for the units to remove, the mean for those to keep.

        Args:
            keep: Which units stay, boolean `(size,)`.
        """
        with torch.no_grad():
            mean = self.kept_multiplier()
            self.constants.copy_(torch.where(keep.to(mean.device), mean, torch.zeros_like(mean)))
        self.phase = Phase.HARDENED

    def kept_multiplier(self) -> Tensor:
        """What a unit is multiplied by if it stays: its mean, or 1 where none can be folded."""
        return self.mean() if self.foldable else torch.ones_like(self.constants)

    @abstractmethod
    def sample(self, rows: int) -> Tensor:
        """Reparametrised draws, `(rows, size)`."""

    @abstractmethod
    def mean(self) -> Tensor:
        """Posterior mean, `(size,)`."""

    @abstractmethod
    def divergence(self, strength: float) -> Tensor:
        """KL divergence of the posterior from the prior per unit in nats, `(size,)`.

        Args:
            strength: How strongly the prior asks units to close; the method gives its meaning.
        """

    @abstractmethod
    def openness(self, sharpness: float) -> Tensor:
        """How likely every unit is to stay, in [0, 1], `(size,)`: what a budget counts.

        Args:
            sharpness: How decided the answer is, from 1 (as likely as the posterior says) up to
                a hard decision.
        """

    @abstractmethod
    def score(self) -> Tensor:
        """How needed every unit is, `(size,)`; comparable between groups, larger is more."""

    @abstractmethod
    def needed(self) -> Tensor:
        """The method's own rule: which units stay, boolean `(size,)`."""


class Method(ABC):
    """A way to learn which units are redundant. Stateless; gates hold the state."""

    name: str

    @abstractmethod
    def gate(self, group: ChannelGroup) -> NoiseGate:
        """The noise for one group."""
