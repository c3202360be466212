"""Pooling, and back to where it came from: law and groups, one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.graph.rules.micro import check_operator


class Unpooled(nn.Module):
    """Pools, computes and unpools."""

    def __init__(self, sized: bool) -> None:
        super().__init__()
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)
        self.sized = sized

    def forward(self, x: Tensor) -> Any:
        y, places = self.pool(x)
        options = {"output_size": x.size()} if self.sized else {}
        return self.unpool(y.sin(), places, **options)


def lines(x: Tensor) -> Tensor:
    y, places = F.max_pool1d(x[..., 0], 2, return_indices=True)
    return F.max_unpool1d(indices=places, input=y, kernel_size=2)[..., None]


def volumes(x: Tensor) -> Tensor:
    pool, unpool = nn.MaxPool3d((2, 2, 1), return_indices=True), nn.MaxUnpool3d((2, 2, 1))
    return unpool(*pool(x[..., None]))[..., 0]


UNPOOLED: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "module": (Unpooled(False), 8),
    "module with a size": (Unpooled(True), 8),
    "function": (lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), 8),
    "one axis, by name": (lines, 8),
    "three axes": (volumes, 8),
}


@pytest.mark.parametrize("name", UNPOOLED)
def test_law_of_unpooling(name: str) -> None:
    torch.manual_seed(0)
    operator, units = UNPOOLED[name]
    check_operator(operator, units)
