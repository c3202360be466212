"""Training in TensorBoard."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rbpfx import RbpfxError
from rbpfx.reporting import TensorBoardLogger
from tests.reporting.conftest import Run


def test_steps_and_report_are_written(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with TensorBoardLogger(tmp_path) as logger:
        for progress in run.heard:
            logger(progress)
        logger.report(run.result.report)
    written = EventAccumulator(str(tmp_path)).Reload()
    tags = written.Tags()
    assert {"noise/loss", "noise/cost", "fine-tuning/loss"} <= set(tags["scalars"])
    assert [event.step for event in written.Scalars("fine-tuning/loss")] == list(range(1, 13))
    assert set(tags["histograms"]) == {"gates/stem", "gates/conv1"}
    counts = written.Histograms("gates/stem")[-1].histogram_value
    assert counts.num == run.result.report.widths["stem"][0]


def test_a_missing_tensorboard_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RbpfxError, match="pip install tensorboard"):
        TensorBoardLogger(tmp_path)
