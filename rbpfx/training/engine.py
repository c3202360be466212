"""The training step: forward, backward and update, as `Training` says.

The phases of training (noise, fine-tuning) decide what is trained and for how long; how one
optimiser step is carried out is decided here, for all of them alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from rbpfx.errors import InputError, RbpfxError
from rbpfx.graph.examples import count_examples
from rbpfx.graph.products import recomputing
from rbpfx.methods import noise_gates
from rbpfx.training.layout import has_images, keep_layout, to_channels_last
from rbpfx.training.loop import frozen_norms
from rbpfx.training.settings import PRECISIONS, Training, Update
from rbpfx.training.task import Task, require_scalar, to_device

_RATES = {"lr", "initial_lr", "max_lr", "min_lr"}
"""Of a group of parameters: what optimisers and torch's schedulers call their learning rates."""


class NumericalFault(Exception):
    """A loss that is not finite, or that has exploded."""


class Losses(NamedTuple):
    """What a step measured, as scalars on the CPU.

    Attributes:
        data: Mean loss over the examples of the step.
        penalty: What was added to it.
    """

    data: Tensor
    penalty: Tensor


class Stepper:
    """Carries out the optimiser steps of one training phase.

    Args:
        model: The network that is trained, in place; its weights may change their memory layout,
            never their identity. `layout.keeping_layout` undoes that.
        task: Turns batches into losses.
        settings: How.
        optimizers: All of them step in every step, unless a scaled gradient overflows.
        schedulers: Learning rate schedulers, stepped once per optimiser step.
        teacher: Network whose outputs are imitated in half of the loss.
        penalty: What is added to the loss, once per optimiser step.

    Raises:
        RbpfxError: The device cannot do what the settings ask for.
        InputError: The settings do not go together with a teacher.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        settings: Training,
        optimizers: Sequence[Optimizer],
        *,
        schedulers: Sequence[LRScheduler] = (),
        teacher: nn.Module | None = None,
        penalty: Callable[[], Tensor] | None = None,
    ) -> None:
        if teacher is not None and settings.train_step is not None:
            raise InputError(
                "train_step computes the loss itself, so nothing can be distilled into it; leave "
                "out distill=True, and call the dense network in train_step"
            )
        self.model = model
        self.task = task
        self.settings = settings
        self.optimizers = optimizers
        self.schedulers = schedulers
        self.teacher = teacher
        self.penalty = penalty
        self.strategy = settings.spread
        self._gates = noise_gates(model)
        self._frozen = frozen_norms(model)
        self._dtype = PRECISIONS[settings.precision]
        self._scaler = _scaler(task.device) if self._dtype == torch.float16 else None
        wanted = settings.channels_last
        self._channels_last = has_images(model) and task.device.type == "cuda"
        if wanted is not None:
            self._channels_last = wanted
        # By default the layout is given up if the first forward shows that it does not work.
        self._on_trial = self._channels_last and wanted is None
        self._restore_layout = keep_layout(model)
        if self._channels_last:
            to_channels_last(model)
        self._network: nn.Module = model
        self._uncompiled: dict[nn.Module, Any] = {}
        if settings.compile:
            self._network = torch.compile(model, dynamic=False)  # type: ignore[assignment]
            self._uncompiled = {g: torch.compiler.disable(g.forward) for g in self._gates}
        self._network = self.strategy.wrap(self._network)

    def step(self, batches: Sequence[Any]) -> Losses:
        """One step of every optimiser.

        Args:
            batches: The batches of the step; their examples count alike.

        Returns:
            The loss of the step, without and with what.

        Raises:
            NumericalFault: The loss is not finite; no parameter was updated.
            InputError: The loss does not depend on the network, is no scalar, or `train_step` does
                not call `update` exactly once.
        """
        self._forget_gradients()
        sizes = [count_examples(batch) for batch in batches]
        total = _Total()
        for place, (batch, size) in enumerate(zip(batches, sizes, strict=True), start=1):
            share = size / sum(sizes) if sum(sizes) else 1 / len(sizes)
            last = place == len(batches)
            with nullcontext() if last else self.strategy.unsynchronized(self._network):
                self._micro_step(batch, lambda loss: self._add(loss, share, total, last))  # noqa: B023
        assert total.losses is not None
        return total.losses

    def state_dict(self) -> dict[str, Any]:
        """The state of optimisers, schedulers and gradient scaler."""
        return {
            "optimizers": [self.strategy.optimizer_state(self.model, o) for o in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "scaler": None if self._scaler is None else self._scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Return to a state."""
        for optimizer, its_state in zip(self.optimizers, state["optimizers"], strict=True):
            self.strategy.load_optimizer_state(self.model, optimizer, its_state)
        for scheduler, its_state in zip(self.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(its_state)
        if self._scaler is not None:
            self._scaler.load_state_dict(state["scaler"])

    def slow_down(self, factor: float) -> None:
        """Multiply all learning rates, those of the schedules too."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for name in _RATES & group.keys():
                    group[name] *= factor
        for scheduler in self.schedulers:
            if hasattr(scheduler, "base_lrs"):
                scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]

    def _micro_step(self, batch: Any, add: Update) -> None:
        """The forward and backward of one batch."""
        self.model.train()
        for norm in self._frozen:
            norm.eval()
        batch = to_device(batch, self.task.device)
        update = _Once(add)
        try:
            self._forward(batch, update)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise InputError(
                f"BatchNorm cannot be trained on this batch: {error}. A batch of one example has "
                "no variance; make batches larger, and leave out a last one of one example "
                "(DataLoader(drop_last=True))"
            ) from error
        except RuntimeError as error:
            # `view` refuses the layout, which the user may not even know of.
            if not self._on_trial or update.calls or "view" not in str(error):
                raise
            self._channels_last = False
            self._restore_layout()
            self._forward(batch, update)
        self._on_trial = False
        if not update.calls:
            raise InputError(
                "train_step returned without calling update(loss); call it exactly once per batch, "
                "so that the step is carried out"
            )

    def _forward(self, batch: Any, update: Update) -> None:
        """Compute the loss of a batch and pass it on to `update`."""
        if self._channels_last:
            batch = to_channels_last(batch)
        with self._autocast(), self._gates_uncompiled(), recomputing():
            if self.settings.train_step is not None:
                self.settings.train_step(self._network, batch, update)
                return
            loss = self.task.loss(self._network, batch, self.teacher)
        update(loss)

    def _add(self, loss: Tensor, share: float, total: _Total, last: bool) -> None:
        """Add the gradient of one batch; with the last one, update."""
        _require_trainable(loss)
        # A hook calls from under autocast, which must not reach backward or penalty.
        with self._autocast(enabled=False):
            objective = loss if share == 1 else loss * share
            total.data = objective.detach() + total.data
            if last:
                penalty = loss.new_zeros(()) if self.penalty is None else self.penalty()
                objective = objective + penalty
                both = _measured(total.data, penalty.detach())
                total.losses = Losses(*self.strategy.mean(both))
                if not isfinite(float(sum(total.losses))):
                    self._forget_gradients()
                    raise NumericalFault("the loss is not a finite number")
            self._backward(objective, share)
            if last:
                self._update()

    def _forget_gradients(self) -> None:
        """Of what is updated, and of what is not."""
        self.model.zero_grad(set_to_none=True)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _backward(self, loss: Tensor, share: float) -> None:
        scale: Tensor | float = share
        if self._scaler is not None:
            scale = self._scaler.scale(torch.full((), share, device=loss.device))
            loss = self._scaler.scale(loss)
        for gate in self._gates:
            gate.loss_scale = scale
        self.strategy.backward(loss)

    def _update(self) -> None:
        """Clip, and step optimisers and schedulers."""
        skipped = False
        if self._scaler is None:
            for optimizer in self.optimizers:
                self._clip(optimizer)
                optimizer.step()
        else:
            before = self._scaler.get_scale()
            # The scaler takes an optimiser without any gradient for a mistake.
            for optimizer in filter(_has_gradients, self.optimizers):
                self._scaler.unscale_(optimizer)
                self._clip(optimizer)
                self._scaler.step(optimizer)
            self._scaler.update()
            skipped = self._scaler.get_scale() < before
        if self._dtype is not None:
            torch.clear_autocast_cache()  # of the weights as they were
        if not skipped:
            for scheduler in self.schedulers:
                scheduler.step()

    def _clip(self, optimizer: Optimizer) -> None:
        if self.settings.clip_norm is not None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.settings.clip_norm)

    @contextmanager
    def _gates_uncompiled(self) -> Iterator[None]:
        """Break the compiled graph at the gates of the noise.

        torch 2.15 misses some changes of `phase` and would run what it compiled for another one.
        """
        for gate, forward in self._uncompiled.items():
            vars(gate)["forward"] = forward
        try:
            yield
        finally:
            for gate in self._uncompiled:
                del vars(gate)["forward"]

    def _autocast(self, enabled: bool = True) -> torch.autocast:
        enabled = enabled and self._dtype is not None
        return torch.autocast(self.task.device.type, dtype=self._dtype, enabled=enabled)


class _Total:
    """The losses of a step so far."""

    def __init__(self) -> None:
        self.data: Tensor | float = 0.0
        self.losses: Losses | None = None


class _Once:
    """An `update` that counts its calls and refuses the second."""

    def __init__(self, add: Update) -> None:
        self.add = add
        self.calls = 0

    def __call__(self, loss: Tensor) -> None:
        self.calls += 1
        if self.calls > 1:
            raise InputError(
                "train_step called update(loss) a second time for one batch; add the losses and "
                "call it once"
            )
        self.add(loss)


def _scaler(device: torch.device) -> torch.amp.GradScaler:
    """The scaler that keeps gradients within the range of float16."""
    scaler = torch.amp.GradScaler(device.type)
    if not scaler.is_enabled():
        raise RbpfxError(
            f"torch cannot train in float16 on {device.type!r}; use precision='bfloat16'"
        )
    return scaler


def _require_trainable(loss: Tensor) -> None:
    require_scalar(loss)
    if not loss.requires_grad:
        raise InputError(
            "the loss does not depend on the network: it was detached, or computed under "
            "torch.no_grad() or by operations without a gradient"
        )


def _measured(data: Tensor, penalty: Tensor) -> Tensor:
    """Both losses, `(2,)`, brought to the CPU together: waiting twice takes twice as long."""
    dtype = torch.promote_types(data.dtype, penalty.dtype)
    return torch.stack([data.to(dtype), penalty.to(data.device, dtype)]).cpu()


def _has_gradients(optimizer: Optimizer) -> bool:
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])


__all__ = ["Losses", "NumericalFault", "Stepper", "Training"]
