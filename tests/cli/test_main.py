"""The entry point: help, exit codes, streams, logs, completion."""

from __future__ import annotations

import logging
import os
import runpy
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import click
import pytest

import rbpfx
from rbpfx import TargetError, demo
from rbpfx.cli.main import cli
from tests.test_report import REPORT

from .conftest import Run

COMMANDS = ["demo", "inspect", "prune", "report", "bench", "export", "apply", "completion"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """The demo, replaced by one that only notes its arguments and is loud about it."""
    seen: list[tuple[object, ...]] = []

    def run(target: float | None, seed: int, progress: bool) -> SimpleNamespace:
        print("of a library")
        warnings.warn("of a library too", stacklevel=1)
        logging.getLogger("rbpfx.somewhere").info("of ours")
        seen.append((target, seed, progress))
        return SimpleNamespace(report=REPORT)

    monkeypatch.setattr(demo, "run", run)
    return seen


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(demo, "run", fail)


def test_version(run: Run) -> None:
    assert run("--version").out == f"rbpfx {rbpfx.__version__}\n"


def test_help_lists_every_command_in_order(run: Run) -> None:
    text = run("--help").out.partition("Commands:")[2]
    assert [line.split()[0] for line in text.strip().splitlines()] == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_and_no_line_is_cut(command: str, run: Run) -> None:
    text = run(command, "--help").out
    assert text.count(f"rbpfx {command}") > 1  # besides the usage
    options = [o for o in cli.commands[command].params if isinstance(o, click.Option)]
    assert all(option.help for option in options)
    assert "..." not in run("--help").out.partition("Commands:")[2]


@pytest.mark.parametrize(
    "arguments", [["nothing"], ["demo", "--macs", "half"], ["prune"], ["report", "nowhere"]]
)
def test_wrong_usage(arguments: list[str], run: Run) -> None:
    ran = run(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert "Usage: rbpfx" in ran.err


def test_text_and_nothing_else_goes_to_stdout(calls: list, run: Run) -> None:
    ran = run("demo")
    assert calls == [(None, 0, True)]
    assert (ran.code, ran.out) == (0, f"{REPORT}\n")
    assert ran.err == "of a library\n"


def test_json_and_nothing_else_goes_to_stdout(calls: list, run: Run) -> None:
    ran = run("demo", "--json", "--macs", "0.4", "--seed", "7", "--quiet")
    assert calls == [(0.4, 7, False)]
    assert ran.data == REPORT.to_dict()


@pytest.mark.parametrize(
    ("flags", "shown"), [((), (False, False)), (("-v",), (True, True)), (("-q",), (False, False))]
)
def test_what_is_logged(
    flags: tuple[str, ...], shown: tuple[bool, bool], calls: list, run: Run
) -> None:
    err = run("demo", *flags).err
    assert ("INFO rbpfx.somewhere: of ours" in err, "of a library too" in err) == shown


def test_logging_is_left_as_it_was(calls: list, run: Run) -> None:
    logger, show = logging.getLogger("rbpfx"), warnings.showwarning
    before = (logger.level, list(logger.handlers))
    run("demo", "-vv")
    assert (logger.level, list(logger.handlers)) == before
    assert warnings.showwarning is show


def test_an_error_is_one_line(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    failing(monkeypatch, TargetError("cannot be reached:\n  conv1"))
    assert run("demo").error == "error: cannot be reached: conv1"


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    failing(monkeypatch, TargetError("cannot be reached"))
    ran = run("demo", "--debug")
    assert ran.code == 1
    assert "Traceback" in ran.err
    assert ran.err.endswith("error: cannot be reached\n")


def test_an_interruption_is_one_line(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    failing(monkeypatch, KeyboardInterrupt())
    ran = run("demo")
    assert (ran.code, ran.out, ran.err) == (130, "", "interrupted\n")


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    failing(monkeypatch, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        run("demo")


def test_a_wrong_target_is_noticed_before_any_training(
    monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.setattr(demo, "train_digits", lambda *_, **__: pytest.fail("it was trained"))
    ran = run("demo", "--macs", "0")
    assert ran.code == 2
    assert "Invalid value for '--macs'" in ran.err


def test_as_a_module(calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["rbpfx", "demo"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("rbpfx", run_name="__main__")
    assert caught.value.code == 0
    assert len(calls) == 1


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str, run: Run) -> None:
    ran = run("completion", shell)
    assert ran.code == 0
    assert f"_RBPFX_COMPLETE={shell}_complete" in ran.out


def test_completions_are_given(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_RBPFX_COMPLETE", "zsh_complete")
    monkeypatch.setenv("COMP_WORDS", "rbpfx pru")
    monkeypatch.setenv("COMP_CWORD", "1")
    with pytest.raises(SystemExit) as caught:
        run()
    assert caught.value.code == 0


def process(*arguments: str, **options: object) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "rbpfx", *arguments],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,  # type: ignore[call-overload]
    )


def test_in_a_process_of_its_own(work: Path) -> None:
    out, err = process(
        "inspect", "nets:small", "--input-size", "1", "8", "8", "--json"
    ).communicate()
    assert out.startswith("{")
    assert err == "nets is imported\n"


def test_ctrl_c(work: Path) -> None:
    (work / "slow.py").write_text(
        "import time\ndef net():\n    open('started', 'w').close()\n    time.sleep(60)\n"
    )
    running = process("inspect", "slow:net")
    while not (work / "started").exists():
        assert running.poll() is None
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate()
    assert (running.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "interrupted"
    assert "Traceback" not in err
