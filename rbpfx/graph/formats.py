"""Formats of fake tensors: how the elements of ordinary ones lie, and new tensors like them.

Ordinary are floating-point tensors in memory of their own. Their elements lie in order (*plain*) or
with the channels last; those that lie otherwise have no format.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from rbpfx.surroundings import autocasts

Shape: TypeAlias = Sequence[int]

_empty = torch.empty  # itself: while a model is traced, torch.fx puts a wrapper in its place
_FLOATING = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def is_ordinary(value: Any) -> bool:
    """Whether a value is a strided floating-point fake tensor that nothing converts on the way."""
    if type(value) is not FakeTensor or value.dtype not in _FLOATING:
        return False
    if value.layout is not torch.strided or value.constant is not None:
        return False
    return not autocasts(value.fake_device.type)


def format_of(value: Any) -> torch.memory_format | None:
    """How the elements of an ordinary tensor lie, if in order or with channels last."""
    if not is_ordinary(value):
        return None
    # Several strides fit an axis of size one. That of the batch makes no difference.
    if value.is_contiguous() and value.stride()[1:] == plain_strides(value.shape)[1:]:
        return torch.contiguous_format
    if value.ndim == 4 and min(value.shape[1:]) > 1:
        last = torch.channels_last
        return last if value.is_contiguous(memory_format=last) else None
    return None


def is_plain(value: Any) -> bool:
    """Whether a value is an ordinary tensor with its elements in order."""
    return format_of(value) is torch.contiguous_format


def plain_strides(shape: Shape) -> tuple[int, ...]:
    """The strides of a tensor whose elements are in order."""
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def goes_with(x: FakeTensor, tensor: Tensor) -> bool:
    """Whether a tensor has the type and the device of another."""
    return tensor.dtype == x.dtype and tensor.device == x.fake_device


def suits(x: FakeTensor, tensor: Tensor | None, *shape: int) -> bool:
    """Whether a parameter or buffer is absent, or goes with `x` and has this shape."""
    return tensor is None or (tensor.shape == shape and goes_with(x, tensor))


def new_tensor(
    x: FakeTensor, shape: Shape, memory_format: torch.memory_format = torch.contiguous_format
) -> FakeTensor:
    """A new tensor of the type and device of `x`."""
    elements = _empty(shape, dtype=x.dtype, device="meta", memory_format=memory_format)
    return FakeTensor(x.fake_mode, elements, x.fake_device)


def new_like(x: Any) -> FakeTensor | None:
    """A new tensor like `x`, if `x` has a format."""
    memory_format = format_of(x)
    return None if memory_format is None else new_tensor(x, x.shape, memory_format)


__all__ = [
    "Shape",
    "format_of",
    "goes_with",
    "is_ordinary",
    "is_plain",
    "new_like",
    "new_tensor",
    "plain_strides",
    "suits",
]
