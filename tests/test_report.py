"""The report: a table to read and plain JSON types."""

from __future__ import annotations

import dataclasses
import json

import pytest

from rbpfx import Figures, Reached, Report

REPORT = Report(
    method="rbp",
    dense=Figures(2_000_000, 40_000_000, {1: 0.004, 64: 0.1}, 0.91),
    pruned=Figures(1_000_000, 10_000_000, {1: 0.004, 64: 0.04}, 0.905),
    widths={"stem": (64, 16), "layer1.conv1": (32, 32)},
    verification_error=3.2e-16,
    target=Reached("macs", 0.25, 0.25),
    frozen={"head": "output of the model"},
    accuracy_after_cut=0.7,
    device="cpu (4 threads)",
    seconds=12.3,
    history=[{"step": 3, "group": "stem", "bound": float("inf")}],
)


def with_accuracy(before: float | None, after: float | None, **changes: object) -> Report:
    return dataclasses.replace(
        REPORT,
        dense=dataclasses.replace(REPORT.dense, accuracy=before),
        pruned=dataclasses.replace(REPORT.pruned, accuracy=after),
        **changes,
    )


def test_the_text_is_a_table() -> None:
    assert (
        str(REPORT)
        == """\
                        dense      pruned        change
-----------------  ----------  ----------  ------------
parameters          2,000,000   1,000,000    2.00x less
MACs per example   40,000,000  10,000,000    4.00x less
latency, batch 1      4.00 ms     4.00 ms          none
latency, batch 64   100.00 ms    40.00 ms    2.50x less
accuracy               91.00%      90.50%  -0.50 points

channel group      units    kept  share
---------------  -------  ------  -------
stem                  64      16  25%
layer1.conv1          32      32  100%

method rbp, 12 s, latency on cpu (4 threads)
sliced equals masked to 3.2e-16 (relative, float64)
target: 25.0% of the MACs, reached 25.0%
kept whole: head (output of the model)"""
    )


def test_what_is_not_exact_is_said() -> None:
    text = str(dataclasses.replace(REPORT, verification_error=0.031, inexact=("norm1", "norm2")))
    assert "NOT EXACT: sliced differs from masked by 3.1e-02 (relative)" in text
    assert "normalization='sliced' cut norm1, norm2" in text
    assert "equals" not in text


def test_what_is_unknown_is_left_out() -> None:
    report = with_accuracy(None, None, target=None, frozen={}, accuracy_after_cut=None)
    text = str(report)
    for word in ("accuracy", "target", "kept whole", "None"):
        assert word not in text


def test_a_metric_of_the_user_is_no_percentage() -> None:
    text = str(with_accuracy(12.25, 13.5, metric="perplexity"))
    assert "accuracy" not in text
    row = next(line for line in text.splitlines() if line.startswith("perplexity"))
    assert row.split() == ["perplexity", "12.25", "13.5", "+1.25"]


@pytest.mark.parametrize("metric", ["accuracy", "perplexity"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_metrics_that_are_not_finite(metric: str, value: float) -> None:
    report = with_accuracy(1.0, value, metric=metric)
    assert metric in str(report)
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["pruned"]["accuracy"] is None


def test_json_round_trip() -> None:
    plain = REPORT.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert set(plain) == {field.name for field in dataclasses.fields(Report)}
    assert plain["widths"]["stem"] == [64, 16]
    assert plain["dense"]["latency"] == {"1": 0.004, "64": 0.1}
    assert plain["history"] == [{"step": 3, "group": "stem", "bound": None}]


def test_a_cost_of_nothing_is_not_divided_by() -> None:
    nothing = dataclasses.replace(REPORT, pruned=Figures(0, 0, {1: 0.0, 64: 0.0}))
    assert "less" not in str(nothing)


def test_a_prune_that_removes_nothing_says_why() -> None:
    whole = {"stem": (64, 64)}
    alone = dataclasses.replace(REPORT, widths=whole, target=None)
    assert "nothing was removed: no unit was redundant by the method's own rule" in str(alone)
    asked = dataclasses.replace(REPORT, widths=whole, target=Reached("macs", 1.0, 1.0))
    assert "nothing was removed: the target allows the whole network" in str(asked)
    assert "nothing was removed" not in str(REPORT)


def test_a_target_that_is_missed_from_below_says_so() -> None:
    coarse = dataclasses.replace(REPORT, target=Reached("params", 0.5, 0.4))
    assert "target: 50.0% of the parameters, reached 40.0% (the widths are too coarse" in str(
        coarse
    )
    excluded = dataclasses.replace(REPORT, excluded=("stem", "conv"))
    assert "excluded by the target: stem, conv" in str(excluded)
