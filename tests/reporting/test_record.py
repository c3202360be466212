"""What is written down of a training: enough for a report, and bounded."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import numpy as np
import pytest

import rbpfx
from rbpfx import FineTune, LoadError, Recursion, Report
from rbpfx.progress import patient
from rbpfx.training.record import BINS, MOMENTS, POINTS, Curves, GateHistograms, due
from tests.reporting.conftest import Run
from tests.toy import ShortcutNet, stripes

BATCHES = [1, 2, 3]


@pytest.mark.parametrize("steps", [1, 2, 11, 12, 13, 99, 100, 101, 1234, 10_000])
@pytest.mark.parametrize("times", [MOMENTS, POINTS])
def test_moments_are_even_and_hold_both_ends(steps: int, times: int) -> None:
    moments = [step for step in range(1, steps + 1) if due(step, steps, times)]
    assert moments[0] == 1
    assert moments[-1] == steps
    assert len(moments) <= times + 1
    gaps = np.diff(moments)
    assert (gaps <= steps // times + 1).all()


def test_curves_hold_the_means_between_moments() -> None:
    curves = Curves()
    for step in range(1, 1001):
        curves.add(step, 1000, loss=float(step))
    points = curves.series["loss"]
    assert points[:3] == [(1, 1.0), (10, 6.0), (20, 15.5)]
    assert len(points) == 101


def test_histograms_count_every_unit_once() -> None:
    histograms = GateHistograms()
    histograms.add(7, {"a": np.array([0.0, 0.49, 0.51, 1.0]), "b": np.ones(3)})
    assert histograms.steps == [7]
    assert np.flatnonzero(histograms.counts["a"][0]).tolist() == [0, 9, 10, BINS - 1]
    assert histograms.counts["b"][0][-1] == 3


def test_a_report_holds_both_trainings(run: Run) -> None:
    report = run.result.report
    noise, recovery = report.curves["noise"], report.curves["fine-tuning"]
    assert noise.keys() == {"loss", "bound", "cost", "open_gates"}
    assert recovery.keys() == {"loss"}
    assert [step for step, _ in noise["cost"]] == list(range(1, 25))
    assert [step for step, _ in recovery["loss"]] == list(range(1, 13))
    assert noise["cost"][-1][1] < noise["cost"][0][1]
    assert report.gates.steps[0] == 1
    assert report.gates.steps[-1] == 24
    assert len(report.gates.steps) <= MOMENTS + 1
    for name, moments in report.gates.counts.items():
        assert [sum(bins) for bins in moments] == [report.widths[name][0]] * len(moments)
        assert set(np.flatnonzero(moments[-1])) <= {0, BINS - 1}  # hardened: open or closed
    assert report.coupling == {"stem": ("conv1",), "conv1": ("stem",)}
    assert report.settings["target"] == "Target(macs=0.5)"
    assert report.environment["rbpfx"] == rbpfx.__version__


def test_the_callback_hears_every_step_of_both_trainings(run: Run) -> None:
    noise = [p for p in run.heard if p.phase == "noise"]
    recovery = [p for p in run.heard if p.phase == "fine-tuning"]
    assert run.heard == noise + recovery
    assert [p.step for p in noise] == list(range(1, 25))
    assert [p.step for p in recovery] == list(range(1, 13))
    pruned = run.result.report
    (cost,) = {p.cost for p in recovery}
    assert cost == pytest.approx(pruned.pruned.macs / pruned.dense.macs)
    assert {p.open_gates for p in recovery} == {sum(after for _, after in pruned.widths.values())}
    told = [loss for _, loss in pruned.curves["fine-tuning"]["loss"]]
    assert told == pytest.approx([p.loss for p in recovery], rel=1e-5)


def test_a_report_is_rebuilt_from_a_saved_plan(run: Run) -> None:
    assert Report.load(run.directory) == run.result.report
    assert str(Report.load(run.directory)) == str(run.result.report)


def test_what_json_lacks_comes_back_as_not_a_number(run: Run) -> None:
    plain = run.result.report.to_dict()
    plain["pruned"]["accuracy"] = None
    plain["curves"]["noise"]["loss"][0][1] = None
    report = Report.from_dict(json.loads(json.dumps(plain, allow_nan=False)))
    assert report.pruned.accuracy is None
    assert math.isnan(report.curves["noise"]["loss"][0][1])


def test_the_size_is_bounded_by_the_groups_not_by_the_steps() -> None:
    curves, histograms = Curves(), GateHistograms()
    groups = {f"layer{i}.0.conv1": np.random.default_rng(i).random(2048) for i in range(50)}
    steps = 20_000
    for step in range(1, steps + 1):
        curves.add(step, steps, loss=math.pi / step, bound=1e6 / 3 + step, cost=1 / step)
        if due(step, steps, MOMENTS):
            histograms.add(step, groups)
    assert len(json.dumps(curves.series)) < 10_000
    assert len(json.dumps(histograms.counts)) < 80_000


def spoil(*path: Any, value: Any) -> Any:
    def change(plain: dict[str, Any]) -> None:
        *parents, last = path
        for entry in parents:
            plain = plain[entry]
        plain[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spoil("widths", "stem", value=[0, 0]), "'widths'"),
        (spoil("widths", "stem", value=[8]), "report.widths.stem"),
        (spoil("widths", "stem", value=[8, "4"]), "report.widths.stem"),
        (spoil("dense", "latency", value={"one": 1.0}), "no int"),
        (spoil("dense", "latency", value={}), "'latency'"),
        (spoil("target", "cost", value="time"), "'target'"),
        (spoil("curves", "noise", "loss", value=[]), "'curves'"),
        (spoil("gates", "counts", "stem", value=[[1]]), "'gates'"),
        (spoil("coupling", value=["stem"]), "report.coupling"),
        (lambda plain: plain.pop("method"), "no entry 'method'"),
    ],
)
def test_figures_from_strangers_are_checked(run: Run, change: Any, message: str) -> None:
    plain = copy.deepcopy(run.result.report.to_dict())
    change(plain)
    with pytest.raises(LoadError, match=message):
        Report.from_dict(plain)


def test_a_plan_of_an_earlier_version_has_a_report_without_curves(run: Run) -> None:
    plain = run.result.report.to_dict()
    for name in ("curves", "gates", "coupling", "settings", "environment"):
        del plain[name]
    assert Report.from_dict(plain).curves == {}


def test_a_missing_plan_is_named(tmp_path: Any) -> None:
    with pytest.raises(LoadError, match=r"no plan\.json"):
        Report.load(tmp_path)


def test_a_long_pass_shows_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert patient(BATCHES, "accuracy", False) is BATCHES
    quick = patient(BATCHES, "accuracy", True)
    assert len(quick) == len(BATCHES)
    assert [list(quick) for _ in range(2)] == [BATCHES, BATCHES]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("rbpfx.progress.PATIENCE", 0.0)
    assert list(patient(BATCHES, "accuracy", True)) == BATCHES
    assert "accuracy" in capsys.readouterr().err


def test_phases_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    batches = stripes()
    with caplog.at_level("INFO", logger="rbpfx"):
        rbpfx.prune(
            ShortcutNet().eval(),
            batches,
            recursion=Recursion(epochs=1),
            recovery=FineTune(epochs=0),
            progress=False,
        )
    for said in (
        "captured ShortcutNet",
        "hardened stem",
        "hardened conv1",
        "sliced differs from masked",
    ):
        assert said in caplog.text
