"""Operators under the other names that torch has for them: law and groups, one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.graph.rules.micro import check_operator

SPELLINGS: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "hstack": (lambda x: torch.hstack([x, x.sin()]), 8),
    "hstack by name": (lambda x: torch.hstack(tensors=(x, x.sin())), 8),
    "hstack of vectors": (
        lambda x: x * torch.hstack((x.mean((0, 2, 3)), x[0, :, 0, 0]))[8:, None, None],
        8,
    ),
    "vstack": (lambda x: torch.vstack((x, x.cos())), 8),
    "vstack of vectors": (
        lambda x: x * torch.vstack((x.mean((0, 2, 3)),) * 2)[0][:, None, None],
        0,
    ),
    "dstack": (lambda x: torch.dstack((x, x.cos())), 8),
    "hsplit": (lambda x: torch.mul(*x.hsplit(2)), 4),
    "hsplit at": (lambda x: torch.hsplit(x, [3])[1], 8),
    "vsplit": (lambda x: torch.vsplit(x, 2)[0], 8),
    "dsplit": (lambda x: torch.add(*torch.dsplit(x, 2)), 8),
    "unsafe_chunk": (lambda x: torch.mul(*x.unsafe_chunk(2, 1)), 4),
    "unsafe_split": (lambda x: torch.mul(*torch.unsafe_split(x, 4, dim=-3)), 4),
    "greater": (lambda x: x * torch.greater(x, x.sin()), 8),
    "less_equal": (lambda x: x * x.less_equal(0.2), 8),
    "not_equal": (lambda x: x * x.not_equal(other=0.1), 8),
    "isclose": (lambda x: x * torch.isclose(x, x.cos(), rtol=0.5), 8),
    "absolute": (lambda x: x.absolute() + x.sin().absolute_(), 8),
    "float_power": (lambda x: torch.float_power(x.abs() + 1, 0.5), 8),
    "expit": (lambda x: torch.special.expit(x), 8),
    "heaviside": (lambda x: x * torch.heaviside(x.detach(), x.new_ones(8, 1, 1)), 8),
    "adjoint": (lambda x: x.flatten(2).adjoint() + torch.adjoint(x.flatten(2)), 8),
    "numel": (lambda x: x / torch.numel(x) + torch.numel(input=x), 8),
    "empty_like": (lambda x: torch.empty_like(x).copy_(x), 8),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_law_of_spellings(name: str) -> None:
    torch.manual_seed(0)
    operator, units = SPELLINGS[name]
    check_operator(operator, units)
