"""Runs a function in several processes that talk over gloo."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Work = Callable[[int, Path], Any]


def in_processes(count: int, work: Work) -> list[Any]:
    """What `work(rank, directory)` returns in each of several processes.

    Args:
        count: Number of processes.
        work: A function of a module; it gets an empty directory that all share.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_entry, (count, work, folder), count)
        return [torch.load(Path(folder) / f"result{rank}.pt") for rank in range(count)]


def _entry(rank: int, count: int, work: Work, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=count)
    try:
        shared = Path(folder) / "shared"
        torch.save(work(rank, shared), Path(folder) / f"result{rank}.pt")
    finally:
        dist.destroy_process_group()
