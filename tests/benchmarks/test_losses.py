"""The benchmark of losses: what it measures, and a row of it."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

import rbpfx
from benchmarks import losses


class Fixed(nn.Module):
    """Answers with its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("name", "output", "target", "value"),
    [
        (losses.ACCURACY, [[2.0, 1.0], [0.0, 3.0], [5.0, 4.0], [1.0, 0.0]], [0, 1, 1, 0], 0.75),
        (losses.R2, [[1.0], [2.0], [3.0]], [[1.0], [2.0], [3.0]], 1.0),
        (losses.R2, [[2.0], [2.0], [2.0]], [[1.0], [2.0], [3.0]], 1 / 3),  # n - 1 in the variance
        (losses.IOU, [[1.0], [1.0], [-1.0], [-1.0]], [[1.0], [0.0], [1.0], [0.0]], 1 / 3),
    ],
)
def test_metrics(name: str, output: list, target: list, value: float) -> None:
    x, y = torch.tensor(output), torch.tensor(target)
    loader = [(x[:1], y[:1]), (x[1:], y[1:])]
    assert losses.measured(name)(Fixed(), loader) == pytest.approx(value)


def test_a_row() -> None:
    row = losses.run("wine, 120 examples", "auto", 0)
    assert "failure" not in row, row
    assert row["macs_ratio"] > 2
    assert row["pruned"] > 0.9
    assert row["forgotten"] < 0.1
    json.dumps(row)


def test_a_row_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise rbpfx.TargetError("out of reach")

    monkeypatch.setattr(rbpfx, "prune", fail)
    assert losses.run("wine, 120 examples", "0.5", 0)["failure"] == "TargetError: out of reach"


def test_every_task_gives_examples_that_fit_its_network() -> None:
    for name in ("friedman, std 1000", "autoencoder, summed", "digits, 100 examples"):
        torch.manual_seed(0)
        task = losses.TASKS[name](0)
        inputs, target = (part[:3] for part in task.test)
        assert torch.isfinite(task.loss_fn(task.model(inputs), target))
