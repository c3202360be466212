"""Measuring the networks that plans emit, beside the dense one."""

from __future__ import annotations

from functools import cached_property

from torch import nn

from rbpfx.deployment.deploy import lowered
from rbpfx.graph.capture import ExampleInputs
from rbpfx.graph.groups import Analysis
from rbpfx.graph.slicing import rewrite
from rbpfx.latency.measure import compare_latency, measure_latency
from rbpfx.latency.model import LatencyModel
from rbpfx.latency.operators import OperatorTimes
from rbpfx.plan import PruningPlan


class PlanMeter:
    """Measures the latency of the networks that plans emit, beside the dense one.

    Args:
        gm: The captured network.
        analysis: Its analysis.
        inputs: What the networks are called with.
        progress: Whether to show progress bars.
        deployed: Whether to measure the form that `rbpfx.deploy` gives them.
        times: The table of operators; by default the one on disk.
    """

    SECONDS = 2.0
    """How long the two networks are measured together, in seconds; ours."""

    def __init__(
        self,
        gm: nn.Module,
        analysis: Analysis,
        inputs: ExampleInputs,
        progress: bool = False,
        deployed: bool = False,
        times: OperatorTimes | None = None,
    ) -> None:
        self.gm = gm
        self.analysis = analysis
        self.inputs = inputs
        self.progress = progress
        self.deployed = deployed
        self.times = times
        self.measured: dict[str, float] = {}

    @cached_property
    def dense(self) -> nn.Module:
        """The dense network in the form that is measured."""
        return self._formed(self.gm)

    @cached_property
    def dense_seconds(self) -> float:
        """Latency of the dense network."""
        return measure_latency(self.dense, self.inputs, seconds=self.SECONDS).median

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
            network = self._formed(rewrite(self.gm, self.analysis, plan))
            pair = compare_latency(self.dense, network, self.inputs, seconds=self.SECONDS)
            self.measured[key] = 1 / pair.speedup
        return self.measured[key]

    def _formed(self, network: nn.Module) -> nn.Module:
        return lowered(network, self.inputs) if self.deployed else network
