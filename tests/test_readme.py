"""The README: its code runs, its commands are those of CI."""

import re
from pathlib import Path

import pytest

import rbpfx
from tests.pages import code_blocks, given_names, run

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


@pytest.mark.parametrize("code", code_blocks(README), ids=lambda code: code.splitlines()[0])
def test_code_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = given_names()
    if "result" in code and "result =" not in code:
        names["result"] = rbpfx.prune(names["model"], names["train_loader"], progress=False)
    run(code, README, names)


def test_commands_are_run_by_ci() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    commands = code_blocks(README, "sh")
    assert len(commands) == 2
    for command in commands:
        install, main = command.strip().split(" && ")
        extras = re.search(r"\[(.*)\]", install)
        assert extras is not None
        assert set(extras.group(1).split(",")) <= {"demo", "test"}
        assert main in ci
