"""The examples: each runs in its tiny mode, prunes, and proves that slicing changed nothing."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS = {
    "compile": ["sklearn"],
    "detector": [],
    "hugging_face": ["transformers"],
    "imagenet_like": [],
    "lightning_callback": ["sklearn", "pytorch_lightning"],
    "own_loop": ["sklearn"],
    "quantize": ["sklearn", "torchao"],
    "timm_model": ["timm"],
}


def run(name: str, *arguments: str) -> None:
    """Run an example as a script, in this process: importing torch anew would take longer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        patch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


LONG = {"compile"}


@pytest.fixture(params=[pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in NEEDS])
def example(request: pytest.FixtureRequest) -> str:
    for package in NEEDS[request.param]:
        pytest.importorskip(package)
    return request.param


def test_every_example_is_here() -> None:
    assert sorted(NEEDS) == sorted(p.stem for p in EXAMPLES.glob("*.py") if p.stem[0] != "_")


def test_it_runs_and_prunes(example: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(example, "--tiny")
    printed = capsys.readouterr().out
    error = re.search(r"sliced equals masked to (\S+)", printed)
    assert error is not None and float(error[1]) < 1e-9
    dense, pruned = (
        int(macs.replace(",", ""))
        for macs in re.findall(r"[\d,]{6,}", re.search(r"(?s)(MACs|dense:).*", printed)[0])[:2]
    )
    assert 0 < pruned < dense


def test_it_says_what_it_does(example: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run(example, "--help")
    assert end.value.code == 0
    assert f"python examples/{example}.py" in capsys.readouterr().out
