"""Example inputs of any number of examples: cut, or repeated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from rbpfx.errors import InputError


def examples_in(value: Any) -> int:
    """Number of examples in nested inputs: the length of the first tensor that has axes, or 0."""
    tensors = (v for v in tree_leaves(value) if isinstance(v, Tensor) and v.ndim)
    return next((len(tensor) for tensor in tensors), 0)


def first_examples(value: Any, count: int) -> Any:
    """Nested example inputs cut to their first examples.

    Args:
        value: Nested inputs. The first tensor tells the number of examples; tensors of another
            length, a mask for example, stay whole.
        count: How many examples to keep at most.
    """
    examples = examples_in(value)

    def cut(leaf: Any) -> Any:
        of_examples = isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == examples
        return leaf[:count] if of_examples else leaf

    return tree_map(cut, value)


def resize_batch(value: Any, count: int) -> Any:
    """Nested example inputs cut, or repeated from the start, to a number of examples.

    Args:
        value: Nested inputs, understood as by `first_examples`.
        count: How many examples there shall be.

    Raises:
        InputError: `count` is no positive number, or the inputs have no examples.
    """
    require_positive(batch_size=count)
    examples = examples_in(value)
    if not examples:
        raise InputError(
            "batch_sizes needs example inputs with a tensor that has the examples on axis 0; "
            "leave it out to measure with the inputs as they are"
        )
    if count <= examples:
        return first_examples(value, count)

    def repeat(leaf: Any) -> Any:
        of_examples = isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == examples
        return leaf[torch.arange(count, device=leaf.device) % examples] if of_examples else leaf

    return tree_map(repeat, value)


def require_positive(**values: int | None) -> None:
    """Raise an `InputError` that names the first value that is no positive whole number."""
    for name, value in values.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise InputError(f"{name}={value!r} must be a whole number, 1 at least")
