"""Measuring the networks that plans emit, beside the dense one."""

from __future__ import annotations

import statistics
import time
from functools import cached_property

from torch import nn

from rbpfx.bars import stages
from rbpfx.deployment.deploy import lowered
from rbpfx.graph.capture import ExampleInputs
from rbpfx.graph.device import device_of
from rbpfx.graph.groups import Analysis
from rbpfx.graph.slicing import rewrite
from rbpfx.latency.measure import compare_latency, measure_latency
from rbpfx.latency.model import LatencyModel
from rbpfx.latency.operators import First, OperatorTimes, alone
from rbpfx.plan import PruningPlan

PRECISION = 0.01
"""Two networks are measured until the standard error of the ratio of their times is this share of
it (ours)."""


class PlanMeter:
    """Measures the latency of the networks that plans emit, beside the dense one.

    Args:
        gm: The captured network.
        analysis: Its analysis.
        inputs: What the networks are called with.
        progress: Whether to show progress bars.
        deployed: Whether to measure the form that `rbpfx.deploy` gives them.
        times: The table of operators; by default the one on disk.
        first: Does work in the first process of several and gives its outcome to all.
    """

    SECONDS = (1.0, 20.0)
    """How long two networks are measured together at a time and at most, in seconds; ours."""

    def __init__(
        self,
        gm: nn.Module,
        analysis: Analysis,
        inputs: ExampleInputs,
        progress: bool = False,
        deployed: bool = False,
        times: OperatorTimes | None = None,
        first: First = alone,
    ) -> None:
        self.gm = gm
        self.analysis = analysis
        self.inputs = inputs
        self.progress = progress
        self.deployed = deployed
        self.times = times or OperatorTimes(device_of(gm), first=first)
        self.first = first
        self.measured: dict[str, float] = {}

    @cached_property
    def dense(self) -> nn.Module:
        """The dense network in the form that is measured."""
        return self._formed(self.gm)

    @cached_property
    def dense_seconds(self) -> float:
        """Latency of the dense network, in seconds."""
        seconds: float = self.first(
            lambda: measure_latency(self.dense, self.inputs, seconds=self.SECONDS[0]).median
        )
        return seconds

    @cached_property
    def model(self) -> LatencyModel:
        """Times of the operators at any widths."""
        return LatencyModel(
            self.analysis,
            self.inputs,
            progress=self.progress,
            deployed=self.deployed,
            times=self.times,
        )

    def __call__(self, plan: PruningPlan) -> float:
        """The share of the dense network's latency that a plan's network has; measured once."""
        key = plan.to_json()
        if key not in self.measured:
            self.measured[key] = self.first(lambda: self._measure(plan))
        return self.measured[key]

    def _measure(self, plan: PruningPlan) -> float:
        with stages("latency target", 2, visible=self.progress) as begin:
            begin("building a network")
            network = self._formed(rewrite(self.gm, self.analysis, plan))
            begin("measuring it")
            return self._share(network)

    def _share(self, network: nn.Module) -> float:
        """The median of the ratios to the dense network, measured until it is precise enough."""
        turn, limit = self.SECONDS
        end = time.perf_counter() + limit
        ratios: list[float] = []
        while True:
            pair = compare_latency(self.dense, network, self.inputs, seconds=turn)
            times = zip(pair.model.times, pair.baseline.times, strict=True)
            ratios += [after / before for after, before in times]
            low, middle, high = statistics.quantiles(ratios, n=4)
            # For normal errors the median of n varies by 1.25 s / sqrt(n), s being 0.74 quartiles.
            error = 1.25 * 0.74 * (high - low) / len(ratios) ** 0.5
            if error <= PRECISION * middle or time.perf_counter() >= end:
                return middle

    def _formed(self, network: nn.Module) -> nn.Module:
        return lowered(network, self.inputs) if self.deployed else network
