"""Processes that are killed at random moments, also in the middle of a write, lose nothing."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import rbpfx
from rbpfx import FineTune, Recursion, Target
from tests.toy import ShortcutNet, stripes, trained

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
BATCHES = stripes()


def run(dense: nn.Module, directory: Path, result: Path) -> None:
    pruned = rbpfx.prune(
        dense,
        BATCHES,
        target=Target(macs=0.5),
        recursion=Recursion(epochs=4, window=1),
        recovery=FineTune(epochs=3),
        progress=False,
        checkpoint_dir=directory,
        checkpoint_interval=0,  # a checkpoint at every step: half of the time is spent writing
    )
    state = {name: t.contiguous() for name, t in pruned.model.state_dict().items()}
    torch.save((dict(pruned.plan.kept), state), result)


def in_a_child(work: Callable[[], None], seconds: float | None) -> bool:
    """Do it in a process that is killed after some time; whether it got to the end."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    if seconds is None:
        return os.waitpid(child, 0)[1] == 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, "the run failed by itself"
            return True
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


@pytest.mark.parametrize("kills", [4, pytest.param(100, marks=pytest.mark.slow)])
def test_every_run_ends_the_same(tmp_path: Path, kills: int) -> None:
    torch.manual_seed(0)
    dense = trained(ShortcutNet(), BATCHES).eval()
    moments = random.Random(0)
    started = time.monotonic()
    assert in_a_child(lambda: run(dense, tmp_path / "whole", tmp_path / "whole.pt"), None)
    whole_seconds = time.monotonic() - started
    wanted_plan, wanted = torch.load(tmp_path / "whole.pt")
    killed = runs = 0
    while killed < kills:
        directory, result = tmp_path / f"run{runs}", tmp_path / f"run{runs}.pt"
        for _ in range(6):
            seconds = moments.uniform(0, whole_seconds) if killed < kills else None
            if in_a_child(lambda: run(dense, directory, result), seconds):  # noqa: B023
                break
            killed += 1
        else:
            assert in_a_child(lambda: run(dense, directory, result), None)  # noqa: B023
        plan, state = torch.load(result)
        assert plan == wanted_plan
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[name], wanted[name]) for name in wanted)
        runs += 1
    print(f"{killed} kills in {runs} runs")
