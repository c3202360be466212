"""Picking, writing and making up tensors: law and groups, one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rbpfx.testing import check_rule
from tests.graph.rules.micro import check_operator


class Picked(nn.Module):
    """Picks by a buffer."""

    def __init__(self, positions: Any, pick: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.register_buffer("positions", torch.tensor(positions))
        self.pick = pick

    def forward(self, x: Tensor) -> Tensor:
        return self.pick(x, self.positions)


class RelativePositionBias(nn.Module):
    """A learnt table with one column per channel, picked by a buffer of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 8))
        self.register_buffer("index", torch.arange(16).reshape(4, 4) % 5)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.table[self.index.view(-1)].view(4, 4, -1).permute(2, 0, 1)
        return x + bias.contiguous().unsqueeze(0)


def write(function: Callable[[Tensor, Tensor], Any]) -> Callable[[Tensor], Tensor]:
    def apply(x: Tensor) -> Tensor:
        y = x * 2.0
        function(y, x)
        return y.sin()

    return apply


def assign(index: Any, value: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    return write(lambda y, x: y.__setitem__(index, value(x)))


def zero_padded(x: Tensor) -> Tensor:
    y = x.new_zeros(x.shape[0], x.shape[1] + 4, *x.shape[2:])
    y[:, 2:10] = x
    return y


PICKS: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "buffer along channels": (Picked([1, 7, 1, 4], lambda x, i: x[:, i]), 8),
    "index_select by a buffer": (Picked([1, 7, 4], lambda x, i: x.index_select(1, i)), 8),
    "list along channels": (lambda x: x[:, [0, 3, 5]], 8),
    "buffer along space": (Picked([0, 2], lambda x, i: x[:, :, i]), 8),
    "table of positions": (Picked([[0, 2], [1, 1]], lambda x, i: x[:, :, 0, i]), 8),
    "apart": (Picked([0, 2], lambda x, i: x.permute(0, 2, 1, 3)[:, i, :, i].mT[..., None]), 8),
    "computed along channels": (lambda x: x.gather(1, x.argsort(1)), 0),
    "gather along space": (lambda x: x.gather(3, x.argsort(3)), 8),
    "take_along_dim": (lambda x: torch.take_along_dim(x, x.argsort(2)[:, :, :2], 2), 8),
    "relative position bias": (RelativePositionBias(), 8),
}
WRITES: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "space": (assign((..., slice(1, None)), lambda x: x[..., 1:]), 8),
    "channels": (assign((slice(None), slice(2, 5)), lambda x: x[:, 2:5].cos()), 8),
    "other channels": (assign((slice(None), slice(2, 5)), lambda x: x[:, :3]), 5),
    "number": (assign((slice(None), slice(2, 5)), lambda x: 0.5), 8),
    "one channel": (assign((slice(None), 3), lambda x: 0.5), 7),
    "every other channel": (assign((slice(None), slice(None, None, 2)), lambda x: 1.0), 0),
    "copy_ to a slice": (write(lambda y, x: y[:, 2:5].copy_(x[:, 2:5])), 8),
    "zero_ of space": (write(lambda y, x: y[..., 0].zero_()), 0),
    "fill_": (write(lambda y, x: y.fill_(0.3)), 8),
    "padding by hand": (zero_padded, 8),
    "added ones": (lambda x: x + torch.ones(x.shape, dtype=x.dtype), 8),
    "concatenated zeros": (lambda x: torch.cat([x, torch.zeros_like(x)[:, :3]], 1), 8),
    "full": (lambda x: torch.maximum(x, torch.full(x.size(), 0.1, dtype=x.dtype)), 8),
}
GATED: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "module": (nn.GLU(1), 4),
    "function": (lambda x: F.glu(x, dim=1), 4),
    "last axis by default": (lambda x: F.glu(x), 8),
    "channels last": (lambda x: nn.GLU()(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), 4),
    "inside of heads": (lambda x: F.glu(x.unflatten(1, (2, 4)), 2).flatten(1, 2), 2),
}


@pytest.mark.parametrize("name", PICKS)
def test_law_of_picks(name: str) -> None:
    torch.manual_seed(0)
    operator, units = PICKS[name]
    check_operator(operator, units)


@pytest.mark.parametrize("name", WRITES)
def test_law_of_writes(name: str) -> None:
    torch.manual_seed(0)
    operator, units = WRITES[name]
    check_operator(operator, units)


@pytest.mark.parametrize("name", GATED)
def test_law_of_gated_halves(name: str) -> None:
    torch.manual_seed(0)
    operator, units = GATED[name]
    check_operator(operator, units)


@pytest.mark.parametrize("dim", [1, -1])
def test_gated_halves_between_layers(dim: int) -> None:
    check_rule(nn.GLU(dim), torch.randn(2, 8, 8), dim=dim)
