"""The coverage harness measures, resumes, and survives models that fail."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import _coverage_report, _zoo, coverage
from benchmarks._isolate import Report, isolated
from benchmarks._record import Record


class Small(nn.Module):
    """A convolution, a BatchNorm, and a drop-out that has to be silenced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.drop, self.head = nn.Dropout(0.5), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.bn(self.conv(x)).relu()))


class Opaque(nn.Module):
    """An operator that no rule knows, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.fft.irfft(torch.fft.rfft(self.first(x))))


class Detector(nn.Module):
    """Runs code of its own, which no graph can hold, over a part that one can."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Small()

    def forward(self, x: Tensor) -> Tensor:
        scores = self.part(x).flatten(1)
        return scores[scores > float(scores.median())]


MODELS = {
    "small": lambda: _zoo.Sample(Small(), (torch.randn(2, 3, 8, 8),)),
    "opaque": lambda: _zoo.Sample(Opaque(), {"x": torch.randn(2, 6)}),
    "broken": lambda: _zoo.Sample(nn.Linear(3, 3), (torch.randn(2, 4),)),
}


@pytest.fixture(autouse=True)
def _zoo_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_zoo, "suite", lambda name: MODELS)


def measured(name: str) -> dict[str, Any]:
    row: dict[str, Any] = {}
    coverage.measure(("torchvision", name), row.update)
    return row


def test_a_row_of_a_model_that_is_prunable() -> None:
    row = measured("small")
    assert "failure" not in row
    assert row["capture"] == "graph"
    assert row["train"] == "deterministic"
    assert row["capture_error"] == row["capture_error_batch"] == row["capture_error_train"] == 0
    assert row["groups"] == 1
    assert row["units"] == 8
    assert row["in_groups"] > 0.95
    assert row["pruned_parameters"] < row["parameters"]
    assert row["pruned_macs"] < row["macs"]
    assert row["effect"] > 1e-3
    assert _coverage_report.is_faithful(row)
    assert _coverage_report.is_exact(row)
    assert _coverage_report.is_smaller(row)
    assert not _coverage_report.is_partial(row)
    assert _coverage_report.verdict(row).startswith("exact")


def test_what_stays_is_named() -> None:
    row = measured("opaque")
    assert any("rfft" in operator for operator in row["unknown"])
    assert not _coverage_report.is_smaller(row)
    assert _coverage_report.is_partial(row)
    assert "nothing removed" in _coverage_report.verdict(row)
    assert "rfft" in _coverage_report.explanation(row)


def test_a_model_of_parts_is_compared_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    build = lambda: _zoo.Sample(Detector(), (torch.randn(2, 3, 8, 8),))  # noqa: E731
    monkeypatch.setitem(MODELS, "detector", build)
    row = measured("detector")
    assert "failure" not in row
    assert row["capture"] == "partial"
    assert row["captured"] == 1
    assert _coverage_report.is_exact(row)
    assert _coverage_report.is_smaller(row)


def test_a_failure_is_told_with_its_stage() -> None:
    row = measured("broken")
    assert row["failure"].startswith("capture: InputError")
    assert "parameters" in row
    assert not _coverage_report.is_exact(row)


def test_rows_are_kept_until_the_code_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_coverage_report, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["coverage", "--suite", "torchvision"])
    coverage.main()
    told = capsys.readouterr().out
    assert "3 models: 2 captured, 2 faithful, 2 exact, 1 smaller, 1 partly prunable" in told
    coverage.main()
    assert "small: " not in capsys.readouterr().out
    monkeypatch.setattr(coverage, "fingerprint", lambda: "another")
    coverage.main()
    assert "small: " in capsys.readouterr().out
    assert set(Record(tmp_path / "coverage-torchvision.json").rows) == set(MODELS)
    page = _coverage_report.page()
    assert "## torchvision" in page
    assert "| small " in page


def test_rates_at_which_values_are_dropped_become_zero() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.MultiheadAttention(4, 2, dropout=0.1))
    coverage.without_dropout(model)
    assert model[0].p == 0.0
    assert model[1].dropout == 0.0


def work(task: str, report: Report) -> None:
    report({"began": task})
    if task == "hangs":
        time.sleep(60)
    if task == "raises":
        raise ValueError("first line\nsecond line")
    if task == "dies":
        import os

        os._exit(3)
    report({"done": True})


def test_work_in_processes_of_its_own() -> None:
    rows = dict(isolated(work, ["runs", "hangs", "raises", "dies"], seconds=3, jobs=2))
    assert rows["runs"] == {"began": "runs", "done": True}
    assert rows["hangs"] == {"began": "hangs", "failure": "time limit"}
    assert rows["raises"] == {"began": "raises", "failure": "ValueError: first line"}
    assert rows["dies"] == {"began": "dies", "failure": "the process died (exit code 3)"}


def test_the_zoo_knows_its_suites(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert len(_zoo.suite("torchvision")) >= 100
    assert len(_zoo.suite("timm")) == 98
    assert len(_zoo.suite("transformers")) == 17
    model, inputs = _zoo.suite("torchvision")["squeezenet1_1"]()
    assert model.eval()(*inputs).shape == (_zoo.BATCH, 1000)
