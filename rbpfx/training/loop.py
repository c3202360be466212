"""Passes over a loader: endless batches, a last check, the BatchNorm refresh."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rbpfx.graph.capture import evaluating
from rbpfx.training.stream import Stream
from rbpfx.training.task import Loader, Task

EPOCHS = 3.0
"""Passes over the loader, by default (ours)."""

STEPS = 100
"""Optimiser steps in each of them, at least: in fewer, gates do not arrive at 0 or 1 (ours,
docs/experiments.md, "Other losses")."""


def batches(loader: Loader, count: int) -> Iterator[Any]:
    """`count` batches, going through the loader as often as needed.

    Raises:
        InputError: The loader yields nothing, cannot be gone through twice, or raises.
    """
    stream = Stream(loader, resumable=False)
    for _ in range(count):
        (batch,) = stream.take()
        yield batch


def steps_per_epoch(task: Task, loader: Loader, accumulate: int = 1) -> int:
    """Number of optimiser steps in one pass.

    Args:
        task: Knows how many batches there are.
        loader: Training batches.
        accumulate: Batches per step; an epoch may end with a step of fewer.
    """
    return -(-task.batches_in(loader) // accumulate)


def planned_steps(epochs: float | None, per_epoch: int) -> int:
    """Optimiser steps of a training.

    Args:
        epochs: How many; None for `EPOCHS`, of at least `STEPS` each.
        per_epoch: Steps in one pass over the loader.
    """
    return round((EPOCHS if epochs is None else epochs) * epoch_steps(epochs, per_epoch))


def epoch_steps(epochs: float | None, per_epoch: int) -> int:
    """What counts as the steps of an epoch; the arguments are those of `planned_steps`."""
    return max(per_epoch, STEPS) if epochs is None else per_epoch


def frozen_norms(model: nn.Module) -> list[_BatchNorm]:
    """BatchNorms whose parameters are kept from training: their statistics are meant to stay too.

    The training flag tells nothing, since whole networks come in eval mode.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    return [n for n in norms if n.affine and not any(p.requires_grad for p in n.parameters())]


@torch.no_grad()
def still_finite(model: nn.Module, batch: Any, task: Task) -> bool:
    """Whether the last step left a network that has a finite loss, in eval mode."""
    with evaluating(model):
        return isfinite(float(task.loss(model, batch)))


@torch.no_grad()
def refresh_batchnorm(
    model: nn.Module,
    loader: Loader,
    task: Task,
    max_batches: int = 64,
    mean: Callable[[Tensor], Tensor] = lambda values: values,
) -> None:
    """Estimate BatchNorm statistics anew as plain averages over training batches.

    Those of `frozen_norms` stay.

    Args:
        model: Changed in place: running statistics only.
        loader: Training batches.
        task: Runs the batches.
        max_batches: How many batches are averaged at most.
        mean: The mean of a tensor over all processes, which see different batches.
    """
    frozen = set(frozen_norms(model))
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m not in frozen]
    norms = [norm for norm in norms if norm.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    with evaluating(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        try:
            for batch in batches(loader, min(max_batches, task.batches_in(loader))):
                task.loss(model, batch)
            for norm in norms:
                for statistic in (norm.running_mean, norm.running_var):
                    if statistic is not None:
                        statistic.copy_(mean(statistic))
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
