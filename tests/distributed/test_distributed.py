"""Several processes prune as one does with all the data; none goes on alone."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import rbpfx
from rbpfx import RbpfxError, Training
from tests.distributed import cases
from tests.distributed.processes import in_processes

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or sys.platform == "win32", reason="needs gloo"
)


def same(a: dict[str, Any], b: dict[str, Any], tolerance: float = 0.0) -> bool:
    return a["plan"] == b["plan"] and all(
        torch.allclose(a["state"][name], b["state"][name], rtol=0, atol=tolerance)
        for name in a["state"]
    )


def require_as_one_process(found: list[dict[str, Any]]) -> None:
    for name, outcome in found[0].items():
        one = cases.outcome(cases.prune(cases.dense(), cases.GLOBAL, **cases.OPTIONS.get(name, {})))
        assert same(outcome, one, 2e-5), name
        assert outcome["accuracy"] == pytest.approx(one["accuracy"], abs=1e-9), name
        assert any(len(units) < 8 for units in outcome["plan"].values()), name
        for other in found[1:]:
            assert same(other[name], outcome), name
            assert other[name]["latency"] == outcome["latency"], name


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    """What two processes found."""
    return in_processes(2, cases.everything)


def test_as_one_process_with_the_same_global_batch(two) -> None:
    require_as_one_process([found["options"] for found in two])
    assert "sharded" in two[0]["options"] or torch.__version__ < "2.9"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_every_way_to_prune(processes: int) -> None:
    found = in_processes(processes, cases.all_options)
    assert found[0].keys() >= cases.OPTIONS.keys()
    require_as_one_process(found)


@pytest.mark.parametrize("work", ["other_weights", "batchnorm"])
def test_the_first_process_gives_weights_and_statistics_to_all(two, work: str) -> None:
    assert same(two[0][work], two[1][work])


def test_what_goes_wrong_in_one_process_is_an_error_in_all(two) -> None:
    for found in two:
        assert (
            "the number of batches in an epoch differs between the processes: 8 in"
            in (found["uneven"])
        )
        assert "tensor 0 of its batch" in found["bad_in_one"]


def test_what_was_ended_goes_on(two) -> None:
    for found in two:
        for name, (wanted, again) in found["ended_and_resumed"].items():
            assert same(wanted, again), name


def test_ctrl_c_in_one_process_stops_all(two) -> None:
    for found in two:
        stopped, again = found["stopped_by_one"]
        assert stopped == "after step 6 of 16 of the noise training"
        assert again["interrupted"] == ""


SCRIPT = """
    import os, sys
    import torch.distributed as dist
    import rbpfx
    from tests.distributed import cases

    dist.init_process_group("gloo")
    rank, directory, dying = dist.get_rank(), sys.argv[1], sys.argv[2] == "die"

    def die(progress):
        if dying and rank == 1 and progress.step == 9:
            os._exit(13)

    result = cases.prune(
        cases.dense(), cases.share(rank, 2), checkpoint_dir=directory, checkpoint_interval=0,
        callback=die,
    )
    if rank == 0:
        print("kept", {name: len(units) for name, units in result.plan.kept.items()})
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_under_torchrun_a_dead_rank_ends_the_job_and_it_resumes(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))

    def torchrun(what: str) -> subprocess.CompletedProcess[str]:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
        return subprocess.run(
            [*launcher, "--standalone", str(script), str(tmp_path / "saved"), what],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
        )

    died = torchrun("die")
    assert died.returncode != 0
    assert "exitcode  : 13" in died.stderr
    assert list((tmp_path / "saved").glob("noise-*.safetensors"))
    resumed = torchrun("live")
    assert resumed.returncode == 0, resumed.stderr
    one = cases.prune(cases.dense(), cases.GLOBAL)
    assert f"kept { {n: len(u) for n, u in one.plan.kept.items()} }" in resumed.stdout


def test_a_strategy_needs_processes() -> None:
    with pytest.raises(RbpfxError, match="start the script with torchrun"):
        rbpfx.Distributed()
    with pytest.raises(RbpfxError, match=r"must be an rbpfx\.Strategy"):
        Training(strategy="ddp")
