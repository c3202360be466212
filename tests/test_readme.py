"""The README: its code runs, its commands are those of CI."""

import re
from pathlib import Path

import pytest
import torch

from tests.toy import ShortcutNet, stripes

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", CODE, ids=lambda code: code.splitlines()[0])
def test_code_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import rbpfx

    monkeypatch.chdir(tmp_path)
    names = {
        "torch": torch,
        "rbpfx": rbpfx,
        "model": ShortcutNet(width=32),
        "train_loader": stripes(),
        "val_loader": stripes(),
    }
    if "result" in code and "result =" not in code:
        names["result"] = rbpfx.prune(names["model"], stripes(), progress=False)
    exec(code, names)


def test_commands_are_run_by_ci() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    assert len(COMMANDS) == 2
    for command in COMMANDS:
        install, run = command.strip().split(" && ")
        extras = re.search(r"\[(.*)\]", install)
        assert extras is not None
        assert set(extras.group(1).split(",")) <= {"demo", "test"}
        assert run in ci
