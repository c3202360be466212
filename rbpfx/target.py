"""What the pruned network may cost."""

from __future__ import annotations

from dataclasses import dataclass

from rbpfx.errors import TargetError


@dataclass(frozen=True)
class Target:
    """A budget for the emitted network.

    Attributes:
        macs: Multiply-accumulates per example: up to 1 the share of the dense network to keep,
            above 1 an absolute number.

    Raises:
        TargetError: The budget is not positive.
    """

    macs: float

    def __post_init__(self) -> None:
        if not self.macs > 0:
            raise TargetError(f"Target(macs={self.macs}) must be positive, for example 0.5")

    def macs_share(self, dense: float) -> float:
        """The share of `dense` multiply-accumulates to keep."""
        return self.macs if self.macs <= 1 else self.macs / dense
