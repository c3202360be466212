"""The task: how a batch becomes a loss, and a network an accuracy."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass
from math import log, nan
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader

from rbpfx.errors import InputError
from rbpfx.graph.capture import ExampleInputs, call_with, evaluating
from rbpfx.graph.examples import count_examples

Loader: TypeAlias = Iterable[Any]
LossFunction: TypeAlias = Callable[[Any, Any], Tensor]
ForwardHook: TypeAlias = Callable[[nn.Module, Any], Tensor]

AUXILIARY_WEIGHT = 0.3
"""Weight of auxiliary heads in the default loss (Szegedy et al., CVPR 2015)."""

LEARNING_RATE = 0.01
"""Of the weights, by default: SGD with momentum 0.9 on a mean cross-entropy (ours)."""

TEN_CLASSES = log(10)
"""Nats that a classifier of ten classes has to learn."""


@dataclass(frozen=True)
class LossScale:
    """What a loss is worth (`training/scale.py`); by default that of a classifier.

    Attributes:
        nat: How much of the loss counts as one nat.
        learnt: Nats by which the dense network is better than its mean output.
        learning_rate: Of the weights, where none is given.
        dense: Training loss of the dense network; not-a-number if it is not known.
    """

    nat: float = 1.0
    learnt: float = TEN_CLASSES
    learning_rate: float = LEARNING_RATE
    dense: float = nan


class Task:
    """Turns batches into losses.

    Args:
        loss_fn: Called as `loss_fn(output, target)`; by default cross-entropy, with auxiliary
            heads weighted by 0.3.
        forward: Called as `forward(model, batch)` and returns the loss, for batches that are no
            (input, target) pairs; replaces `loss_fn`.
        device: Where batches are moved.

    Attributes:
        scale: What the loss is worth.
    """

    def __init__(
        self,
        loss_fn: LossFunction | None = None,
        forward: ForwardHook | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if loss_fn is not None and forward is not None:
            raise InputError("give loss_fn or forward, not both: forward returns the loss itself")
        self.loss_fn = loss_fn
        self.forward = forward
        self.device = torch.device(device)
        self.scale = LossScale()
        self._counts: dict[int, tuple[Loader, int, int]] = {}  # id -> the loader, what it has

    @property
    def is_classification(self) -> bool:
        """Whether the loss is cross-entropy, so that top-1 accuracy means something."""
        if self.loss_fn is None:
            return self.forward is None
        return self.loss_fn is F.cross_entropy or isinstance(self.loss_fn, nn.CrossEntropyLoss)

    def loss(self, model: nn.Module, batch: Any, teacher: nn.Module | None = None) -> Tensor:
        """Mean loss of a batch; half of it distilled from a teacher if there is one."""
        batch = to_device(batch, self.device)
        if self.forward is not None:
            return self.forward(model, batch)
        inputs, target = split_pair(batch)
        output = call_with(model, inputs)
        loss = self._loss_of(output, target)
        if teacher is None:
            return loss
        with torch.no_grad():
            wanted = call_with(teacher, inputs)
        return 0.5 * loss + 0.5 * distillation_loss(main_output(output), main_output(wanted))

    def _loss_of(self, output: Any, target: Any) -> Tensor:
        try:
            return (self.loss_fn or classification_loss)(output, target)
        except IndexError as error:
            if not self.is_classification:
                raise
            classes = main_output(output).shape[1]
            raise InputError(
                f"a batch of the loader has a target that is no class: {str(error).rstrip('.')}. "
                f"The output has {classes} classes, so that targets go from 0 to {classes - 1}; "
                f"only those of ignore_index ({self._ignored}) may lie outside"
            ) from error

    @property
    def _ignored(self) -> int:
        """The class index that counts in no cross-entropy."""
        ignored = (
            self.loss_fn.ignore_index if isinstance(self.loss_fn, nn.CrossEntropyLoss) else -100
        )
        return int(ignored)

    def example_inputs(self, model: nn.Module, batch: Any) -> ExampleInputs:
        """What the model is called with for a batch."""
        batch = to_device(batch, self.device)
        if self.forward is None:
            inputs: ExampleInputs = split_pair(batch)[0]
            return inputs
        return _recorded_call(model, lambda: self.forward(model, batch))  # type: ignore[misc]

    def batches_in(self, loader: Loader) -> int:
        """How many batches a loader yields; one that does not say is gone through once."""
        try:
            return len(loader)  # type: ignore[arg-type]
        except TypeError:
            return self._counted(loader)[1]

    def examples_in(self, loader: Loader) -> int:
        """How many examples a loader yields in this process; a count where it does not say."""
        told = _examples_told(loader)
        return self._counted(loader)[2] if told is None else told

    def _counted(self, loader: Loader) -> tuple[Loader, int, int]:
        if id(loader) not in self._counts:
            examples = [count_examples(batch) for batch in loader]
            self._counts[id(loader)] = loader, len(examples), sum(examples)
        return self._counts[id(loader)]

    def accuracy(self, model: nn.Module, loader: Loader) -> float:
        """Top-1 accuracy in eval mode, in [0, 1]; over pixels if there is a target for each.

        Targets that the loss ignores (`ignore_index`) do not count.

        Raises:
            InputError: There is no target to count, or targets do not fit the output.
        """
        correct = total = seen = 0
        with evaluating(model), torch.no_grad():
            for batch in loader:
                inputs, target = split_pair(to_device(batch, self.device))
                scores = main_output(call_with(model, inputs))
                given = scores.argmax(1)
                if target.shape == scores.shape:
                    wanted, counts = target.argmax(1), torch.ones_like(given, dtype=torch.bool)
                else:
                    wanted, counts = target, target != self._ignored
                if wanted.shape != given.shape:
                    raise InputError(
                        f"accuracy needs a class for each of {tuple(given.shape)} predictions, but "
                        f"the validation loader has targets of shape {tuple(target.shape)}; change "
                        "them, or give metric=... to measure something else"
                    )
                correct += int((given.eq(wanted) & counts).sum())
                total += int(counts.sum())
                seen += counts.numel()
        if not seen:
            raise InputError("the validation loader yields no batch")
        if not total:
            raise InputError(
                f"all {seen} targets of the validation loader are ignore_index={self._ignored}, so "
                "that there is no accuracy; give a val_loader with classes, or metric=..."
            )
        return correct / total


def classification_loss(output: Any, target: Tensor) -> Tensor:
    """Cross-entropy of class scores `(N, C, ...)`, auxiliary heads included.

    Raises:
        InputError: Output or target are not those of a classifier.
    """
    scores = main_output(output)
    if (target.is_floating_point() and target.shape != scores.shape) or scores.ndim < 2:
        raise InputError(
            f"the default loss is cross-entropy, but the output has shape {tuple(scores.shape)} "
            f"and the target {tuple(target.shape)} of {target.dtype}; pass loss_fn=..."
        )
    loss = F.cross_entropy(scores, target)
    # A second output of another shape is no head: features, for example.
    others = output[1:] if _is_tuple(output) else ()
    for head in (o for o in others if isinstance(o, Tensor) and o.shape == scores.shape):
        loss = loss + AUXILIARY_WEIGHT * F.cross_entropy(head, target)
    return loss


def distillation_loss(output: Tensor, wanted: Tensor, temperature: float = 4.0) -> Tensor:
    """Hinton, Vinyals and Dean, arXiv 1503.02531: T^2 KL(softmax(wanted / T), softmax(output / T)).

    Args:
        output: Class scores of the student, `(N, C)`.
        wanted: Class scores of the teacher, `(N, C)`.
        temperature: T; 4 as in Zagoruyko and Komodakis, ICLR 2017.
    """
    student = F.log_softmax(output / temperature, dim=1)
    teacher = F.log_softmax(wanted / temperature, dim=1)
    divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return temperature**2 * divergence


def main_output(output: Any) -> Tensor:
    """The class scores among what a classifier returns: itself, `.logits`, or the first entry."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        output = output.get("logits", output.get("out", next(iter(output.values()))))
    elif hasattr(output, "logits"):
        output = output.logits
    elif _is_tuple(output):
        output = output[0]
    if not isinstance(output, Tensor):
        raise InputError(f"cannot find class scores in an output of {type(output).__name__}")
    return output


def split_pair(batch: Any) -> tuple[Any, Any]:
    """An (input, target) batch as a pair.

    Raises:
        InputError: It is none.
    """
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    kind = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, Sized) else type(batch)
    raise InputError(
        f"the loader yields a {kind}, not (input, target) pairs; "
        "pass forward=lambda model, batch: loss"
    )


def require_scalar(loss: object) -> None:
    """A loss is one number.

    Raises:
        InputError: It is something else.
    """
    if isinstance(loss, Tensor) and loss.ndim == 0:
        return
    if isinstance(loss, Tensor):
        remedy = "average over the batch"
    elif isinstance(loss, (int, float)):
        remedy = "return the tensor itself, without .item() or float()"
    else:
        remedy = "return the loss tensor alone, such as outputs.loss or outputs['loss']"
    raise InputError(f"the loss must be a scalar tensor, not {loss!r}; {remedy}")


def to_device(batch: Any, device: torch.device) -> Any:
    """A nested batch with all tensors on a device."""
    if isinstance(batch, Tensor):
        moved = batch.to(device, non_blocking=True)
        return moved.clone() if moved.is_inference() else moved
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def _examples_told(loader: Loader) -> int | None:
    """How many examples a loader says that a pass has, in this process; None if it does not say.

    A sampler may draw some of the data set only, or some of it twice.
    """
    batch_sampler = getattr(loader, "batch_sampler", None)
    shards = getattr(batch_sampler, "num_processes", 1)
    batch_sampler = getattr(batch_sampler, "batch_sampler", batch_sampler)
    source = getattr(batch_sampler, "sampler", None)
    if not isinstance(loader, DataLoader):
        source = getattr(loader, "sampler", getattr(loader, "dataset", None))
    elif not isinstance(batch_sampler, BatchSampler):
        source = None  # batches of the user's own
    return -(-len(source) // shards) if isinstance(source, Sized) else None


def _is_tuple(output: Any) -> bool:
    return isinstance(output, (tuple, list)) and len(output) > 0


def _recorded_call(model: nn.Module, run: Callable[[], Any]) -> ExampleInputs:
    """What `run` calls the model with, as a mapping of forward arguments."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))

    handle = model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        with evaluating(model), torch.no_grad():
            run()
    finally:
        handle.remove()
    if not calls:
        raise InputError(
            "forward(model, batch) never calls the model it is given; call its argument `model`, "
            "a copy that is pruned, not a variable of yours that holds the network"
        )
    args, kwargs = calls[0]
    if args and kwargs:
        return inspect.signature(model.forward).bind(*args, **kwargs).arguments
    return kwargs or args
