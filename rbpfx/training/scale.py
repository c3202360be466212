"""What a loss is worth: how much of it counts as one nat, and how fast to learn from it.

The divergences of the methods and the price of a network are in nats, as cross-entropy is. Other
losses have a unit of their own: a squared error in millimetres is a million times that in metres.
The yardstick is what the network has learnt: how far its training loss lies below that of its *mean
output*, the same answer for every example. A classifier of ten classes has learnt about ln 10 nats,
so ln 10 nats is what every other loss counts as. This and the learning rates are ours, chosen in
docs/experiments.md, "Other losses".
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from math import ceil, isfinite
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from rbpfx.graph.capture import evaluating
from rbpfx.graph.examples import count_examples
from rbpfx.surroundings import generators_kept
from rbpfx.training.loop import batches
from rbpfx.training.settings import Training
from rbpfx.training.task import LEARNING_RATE, TEN_CLASSES, Loader, LossScale, Task

logger = logging.getLogger(__name__)

EXAMPLES = 64
"""Training examples that are looked at, at least."""

SHARES = (0.0, 0.25, 0.5, 1.0)
"""Of the mean output, of which the best counts: the mean of confident scores is too confident."""

TELLING = 1e-3
"""Share of the mean output's loss that a network must be better by to have learnt anything."""

FULL_BATCH = 32
"""Smaller batches are learnt from at a proportionally smaller rate."""


def measure_scale(
    model: nn.Module, loader: Loader, task: Task, training: Training, batch: int
) -> LossScale:
    """What the loss of a trained network is worth; draws no random numbers that training misses.

    Args:
        model: The network.
        loader: Training batches.
        task: Turns them into losses.
        training: How a training step is carried out; a `train_step` of the user's own knows the
            loss alone, which then counts as nats.
        batch: Examples in a batch.
    """
    strategy = training.spread
    together = batch * training.accumulate * strategy.processes
    rate = LEARNING_RATE * min(1, together / FULL_BATCH)
    if training.train_step is not None:
        return LossScale(learning_rate=rate)
    with generators_kept(task.device), torch.no_grad():
        looked_at = _batches(loader, batch)
        dense, constant = _losses(model, looked_at, task)
    measured = torch.tensor([dense, constant], dtype=torch.float64, device="cpu")
    dense, constant = strategy.mean(measured).tolist()
    learnt = constant - dense
    if not (isfinite(learnt) and learnt > TELLING * abs(constant)):
        if not task.is_classification:
            logger.warning(
                "the training loss is %.3g, and %.3g if the network gives its mean output to every "
                "example, which does not tell the unit of the loss: it counts as nats, as "
                "cross-entropy does",
                dense,
                constant,
            )
        return LossScale(learning_rate=rate)
    nat = 1.0 if task.is_classification else learnt / TEN_CLASSES
    return LossScale(nat, learnt / nat, rate / max(1, nat), dense)


def share_forgotten(
    model: nn.Module, loader: Loader, task: Task, training: Training, batch: int
) -> float | None:
    """Share of what the dense network had learnt that a smaller one has not.

    0 at the training loss of the dense network or below, 1 at that of its mean output; None if
    `measure_scale` could not tell. The arguments are those of `measure_scale`.
    """
    scale = task.scale
    if not isfinite(scale.dense):
        return None
    with generators_kept(task.device), torch.no_grad():
        measured = _mean_loss(model, _batches(loader, batch), task)
    loss = float(training.spread.mean(torch.tensor(measured, dtype=torch.float64, device="cpu")))
    return max(loss - scale.dense, 0.0) / (scale.learnt * scale.nat) if isfinite(loss) else None


def _batches(loader: Loader, batch: int) -> list[Any]:
    """As many as hold the examples to look at."""
    return list(batches(loader, ceil(EXAMPLES / batch)))


def _losses(model: nn.Module, looked_at: Sequence[Any], task: Task) -> tuple[float, float]:
    """The training loss, and that of the mean output; not-a-number if that has none."""
    outputs = _MeanOutput()
    dense = _mean_loss(model, looked_at, task, outputs.record)
    try:
        return dense, min(
            _mean_loss(model, looked_at, task, partial(outputs.replace, share)) for share in SHARES
        )
    except Exception as error:  # the user's loss need not bear an output that is none
        logger.info("the loss of the mean output: %r", error)
        return dense, float("nan")


def _mean_loss(
    model: nn.Module,
    looked_at: Sequence[Any],
    task: Task,
    hook: Callable[[nn.Module, Any, Any], Any] | None = None,
) -> float:
    handle = None if hook is None else model.register_forward_hook(hook)
    try:
        with evaluating(model):
            losses = [float(task.loss(model, batch)) for batch in looked_at]
    finally:
        if handle is not None:
            handle.remove()
    sizes = [count_examples(batch) for batch in looked_at]
    total = sum(loss * size for loss, size in zip(losses, sizes, strict=True))
    return total / max(sum(sizes), 1)


class _MeanOutput:
    """The mean over all examples of what a network puts out, which may then take its place."""

    def __init__(self) -> None:
        self._sums: dict[tuple[int, Size], tuple[Tensor, int]] = {}

    def record(self, _: nn.Module, __: Any, output: Any) -> None:
        for place, leaf in enumerate(tree_leaves(output)):
            if _is_of_examples(leaf):
                total, count = self._sums.get((place, leaf.shape[1:]), (0, 0))
                self._sums[place, leaf.shape[1:]] = total + leaf.sum(0), count + len(leaf)

    def replace(self, share: float, _: nn.Module, __: Any, output: Any) -> Any:
        leaves, structure = tree_flatten(output)
        return tree_unflatten([self._mean(share, *entry) for entry in enumerate(leaves)], structure)

    def _mean(self, share: float, place: int, leaf: Any) -> Any:
        if not _is_of_examples(leaf):
            return leaf
        total, count = self._sums[place, leaf.shape[1:]]
        return (share * total / count).expand_as(leaf).clone()


def _is_of_examples(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim > 0 and len(leaf) > 0


__all__ = ["measure_scale", "share_forgotten"]
