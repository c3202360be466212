"""A small report with everything in it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import rbpfx
from rbpfx import FineTune, Progress, PruningResult, Recursion, Target
from tests.toy import ShortcutNet, stripes, trained


class Run(NamedTuple):
    result: PruningResult
    heard: list[Progress]
    directory: Path


@pytest.fixture(scope="package")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A pruned network, what its callback heard, and where it is saved."""
    torch.manual_seed(0)
    batches = stripes()
    heard: list[Progress] = []
    result = rbpfx.prune(
        trained(ShortcutNet(), batches).eval(),
        batches,
        val_loader=batches,
        target=Target(macs=0.5),
        recursion=Recursion(epochs=4),
        recovery=FineTune(epochs=2),
        progress=False,
        callback=heard.append,
    )
    directory = tmp_path_factory.mktemp("saved")
    result.save(directory)
    return Run(result, heard, directory)
