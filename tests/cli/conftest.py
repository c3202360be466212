"""A directory to work in, with a module of models and loaders, and the command line to call."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from rbpfx.cli import main

NETS = """
import torch
from torch import nn

print("nets is imported")


def small():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 10),
    )


def colours():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    )


def fails():
    raise ValueError("no way")


def number():
    return 3


batches = [(torch.randn(8, 1, 8, 8), torch.arange(8)) for _ in range(2)]


def loader():
    return batches


def loaders():
    return batches, batches[:1]


def broken():
    class Broken:
        def __iter__(self):
            yield batches[0]
            raise RuntimeError("bad sector")

    return Broken()


def once():
    return iter(batches)
"""


@dataclass(frozen=True)
class Ran:
    """What a call of the command line did."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one line of an error."""
        assert self.code == 1
        assert self.out == ""
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        return lines[0]


Run = Callable[..., Ran]


def make_photos(folder: Path, classes: str = "ab", count: int = 4) -> None:
    """Images of different sizes, dark and bright ones."""
    for place, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            colour = (60 + 120 * place, 60 + i, 60)
            Image.new("RGB", (20 + i, 24), colour).save(folder / name / f"{i}.png")


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory."""
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("nets", None)
    yield tmp_path
    sys.modules.pop("nets", None)


@pytest.fixture
def run(work: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line, in that directory."""

    def call(*arguments: object) -> Ran:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return call


SMALL = ("prune", "nets:small", "--data", "digits", "--method", "magnitude", "--macs", "0.5")
SMALL = (*SMALL, "--recovery-epochs", "0", "--out", "pruned")


@pytest.fixture(scope="session")
def saved_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved network of nets:small."""
    place = tmp_path_factory.mktemp("saved")
    (place / "nets.py").write_text(NETS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(sys, "path", list(sys.path))
        assert main([*SMALL, "--quiet"]) == 0
    sys.modules.pop("nets", None)
    return place / "pruned"


@pytest.fixture
def saved(saved_once: Path, work: Path) -> Path:
    """A copy of it in the current directory."""
    shutil.copytree(saved_once, work / "pruned")
    return work / "pruned"


def equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][name], states[1][name]) for name in states[0]
    )
