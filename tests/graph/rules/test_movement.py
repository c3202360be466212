"""Operators that move channels: law and groups, one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.graph.rules.micro import check_operator


def windows(x: Tensor) -> Tensor:
    """Windows of tokens, shifted, as in Swin."""
    n, c, h, w = x.shape
    x = torch.roll(x.permute(0, 2, 3, 1), shifts=(-1, -1), dims=(1, 2))
    x = x.view(n, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
    x = x.sin().view(n, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
    return x.roll((1, 1), (1, 2)).permute(0, 3, 1, 2)


def space_to_depth(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    x = x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4)
    return x.reshape(n, c * 4, h // 2, w // 2)


def depth_to_space(x: Tensor) -> Tensor:
    n, _, h, w = x.shape
    x = x.view(n, -1, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(n, -1, 2 * h, 2 * w)


OPERATORS: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "flip of channels": (lambda x: x.flip(1), 8),
    "flip of space": (lambda x: torch.flip(x, (2, 3)), 8),
    "roll of channels": (lambda x: x.roll(3, 1), 8),
    "roll of channels and space": (lambda x: x.roll((1, 1), (1, 2)), 8),
    "roll of everything": (lambda x: x.roll(1), 0),
    "repeat": (lambda x: x.repeat(1, 3, 1, 1), 8),
    "tile": (lambda x: torch.tile(x, (2, 1, 1)), 8),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, dim=1), 8),
    "rot90": (lambda x: torch.rot90(x, 1, (2, 3)), 8),
    "rot90 of channels": (lambda x: torch.rot90(x, 2, (1, 2)), 0),
    "pixel shuffle": (nn.PixelShuffle(2), 2),
    "pixel shuffle by views": (depth_to_space, 2),
    "pixel unshuffle": (nn.PixelUnshuffle(2), 8),
    "space to depth": (space_to_depth, 8),
    "channel shuffle": (nn.ChannelShuffle(2), 8),
    "patches": (lambda x: F.unfold(x, 2, stride=2).transpose(1, 2), 8),
    "patches and back": (lambda x: F.fold(F.unfold(x, 3, padding=1), (4, 4), 3, padding=1), 8),
    "windows along an axis": (lambda x: x.unfold(2, 2, 2).mean(-1), 8),
    "windows": (windows, 8),
    "matrix transpose": (lambda x: x.flatten(2).mT, 8),
    "stack": (lambda x: torch.stack([x, x.sin()], 2).flatten(1, 2), 8),
    "stack in front": (lambda x: torch.stack([x, x.sin()], 1).flatten(1, 2), 8),
    "gate": (lambda x: torch.mul(*x.unflatten(1, (2, 4)).unbind(1)), 4),
    "second half": (lambda x: x.unflatten(1, (2, 4))[:, 1], 4),
    "select": (lambda x: x.unflatten(1, (4, 2)).select(2, 0), 4),
    "views of a number": (lambda x: x * x.mean().view(1).reshape(()).view(1, 1), 8),
    "view as": (lambda x: x.flatten(2).view_as(x), 8),
}


def spatial(x: Tensor) -> Tensor:
    """A map that is to be spread over channels."""
    return x.mean(1, keepdim=True).sigmoid()


def channelwise(x: Tensor) -> Tensor:
    """A gate that is to be spread over space."""
    return x.mean((2, 3), keepdim=True).sigmoid()


def views_of_repetitions(x: Tensor) -> Tensor:
    spread = x * spatial(x).expand(-1, 8, -1, -1)
    return spread.permute(0, 2, 3, 1).flatten(1).unflatten(1, (4, 4, 8)).permute(0, 3, 1, 2)


REPETITIONS: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "expand": (lambda x: x * spatial(x).expand(-1, 8, -1, -1), 8),
    "expand to one size": (lambda x: x * spatial(x).expand(-1, x.shape[1], -1, -1), 8),
    "expand to sizes": (lambda x: x * spatial(x).expand(x.size()), 8),
    "expand to a list": (lambda x: x * spatial(x).expand(*x.shape), 8),
    "broadcast_to": (lambda x: torch.broadcast_to(spatial(x), x.shape) * x, 8),
    "broadcast_to by name": (lambda x: torch.broadcast_to(spatial(x), size=(2, 8, 4, 4)) * x, 8),
    "broadcast_to as a method": (lambda x: spatial(x).broadcast_to((2, 8, 4, 4)) + x, 8),
    "repeat": (lambda x: x * spatial(x).repeat(1, 8, 1, 1), 8),
    "repeat in a tuple": (lambda x: x * spatial(x).repeat((1, x.size(1), 1, 1)), 8),
    "repeat in front": (lambda x: x * spatial(x)[:, 0].mean(0).repeat(1, 8, 1, 1), 8),
    "repeat over the batch": (lambda x: x * spatial(x)[:, 0].mean(0).repeat(8, 1, 1), 0),
    "tile": (lambda x: x * torch.tile(spatial(x), (8, 1, 1)), 8),
    "tile by name": (lambda x: x * torch.tile(spatial(x), dims=(8, 1, 1)), 8),
    "repeat_interleave": (lambda x: x * spatial(x).repeat_interleave(8, 1), 8),
    "named": (lambda x: x * torch.repeat_interleave(spatial(x), repeats=8, dim=-3), 8),
    "broadcast_tensors": (lambda x: torch.mul(*torch.broadcast_tensors(x, spatial(x))), 8),
    "nothing but repetitions": (lambda x: spatial(x).expand(-1, 8, -1, -1), 8),
    "flattened": (views_of_repetitions, 8),
    "flattened groups": (
        lambda x: x * spatial(x).repeat(1, 8, 1, 1).unflatten(1, (2, 4)).flatten(1, 2),
        8,
    ),
    "beside no channels": (lambda x: torch.cat([x, x[:, 3:3].sin() * 2.0], 1), 8),
    "one channel to all": (lambda x: x * x[:, 2:3].expand(-1, 8, -1, -1), 7),
    "one channel, repeated": (lambda x: x * x[:, 2:3].repeat(1, 8, 1, 1), 7),
    "over space": (lambda x: x * channelwise(x).expand(-1, -1, 4, 4), 8),
    "global features": (lambda x: torch.cat([x, channelwise(x).repeat(1, 1, 4, 4)], 1), 8),
    "heads side by side": (
        lambda x: x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(2, 16, 4, 4),
        8,
    ),
    "heads behind": (lambda x: x[:, None].expand(-1, 2, -1, -1, -1).reshape(2, 16, 4, 4), 8),
}


@pytest.mark.parametrize("name", REPETITIONS)
def test_law_of_repetitions(name: str) -> None:
    torch.manual_seed(0)
    operator, units = REPETITIONS[name]
    check_operator(operator, units)


@pytest.mark.parametrize("name", OPERATORS)
def test_law(name: str) -> None:
    torch.manual_seed(0)
    operator, units = OPERATORS[name]
    check_operator(operator, units)
