"""Whenever a save is interrupted, a whole network is there: the old one, or the new one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

import rbpfx
from rbpfx import PruningResult, SaveError
from rbpfx.saving import files
from tests.saving.results import halved, outputs
from tests.toy import ShortcutNet, stripes

IMAGES = stripes()[0][0]


class Crash(BaseException):
    """The process ends here."""


@pytest.fixture
def result() -> PruningResult:
    return halved(ShortcutNet().eval(), IMAGES)


def changed(result: PruningResult) -> tuple[Tensor, Tensor]:
    """What the network computes before and after a change of its weights, which is made."""
    before = outputs(result.model, IMAGES)[0]
    with torch.no_grad():
        result.model.head.bias.add_(1)
    return before, outputs(result.model, IMAGES)[0]


def loaded(directory: Path) -> Tensor:
    return outputs(rbpfx.load(directory, ShortcutNet), IMAGES)[0]


def crash_at(monkeypatch: pytest.MonkeyPatch, module: object, name: str, call: int) -> None:
    """Let the process end before a function is called for the n-th time."""
    original = getattr(module, name)
    left = [call]

    def function(*args: object) -> object:
        if not left[0]:
            raise Crash
        left[0] -= 1
        return original(*args)

    monkeypatch.setattr(module, name, function)


STEPS = [(os, "replace", call) for call in range(3)] + [
    (files, name, call) for name, calls in (("flush", 3), ("_stamp", 2)) for call in range(calls)
]


@pytest.mark.parametrize("program", [False, True])
@pytest.mark.parametrize("step", STEPS, ids=lambda step: f"{step[1]}-{step[2]}")
def test_a_crash_leaves_the_old_or_the_new(result, tmp_path, monkeypatch, step, program) -> None:
    result.save(tmp_path, program=True)
    before, after = changed(result)
    with monkeypatch.context() as context:
        context.setattr(files, "_discard", lambda directory: None)  # nobody tidies up
        crash_at(context, *step)
        try:
            result.save(tmp_path, program=program)
        except Crash:
            crashed = True
        else:
            crashed = False
    found = loaded(tmp_path)
    assert torch.equal(found, before) or torch.equal(found, after)
    assert crashed or torch.equal(found, after)
    trusted = outputs(rbpfx.load(tmp_path, trusted=True), IMAGES)[0] if program else found
    torch.testing.assert_close(trusted, found)

    before, after = changed(result)
    result.save(tmp_path)
    assert torch.equal(loaded(tmp_path), after)
    assert {f.name for f in tmp_path.iterdir()} == {"plan.json", "weights.safetensors"}


@pytest.mark.parametrize("call", range(2))
def test_two_crashes_in_a_row(result, tmp_path, monkeypatch, call) -> None:
    result.save(tmp_path)
    seen = [outputs(result.model, IMAGES)[0]]
    for module, name, at in ((os, "replace", 1), (files, "flush", call)):
        seen.append(changed(result)[1])
        with monkeypatch.context() as context:
            crash_at(context, module, name, at)
            with pytest.raises(Crash):
                result.save(tmp_path)
    # The first was past the point of no return, the second was not.
    assert torch.equal(loaded(tmp_path), seen[1])


def test_an_error_leaves_no_trace(result, tmp_path, monkeypatch) -> None:
    result.save(tmp_path)
    before, _ = changed(result)

    def full(path: Path) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as context:
        context.setattr(files, "flush", full)
        with pytest.raises(SaveError, match="no space left"):
            result.save(tmp_path)
    assert torch.equal(loaded(tmp_path), before)
    assert {f.name for f in tmp_path.iterdir()} == {"plan.json", "weights.safetensors"}


def test_other_files_stay(result, tmp_path) -> None:
    for name in ("notes.txt", "network.pt2"):
        (tmp_path / name).write_text("mine")
    result.save(tmp_path)
    result.save(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "network.pt2").read_text() == "mine"


def test_a_program_goes_with_its_save(result, tmp_path) -> None:
    result.save(tmp_path, program=True)
    assert (tmp_path / "network.pt2").exists()
    result.save(tmp_path)
    assert not (tmp_path / "network.pt2").exists()
