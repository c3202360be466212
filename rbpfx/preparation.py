"""What is checked before any work is done: that model, loader and loss go together."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rbpfx.errors import CaptureError, InputError, NothingToPruneError, RbpfxError
from rbpfx.graph.capture import ExampleInputs, call_with, evaluating
from rbpfx.graph.copying import copy_model
from rbpfx.graph.examples import count_examples
from rbpfx.graph.groups import Analysis
from rbpfx.graph.verification import difference
from rbpfx.training.task import Loader, Task, require_scalar

CAPTURE_TOLERANCE = 1e-4
"""Largest relative difference between a model and its graph (ours)."""


def require_repeatable(loader: Loader, val_loader: Loader | None) -> None:
    """Both loaders can be gone through more than once.

    Raises:
        InputError: One is an iterator.
    """
    for name, batches in (("loader", loader), ("val_loader", val_loader)):
        if isinstance(batches, Iterator):
            raise InputError(
                f"the {name} is a {type(batches).__name__}, which can be gone through only once; "
                "pass a DataLoader or a list"
            )


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
            "your model stays as it is; detach tensors that the model caches in its attributes."
        ) from error


def example_inputs(model: nn.Module, loader: Loader, task: Task) -> tuple[ExampleInputs, int]:
    """Inputs of the first batch and its size, after one full trial of the task on it.

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
    return inputs, count_examples(batch)


def check_capture(model: nn.Module, gm: nn.Module, inputs: ExampleInputs) -> None:
    """The graph must compute what the model computes, the second time too.

    Raises:
        CaptureError: It does not.
    """
    with evaluating(model, gm), torch.no_grad():
        error = max(difference(call_with(model, inputs), call_with(gm, inputs)) for _ in range(2))
    if not error <= CAPTURE_TOLERANCE:
        raise CaptureError(
            f"the captured graph differs from the model by {error:.1e} of its output: the model's "
            "Python code depends on something that tracing fixes. Keep that module whole with "
            "leaf_modules=[...]."
        )


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
    "require_groups",
    "require_repeatable",
    "trainable_copy",
]
