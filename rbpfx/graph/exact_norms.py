"""Normalisations over channels of which some have gone, counted as zeros.

`rewrite` emits them with `normalization="exact"`. Removed channels add nothing to sums, so a mean
is a sum divided by the original count, and in a variance they stand for the squared mean. What
comes out for the channels that are left is what the whole normalisation computes when the others
are multiplied by zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    original_count: int,
) -> Tensor:
    """`F.layer_norm` over `original_count` entries, of which those in `input` are left."""
    dims = tuple(range(-len(normalized_shape), 0))
    wide = _widened(input)
    mean = wide.sum(dims, keepdim=True) / original_count
    centered = wide - mean
    gone = original_count - prod(normalized_shape)
    squares = centered.square().sum(dims, keepdim=True) + gone * mean.square()
    result = (centered * (squares / original_count + eps).rsqrt()).to(input.dtype)
    return _affine(result, weight, bias)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    eps: float | None,
    original_count: int,
) -> Tensor:
    """`F.rms_norm` over `original_count` entries, of which those in `input` are left."""
    if eps is None:
        eps = torch.finfo(input.dtype).eps
    ratio = original_count / prod(normalized_shape)
    scale = ratio**0.5
    result = F.rms_norm(input, tuple(normalized_shape), None, eps * ratio) * scale
    return _affine(result, weight, None)


def group_norm(
    input: Tensor,
    group_sizes: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    original_count: int,
) -> Tensor:
    """`F.group_norm` with groups of `original_count` channels, of which some are left.

    Args:
        input: (N, C, ...).
        group_sizes: Channels left in every group; they sum up to C.
        weight: (C,).
        bias: (C,).
        eps: Added to the variance.
        original_count: Channels that every group had.
    """
    wide = _widened(input).flatten(2) if input.ndim > 2 else _widened(input).unsqueeze(2)
    sizes = torch.tensor(tuple(group_sizes), device=input.device)
    group = torch.arange(len(sizes), device=input.device).repeat_interleave(
        sizes, output_size=wide.shape[1]
    )
    count = original_count * wide.shape[2]

    def summed(values: Tensor) -> Tensor:
        """(N, C, L) to (N, groups)."""
        zeros = values.new_zeros(values.shape[0], len(sizes))
        return zeros.index_add(1, group, values.sum(2))

    mean = summed(wide) / count
    centered = wide - mean[:, group, None]
    gone = (original_count - sizes) * wide.shape[2]
    squares = summed(centered.square()) + gone * mean.square()
    scale = (squares / count + eps).rsqrt()
    result = (centered * scale[:, group, None]).reshape(input.shape).to(input.dtype)
    shape = (-1, *(1 for _ in input.shape[2:]))
    return _affine(result, *(t if t is None else t.reshape(shape) for t in (weight, bias)))


class ExactLayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` over channels of which some have gone; made by `take_over`."""

    original_count: int

    def forward(self, input: Tensor) -> Tensor:
        """Normalise as if the channels that have gone were zeros."""
        shape = self.normalized_shape
        return layer_norm(input, shape, self.weight, self.bias, self.eps, self.original_count)

    def extra_repr(self) -> str:
        """The sizes left, and the original count."""
        return f"{super().extra_repr()}, original_count={self.original_count}"


class ExactRMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` over channels of which some have gone; made by `take_over`."""

    original_count: int

    def forward(self, x: Tensor) -> Tensor:
        """Normalise as if the channels that have gone were zeros."""
        return rms_norm(x, self.normalized_shape, self.weight, self.eps, self.original_count)

    def extra_repr(self) -> str:
        """The sizes left, and the original count."""
        return f"{super().extra_repr()}, original_count={self.original_count}"


class ExactGroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` over channels of which some have gone; made by `take_over`.

    Attributes:
        group_sizes: Channels left in every group.
        original_count: Channels that every group had.
    """

    group_sizes: tuple[int, ...]
    original_count: int

    def forward(self, input: Tensor) -> Tensor:
        """Normalise as if the channels that have gone were zeros."""
        sizes = self.group_sizes
        return group_norm(input, sizes, self.weight, self.bias, self.eps, self.original_count)

    def extra_repr(self) -> str:
        """The sizes left, and the original count."""
        sizes = f"group_sizes={self.group_sizes}, original_count={self.original_count}"
        return f"{super().extra_repr()}, {sizes}"


def take_over(module: nn.Module, exact: type[nn.Module], original_count: int) -> None:
    """Turn a normalisation into its exact counterpart where it is, parameters and all.

    As torch's parametrisations do, this changes the class of the object: names, ties and the
    training flag stay what they are.
    """
    module.__class__ = exact
    module.original_count = original_count  # type: ignore[assignment]


def _widened(value: Tensor) -> Tensor:
    """A half-precision value as float, as torch's own normalisations compute."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def _affine(value: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        value = value * weight
    return value if bias is None else value + bias


__all__ = [
    "ExactGroupNorm",
    "ExactLayerNorm",
    "ExactRMSNorm",
    "group_norm",
    "layer_norm",
    "rms_norm",
    "take_over",
]
