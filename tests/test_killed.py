"""Processes that are killed at random moments, also in the middle of a write, lose nothing."""

from __future__ import annotations

import multiprocessing
import random
import time
from pathlib import Path

import pytest
import torch

import rbpfx
from rbpfx import FineTune, Recursion, Target
from tests.toy import ShortcutNet, stripes, trained

BATCHES = stripes()


def run(directory: Path, result: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pruned = rbpfx.prune(
        trained(ShortcutNet(), BATCHES).eval(),
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


@pytest.fixture
def processes() -> multiprocessing.context.BaseContext:
    """Processes that start quickly, from one that has imported everything and done nothing."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("processes start too slowly here")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rbpfx", "tests.toy"])
    return context


@pytest.mark.parametrize("kills", [2, pytest.param(100, marks=pytest.mark.slow)])
def test_every_run_ends_the_same(tmp_path: Path, kills: int, processes) -> None:
    def carry_out(name: str, seconds: float | None) -> bool:
        """Run in a process that is killed after some time; whether it got to the end."""
        process = processes.Process(target=run, args=(tmp_path / name, tmp_path / f"{name}.pt"))
        process.start()
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
            return False
        assert process.exitcode == 0, "the run failed by itself; its traceback is above"
        return True

    carry_out("warm-up", None)
    started = time.monotonic()
    carry_out("whole", None)
    whole_seconds = time.monotonic() - started
    wanted_plan, wanted = torch.load(tmp_path / "whole.pt")
    moments = random.Random(0)
    killed = runs = 0
    while killed < kills:
        name, attempts = f"run{runs}", 0
        while not carry_out(
            name, moments.uniform(0, whole_seconds) if killed < kills and attempts < 6 else None
        ):
            killed += 1
            attempts += 1
        plan, state = torch.load(tmp_path / f"{name}.pt")
        assert plan == wanted_plan
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[name], wanted[name]) for name in wanted)
        runs += 1
    print(f"{killed} kills in {runs} runs")
