"""Recovery: fine-tune the sliced network, on a cosine schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from rbpfx.errors import DivergenceError, RbpfxError
from rbpfx.graph.capture import keeping_modes
from rbpfx.training.loop import (
    batches,
    gradient_step,
    snapshot,
    steps_per_epoch,
    still_finite,
)
from rbpfx.training.task import Loader, Task


@dataclass(frozen=True)
class FineTune:
    """How the sliced network is fine-tuned: SGD with Nesterov momentum 0.9, cosine schedule.

    Attributes:
        epochs: Passes over the loader; 0 for none.
        lr: Learning rate at the start; falls to 0 along a cosine.
        weight_decay: L2 penalty on the weights.
    """

    epochs: float = 3.0
    lr: float = 0.01
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        if self.epochs < 0 or not self.lr > 0:
            raise RbpfxError(f"{self}: epochs must not be negative, lr must be positive")


def finetune(
    model: nn.Module,
    loader: Loader,
    task: Task,
    settings: FineTune,
    teacher: nn.Module | None = None,
    report: Callable[[int, int, float], None] = lambda *_: None,
) -> None:
    """Train a network in place; after a cut, refresh its BatchNorm statistics first.

    Args:
        model: The network; every submodule is left in the mode it was in.
        loader: Training batches.
        task: Turns batches into losses.
        settings: How.
        teacher: Network whose outputs are imitated in half of the loss.
        report: Called after every step with (steps done, steps planned, loss).

    Raises:
        DivergenceError: The loss is no finite number any more; `model` is as it was before.
    """
    steps = round(settings.epochs * steps_per_epoch(loader))
    weights = [p for p in model.parameters() if p.requires_grad]
    if steps == 0 or not weights:
        return
    optimizer = torch.optim.SGD(
        weights, settings.lr, momentum=0.9, nesterov=True, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    before = snapshot(model)
    with keeping_modes(model):
        for step, batch in enumerate(batches(loader, steps), start=1):
            model.train()
            loss = task.loss(model, batch, teacher)
            gradient_step(loss, [optimizer], lambda: _diverged(model, before, step))  # noqa: B023
            schedule.step()
            report(step, steps, float(loss.detach()))
    if not still_finite(model, batch, task):
        raise _diverged(model, before, steps)


def _diverged(model: nn.Module, before: dict[str, torch.Tensor], step: int) -> DivergenceError:
    model.load_state_dict(before)
    return DivergenceError(
        f"the loss is not a finite number at step {step} of the fine-tuning. The network is back "
        "at the state before it (error.model). Lower FineTune(lr=...).",
        stage="fine-tuning",
        step=step,
        model=model,
    )
