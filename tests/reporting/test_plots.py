"""Charts on matplotlib axes."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

from rbpfx import InputError, RbpfxError, Report
from rbpfx.reporting import plot_coupling, plot_gates, plot_history, plot_widths
from rbpfx.training.record import GateHistograms
from tests.reporting.conftest import Run

matplotlib = pytest.importorskip("matplotlib")


@pytest.fixture
def ax() -> object:
    from matplotlib.figure import Figure

    return Figure().subplots()


@pytest.fixture(scope="module")
def report(run: Run) -> Report:
    return run.result.report


def test_widths(report: Report, ax: object) -> None:
    assert plot_widths(report, ax) is ax
    kept, dense = ([bar.get_width() for bar in bars] for bars in ax.containers)
    assert list(zip(dense, kept, strict=True)) == list(report.widths.values())
    assert [label.get_text() for label in ax.get_yticklabels()] == ["stem", "conv1"]


def test_gates(report: Report, ax: object) -> None:
    assert plot_gates(report, ax=ax) is ax
    shares = np.asarray(ax.images[0].get_array()) ** 2
    assert shares.sum(axis=0) == pytest.approx([1] * len(report.gates.steps))
    plot_gates(report, "stem", ax)
    with pytest.raises(InputError, match="it has: stem, conv1"):
        plot_gates(report, "other", ax)
    with pytest.raises(InputError, match="no gates were trained"):
        plot_gates(dataclasses.replace(report, gates=GateHistograms()), ax=ax)


def test_history(report: Report, ax: object) -> None:
    assert plot_history(report, ax=ax) is ax
    noise, recovery = ax.lines
    assert list(noise.get_ydata()) == [loss for _, loss in report.curves["noise"]["loss"]]
    assert recovery.get_xdata()[0] == 25  # after the 24 steps of the noise
    with pytest.raises(InputError, match=r"no curve of 'accuracy'; it has: bound, cost, loss"):
        plot_history(report, "accuracy", ax)


def test_coupling(run: Run, ax: object) -> None:
    assert plot_coupling(run.result.report, ax) is ax
    texts = [text.get_text() for text in ax.texts]
    for name, (before, after) in run.result.report.widths.items():
        assert f"{name}\n{after} / {before}" in texts
    assert plot_coupling(run.result.analysis, ax) is ax


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_picture(run: Run, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"report.{suffix}"
    Report.load(run.directory).write(path)
    assert path.stat().st_size > 10_000


def test_without_training_there_is_a_picture_too(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "report.png"
    dataclasses.replace(report, curves={}, gates=GateHistograms()).write(path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_missing_matplotlib_is_named(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for plot in (plot_widths, plot_gates, plot_history, plot_coupling):
        with pytest.raises(RbpfxError, match=r'pip install "rbpfx\[plot\]"'):
            plot(report)
