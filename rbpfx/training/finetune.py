"""Recovery: fine-tune the sliced network, by default with SGD on a cosine schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import cos, pi
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from rbpfx.checkpoints import Checkpoints
from rbpfx.errors import InputError, RbpfxError
from rbpfx.graph.capture import keeping_modes
from rbpfx.training.engine import Stepper, Training
from rbpfx.training.interruption import Interruption
from rbpfx.training.layout import keeping_layout
from rbpfx.training.loop import planned_steps, steps_per_epoch
from rbpfx.training.record import Curves
from rbpfx.training.safeguard import Safeguard
from rbpfx.training.strategy import Strategy
from rbpfx.training.task import Loader, Task


@dataclass(frozen=True)
class FineTune:
    """How the sliced network is fine-tuned: by default SGD with Nesterov momentum, cosine schedule.

    To keep a training loop of one's own, let `prune(recovery=FineTune(epochs=0))` do none and
    train `result.model` like any network; `rbpfx.rebind` takes the state of an optimiser along.
    A loop body of one's own goes into `Training(train_step=...)`.

    Attributes:
        epochs: Passes over the loader; 0 for none. None for 3, of at least 100 steps each.
        lr: Learning rate after the warm-up; falls to 0 along a cosine. None for 0.01, less for
            batches below 32 and where losses are large.
        weight_decay: L2 penalty on the weights.
        momentum: Momentum of SGD; 0 for none.
        warmup: Share of the steps in which the learning rate rises linearly.
        optimizer: Called with the parameters that are trained; returns the optimiser. `lr`,
            `weight_decay` and `momentum` are not used then.
        scheduler: Called with the optimiser and the number of steps; returns what sets the
            learning rate, stepped without arguments after every optimiser step. The cosine and
            `warmup` are not used then.

    Raises:
        RbpfxError: A setting has no such value.
    """

    epochs: float | None = None
    lr: float | None = None
    weight_decay: float = 5e-4
    momentum: float = 0.9
    warmup: float = 0.0
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None
    scheduler: Callable[[Optimizer, int], LRScheduler] | None = None

    def __post_init__(self) -> None:
        epochs_fit = self.epochs is None or 0 <= self.epochs < float("inf")
        if not epochs_fit or not (self.lr is None or self.lr > 0):
            raise RbpfxError(
                f"{self}: epochs must not be negative nor infinite, lr must be positive"
            )
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
    curves: Curves | None = None,
    checkpoints: Checkpoints | None = None,
    interruption: Interruption | None = None,
) -> str:
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
        curves: Where losses are written down.
        checkpoints: Where the training is saved, and goes on if it was saved there.
        interruption: Asks the training to stop.

    Returns:
        How far it got before it was stopped, in words; empty if it has finished.

    Raises:
        InputError: `settings.optimizer` returns no optimiser, or the loss does not depend on the
            network.
        DivergenceError: The loss is no finite number any more, or has exploded, and was not saved
            by lower learning rates; `model` is back at its last good state.
    """
    training = training or Training()
    per_epoch = steps_per_epoch(task, loader, training.accumulate)
    steps = planned_steps(settings.epochs, per_epoch)
    if steps == 0 or not any(p.requires_grad for p in model.parameters()):
        return ""
    strategy = training.spread
    strategy.require_same("the number of batches in an epoch", per_epoch)
    network = strategy.distribute(model)
    weights = [p for p in network.parameters() if p.requires_grad]
    optimizer = _optimizer(settings, weights, task.scale.learning_rate)
    schedule = _scheduler(settings, optimizer, steps)
    run = _Run(network, steps, strategy, curves or Curves())
    with keeping_modes(model), keeping_layout(model):
        stepper = Stepper(
            network, task, training, [optimizer], schedulers=[schedule], teacher=teacher
        )
        safeguard = Safeguard(
            run,
            stepper,
            loader,
            place=lambda: ("fine-tuning", " of the fine-tuning"),
            advice="Lower FineTune(lr=...).",
            checkpoints=checkpoints,
            interruption=interruption,
        )
        while not run.finished and not safeguard.stopped:
            losses = safeguard.step()
            if losses is None:
                continue
            loss = float(losses.data)
            run.step += 1
            run.curves.add(run.step, steps, loss=loss)
            report(run.step, steps, loss)
            safeguard.passed(milestone=run.step % per_epoch == 0)
        if network is not model:
            model.load_state_dict(strategy.state(network))
        strategy.synchronize(model)  # the statistics of BatchNorm
    return "" if run.finished else f"after step {run.step} of {steps} of the fine-tuning"


class _Run:
    """A fine-tuning under way."""

    def __init__(self, network: nn.Module, steps: int, strategy: Strategy, curves: Curves) -> None:
        self.network = network
        self.curves = curves
        self.steps = steps
        self.strategy = strategy
        self.step = 0

    @property
    def finished(self) -> bool:
        return self.step == self.steps

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "network": self.strategy.state(self.network),
            "curves": self.curves.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.strategy.load_state(self.network, state["network"])
        self.curves.load_state_dict(state["curves"])


def _optimizer(settings: FineTune, weights: list[nn.Parameter], rate: float) -> Optimizer:
    if settings.optimizer is None:
        return torch.optim.SGD(
            weights,
            rate if settings.lr is None else settings.lr,
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
