"""Weights computed from parameters: sliced where they are used, whole before."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from rbpfx.graph.capture import trace
from rbpfx.graph.groups import analyze
from tests.graph.laws import check_again, check_close, check_costs, check_law, compile_random


class Standardized(nn.Conv2d):
    """Weight standardisation (Qiao et al., arXiv 1903.10520)."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(rows, None, None, training=True, momentum=0.0, eps=1e-6)
        weight = weight.reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, 1, self.groups)


class Normalized(nn.Linear):
    """Rows of length one."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.softmax(self.weight, dim=1), self.bias)


def network(kind: str) -> nn.Module:
    convolutions = [Standardized(3, 6, 3, padding=1), Standardized(6, 8, 1), nn.Conv2d(8, 4, 1)]
    if kind == "grouped":
        convolutions[1] = Standardized(6, 8, 1, groups=2)
    if kind == "weight_norm":
        convolutions[:2] = [
            parametrizations.weight_norm(nn.Conv2d(3, 6, 3, padding=1)),
            parametrizations.weight_norm(nn.Conv2d(6, 8, 1)),
        ]
    layers: list[nn.Module] = []
    for convolution in convolutions:
        layers += [convolution, nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), Normalized(4, 6), nn.ReLU(), Normalized(6, 2)]
    return nn.Sequential(*layers, *head)


@pytest.mark.parametrize("kind", ["plain", "grouped", "weight_norm"])
def test_computed_weights_are_sliced(kind: str) -> None:
    torch.manual_seed(0)
    model = network(kind).double().eval()
    inputs = (torch.randn(2, 3, 5, 5, dtype=torch.float64),)
    groups = analyze(trace(model, inputs)).groups
    halves = 2 if kind == "grouped" else 1
    assert [g.size for g in groups] == [6 // halves, 8 // halves, 4, 6]
    compiled = compile_random(model, inputs, seed=1)
    assert compiled.removed > 4
    for mode in (False, True):
        check_law(compiled, inputs, train=mode)
    check_costs(compiled)
    check_close(compiled, inputs)
    check_again(compiled, inputs, 1)
