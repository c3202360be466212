"""Memory of a forward pass: figures that can be counted by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rbpfx import measure_latency
from rbpfx.latency import Memory
from rbpfx.latency.memory import parameter_bytes, peak_allocated

CPU = torch.device("cpu")
VALUE = 4 * 1000 * 1000  # bytes


def near(size: int) -> Any:
    """Constants of a few bytes are allocated as well."""
    return pytest.approx(size, abs=100)


class Chain(nn.Module):
    """Values of one size, of which at most `held` and the one being computed are alive."""

    def __init__(self, held: int) -> None:
        super().__init__()
        self.held = held

    def forward(self, x: Tensor) -> Tensor:
        values = [x + 1]
        for _ in range(6):
            values = [*values, values[-1] + 1][-self.held - 1 :]
            del values[: -self.held]
        return values[-1]


def test_the_peak_is_what_lives_at_once() -> None:
    x = torch.zeros(1000, 1000)
    for held in (1, 2, 4):
        assert peak_allocated(lambda: Chain(held)(x), CPU) == near((held + 1) * VALUE)  # noqa: B023


def test_what_was_there_before_is_not_counted() -> None:
    x = torch.zeros(1000, 1000)
    assert peak_allocated(lambda: x.mul_(2), CPU) < 100
    assert peak_allocated(lambda: x + 1, CPU) == near(VALUE)


def test_tied_parameters_count_once() -> None:
    network = nn.Sequential(nn.Linear(10, 10, bias=False), nn.BatchNorm1d(10))
    tied = nn.Sequential(network, network[0])
    assert parameter_bytes(tied) == parameter_bytes(network) == 4 * (100 + 4 * 10) + 8


def test_packed_weights_count() -> None:
    network = nn.Linear(10, 10, bias=False)
    network.packed = network.weight.detach().to_mkldnn()
    assert parameter_bytes(network) == 2 * 4 * 100


def test_latency_has_the_memory_if_asked_for() -> None:
    network, x = nn.Linear(10, 1000), torch.zeros(100, 10)
    assert measure_latency(network, x, max_repeats=3).memory is None
    latency = measure_latency(network, x, max_repeats=3, memory=True)
    assert latency.memory is not None
    assert latency.memory.parameters == 4 * 11 * 1000
    assert latency.memory.activations >= 4 * 100 * 1000
    assert str(latency).endswith(str(latency.memory))


def test_memory_in_words() -> None:
    assert str(Memory(2_000_000, 1_500_000)) == (
        "3.5 MB at the peak (2.0 MB parameters, 1.5 MB activations)"
    )
