"""Records of results survive an interruption; deadlines expire."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import _record
from benchmarks._record import Deadline, Record, environment


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results" / "record.json"


def test_environment_names_machine_and_versions() -> None:
    described = environment()
    assert described["cpu"]
    assert described["torch"] == torch.__version__
    assert described["threads"] == torch.get_num_threads()
    assert json.loads(json.dumps(described)) == described


def test_rows_are_found_again(path: Path) -> None:
    first = Record(path)
    assert not first.done("a")
    first.add("a", {"error": 1.5})
    first.add("b", {"widths": torch.tensor([3, 5]), "macs": np.int64(7)})

    second = Record(path)
    assert second.done("a")
    assert not second.done("c")
    assert second.rows["a"] == {"error": 1.5, "environment": 0}
    assert second.rows["b"] == {"widths": [3, 5], "macs": 7, "environment": 0}


def test_rows_keep_the_environment_they_were_measured_in(path: Path) -> None:
    Record(path).add("a", {})
    Record(path).add("b", {})
    content = json.loads(path.read_text())
    assert [row["environment"] for row in content["rows"].values()] == [0, 1]
    assert len(content["environments"]) == 2


def test_an_interrupted_write_leaves_the_old_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Record(path)
    record.add("a", {"error": 1.5})

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        record.add("b", {"error": 2.5})
    assert list(Record(path).rows) == ["a"]


def test_a_value_that_json_cannot_hold_is_refused(path: Path) -> None:
    record = Record(path)
    with pytest.raises(TypeError, match="cannot hold a set"):
        record.add("a", {"error": {1}})
    assert not record.done("a")
    assert not path.exists()


def test_table_shows_the_rows(path: Path) -> None:
    record = Record(path)
    record.add("a", {"seed": 0, "error": 1.5})
    record.add("b", {"seed": 1})
    header, _, first, second = record.table().splitlines()
    assert header.split() == ["|", "seed", "|", "error", "|"]
    assert first.split() == ["|", "0", "|", "1.5", "|"]
    assert second.split() == ["|", "1", "|", "|"]
    assert "seed" not in record.table(["error"])


def test_deadline_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(_record.time, "monotonic", lambda: now)
    deadline, endless = Deadline(10), Deadline()
    now = 104.0
    assert (deadline.elapsed, deadline.remaining, deadline.expired) == (4, 6, False)
    now = 111.0
    assert (deadline.remaining, deadline.expired) == (0, True)
    assert not endless.expired
