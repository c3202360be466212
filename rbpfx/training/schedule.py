"""The schedule of the noise training: its settings, when groups are hardened, when to go on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from rbpfx.errors import RbpfxError
from rbpfx.methods import Phase

SETTLING = 0.1
"""Share of the budget's ramp in which it stays at 1, while Adam learns the gradients' scale."""

DECISIONS = ("once", "epoch")


@dataclass(frozen=True)
class Recursion:
    """How the noise is trained. Every default is ours, chosen in docs/experiments.md.

    Attributes:
        epochs: Passes over the loader for all groups together (at most, without a target). None
            for 3, of at least 100 steps each.
        strength: How hard to prune without a target; None for the method's own default. For RBP
            it is the price of the whole network in nats of training loss: a channel stays if it
            lowers the mean training loss by more than its share of the cost times this. (The
            prior's lambda = 1 / (2 eps^2), divided by N and summed over all channels.) For the
            other noise methods it multiplies the divergence of the evidence lower bound. With a
            target the strength is found, not set; but for `AutoBalanced`, whose alpha it is. What
            counts as a nat of a loss that is no cross-entropy, and what of a network that had
            less than ten classes to learn, is measured: see `training/scale.py`.
        window: How many groups are noisy at a time. 1 is the strict recursion; None makes all
            groups noisy from the start, the front then hardens them one by one.
        front: Share of the steps during which the front passes, if `window` is None. 0 hardens
            all groups together at the end: joint training, without recursion.
        decisions: "once" to decide every group when it is hardened; "epoch" to remove for good,
            at the end of every epoch, the units that the method's own rule finds redundant, as
            BMRS does. Not used with a target, which decides by itself.
        budget_ramp: Share of the steps before the front in which the budget falls to the target.
        sharpness: How decided gates count towards a budget, while it falls and at the end (see
            `NoiseGate.openness`): the growth pushes half-open gates apart.
        noise_lr: Learning rate of the noise parameters (Adam); None for the method's own default.
        weight_lr: Learning rate of the weights (SGD, Nesterov momentum 0.9); 0 freezes them. None
            for 0.01, less for batches below 32 and where losses are large.
        weight_decay: L2 penalty on the weights.
        patience: Without a target, noise training moves on to hardening when over this share of
            an epoch the evidence bound has fallen by less than `tolerance` of its whole fall. With
            `epochs=None`, an epoch has at least 100 steps here too.
        tolerance: See `patience`.
        cost_aware: Weigh every unit's divergence by what it costs: multiply-accumulates, or
            parameters if these are the target.

    Raises:
        RbpfxError: A setting has no such value.
    """

    epochs: float | None = None
    strength: float | None = None
    window: int | None = None
    front: float = 0.3
    decisions: str = "once"
    budget_ramp: float = 0.7
    sharpness: tuple[float, float] = (2.0, 8.0)
    noise_lr: float | None = None
    weight_lr: float | None = None
    weight_decay: float = 5e-4
    patience: float = 0.5
    tolerance: float = 0.02
    cost_aware: bool = True

    def __post_init__(self) -> None:
        positive = ("epochs", "strength", "noise_lr", "patience")
        for name in positive:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise RbpfxError(f"Recursion({name}={value}) must be positive")
            if name in ("epochs", "strength") and value == float("inf"):
                raise RbpfxError(f"Recursion({name}={value}) must be finite")
        for name in ("weight_lr", "weight_decay", "tolerance"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise RbpfxError(f"Recursion({name}={value}) must not be negative")
        if not min(self.sharpness) > 0:
            raise RbpfxError(f"Recursion(sharpness={self.sharpness}) must be positive")
        if self.window is not None and self.window < 1:
            raise RbpfxError(f"Recursion(window={self.window}) must be at least 1, or None")
        if self.decisions not in DECISIONS:
            raise RbpfxError(f"Recursion(decisions={self.decisions!r}): it is one of {DECISIONS}")
        if not 0 <= self.front < 1 or not 0 < self.budget_ramp <= 1:
            raise RbpfxError("Recursion(front=...) lies in [0, 1), budget_ramp in (0, 1]")


@dataclass(frozen=True)
class Schedule:
    """When every group becomes noisy and when it is hardened.

    Attributes:
        groups: Number of groups.
        ahead: How many groups from the front on are noisy.
        start: Step at which the front sets out.
        steps: Step at which it has passed the last group.
        ramp: Steps in which the budget falls.
    """

    groups: int
    ahead: int
    start: int
    steps: int
    ramp: float

    @classmethod
    def plan(cls, groups: int, steps: int, settings: Recursion) -> Schedule:
        """The schedule that settings ask for."""
        if settings.window is not None:
            return cls(groups, settings.window, 0, steps, 0)
        start = round((1 - settings.front) * steps)
        return cls(groups, groups, start, steps, settings.budget_ramp * start)

    def phase(self, group: int, front: int) -> Phase:
        """The phase of a group that is not hardened yet."""
        return Phase.NOISY if group < front + self.ahead else Phase.WAITING

    def hardens(self, step: int, group: int) -> bool:
        """Whether a group is hardened after a step."""
        return step + 1 >= self.start + (group + 1) * (self.steps - self.start) / self.groups

    def budget(self, step: int, target: float) -> float:
        """Share of the cost allowed at a step: falls linearly from 1, then stays."""
        settling = SETTLING * self.ramp
        fallen = (step + 1 - settling) / (self.ramp - settling + 1)
        return 1 - (1 - target) * min(max(fallen, 0), 1)

    def sharpness(self, step: int, between: tuple[float, float]) -> float:
        """How decided gates count at a step: grows geometrically once the budget has fallen."""
        first, last = between
        passed = max(step + 1 - self.ramp, 0) / max(self.steps - self.ramp, 1)
        return float(first * (last / first) ** passed)

    def started(self, step: int) -> Schedule:
        """The same schedule with the front setting out at `step` instead of later."""
        if step >= self.start:
            return self
        return replace(self, start=step, steps=step + self.steps - self.start)


class Evidence:
    """Watches the negative evidence bound and says when it has stopped falling.

    Args:
        interval: Steps averaged into one reading.
        tolerance: A fall between two readings below this share of the whole fall counts as none.
    """

    def __init__(self, interval: int, tolerance: float) -> None:
        self.interval = interval
        self.tolerance = tolerance
        self.window: list[float] = []
        self.readings: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        """What it has heard."""
        return {"window": self.window, "readings": self.readings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Return to a state."""
        self.window, self.readings = state["window"], state["readings"]

    def settled(self, bound: float) -> bool:
        """Take one step's bound; whether it has stopped falling."""
        self.window.append(bound)
        if len(self.window) < self.interval:
            return False
        self.readings.append(sum(self.window) / len(self.window))
        self.window.clear()
        if len(self.readings) < 3:
            return False
        first, before, now = self.readings[0], *self.readings[-2:]
        return before - now < self.tolerance * abs(first - now)
