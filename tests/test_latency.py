"""Latency: what is called how often, and what is reported; no claims about time itself."""

from __future__ import annotations

import statistics
from collections import namedtuple

import pytest
import torch
from torch import Tensor, nn

from rbpfx import Latency, measure_latency
from rbpfx.latency import first_examples

Pair = namedtuple("Pair", ["x", "mask"])


class Log(nn.Module):
    """Notes its calls."""

    def __init__(self, name: str, log: list[tuple[str, bool, bool]]) -> None:
        super().__init__()
        self.name = name
        self.log = log
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        self.log.append((self.name, self.training, torch.is_grad_enabled()))
        return x * self.weight


def test_networks_take_turns() -> None:
    log: list[tuple[str, bool, bool]] = []
    models = [Log("a", log), Log("b", log).eval(), Log("c", log)]
    results = measure_latency(models, torch.zeros(3, 2), max_repeats=7)
    assert [result.repeats for result in results] == [7, 7, 7]
    assert [name for name, _, _ in log] == ["a", "b", "c"] * 8  # a warm-up each, then 7 rounds
    assert not any(training or grad for _, training, grad in log)
    assert [model.training for model in models] == [True, False, True]


def test_time_limit_after_three_rounds() -> None:
    (result,) = measure_latency([nn.Identity()], torch.zeros(1), seconds=0, max_repeats=100)
    assert result.repeats == 3


def test_median_and_interquartile_range(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([5.0, 1.0, 2.0, 4.0, 3.0, 100.0, 7.0])
    monkeypatch.setattr("rbpfx.latency._timed", lambda *_: next(times))
    (result,) = measure_latency([nn.Identity()], torch.zeros(1), max_repeats=7)
    quartiles = statistics.quantiles([5, 1, 2, 4, 3, 100, 7], n=4)
    assert result == Latency(median=4.0, spread=quartiles[2] - quartiles[0], repeats=7)
    assert result.spread == 5


def test_times_are_positive() -> None:
    results = measure_latency([nn.Linear(3, 3)] * 2, torch.zeros(4, 3), max_repeats=3)
    assert all(result.median > 0 and result.spread >= 0 for result in results)


@pytest.mark.parametrize("inputs", [(torch.zeros(3, 2),), {"x": torch.zeros(3, 2)}])
def test_inputs_of_any_form(inputs: object) -> None:
    log: list[tuple[str, bool, bool]] = []
    measure_latency([Log("a", log)], inputs, max_repeats=3)
    assert len(log) == 4


class TestFirstExamples:
    def test_tensors_are_cut(self) -> None:
        x = torch.arange(6).reshape(3, 2)
        assert torch.equal(first_examples(x, 2), x[:2])
        assert torch.equal(first_examples(x, 5), x)

    def test_nests_keep_their_form(self) -> None:
        x = torch.zeros(4, 2)
        value = {"pair": Pair(x, [x, None]), "flag": True, "tuple": (x, "text", 4)}
        cut = first_examples(value, 1)
        assert isinstance(cut["pair"], Pair)
        assert cut["pair"].x.shape == cut["pair"].mask[0].shape == cut["tuple"][0].shape == (1, 2)
        assert (cut["pair"].mask[1], cut["flag"], cut["tuple"][1:]) == (None, True, ("text", 4))

    def test_what_has_no_examples_stays_whole(self) -> None:
        """An attention mask or a scalar that goes along with the examples."""
        images, mask, scale = torch.zeros(8, 5, 2), torch.zeros(5, 5), torch.tensor(2.0)
        cut = first_examples((scale, images, mask), 2)
        assert [tensor.shape for tensor in cut] == [(), (2, 5, 2), (5, 5)]

    def test_nothing_to_cut(self) -> None:
        assert first_examples((1, None), 2) == (1, None)
