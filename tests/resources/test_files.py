"""Every file that is opened is closed again, at once and not by the garbage collector."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

import rbpfx
from rbpfx import PruningResult
from tests.resources.common import X, open_files, prune
from tests.toy import ShortcutNet

pytestmark = pytest.mark.filterwarnings("ignore")

Action = Callable[[PruningResult, Path], object]
ACTIONS: dict[str, Action] = {
    "prune": lambda _, folder: prune(),
    "save": lambda result, folder: result.save(folder / "new", program=True),
    "load": lambda _, folder: rbpfx.load(folder / "saved", ShortcutNet),
    "load a program": lambda _, folder: rbpfx.load(folder / "saved", trusted=True),
    "report": lambda result, folder: result.report.write(folder / "report.html"),
    "write source": lambda result, folder: result.to_source(folder / "net.py"),
    "deploy": lambda result, _: result.deploy(),
    "export": lambda result, folder: rbpfx.export(result.model.eval(), X, folder / "net.pt2"),
    "export to ONNX": lambda result, folder: to_onnx(result, folder),
    "look into a damaged save": lambda _, folder: refused(folder),
}


def to_onnx(result: PruningResult, folder: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    rbpfx.export(result.model.eval(), X, folder / "net.onnx")


def refused(folder: Path) -> None:
    (folder / "saved" / "weights.safetensors").write_bytes(b"damaged")
    with pytest.raises(rbpfx.LoadError):
        rbpfx.load(folder / "saved", ShortcutNet)


@pytest.fixture(scope="module")
def result() -> PruningResult:
    return prune()


@pytest.mark.parametrize("name", ACTIONS)
def test_files_are_closed(name: str, result: PruningResult, tmp_path: Path) -> None:
    result.save(tmp_path / "saved", program=True)
    ACTIONS[name](result, tmp_path)  # what is opened once, in an import, may stay open
    result.save(tmp_path / "saved", program=True)
    gc.collect()
    before = open_files()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        ACTIONS[name](result, tmp_path)
        now = open_files()
        gc.collect()
    assert [str(w.message) for w in caught if issubclass(w.category, ResourceWarning)] == []
    assert now == before
