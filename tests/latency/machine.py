"""A machine whose times are known: kernels work on blocks of 16 channels."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from rbpfx import Analysis, PruningPlan
from rbpfx.latency.model import LatencyModel
from rbpfx.latency.operators import Operator, OperatorTimes

BLOCK = 16


class StairTimes(OperatorTimes):
    """Times of that machine, where layers take time for every pair of blocks."""

    def __init__(self, block: int = BLOCK) -> None:
        super().__init__(torch.device("cpu"), Path("nowhere.json"))
        self.seconds = {}
        self.block = block

    def blocks(self, channels: int) -> int:
        return -(-channels // self.block)

    def of_layer(self, layer: nn.Module, x: torch.Tensor) -> float:
        if isinstance(layer, _ConvNd):
            work = int(np.prod(layer.kernel_size)) * len(x)
            inputs = layer.in_channels // layer.groups
            return 1e-6 * work * self.blocks(inputs) * self.blocks(layer.out_channels)
        return 1e-6 * len(x) * self.blocks(layer.in_features) * self.blocks(layer.out_features)

    def measure(self, operators: Iterable[Operator], progress: bool = False) -> None:
        for operator in operators:
            if operator.key in self.seconds:
                continue
            call = operator.prepare()
            function = call.func
            if isinstance(function, (_ConvNd, nn.Linear)):
                self.seconds[operator.key] = self.of_layer(function, call.args[0])
            else:
                tensors = [a for a in call.args if isinstance(a, torch.Tensor)]
                self.seconds[operator.key] = 1e-10 * sum(t.numel() for t in tensors)


class StairMeter:
    """Measures networks of that machine; they take a constant time beside their operators."""

    OVERHEAD = 0.1

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self.model = LatencyModel(analysis, times=StairTimes())
        self.asked = 0
        self.dense_seconds = 0.02

    def __call__(self, plan: PruningPlan) -> float:
        self.asked += 1
        groups = self.analysis.groups
        widths = np.array([len(plan.kept.get(g.name, range(g.size))) for g in groups])
        share = self.model.seconds(widths) / self.model.seconds(self.model.sizes)
        return (share + self.OVERHEAD) / (1 + self.OVERHEAD)
