"""Latency: what is called how often, and what is reported; no claims about time itself."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rbpfx import Latency, measure_latency
from rbpfx.errors import InputError
from rbpfx.latency import Comparison, compare_latency

BRIEF: dict[str, Any] = {"max_repeats": 3, "warmup": 1}


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


class Witness(nn.Module):
    """Remembers the last input, and the weight as it was then."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 2)
        self.seen: list[tuple[Tensor, Tensor, int]] = []

    def __deepcopy__(self, memo: Any) -> Witness:
        twin = Witness()
        twin.seen = self.seen
        return twin

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((x, self.conv.weight, torch.get_num_threads()))
        return self.conv(x)


def test_networks_take_turns_in_alternating_order() -> None:
    log: list[tuple[str, bool, bool]] = []
    models = [Log("a", log), Log("b", log).eval(), Log("c", log)]
    results = measure_latency(models, torch.zeros(3, 2), max_repeats=7, warmup=1)
    assert [result.repeats for result in results] == [7, 7, 7]
    rounds = [["a", "b", "c"], ["c", "b", "a"]] * 4  # after the warm-up
    expected = ["a", "b", "c", *(name for turn in rounds[:7] for name in turn)]
    assert [name for name, _, _ in log] == expected
    assert not any(training or grad for _, training, grad in log)
    assert [model.training for model in models] == [True, False, True]


def test_time_limit_after_three_rounds() -> None:
    (result,) = measure_latency([nn.Identity()], torch.zeros(1), seconds=0, max_repeats=100)
    assert result.repeats == 3


def test_median_and_interquartile_range(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = [5.0, 1.0, 2.0, 4.0, 3.0, 100.0, 7.0]
    times = iter(seconds)
    monkeypatch.setattr("rbpfx.latency.measure._timed", lambda *_: next(times))
    result = measure_latency(nn.Identity(), torch.zeros(1), max_repeats=7)
    quartiles = statistics.quantiles(seconds, n=4)
    assert (result.median, result.spread, result.repeats) == (4, quartiles[2] - quartiles[0], 7)
    assert result.spread == 5
    assert result.times == tuple(seconds)


def test_times_are_positive() -> None:
    results = measure_latency([nn.Linear(3, 3)] * 2, torch.zeros(4, 3), max_repeats=3)
    assert all(result.median > 0 and result.spread >= 0 for result in results)


@pytest.mark.parametrize("inputs", [(torch.zeros(3, 2),), {"x": torch.zeros(3, 2)}])
def test_inputs_of_any_form(inputs: Any) -> None:
    log: list[tuple[str, bool, bool]] = []
    measure_latency([Log("a", log)], inputs, **BRIEF)
    assert len(log) == 4


def test_results_have_the_form_of_the_networks() -> None:
    x, network = torch.zeros(3, 2), nn.Sequential(nn.Linear(2, 2))
    assert isinstance(measure_latency(network, x, **BRIEF), Latency)
    assert isinstance(measure_latency([network], x, **BRIEF), list)
    assert list(measure_latency({"a": network, "b": network}, x, **BRIEF)) == ["a", "b"]
    sized = measure_latency({"a": network}, x, batch_sizes=[1, 5], **BRIEF)
    assert {size: found["a"].batch_size for size, found in sized.items()} == {1: 1, 5: 5}


def test_circumstances_are_told_and_restored() -> None:
    witness, before = Witness(), torch.get_num_threads()
    latency = measure_latency(witness, torch.zeros(2, 3, 4, 4), threads=before + 1, **BRIEF)
    assert {threads for *_, threads in witness.seen} == {before + 1} == {latency.threads}
    assert torch.get_num_threads() == before
    assert (latency.device, latency.batch_size) == ("cpu", 2)
    assert f"batch 2, cpu, {before + 1} threads" in str(latency)


def test_conversions_are_made_on_copies() -> None:
    witness, image = Witness(), torch.zeros(2, 3, 4, 4)
    weight = witness.conv.weight
    stride = weight.stride()
    measure_latency(witness, image, channels_last=True, dtype=torch.bfloat16, **BRIEF)
    for seen, used, _ in witness.seen:
        assert seen.dtype == used.dtype == torch.bfloat16
        assert seen.is_contiguous(memory_format=torch.channels_last)
        assert used.is_contiguous(memory_format=torch.channels_last)
    assert witness.conv.weight is weight
    assert (weight.dtype, weight.stride()) == (torch.float32, stride)


def test_compiled_networks_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[tuple[str, bool, bool]] = []
    eager, other = Log("eager", log), Log("compiled", log)
    monkeypatch.setattr(torch, "compile", lambda network, **_: {eager: other}[network])
    measure_latency(eager, torch.zeros(1, 2), compile=True, **BRIEF)
    assert {name for name, *_ in log} == {"compiled"}


# -- comparisons ---------------------------------------------------------------------------


def test_ratios_are_taken_round_by_round() -> None:
    """A machine that slows down halfway changes both times, and no ratio."""
    baseline = Latency(0, 0, 4, times=(2.0, 4.0, 40.0, 80.0))
    model = Latency(0, 0, 4, times=(1.0, 2.0, 20.0, 40.0))
    comparison = Comparison(baseline, model)
    assert comparison.speedup == 2
    assert comparison.quartiles == (2, 2)
    assert str(comparison).startswith("2.00x faster (2.00x to 2.00x in half of 4 rounds)")


@pytest.mark.parametrize("times", [(), (1.0, 2.0, 3.0)])
def test_what_was_not_measured_together_has_no_ratio(times: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="measured together"):
        Comparison(Latency(1, 0, 2, times=(1.0, 2.0)), Latency(1, 0, 3, times=times))


def test_compare_measures_in_turns() -> None:
    log: list[tuple[str, bool, bool]] = []
    dense, pruned = Log("dense", log), Log("pruned", log)
    found = compare_latency(dense, pruned, torch.zeros(4, 2), batch_sizes=[1, 8], **BRIEF)
    assert {size: c.model.batch_size for size, c in found.items()} == {1: 1, 8: 8}
    assert log[2:4] == log[5:3:-1]
    alone = compare_latency(dense, pruned, torch.zeros(4, 2), memory=True, **BRIEF)
    assert alone.memory_ratio == 1


# -- errors --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("models", "told"),
    [
        ([], "there is no network"),
        ({}, "there is no network"),
        ([torch.relu], "network 0 is a .*, not a torch.nn.Module"),
        ([nn.Linear(2, 2), nn.Linear(2, 2, device="meta")], "network 0 on cpu; network 1 on meta"),
        ({"wide": nn.Linear(9, 9)}, r"wide does not run on the example inputs \(\(3, 2\) torch.fl"),
    ],
)
def test_networks_that_cannot_be_measured(
    models: list[nn.Module] | Mapping[str, nn.Module], told: str
) -> None:
    with pytest.raises(InputError, match=told):
        measure_latency(models, torch.zeros(3, 2))


@pytest.mark.parametrize(
    "options", [{"warmup": 0}, {"max_repeats": 0}, {"threads": 0}, {"batch_sizes": [0]}]
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="whole number, 1 at least"):
        measure_latency(nn.Identity(), torch.zeros(3, 2), **options)


def test_a_model_that_cannot_be_copied() -> None:
    model = nn.Linear(2, 2)
    model.cached = model.weight * 2  # a tensor with a history
    with pytest.raises(InputError, match="cannot be copied"):
        measure_latency(model, torch.zeros(3, 2), dtype=torch.float64)


@pytest.mark.parametrize("listed", [True, False])
def test_a_result_is_no_network(listed: bool) -> None:
    holder: Any = SimpleNamespace(model=nn.Linear(2, 2), deploy=print)
    with pytest.raises(InputError, match="attribute `model`"):
        measure_latency([holder] if listed else holder, torch.zeros(1, 2), **BRIEF)
