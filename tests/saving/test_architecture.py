"""Two architectures are the same if their tensors and their operators are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rbpfx import trace
from rbpfx.saving.architecture import Architecture, describe

IMAGES = torch.rand(2, 3, 8, 8)


class Net(nn.Module):
    """A network whose settings can be changed without changing a tensor."""

    def __init__(self, stride: int = 1, slope: float = 0.1, eps: float = 1e-5, p: float = 0.1):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride, padding=1)
        self.bn = nn.BatchNorm2d(4, eps)
        self.drop = nn.Dropout(p)
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.bn(self.conv(x)), self.slope)
        return self.drop(x) - x.mean(1, keepdim=True)


class Swapped(Net):
    """The operands of the last operator exchanged."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.bn(self.conv(x)), self.slope)
        return x.mean(1, keepdim=True) - self.drop(x)


class Rewritten(Net):
    """The same in other words."""

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-1]
        assert size > 1
        hidden = torch.nn.functional.leaky_relu(self.bn(self.conv(x)), self.slope)
        return self.drop(hidden) - torch.mean(hidden, 1, keepdim=True)


def architecture(model: nn.Module, images: Tensor = IMAGES) -> Architecture:
    return describe(trace(model, images))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Net(stride=2), "Conv2d"),
        (lambda: Net(slope=0.2), "leaky_relu"),
        (lambda: Net(eps=1e-3), "BatchNorm2d"),
        (lambda: Net(p=0.2), "Dropout"),
        (Swapped, "'%4 = mean(%3, 1, keepdim=True) -> (2, 1, 8, 8)' here"),
        (lambda: Net().double(), "'conv.weight' is a parameter of float32"),
    ],
)
def test_differences_are_found_and_named(make: Callable[[], nn.Module], message: str) -> None:
    dtype = next(make().parameters()).dtype
    mine, other = architecture(Net()), architecture(make(), IMAGES.to(dtype))
    assert mine.sha256 != other.sha256
    assert message in mine.difference(other)


@pytest.mark.parametrize("make", [Net, Rewritten, lambda: Net().eval()])
def test_what_does_not_matter(make: Callable[[], nn.Module]) -> None:
    mine, other = architecture(Net()), architecture(make())
    assert mine.difference(other) is None
    assert mine.sha256 == other.sha256
