"""The table of operators: timed once, kept on disk, safe against damage."""

import json
from pathlib import Path

import pytest
import torch

from rbpfx.latency.operators import (
    SWITCHES,
    Operator,
    OperatorTimes,
    _switch,
    cache_directory,
    fastest,
    filled,
)

CPU = torch.device("cpu")


class Counting:
    """Operators that count how often they are prepared and called."""

    def __init__(self) -> None:
        self.prepared = self.called = 0

    def operator(self, key: str) -> Operator:
        def call() -> None:
            self.called += 1

        def prepare():
            self.prepared += 1
            return call

        return Operator(key, prepare)


def test_timed_once_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "times.json"
    counting = Counting()
    times = OperatorTimes(CPU, path)
    times.measure([counting.operator("a"), counting.operator("b"), counting.operator("a")])
    assert counting.prepared == 2
    assert counting.called >= 6
    again = OperatorTimes(CPU, path)
    again.measure([counting.operator("a"), counting.operator("b")])
    assert counting.prepared == 2
    assert again["a"] == times["a"] > 0


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"machine": 1}', '{"seconds": {"a": "x"}}'])
def test_a_damaged_file_is_measured_anew(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "times.json"
    path.write_text(damage)
    times = OperatorTimes(CPU, path)
    times.measure([Counting().operator("a")])
    assert json.loads(path.read_text())["seconds"]["a"] == times["a"]


def test_times_of_another_machine_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    times = OperatorTimes(CPU, path)
    times.measure([Counting().operator("a")])
    content = json.loads(path.read_text())
    content["machine"]["device"] = "another"
    path.write_text(json.dumps(content))
    assert "a" not in OperatorTimes(CPU, path).seconds


def test_the_file_depends_on_the_threads() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = OperatorTimes(CPU).path
        torch.set_num_threads(2)
        assert OperatorTimes(CPU).path != one
    finally:
        torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_the_file_depends_on_the_switches_that_pick_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usual = OperatorTimes(CPU).path
    with torch.backends.mkldnn.flags(enabled=False):
        assert OperatorTimes(CPU).path != usual
    assert OperatorTimes(CPU).path == usual
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    assert OperatorTimes(CPU).path != usual


@pytest.mark.parametrize("name", [n for names in SWITCHES.values() for n in names])
def test_there_are_such_switches(name: str) -> None:
    if "fp32_precision" not in name or hasattr(torch.backends, "fp32_precision"):
        assert _switch(name)


def test_the_file_depends_on_how_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = OperatorTimes(CPU).path
    monkeypatch.setattr("rbpfx.latency.operators.MEASURE", -1)
    assert OperatorTimes(CPU).path != usual


def test_two_processes_add_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    first, second = OperatorTimes(CPU, path), OperatorTimes(CPU, path)
    first.measure([Counting().operator("a")])
    second.measure([Counting().operator("b")])
    assert OperatorTimes(CPU, path).seconds.keys() == {"a", "b"}


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    times = OperatorTimes(CPU, blocked / "times.json")
    times.measure([Counting().operator("a")])
    assert times["a"] >= 0


def test_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "rbpfx"
    monkeypatch.setenv("RBPFX_CACHE", str(tmp_path / "mine"))
    assert cache_directory() == tmp_path / "mine"


def test_the_fastest_time_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1e-4, 1.0, 1.003, 2.0, 2.001, 3.0, 3.02])  # the first call warms up
    monkeypatch.setattr("rbpfx.latency.operators.time.perf_counter", lambda: next(clock))
    assert fastest(lambda: None, CPU) == pytest.approx(0.001)


def test_operands_are_no_special_numbers() -> None:
    assert (filled(torch.zeros(1), (3,)) == 0.5).all()
    assert filled(torch.zeros(1, dtype=torch.int64), (3,)).sum() == 0  # a valid index
    assert filled(torch.zeros(1, dtype=torch.bool), (3,)).all()
    image = filled(torch.zeros(1), (2, 4, 3, 3), channels_last=True)
    assert image.is_contiguous(memory_format=torch.channels_last)
