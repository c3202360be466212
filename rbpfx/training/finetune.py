"""Recovery: fine-tune the sliced network, by default with SGD on a cosine schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from math import cos, pi

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from rbpfx.errors import DivergenceError, InputError, RbpfxError
from rbpfx.graph.capture import keeping_modes
from rbpfx.training.engine import Stepper, Training
from rbpfx.training.layout import keeping_layout
from rbpfx.training.loop import grouped, snapshot, steps_per_epoch, still_finite
from rbpfx.training.task import Loader, Task


@dataclass(frozen=True)
class FineTune:
    """How the sliced network is fine-tuned: by default SGD with Nesterov momentum, cosine schedule.

    To keep a training loop of one's own, let `prune(recovery=FineTune(epochs=0))` do none and
    train `result.model` like any network; `rbpfx.rebind` takes the state of an optimiser along.
    A loop body of one's own goes into `Training(train_step=...)`.

    Attributes:
        epochs: Passes over the loader; 0 for none.
        lr: Learning rate after the warm-up; falls to 0 along a cosine.
        weight_decay: L2 penalty on the weights.
        momentum: Momentum of SGD; 0 for none.
        warmup: Share of the steps in which the learning rate rises linearly.
        optimizer: Called with the parameters that are trained; returns the optimiser. `lr`,
            `weight_decay` and `momentum` are not used then.
        scheduler: Called with the optimiser and the number of steps; returns what sets the
            learning rate, stepped without arguments after every optimiser step. The cosine and
            `warmup` are not used then.
    """

    epochs: float = 3.0
    lr: float = 0.01
    weight_decay: float = 5e-4
    momentum: float = 0.9
    warmup: float = 0.0
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None
    scheduler: Callable[[Optimizer, int], LRScheduler] | None = None

    def __post_init__(self) -> None:
        if not self.epochs >= 0 or not self.lr > 0:
            raise RbpfxError(f"{self}: epochs must not be negative, lr must be positive")
        if not self.weight_decay >= 0:
            raise RbpfxError(f"{self}: weight_decay must not be negative")
        if not 0 <= self.momentum < 1:
            raise RbpfxError(f"{self}: momentum must be from 0 to below 1")
        if not 0 <= self.warmup < 1:
            raise RbpfxError(f"{self}: warmup is a share of the steps, from 0 to below 1")


def finetune(
    model: nn.Module,
    loader: Loader,
    task: Task,
    settings: FineTune,
    teacher: nn.Module | None = None,
    report: Callable[[int, int, float], None] = lambda *_: None,
    training: Training | None = None,
) -> None:
    """Train a network in place; after a cut, refresh its BatchNorm statistics first.

    Args:
        model: The network; every submodule is left in the mode it was in. Parameters that do not
            require a gradient stay as they are.
        loader: Training batches.
        task: Turns batches into losses.
        settings: What is done.
        teacher: Network whose outputs are imitated in half of the loss.
        report: Called after every step with (steps done, steps planned, loss).
        training: How a step is carried out.

    Raises:
        InputError: `settings.optimizer` returns no optimiser, or the loss does not depend on the
            network.
        DivergenceError: The loss is no finite number any more; `model` is as it was before.
    """
    training = training or Training()
    steps = round(settings.epochs * steps_per_epoch(loader, training.accumulate))
    weights = [p for p in model.parameters() if p.requires_grad]
    if steps == 0 or not weights:
        return
    optimizer = _optimizer(settings, weights)
    schedule = _scheduler(settings, optimizer, steps)
    before = snapshot(model)
    with keeping_modes(model), keeping_layout(model):
        stepper = Stepper(
            model, task, training, [optimizer], schedulers=[schedule], teacher=teacher
        )
        for step, group in enumerate(grouped(loader, steps, training.accumulate), start=1):
            losses = stepper.step(group, partial(_diverged, model, before, step))
            report(step, steps, float(losses.data))
    if not still_finite(model, group[-1], task):
        raise _diverged(model, before, steps)


def _optimizer(settings: FineTune, weights: list[nn.Parameter]) -> Optimizer:
    if settings.optimizer is None:
        return torch.optim.SGD(
            weights,
            settings.lr,
            momentum=settings.momentum,
            nesterov=settings.momentum > 0,
            weight_decay=settings.weight_decay,
        )
    optimizer = settings.optimizer(weights)
    if not isinstance(optimizer, Optimizer):
        raise InputError(
            "FineTune(optimizer=...) must return a torch optimiser of the parameters it is called "
            f"with, not {optimizer!r}; for example lambda weights: torch.optim.AdamW(weights)"
        )
    return optimizer


def _scheduler(settings: FineTune, optimizer: Optimizer, steps: int) -> LRScheduler:
    if settings.scheduler is not None:
        return settings.scheduler(optimizer, steps)
    rising = round(settings.warmup * steps)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        return 0.5 * (1 + cos(pi * (step - rising) / max(steps - rising, 1)))

    return LambdaLR(optimizer, factor)


def _diverged(model: nn.Module, before: dict[str, torch.Tensor], step: int) -> DivergenceError:
    model.load_state_dict(before)
    return DivergenceError(
        f"the loss is not a finite number at step {step} of the fine-tuning. The network is back "
        "at the state before it (error.model). Lower FineTune(lr=...).",
        stage="fine-tuning",
        step=step,
        model=model,
    )
