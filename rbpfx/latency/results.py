"""What was measured: the time of a network, and of two beside one another."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from rbpfx.errors import InputError
from rbpfx.latency.memory import Memory


@dataclass(frozen=True)
class Latency:
    """Time of one forward pass in eval mode.

    Attributes:
        median: Seconds.
        spread: Interquartile range in seconds.
        repeats: How often it was measured.
        device: Where.
        threads: CPU threads that operators were allowed.
        batch_size: Number of examples in the pass.
        memory: What the pass needs at its peak, if it was asked for.
        times: Seconds of every repeat; entry i of networks measured together is from one round.
    """

    median: float
    spread: float
    repeats: int
    device: str = "cpu"
    threads: int | None = None
    batch_size: int | None = None
    memory: Memory | None = None
    times: tuple[float, ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        circumstances = [f"{self.repeats} repeats", *_circumstances(self)]
        memory = [] if self.memory is None else [str(self.memory)]
        time = f"{_milliseconds(self.median)}, interquartile range {_milliseconds(self.spread)}"
        return "; ".join([f"{time} ({', '.join(circumstances)})", *memory])


@dataclass(frozen=True)
class Comparison:
    """Two networks measured in turns, and their ratio round by round.

    Attributes:
        baseline: Time of the network that is compared with.
        model: Time of the other one.
        speedup: How many times faster the model is: the median of the ratios of all rounds.
        quartiles: Between which two ratios half of the rounds lie.

    Raises:
        InputError: They were not measured together, or in fewer than two rounds.
    """

    baseline: Latency
    model: Latency
    speedup: float = field(init=False)
    quartiles: tuple[float, float] = field(init=False)

    def __post_init__(self) -> None:
        if len(self.baseline.times) < 2 or len(self.baseline.times) != len(self.model.times):
            raise InputError(
                "two latencies compare round by round only if they were measured together; pass "
                "both networks to one call of measure_latency, or call compare_latency"
            )
        pairs = zip(self.baseline.times, self.model.times, strict=True)
        low, middle, high = statistics.quantiles((before / after for before, after in pairs), n=4)
        object.__setattr__(self, "speedup", middle)
        object.__setattr__(self, "quartiles", (low, high))

    @property
    def memory_ratio(self) -> float | None:
        """Share of the baseline's peak memory that the model needs, if it was measured."""
        if self.baseline.memory is None or self.model.memory is None:
            return None
        return self.model.memory.peak / self.baseline.memory.peak

    def __str__(self) -> str:
        low, high = self.quartiles
        memory = "" if self.memory_ratio is None else f", {self.memory_ratio:.0%} of the memory"
        return (
            f"{self.speedup:.2f}x faster ({low:.2f}x to {high:.2f}x in half of "
            f"{self.model.repeats} rounds): {_milliseconds(self.baseline.median)} -> "
            f"{_milliseconds(self.model.median)}{memory} ({', '.join(_circumstances(self.model))})"
        )


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _circumstances(latency: Latency) -> list[str]:
    batch = [] if latency.batch_size is None else [f"batch {latency.batch_size}"]
    threads = []
    if latency.threads is not None and latency.device == "cpu":
        threads = [f"{latency.threads} thread{'s' if latency.threads != 1 else ''}"]
    return [*batch, latency.device, *threads]
