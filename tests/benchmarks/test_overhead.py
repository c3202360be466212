"""What noise costs, and the staircase: rows of tiny networks."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from torch import nn

from benchmarks import overhead
from benchmarks.overhead import Case, Enough, Pair, Steps, run
from benchmarks.staircase import Convolution, measure
from rbpfx import noise_gates
from rbpfx.training.recursion import RecursiveTraining

CASE = Case("tiny", False, "cpu", 4, 8, "rbp")


def net() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8 * 16, 1000))


@pytest.fixture
def pair() -> Pair:
    torch.manual_seed(0)
    return Pair(net(), CASE)


def test_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "torchvision_model", lambda _: net())
    row = run(CASE, 4)
    json.dumps(row)
    assert row["time_ratio"] > 0
    assert row["memory_ratio"] > 1
    assert row["memory_reached"] == (row["memory_ratio"] <= 1.10)
    assert row["bytes"][0] > row["weight_bytes"]


def test_steps_take_turns(pair: Pair) -> None:
    log: list[str] = []
    steps = Steps(pair, 3, lambda: log.append("turn"))
    with pytest.raises(Enough):
        for _ in steps:
            log.append("step")
    assert log == ["turn", "step"] * 3
    assert len(steps.turns) == len(steps.steps) == 3


def test_the_noisy_side_trains_noise_and_decides_nothing(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[RecursiveTraining] = []
    init = RecursiveTraining.__init__

    def remembered(self: RecursiveTraining, *args: object) -> None:
        init(self, *args)
        trained.append(self)

    monkeypatch.setattr(RecursiveTraining, "__init__", remembered)
    plain, noisy = overhead.times(pair, 2)
    assert len(plain) == len(noisy) == 2
    (training,) = trained
    gates = noise_gates(training.noisy)
    assert {gate.phase.value for gate in gates} == {"noisy"}
    assert training.decisions.expected_cost() < 0.55
    assert not training.history


def test_the_dense_network_is_left_alone(pair: Pair) -> None:
    before = {name: tensor.clone() for name, tensor in pair.model.state_dict().items()}
    overhead.times(pair, 1)
    assert all(torch.equal(before[n], t) for n, t in pair.model.state_dict().items())


def test_one_time_per_width() -> None:
    options = argparse.Namespace(batch=1, device="cpu", threads=1, row_seconds=0)
    times = measure(Convolution(3, 4, depthwise=True), [2, 4, 6], options)
    assert len(times) == 3
    assert min(times) > 0
