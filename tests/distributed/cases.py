"""What is pruned in one process and in several: a small task, and ways to prune it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import rbpfx
from rbpfx import FineTune, PruningResult, Recursion, Target, Training
from rbpfx.training.strategy import _require_averages
from tests.toy import ShortcutNet, stripes, trained

GLOBAL = stripes(96, 12)


class Plain(nn.Module):
    """A shortcut and no BatchNorm, whose statistics would be those of a process's own examples."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.inner = nn.Conv2d(8, 8, 3, padding=1)
        self.outer = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.outer(F.relu(self.inner(x))))
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))


FEW = ("rbp without a target", "strict recursion", "taylor, recursively")
"""Those of the default suite."""
OPTIONS: dict[str, dict[str, Any]] = {
    "rbp": {},
    "rbp without a target": {
        "target": None,
        "recursion": Recursion(3, strength=0.8, noise_lr=0.3),
    },
    "strict recursion": {"recursion": Recursion(epochs=2, window=1), "distill": True},
    "sbp": {"method": "sbp", "training": Training(accumulate=2)},
    "taylor": {"method": "taylor", "recursion": None},
    "taylor, recursively": {"method": "taylor"},
    "random": {"method": "random", "recursion": None},
}


def dense() -> nn.Module:
    torch.manual_seed(0)
    return trained(Plain(), GLOBAL, 3)


def share(rank: int, processes: int) -> list[tuple[Tensor, Tensor]]:
    """The part of every batch that belongs to a process."""
    rows = 12 // processes
    part = slice(rank * rows, (rank + 1) * rows)
    return [(images[part], labels[part]) for images, labels in GLOBAL]


def prune(model: nn.Module, loader: Any, **options: Any) -> PruningResult:
    settings: dict[str, Any] = {
        "target": Target(macs=0.5),
        "recursion": Recursion(epochs=2),
        "recovery": FineTune(epochs=1),
        "val_loader": loader,
        "progress": False,
        **options,
    }
    return rbpfx.prune(model, loader, **settings)


def outcome(result: PruningResult) -> dict[str, Any]:
    report = result.report
    return {
        "plan": dict(result.plan.kept),
        "state": {name: t.clone() for name, t in result.model.state_dict().items()},
        "accuracy": (report.dense.accuracy, report.accuracy_after_cut, report.pruned.accuracy),
        "latency": report.pruned.latency,
        "interrupted": report.interrupted,
    }


def gloo_averages() -> bool:
    """Whether gloo can reduce to means, which FSDP2 needs; that of torch 2.8 cannot."""
    try:
        _require_averages(torch.device("cpu"))
    except rbpfx.DistributedError as error:
        assert "take a newer torch" in str(error)
        return False
    return True


def all_options(rank: int, directory: Path, names: Iterable[str] = OPTIONS) -> dict[str, Any]:
    """Every way to prune, in this process of several."""
    loader = share(rank, dist.get_world_size())
    found = {name: outcome(prune(dense(), loader, **OPTIONS[name])) for name in names}
    if gloo_averages():
        sharded = Training(strategy=rbpfx.Sharded())
        found["sharded"] = outcome(prune(dense(), loader, training=sharded))
    return found


def other_weights(rank: int, directory: Path) -> dict[str, Any]:
    """A model that is another one in every process."""
    torch.manual_seed(rank)
    return outcome(prune(trained(Plain(), GLOBAL, 1 + rank), share(rank, 2)))


def batchnorm(rank: int, directory: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    return outcome(prune(trained(ShortcutNet(), GLOBAL, 3), share(rank, 2)))


def uneven(rank: int, directory: Path) -> str:
    loader = share(rank, 2)
    try:
        prune(dense(), loader[: 8 - rank])
    except rbpfx.DistributedError as error:
        return str(error)
    return "nothing was noticed"


class Ended(Exception):
    pass


def ended_and_resumed(rank: int, directory: Path) -> dict[str, Any]:
    """A training that ends at some steps and goes on, in both phases, whole and in parts."""
    found: dict[str, Any] = {}
    for name, strategy in (("whole", None), ("sharded", rbpfx.Sharded())):
        if strategy is not None and not gloo_averages():
            continue
        options = {"training": Training(strategy=strategy), "checkpoint_interval": 0}
        wanted = outcome(prune(dense(), share(rank, 2), **options))
        for step in (5, 13):

            def end(progress: rbpfx.Progress, left: list[int] = [step]) -> None:  # noqa: B006
                left[0] -= 1
                if left[0] == 0:
                    raise Ended

            saved = directory / name
            with suppress(Ended):
                prune(dense(), share(rank, 2), callback=end, checkpoint_dir=saved, **options)
        again = prune(dense(), share(rank, 2), checkpoint_dir=directory / name, **options)
        found[name] = (wanted, outcome(again))
    return found


def stopped_by_one(rank: int, directory: Path) -> tuple[str, dict[str, Any]]:
    """Ctrl-C reaches one process only."""
    import os
    import signal

    seen: list[int] = []

    def press(progress: rbpfx.Progress) -> None:
        seen.append(progress.step)
        if rank == 1 and len(seen) == 6:
            os.kill(os.getpid(), signal.SIGINT)

    stopped = prune(dense(), share(rank, 2), callback=press, checkpoint_dir=directory)
    return stopped.report.interrupted, outcome(
        prune(dense(), share(rank, 2), checkpoint_dir=directory)
    )


def bad_in_one(rank: int, directory: Path) -> str:
    """NaN in the data of one process."""
    loader = [(images.clone(), labels) for images, labels in share(rank, 2)]
    if rank == 1:
        loader[2][0][0] = float("nan")
    try:
        prune(dense(), loader)
    except rbpfx.DivergenceError as error:
        return str(error)
    return "nothing was noticed"


def everything(rank: int, directory: Path) -> dict[str, Any]:
    """All of the above, since processes are slow to start."""
    works = (other_weights, batchnorm, uneven, bad_in_one, ended_and_resumed, stopped_by_one)
    found = {work.__name__: work(rank, directory / work.__name__) for work in works}
    return {**found, "options": all_options(rank, directory, FEW)}
