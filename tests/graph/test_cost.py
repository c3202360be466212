"""Multiply-accumulates, counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rbpfx.graph.capture import trace
from rbpfx.graph.cost import count_macs, count_parameters
from rbpfx.graph.groups import analyze


@pytest.mark.parametrize(
    ("module", "shape", "macs"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), (2, 3, 10, 10), 3 * 8 * 9 * 100),
        (nn.Conv2d(3, 8, 3, stride=2, padding=1), (2, 3, 10, 10), 3 * 8 * 9 * 25),
        (nn.Conv2d(8, 8, 3, padding=1, groups=8), (2, 8, 10, 10), 8 * 9 * 100),
        (nn.Conv2d(8, 4, 1, groups=2), (2, 8, 10, 10), 4 * 4 * 100),
        (nn.Conv1d(3, 5, 3), (2, 3, 10), 3 * 5 * 3 * 8),
        (nn.Conv3d(1, 2, 3, padding=1), (2, 1, 4, 4, 4), 2 * 27 * 64),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (2, 4, 5, 5), 4 * 6 * 4 * 25),
        (nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (2, 4, 5, 5), 4 * 3 * 4 * 25),
        (nn.Linear(7, 3), (2, 7), 21),
        (nn.Linear(7, 3), (2, 5, 7), 5 * 21),
        (nn.Sequential(nn.BatchNorm1d(7), nn.ReLU()), (2, 7), 0),
    ],
)
def test_macs_per_example(module: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    assert count_macs(trace(module, torch.zeros(shape))) == macs


def test_shared_modules_count_at_every_call_and_parameters_once() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(self.a(self.a(x)))
            return y

    gm = trace(Shared(), torch.zeros(2, 4))
    assert count_macs(gm) == 3 * 16
    assert count_parameters(gm) == 20


def test_what_only_train_mode_runs_costs_nothing() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(3, 4)
            self.head = nn.Linear(4, 2)
            self.aux = nn.Linear(4, 5)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
            x = self.stem(x)
            return self.head(x), self.aux(x) if self.training else None

    gm = trace(Auxiliary(), torch.zeros(2, 3))
    assert count_macs(gm) == 3 * 4 + 4 * 2
    (group,) = analyze(gm).groups
    assert group.macs_per_unit == 3 + 2


def test_followed_axes_that_a_linear_layer_leaves_alone_cost_too() -> None:
    class Mixer(nn.Module):
        """Mixes the positions of every channel: (N, C, T) over T."""

        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv1d(3, 4, 1)
            self.mix = nn.Linear(6, 5)
            self.head = nn.Conv1d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.mix(self.stem(x)))
            return y

    gm = trace(Mixer(), torch.zeros(2, 3, 6))
    groups = {g.name: g.macs_per_unit for g in analyze(gm).groups}
    assert groups["stem"] == 3 * 6 + 6 * 5 + 2 * 5
