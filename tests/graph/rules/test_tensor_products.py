"""Products under other names, and by named operands: law and groups, one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.graph.rules.micro import check_operator


def mean(x: Tensor) -> Tensor:
    return x.mean((2, 3))


PRODUCTS: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "matmul, named": (
        lambda x: (
            torch.matmul(other=x.flatten(2), input=x.flatten(2).mT).sum((1, 2))[:, None, None, None]
            * x
        ),
        8,
    ),
    "bmm, named": (
        lambda x: torch.bmm(mat2=x.flatten(2), input=x.flatten(2).mT)[:, :1, :4, None] * x,
        8,
    ),
    "linalg": (lambda x: torch.linalg.matmul(x, x.mT), 8),
    "inner": (lambda x: x * torch.inner(mean(x), mean(x)).sum(), 8),
    "inner, method": (lambda x: x * mean(x).inner(other=mean(x)).sum(), 8),
    "inner with a number": (lambda x: torch.inner(x, x.sum()), 0),
    "outer": (lambda x: x * torch.outer(x.mean((0, 2, 3)), x.mean((0, 1, 2)))[:, :, None], 8),
    "outer, method": (
        lambda x: x * x.mean((0, 1, 2)).outer(vec2=x.mean((0, 2, 3))).t()[..., None],
        8,
    ),
    "tensordot": (
        lambda x: torch.tensordot(x, x, dims=([1, 2], [1, 2])).sum((1, 2))[:, None, :, None] * x,
        8,
    ),
    "tensordot from the end": (
        lambda x: (
            torch.tensordot(a=x, b=x, dims=([-3], [-3])).sum((1, 2, 3, 4, 5))[:, None, None, None]
            * x
        ),
        8,
    ),
    "tensordot, a number of axes": (
        lambda x: x * torch.tensordot(x.mean((0, 3)), x.mean((0, 3)).t(), 1).sum(1)[:, None, None],
        8,
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_law_of_products(name: str) -> None:
    torch.manual_seed(0)
    operator, units = PRODUCTS[name]
    check_operator(operator, units)
