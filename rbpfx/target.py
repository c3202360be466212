"""What the pruned network may cost, and between which widths its layers stay."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from numbers import Real

from rbpfx.errors import TargetError

COSTS = {"macs": "MACs", "params": "parameters", "latency": "latency"}
"""Field of `Target` -> what a report calls it."""

AUTO = "auto"

UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}

Width = float | None


@dataclass(frozen=True)
class Target:
    """A budget for the emitted network, and bounds on its widths.

    At most one of `macs`, `params` and `latency` is given; without any of them the method decides
    the widths by itself, within the bounds.

    Names are patterns in the style of the shell, matched against the qualified names of the
    layers that produce a group's channels: "layer1.*.conv1", or "layer1" for all that is in it.

    Attributes:
        macs: Multiply-accumulates per example: up to 1 the share of the dense network to keep
            (0.5 for a half), above 1 an absolute number (50 for fifty multiply-accumulates).
        params: Parameters, likewise.
        latency: Time of a forward pass: a number up to 1 is the share of the dense network's to
            keep, a string such as "4.5 ms" an absolute time. It is measured on the machine at
            hand, while `prune` runs, for batches of `batch_size`; the widths are those that lose
            least score for the time.
        deployed: Whether `latency` is that of the form that `rbpfx.deploy` gives the networks, not
            of the networks as they are emitted.
        batch_size: Batch size for which `latency` is meant; that of the loader by default, which
            is also the largest.
        round_to: Make widths a multiple of this number of channels (8 or 16 serve most kernels).
            Rounding keeps more of the best units; the budget then pays for them elsewhere. "auto"
            takes the widths at which the next wider ones take noticeably longer on the machine
            at hand, measured operator by operator.
        min_width: Least number of units in every group.
        widths: Pattern -> (least, most) units of a group: whole numbers are counts, fractions
            shares of the dense width, None no bound. Of several patterns the last one counts.
        include: If given, only groups that match one of these patterns are pruned.
        exclude: Groups that match one of these patterns stay whole.

    Raises:
        TargetError: The budget is not positive, or a bound makes no sense.

    Examples:
        >>> Target(macs=0.5, round_to=8, exclude=["conv1"], widths={"layer4": (0.25, None)})
        ... # doctest: +SKIP
    """

    macs: float | None = None
    params: float | None = None
    latency: float | str | None = None
    deployed: bool = False
    batch_size: int | None = None
    round_to: int | str = 1
    min_width: int = 1
    widths: Mapping[str, tuple[Width, Width]] = field(default_factory=dict)
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        given = [name for name in COSTS if getattr(self, name) is not None]
        if len(given) > 1:
            raise TargetError(f"a target has one budget, not {' and '.join(given)}; choose one")
        for name in given:
            value = getattr(self, name)
            if not _is_number(value) and not (name == "latency" and isinstance(value, str)):
                raise TargetError(f"Target({name}={value!r}) must be a number, for example 0.5")
            if name == "latency":
                self.latency_share(1.0)  # complains
            elif not value > 0:
                raise TargetError(f"Target({name}={value}) must be positive, for example 0.5")
        if self.deployed and self.latency is None and self.round_to != AUTO:
            raise TargetError(
                "Target(deployed=True) says which form a latency is that of; give latency=..., or "
                "leave it out"
            )
        for name in ("round_to", "min_width", "batch_size"):
            value = getattr(self, name)
            if name == "round_to" and value == AUTO:
                continue
            if value is not None and not _is_number(value):
                words = "a number, or round_to='auto'" if name == "round_to" else "a whole number"
                raise TargetError(f"Target({name}={value!r}) must be {words}")
            if value is not None and (value != int(value) or value < 1):
                raise TargetError(f"Target({name}={value}) must be a whole number, 1 at least")
        for name in ("include", "exclude"):
            patterns = getattr(self, name)
            if isinstance(patterns, str):
                raise TargetError(f"Target({name}=...) is a list of patterns, not one string")
            if not isinstance(patterns, Iterable) or not all(isinstance(p, str) for p in patterns):
                raise TargetError(f"Target({name}={patterns!r}) must be a list of patterns, of str")
        if not isinstance(self.widths, Mapping):
            raise TargetError(
                f"Target(widths={self.widths!r}) must map patterns to bounds, for example "
                "{'layer4': (0.25, None)}"
            )
        for pattern, bounds in self.widths.items():
            _require_bounds(pattern, bounds)

    @property
    def cost(self) -> str | None:
        """What is limited: "macs", "params", "latency", or None."""
        return next((name for name in COSTS if getattr(self, name) is not None), None)

    def share(self, dense: float) -> float:
        """The share of the dense network's cost to keep.

        Args:
            dense: That cost: MACs per example, parameters, or seconds.
        """
        if self.cost == "latency":
            return self.latency_share(dense)
        value = self.macs if self.macs is not None else self.params
        if value is None:
            raise TargetError("this target limits no cost")
        return value if value <= 1 else value / dense

    def remedy(self) -> str:
        """What to do if it cannot be reached."""
        value = getattr(self, str(self.cost))
        if isinstance(value, (int, float)) and 1 < value <= 100:
            return (
                f"{self.cost}={value} is {value} {COSTS[str(self.cost)]} in all; a share of "
                f"{value} % is written Target({self.cost}={value / 100})"
            )
        bounds = [
            f"{name}={getattr(self, name)}"
            for name in ("round_to", "min_width", "widths", "exclude")
            if getattr(self, name) not in (1, {}, (), [])
        ]
        return " or less of ".join(["choose a larger target", *bounds])

    def latency_share(self, dense: float) -> float:
        """The share of a dense latency, in seconds, to keep."""
        value = self.latency
        if isinstance(value, str):
            match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*(s|ms|us)\s*", value)
            try:
                value = float(match[1]) * UNITS[match[2]] / dense if match else 0.0
            except ValueError:
                value = 0.0
            valid = value > 0
        else:
            valid = value is not None and 0 < value <= 1
        if not valid:
            raise TargetError(
                f"Target(latency={self.latency!r}) must be a share, for example 0.5, or a time, "
                "for example '4.5 ms'"
            )
        assert value is not None
        return value


@dataclass(frozen=True)
class Reached:
    """What a target asked for and what the emitted network costs.

    Attributes:
        cost: What is limited: "macs", "params" or "latency".
        asked: Share of the dense network's cost.
        reached: Share that the emitted network has.
        seconds: Latency of the dense network, if a time was asked for and not a share.
    """

    cost: str
    asked: float
    reached: float
    seconds: float | None = None

    def short(self) -> str:
        """What was asked for, in a few words."""
        if self.seconds is not None:
            return f"latency {in_units(self.asked * self.seconds)}"
        return f"{self.asked:.1%} of the {COSTS[self.cost]}"

    def __str__(self) -> str:
        text = f"target: {self.short()}, reached {self._reached()}"
        if self.reached < 0.99 * self.asked and self.cost != "latency":
            text += " (the widths are too coarse, or bound, to come nearer)"
        return text

    def _reached(self) -> str:
        if self.seconds is None:
            return f"{self.reached:.1%}"
        return f"{in_units(self.reached * self.seconds)} ({self.reached:.1%} of the dense network)"


def in_units(seconds: float) -> str:
    """A time in the unit that suits it, for example "4.5 ms"."""
    unit = next((name for name, size in UNITS.items() if seconds >= size), "us")
    return f"{seconds / UNITS[unit]:.4g} {unit}"


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a qualified name, or a module that it lies in, matches one of the patterns."""
    return any(fnmatchcase(name, p) or fnmatchcase(name, f"{p}.*") for p in patterns)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _require_bounds(pattern: str, bounds: tuple[Width, Width]) -> None:
    try:
        least, most = bounds
    except (TypeError, ValueError):
        raise TargetError(f"widths[{pattern!r}] must be (least, most), not {bounds!r}") from None
    for bound in (least, most):
        if bound is None:
            continue
        if not _is_number(bound):
            raise TargetError(f"widths[{pattern!r}]: {bound!r} must be a number, or None")
        if isinstance(bound, float) and not 0 < bound <= 1:
            raise TargetError(f"widths[{pattern!r}]: the share {bound} must lie between 0 and 1")
        if bound < 0 or (isinstance(bound, int) and bound < 1):
            raise TargetError(f"widths[{pattern!r}]: {bound} units are too few")
    if type(least) is type(most) and least is not None and most is not None and least > most:
        raise TargetError(f"widths[{pattern!r}]: at least {least} and at most {most} exclude it")
