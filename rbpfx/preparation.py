"""What is checked before any work is done: that model, loader and loss go together."""

from __future__ import annotations

from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._pytree import tree_leaves

from rbpfx.emission import VERIFIED_EXAMPLES
from rbpfx.errors import CaptureError, InputError, NothingToPruneError, RbpfxError
from rbpfx.graph.capture import ExampleInputs, call_with, evaluating
from rbpfx.graph.copying import copy_model
from rbpfx.graph.device import device_of
from rbpfx.graph.examples import count_examples, first_examples
from rbpfx.graph.groups import Analysis
from rbpfx.graph.usercode import failing_line
from rbpfx.graph.verification import difference
from rbpfx.surroundings import seeded
from rbpfx.training.task import (
    Loader,
    Task,
    main_output,
    require_scalar,
    split_pair,
    to_device,
)

CAPTURE_TOLERANCE = 1e-4
"""Largest relative difference between a model and its graph (ours)."""

HOOKS: dict[type[Any], str] = {
    WeightNorm: "torch.nn.utils.weight_norm. Call torch.nn.utils.remove_weight_norm before "
    "pruning, or use torch.nn.utils.parametrizations.weight_norm",
    SpectralNorm: "torch.nn.utils.spectral_norm. Call torch.nn.utils.remove_spectral_norm before "
    "pruning, or use torch.nn.utils.parametrizations.spectral_norm",
    BasePruningMethod: "torch.nn.utils.prune. Call torch.nn.utils.prune.remove before pruning",
}
"""Hooks that leave a computed weight in a module -> what to do about them."""


def trainable_copy(model: nn.Module) -> nn.Module:
    """A copy of the model, which has to be one that can be trained.

    Raises:
        InputError: Its parameters are of too few bits.
        CaptureError: It cannot be copied.
    """
    low = {p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize < 4}
    if low:
        raise InputError(
            f"the model has parameters of {', '.join(sorted(map(str, low)))}, too coarse to train "
            "noise on; pass model.float() and convert the result back"
        )
    try:
        return copy_model(model, {})
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied ({error}). rbpfx works on a copy so that "
            f"your model stays as it is; {_copy_remedy(model)}"
        ) from error


def _copy_remedy(model: nn.Module) -> str:
    """What to do about a model that cannot be copied."""
    for name, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            remedy = next((words for kind, words in HOOKS.items() if isinstance(hook, kind)), None)
            if remedy is not None:
                return f"{name or 'the model'!r} caches a weight that a hook computes: {remedy}"
    cached = [
        f"{name}.{attribute}".lstrip(".")
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    found = f" ({', '.join(cached)})" if cached else ""
    return f"detach tensors that the model caches in its attributes{found}."


def example_inputs(
    model: nn.Module, loader: Loader, task: Task, distill: bool = False
) -> tuple[ExampleInputs, int]:
    """Inputs of the first batch and its size, after one full trial of the task on it.

    Args:
        model: The network.
        loader: Training batches.
        task: Turns them into losses.
        distill: Whether class scores are imitated, so that there must be some.

    Raises:
        InputError: Model, loss and loader do not fit together.
    """
    batch = next(iter(loader), None)
    if batch is None:
        raise InputError("the loader yields no batch")
    inputs: ExampleInputs | None = None
    try:
        inputs = task.example_inputs(model, batch)
        with evaluating(model), torch.no_grad():
            loss = task.loss(model, batch)
    except RbpfxError:
        raise
    except Exception as error:
        leaves = tree_leaves(batch if inputs is None else inputs)
        shapes = [tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)]
        raise InputError(
            f"the model and the loss do not run on the loader's first batch (tensors of shape "
            f"{shapes}): {error}"
        ) from error
    require_scalar(loss)
    if not isfinite(float(loss)):
        raise InputError(
            f"the loss of the model is {float(loss)} before anything was pruned; check its "
            "parameters and the loader's first batch for NaN"
        )
    if distill and not task.is_classification:
        _require_class_scores(model, task, batch)
    return inputs, count_examples(batch)


def _require_class_scores(model: nn.Module, task: Task, batch: Any) -> None:
    """A loss of the user's own is that of a classifier, as far as its first batch tells."""
    inputs, target = split_pair(to_device(batch, task.device))
    with evaluating(model), torch.no_grad():
        scores = main_output(call_with(model, inputs))
    found = ""
    if scores.ndim < 2 or scores.shape[1] < 2:
        found = f"the output of shape {tuple(scores.shape)} has no classes on axis 1"
    elif isinstance(target, Tensor) and target.is_floating_point():
        if not _is_distribution(target, scores):
            found = f"the targets are {target.dtype} numbers, neither classes nor probabilities"
    if found:
        raise InputError(
            f"distill=True imitates class scores, by their softmax over axis 1, but {found}; leave "
            "it out, or distil in the loss of a Training(train_step=...) of your own"
        )


def _is_distribution(target: Tensor, scores: Tensor) -> bool:
    """Whether targets are probabilities of the classes on axis 1."""
    if target.shape != scores.shape or bool((target < 0).any()):
        return False
    total = target.sum(1)
    return torch.allclose(total, torch.ones_like(total), atol=1e-3)


def check_capture(model: nn.Module, gm: nn.Module, inputs: ExampleInputs) -> None:
    """The graph must compute what the model computes, the second time too.

    Raises:
        CaptureError: It does not, or the model itself computes something else every time.
    """
    device = device_of(model)

    def call(network: nn.Module, seed: int = 0) -> Any:
        with seeded(seed, device):
            return call_with(network, inputs)

    with evaluating(model, gm), torch.no_grad():
        wanted = call(model)
        error = max(difference(wanted, call(gm)), difference(call(model), call(gm)))
        again, drawn = difference(wanted, call(model)), difference(wanted, call(model, seed=1))
    if not again <= CAPTURE_TOLERANCE:
        raise CaptureError(
            f"two calls of the model in eval mode with the same input differ by {again:.1e} of its "
            "output: it counts its calls, keeps a state, or draws from a random generator other "
            "than torch's. Make its forward in eval mode depend on the input alone."
        )
    if not drawn <= CAPTURE_TOLERANCE:
        raise CaptureError(
            f"the model draws random numbers in eval mode, which change its output by {drawn:.1e}: "
            "no pruned network could be compared with it. Draw in train mode only: "
            "F.dropout(..., training=self.training); the mean instead of a sample unless "
            "self.training."
        )
    if not error <= CAPTURE_TOLERANCE:
        raise CaptureError(
            f"the captured graph differs from the model by {error:.1e} of its output: the model's "
            "Python code depends on something that tracing fixes. Keep that module whole with "
            "leaf_modules=[...]."
        )


def require_free_batch(model: nn.Module, gm: nn.Module, inputs: ExampleInputs) -> None:
    """Model and graph run at the batch sizes at which networks are verified and measured.

    Raises:
        InputError: One does not; says where the size is fixed.
    """
    examples = count_examples(inputs, 0)
    for size in sorted({1, VERIFIED_EXAMPLES}):
        if size >= examples:
            continue
        for network, subject in ((model, "model"), (gm, "captured graph")):
            error = _failure(network, first_examples(inputs, size))
            if error is not None:
                cause = str(error).partition(" Capture it again")[0].rstrip(".")
                raise InputError(
                    f"the {subject} runs on {examples} examples and not on {size}: its forward "
                    f"fixes the batch size{failing_line(error)}: {cause}. Pruned "
                    f"networks are verified and timed on {VERIFIED_EXAMPLES} and 1 examples; take "
                    "the batch size from the input, as in x.view(x.shape[0], -1), and put it in no "
                    "range(...) and no torch.Size(...)."
                ) from error


def _failure(network: nn.Module, inputs: ExampleInputs) -> Exception | None:
    """What a network raises in eval mode; None if it runs."""
    with seeded(0, device_of(network)), evaluating(network), torch.no_grad():
        try:
            call_with(network, inputs)
        except Exception as error:
            return error
    return None


def require_groups(analysis: Analysis) -> None:
    """There is something to prune.

    Raises:
        NothingToPruneError: There is not; says why, axis by axis.
    """
    if not analysis.groups:
        reasons = "\n".join(f"  {axis.name}: {axis.reason}" for axis in analysis.frozen)
        raise NothingToPruneError(
            "the model has no channel that may be removed:\n" + (reasons or "  no layer was found")
        )


__all__ = [
    "check_capture",
    "example_inputs",
    "require_free_batch",
    "require_groups",
    "trainable_copy",
]
