"""Memory layouts: images and convolution weights with the channels last, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


def has_images(model: nn.Module) -> bool:
    """Whether a model has 4-d weights, so that the layout matters."""
    return any(p.ndim == 4 for p in model.parameters())


def to_channels_last(value: Any) -> Any:
    """Lay out all 4-d tensors of a module (in place) or of a nested batch with channels last."""
    if not isinstance(value, nn.Module):
        return tree_map_only(Tensor, _channels_last, value)
    for tensor in _tensors(value):
        tensor.data = _channels_last(tensor.data)
    return value


def keep_layout(model: nn.Module) -> Callable[[], None]:
    """Remember how 4-d tensors are laid out; the function that lays them out like that again."""
    before = [(t, t.stride(), _format(t)) for t in _tensors(model)]

    def restore() -> None:
        for tensor, strides, memory_format in before:
            if tensor.stride() != strides:
                tensor.data = tensor.data.contiguous(memory_format=memory_format)

    return restore


@contextmanager
def keeping_layout(model: nn.Module) -> Iterator[None]:
    """Give the tensors of a model the memory layout back that they had."""
    restore = keep_layout(model)
    try:
        yield
    finally:
        restore()


def _tensors(model: nn.Module) -> list[Tensor]:
    return [t for t in (*model.parameters(), *model.buffers()) if t.ndim == 4]


def _channels_last(tensor: Tensor) -> Tensor:
    if tensor.ndim != 4:
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last)


def _format(tensor: Tensor) -> torch.memory_format:
    if tensor.is_contiguous() or not tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last
