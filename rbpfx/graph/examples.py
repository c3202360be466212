"""The examples of a batch: how many there are, the first of them, and as many as one likes.

A batch is a nest of mappings, tuples and lists. One entry an example have tensors, along their
first axis, and two kinds of lists inside the nest, as detectors take them: of images `(C, H, W)` of
their own sizes, and of mappings with the same keys. A list that is the batch itself is a tuple of
arguments, which is what collated tuples become. The first of these that has axes tells how many
examples there are; others of another length, an attention mask for example, belong to all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from rbpfx.errors import InputError

_IMAGE_AXES = 3


def count_examples(batch: Any, default: int = 1) -> int:
    """Number of examples in a nested batch.

    Args:
        batch: The batch.
        default: The answer for batches that do not tell.
    """
    return next((_length(part) for part in _parts(batch)), default)


def first_examples(batch: Any, count: int) -> Any:
    """A nested batch cut to its first examples.

    Args:
        batch: The batch; mappings become dictionaries.
        count: How many examples to keep at most, 0 at least.
    """
    return _changed(batch, count_examples(batch, 0), lambda part: part[:count])


def resize_batch(batch: Any, count: int) -> Any:
    """A nested batch cut, or repeated from the start, to a number of examples.

    Args:
        batch: The batch; mappings become dictionaries.
        count: How many examples there shall be, 1 at least.

    Raises:
        InputError: The batch has no examples.
    """
    examples = count_examples(batch, 0)
    if not examples:
        raise InputError(
            "another batch size needs example inputs with a tensor that has the examples on axis "
            "0; leave it out to take the inputs as they are"
        )

    def resized(part: Any) -> Any:
        if count <= examples:
            return part[:count]
        if isinstance(part, list):
            return [part[i % examples] for i in range(count)]
        return part[torch.arange(count, device=part.device) % examples]

    return _changed(batch, examples, resized)


def _parts(value: Any, nested: bool = False) -> Iterator[Any]:
    """The tensors and lists with one entry an example, in order."""
    if _has_examples(value, nested):
        yield value
        return
    children = value.values() if isinstance(value, Mapping) else value
    if isinstance(children, (tuple, list)) or isinstance(value, Mapping):
        for child in children:
            yield from _parts(child, nested=True)


def _changed(value: Any, examples: int, change: Callable[[Any], Any], nested: bool = False) -> Any:
    """A nest with all changed that has one entry for each of so many examples."""
    if _has_examples(value, nested) and _length(value) == examples:
        return change(value)

    def child(entry: Any) -> Any:
        return _changed(entry, examples, change, nested=True)

    if isinstance(value, Mapping):
        return {key: child(entry) for key, entry in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(child, value))
    if isinstance(value, (tuple, list)):
        return type(value)(map(child, value))
    return value


def _has_examples(value: Any, nested: bool) -> bool:
    """Whether a value has one entry an example, as far as its form tells."""
    if isinstance(value, Tensor):
        return value.ndim > 0
    if not nested or not isinstance(value, list) or not value:
        return False
    if all(isinstance(entry, Mapping) for entry in value):
        return all(entry.keys() == value[0].keys() for entry in value)
    return all(isinstance(entry, Tensor) and entry.ndim == _IMAGE_AXES for entry in value)


def _length(part: Any) -> int:
    return len(part) if isinstance(part, list) else int(part.shape[0])


__all__ = ["count_examples", "first_examples", "resize_batch"]
