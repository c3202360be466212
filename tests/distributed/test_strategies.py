"""The strategies of docs/long-trainings.md, on the libraries that they are for."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from tests.pages import code_blocks

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "long-trainings.md"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not torch.distributed.is_available() or sys.platform == "win32", reason="needs gloo"
    ),
]

LIBRARIES = {
    "lightning_fabric": """
        from lightning_fabric import Fabric

        unused = "ddp_find_unused_parameters_true"
        fabric = Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy=unused)
        fabric.launch()
        strategy = OnFabric(fabric)
    """,
    "accelerate": """
        from accelerate import Accelerator, DistributedDataParallelKwargs

        missing = DistributedDataParallelKwargs(find_unused_parameters=True)
        strategy = OnAccelerate(Accelerator(cpu=True, kwargs_handlers=[missing]))
    """,
}

COMPARISON = """
    import torch
    from rbpfx import Training
    from tests.distributed import cases

    calls = []
    backward = type(strategy).backward
    type(strategy).backward = lambda self, loss: calls.append(backward(self, loss))
    loader = cases.share(dist.get_rank(), dist.get_world_size())
    for accumulate in (1, 2):
        found, wanted = (
            cases.outcome(
                cases.prune(
                    cases.dense(),
                    loader,
                    training=Training(strategy=given, accumulate=accumulate),
                )
            )
            for given in (strategy, None)
        )
        assert calls
        assert found["plan"] == wanted["plan"]
        for name, tensor in wanted["state"].items():
            assert torch.allclose(found["state"][name], tensor, atol=1e-6), name
    print("the same")
"""


def torchrun(script: Path, processes: int) -> str:
    """What a script prints, on all processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    found = subprocess.run(
        [*launcher, f"--nproc-per-node={processes}", str(script)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=script.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_strategy_of_ones_own(library: str, processes: int, tmp_path: Path) -> None:
    pytest.importorskip(library)
    (classes,) = (block for block in code_blocks(PAGE) if "class OnFabric" in block)
    script = tmp_path / "script.py"
    start = 'import rbpfx\nimport torch.distributed as dist\n\ndist.init_process_group("gloo")\n'
    parts = [start, classes, textwrap.dedent(LIBRARIES[library]), textwrap.dedent(COMPARISON)]
    script.write_text("\n".join(parts))
    assert torchrun(script, processes).count("the same") == processes


def test_the_script_for_torchrun(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    (code,) = (block for block in code_blocks(PAGE) if "def main()" in block)
    script = tmp_path / "script.py"
    script.write_text(code)
    first = torchrun(script, 2)
    assert "MACs per example" in first
    assert (tmp_path / "pruned" / "plan.json").exists()
    again = torchrun(script, 2)  # from the checkpoints of the finished run
    kept = [[line for line in text.splitlines() if "%" in line] for text in (first, again)]
    assert kept[0] == kept[1]
