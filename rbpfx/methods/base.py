"""What a method is: a gate for every group, what training adds to the loss, and a rule to decide.

A method of one's own is one subclass of `Gate` (or of `NoiseGate`, if it draws noise) and one of
`Method` that makes the gates; see docs/writing-a-method.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from rbpfx.graph.groups import Analysis, ChannelGroup

if TYPE_CHECKING:
    from rbpfx.training.schedule import Recursion


class Phase(Enum):
    """Where a group is in the recursion."""

    WAITING = "waiting"
    """Not reached yet: multipliers are 1, and nothing is added to the loss."""
    NOISY = "noisy"
    """In training. Noise is drawn anew for every example in train mode, the mean in eval mode."""
    HARDENED = "hardened"
    """Constants: 0 for redundant units."""


class Gate(nn.Module, ABC):
    """The multipliers of one channel group, and how needed its units are.

    Only `score` has to be written; everything else has a default that adds no noise and nothing
    to the loss.

    Args:
        size: Number of units.
        foldable: Whether a multiplier other than 1 may stay after hardening.

    Attributes:
        group: Name of the channel group, set by `insert_noise`.
        phase: Where the group is in the recursion.
        alive: Which units have not been removed yet, boolean `(size,)`.
        processes: The number of this process of the training, and how many there are.
        loss_scale: What the mean loss of a batch is multiplied by before its gradient is taken; a
            tensor with a gradient scaler, under which gradients may be infinite.
        constants: What the units are multiplied by once hardened, `(size,)`.
    """

    constants: Tensor
    alive: Tensor

    def __init__(self, size: int, foldable: bool = True) -> None:
        super().__init__()
        self.size = size
        self.foldable = foldable
        self.group = ""
        self.phase = Phase.NOISY
        self.processes = (0, 1)
        self.loss_scale: Tensor | float = 1.0
        self.register_buffer("constants", torch.ones(size))
        self.register_buffer("alive", torch.ones(size, dtype=torch.bool))

    def bind(self, noisy: nn.Module, analysis: Analysis) -> None:
        """Look at the network that the gate has just become part of; nothing by default.

        Args:
            noisy: The graph with all gates; its parameters have the names that they had.
            analysis: The analysis of the graph without gates.
        """

    def forward(self, reference: Tensor | None) -> Tensor:
        """Multipliers for one call.

        Args:
            reference: A tensor with the examples on axis 0; None for one draw for all of them.

        Returns:
            `(N, size)` while noisy in train mode with a reference, else `(1, size)`.
        """
        if self.phase is Phase.HARDENED:
            return self.constants.unsqueeze(0)
        if self.phase is Phase.WAITING:
            multipliers = torch.ones_like(self.constants).unsqueeze(0)
        elif self.training:
            multipliers = self.sample(1) if reference is None else self._drawn(reference.shape[0])
        else:
            multipliers = self.mean().unsqueeze(0)
        return multipliers * self.alive

    def _drawn(self, rows: int) -> Tensor:
        """Draws for the examples of this process, out of those for the examples of all."""
        rank, processes = self.processes
        draws = self.sample(rows * processes)
        return draws if len(draws) == 1 else draws[rank * rows : (rank + 1) * rows]

    def average(self, mean: Callable[[Tensor], Tensor]) -> None:
        """Average what every process measured for itself; nothing by default.

        Args:
            mean: The mean of a tensor over all processes.
        """

    def remove(self, redundant: Tensor) -> None:
        """Remove units for good while the others go on.

        Args:
            redundant: Which units go, boolean `(size,)`.
        """
        self.alive &= ~redundant.to(self.alive.device)

    def harden(self, keep: Tensor) -> None:
        """End the training: 0 for the units to remove, `kept_multiplier` for those to keep.

        Args:
            keep: Which units stay, boolean `(size,)`.
        """
        with torch.no_grad():
            kept = self.kept_multiplier()
            keep = keep.to(kept.device) & self.alive
            self.constants.copy_(torch.where(keep, kept, torch.zeros_like(kept)))
        self.phase = Phase.HARDENED

    def kept_multiplier(self) -> Tensor:
        """What a unit is multiplied by if it stays: its mean, or 1 where none can be folded."""
        return self.mean() if self.foldable else torch.ones_like(self.constants)

    def sample(self, rows: int) -> Tensor:
        """Reparametrised draws, `(rows, size)` or `(1, size)`; ones by default."""
        return torch.ones_like(self.constants).unsqueeze(0)

    def mean(self) -> Tensor:
        """Mean multiplier, `(size,)`; ones by default."""
        return torch.ones_like(self.constants)

    def penalty(self, strength: float, examples: int) -> Tensor:
        """What every unit adds to the loss of a training example, `(size,)`; 0 by default.

        Args:
            strength: How strongly a unit is asked to close: `Recursion.strength`, or one unit's
                share of it (`Method.shares_strength`). The method gives its meaning.
            examples: Number of training examples.
        """
        return torch.zeros_like(self.constants)

    def pressure(self) -> Tensor:
        """What a budget pushes down until the expected cost fits it, `(size,)`.

        Only its gradient with respect to the gate's parameters matters. A gate without
        parameters is not pushed.
        """
        return torch.zeros_like(self.constants)

    def openness(self, sharpness: float) -> Tensor:
        """How likely every unit is to stay, in [0, 1], `(size,)`: what a budget counts.

        Args:
            sharpness: How decided the answer is, from 1 (as likely as the gate says) up to
                a hard decision.
        """
        return torch.ones_like(self.constants)

    def choose(self, keep: Tensor) -> None:
        """Hear, at the start of every epoch, which units the target would keep now.

        Args:
            keep: Boolean `(size,)`.
        """

    def update(self) -> None:
        """Called after every optimiser step, for what is not learnt by gradients."""

    @abstractmethod
    def score(self) -> Tensor:
        """How needed every unit is, `(size,)`; comparable between groups, larger is more."""

    def needed(self) -> Tensor:
        """The method's own rule: which units stay, boolean `(size,)`; all by default."""
        return torch.ones_like(self.alive)


class NoiseGate(Gate):
    """The noise of one channel group: a distribution over one multiplier per unit."""

    @abstractmethod
    def sample(self, rows: int) -> Tensor:
        """Reparametrised draws, `(rows, size)`."""

    @abstractmethod
    def mean(self) -> Tensor:
        """Posterior mean, `(size,)`."""

    @abstractmethod
    def penalty(self, strength: float, examples: int) -> Tensor:
        """The weighted divergence of the posterior from the prior per example, `(size,)`."""

    @abstractmethod
    def pressure(self) -> Tensor:
        """What a budget pushes down: the part of the divergence that closes units, `(size,)`."""

    @abstractmethod
    def openness(self, sharpness: float) -> Tensor:
        """How likely every unit is to stay, in [0, 1], `(size,)`."""

    @abstractmethod
    def needed(self) -> Tensor:
        """The method's own rule: which units stay, boolean `(size,)`."""


class Method(ABC):
    """A way to learn which units are redundant. Stateless; gates hold the state.

    Attributes:
        name: What reports and saved plans call it, and `prune(method=...)` if it is in `METHODS`;
            has to be given.
        decides: Whether it has a rule of its own, so that no target is needed.
        trains: Whether there is something to train before the decision. If not, `prune` goes
            straight to the decision unless a recursion is asked for.
        observes: Whether scores need gradients of the loss: a pass over training batches
            precedes the decision of a method that does not train.
        strength: Default of `Recursion.strength`; the method gives its meaning.
        shares_strength: Whether a strength is of the whole network: every unit has its share of
            it, so that it means the same in wide networks and in narrow ones. If not, every unit
            has it in full.
        noise_lr: Default of `Recursion.noise_lr`.
        cost_weighted: Whether penalties are weighed by what a unit costs.
        budgeted_strength: What takes its place while a target finds the strength: a weak
            pull. None if the strength is not found but set, target or not.
    """

    name: ClassVar[str]
    decides: ClassVar[bool] = True
    trains: ClassVar[bool] = True
    observes: ClassVar[bool] = False
    strength: ClassVar[float] = 1.0
    budgeted_strength: ClassVar[float | None] = 1.0
    shares_strength: ClassVar[bool] = False
    noise_lr: ClassVar[float] = 0.05
    cost_weighted: ClassVar[bool] = True

    @abstractmethod
    def gate(self, group: ChannelGroup) -> Gate:
        """The gate for one group."""

    def recursion(self) -> Recursion:
        """How its gates are trained if the caller does not say."""
        from rbpfx.training.schedule import Recursion

        return Recursion()
