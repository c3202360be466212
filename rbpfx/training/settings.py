"""The settings of a training step: precision, accumulation, clipping, or a step of one's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from rbpfx.errors import RbpfxError
from rbpfx.training.strategy import Strategy, default_strategy

Update: TypeAlias = Callable[[Tensor], None]
TrainStep: TypeAlias = Callable[[nn.Module, Any, Update], Any]

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What forwards are computed in: by name, the dtype of autocast, None for no autocast."""


@dataclass(frozen=True)
class Training:
    """How a training step is carried out, of the noise and of the fine-tuning.

    A loop body of one's own goes into `train_step`. It gets the network, one batch of the loader
    (on the device already) and `update`; it computes a loss as it likes and calls `update(loss)`
    exactly once, which adds what rbpfx needs and carries out the step:

        def train_step(model, batch, update):
            images, labels = mixup(*batch)
            update(criterion(model(images), labels))
            average.update_parameters(model)

    A loop that does not fit into this form comes afterwards: `prune(recovery=FineTune(epochs=0))`
    does not fine-tune, and `result.model` is a network to train like any other.

    Attributes:
        precision: What forwards are computed in: "float32" (the dtypes of the model, to be
            precise), or by autocast "bfloat16" or "float16", the latter with scaled gradients.
            Weights, their updates and the penalty stay as they are.
        channels_last: Whether images and 4-d weights are laid out with the channels last. None:
            on CUDA devices, unless the model cannot deal with it.
        compile: Whether the network is compiled by `torch.compile` for training; not its noise,
            which changes from group to group.
        accumulate: Batches of the loader per optimiser step, weighted by their numbers of
            examples: for a mean loss, what one batch of all of them would give (except that
            BatchNorm sees the batches one by one).
        clip_norm: The largest norm of a gradient, of the weights and of the noise each; None for
            no limit.
        train_step: Called as `train_step(model, batch, update)` for every batch, in train mode and
            under autocast. With `accumulate`, weights change with the last batch of a step only.
        strategy: How training is spread over processes; None for `rbpfx.Distributed` if
            `torch.distributed` has several, as under torchrun, and for one process otherwise.

    Raises:
        RbpfxError: A setting has no such value.
    """

    precision: str = "float32"
    channels_last: bool | None = None
    compile: bool = False
    accumulate: int = 1
    clip_norm: float | None = None
    train_step: TrainStep | None = None
    strategy: Strategy | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise RbpfxError(
                f"precision={self.precision!r} is unknown; give one of {', '.join(PRECISIONS)}"
            )
        if self.channels_last not in (None, True, False):
            raise RbpfxError(f"channels_last={self.channels_last!r} must be True, False or None")
        if not isinstance(self.compile, bool):
            raise RbpfxError(f"compile={self.compile!r} must be True or False")
        if not isinstance(self.accumulate, int) or self.accumulate < 1:
            raise RbpfxError(f"accumulate={self.accumulate!r} must be a whole number from 1")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise RbpfxError(f"clip_norm={self.clip_norm!r} must be positive, or None")
        if self.train_step is not None and not callable(self.train_step):
            raise RbpfxError("train_step must be callable as train_step(model, batch, update)")
        if self.strategy is not None and not isinstance(self.strategy, Strategy):
            raise RbpfxError(f"strategy={self.strategy!r} must be an rbpfx.Strategy, or None")

    @property
    def spread(self) -> Strategy:
        """The strategy, or the one that is taken by default."""
        return self.strategy or default_strategy()
