"""Numerical faults: where the numbers of a step stopped being finite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rbpfx.surroundings import generators_kept
from rbpfx.training.task import Task


def bad_batch(batches: Sequence[Any]) -> str | None:
    """What is wrong with the numbers of some batches, in words; None if they are all finite."""
    for batch in batches:
        for place, leaf in enumerate(tree_leaves(batch)):
            if isinstance(leaf, Tensor) and not _finite(leaf):
                return (
                    f"tensor {place} of its batch, of shape {tuple(leaf.shape)}, holds NaN or Inf"
                )
    return None


def locate(model: nn.Module, batch: Any, task: Task) -> str | None:
    """Where the numbers of a forward pass stop being finite, in words; None if they do not.

    Also None if the batch is none for the task, as one for a training step of the user's own.
    Running statistics change as in any forward pass in train mode; random numbers are not drawn
    from the generators that the training draws from.
    """
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            return f"parameter {name!r} holds NaN or Inf"
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(_: nn.Module, __: object, output: object) -> None:
            tensors = (t for t in tree_leaves(output) if isinstance(t, Tensor))
            if not found and not all(map(_finite, tensors)):
                found.append(f"the activations of {name!r} hold NaN or Inf")

        return hook

    handles = [m.register_forward_hook(look(name)) for name, m in model.named_modules() if name]
    try:
        with generators_kept(task.device), torch.no_grad():
            loss = task.loss(model, batch)
    except Exception:
        return None
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return found[0]
    return None if _finite(loss) else "the loss is not finite although the activations are"


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.detach()).all())


__all__ = ["bad_batch", "locate"]
