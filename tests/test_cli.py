"""The command line: exit codes and what goes to which stream."""

from __future__ import annotations

import json
import runpy
import sys
from types import SimpleNamespace

import pytest

import rbpfx
from rbpfx import TargetError, cli, demo
from tests.test_report import REPORT


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """The demo, replaced by one that only notes its arguments."""
    seen: list[tuple[object, ...]] = []

    def run(target: float | None, seed: int, progress: bool) -> SimpleNamespace:
        seen.append((target, seed, progress))
        return SimpleNamespace(report=REPORT)

    monkeypatch.setattr(demo, "run", run)
    return seen


def exit_code(*arguments: str) -> object:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    return caught.value.code


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--version") == 0
    assert capsys.readouterr().out == f"rbpfx {rbpfx.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--help"], ["demo", "--version"]), (["demo", "--help"], ["--macs", "--seed", "--json"])],
)
def test_help(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(*arguments) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in words)


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["demo", "--macs", "half"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(*arguments) == 2
    assert "usage: rbpfx" in capsys.readouterr().err


def test_the_report_is_printed(calls: list, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo"]) == 0
    assert calls == [(None, 0, True)]
    assert capsys.readouterr().out == f"{REPORT}\n"


def test_json(calls: list, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--json", "--macs", "0.4", "--seed", "7", "--quiet"]) == 0
    assert calls == [(0.4, 7, False)]
    printed = capsys.readouterr()
    assert json.loads(printed.out) == REPORT.to_dict()
    assert printed.err == ""


def test_an_error_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise TargetError("cannot be reached")

    monkeypatch.setattr(demo, "run", fail)
    assert cli.main(["demo"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "rbpfx: error: cannot be reached\n"


def test_a_wrong_target_is_noticed_before_any_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "train_digits", lambda *_, **__: pytest.fail("it was trained"))
    assert cli.main(["demo", "--macs", "0"]) == 1
    assert "must be positive" in capsys.readouterr().err


def test_as_a_module(calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["rbpfx", "demo"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("rbpfx", run_name="__main__")
    assert caught.value.code == 0
    assert len(calls) == 1
