"""Writing and adding by positions held in tensors: law and groups, one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.graph.rules.micro import check_operator


def over_nodes(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function of nodes (32, 8) and, for each of them, a node computed from its values."""

    def apply(x: Tensor) -> Tensor:
        nodes = x.permute(0, 2, 3, 1).reshape(-1, 8)
        index = (nodes.detach().mean(1) > 0).long() * 3
        return function(nodes, index).view(2, 4, 4, 8).permute(0, 3, 1, 2)

    return apply


def aggregated(x: Tensor) -> Tensor:
    """Messages along edges, summed up at their targets, as in a graph convolution."""
    source, target = torch.arange(32), torch.arange(32) // 4
    nodes = x.permute(0, 2, 3, 1).reshape(-1, 8)
    degree = torch.zeros(32, dtype=x.dtype).scatter_add_(0, target, torch.ones(32, dtype=x.dtype))
    messages = nodes[source] / degree.clamp(min=1)[target].unsqueeze(-1)
    summed = torch.zeros_like(nodes).scatter_add_(0, target.unsqueeze(-1).expand(-1, 8), messages)
    return summed.view(2, 4, 4, 8).permute(0, 3, 1, 2)


BACKWARDS = torch.arange(32).flip(0)
SLABS: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "index_add": (over_nodes(lambda y, i: torch.zeros_like(y).index_add(0, i, y)), 8),
    "index_add_": (over_nodes(lambda y, i: torch.zeros(32, 8).to(y).index_add_(0, i, y)), 8),
    "index_add by name": (
        over_nodes(
            lambda y, i: torch.index_add(y.new_zeros(32, 8), dim=0, index=i, source=y, alpha=2)
        ),
        8,
    ),
    "index_add at the end": (lambda x: x.index_add(-1, torch.tensor([0, 1]), x[..., :2]), 8),
    "index_add along channels": (lambda x: x.index_add(1, torch.tensor([0, 1]), x[:, :2]), 0),
    "index_copy": (over_nodes(lambda y, i: y.index_copy(0, BACKWARDS, y.sin())), 8),
    "index_copy_": (over_nodes(lambda y, i: y.cos().index_copy_(-2, BACKWARDS, y.sin())), 8),
    "index_fill": (over_nodes(lambda y, i: y.index_fill(0, i, 0.5)), 8),
    "index_reduce": (over_nodes(lambda y, i: torch.index_reduce(y, 0, i, y.sin(), "amax")), 8),
}
SCATTERED: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "expand": (
        over_nodes(lambda y, i: torch.zeros_like(y).scatter_add(0, i[:, None].expand(-1, 8), y)),
        8,
    ),
    "expand_as": (
        over_nodes(lambda y, i: torch.zeros_like(y).scatter_add_(0, i[:, None].expand_as(y), y)),
        8,
    ),
    "repeat": (
        over_nodes(lambda y, i: y.new_zeros(4, 8).scatter_add_(0, i[:, None].repeat(1, 8), y)[i]),
        8,
    ),
    "scatter": (
        over_nodes(lambda y, i: torch.scatter(y, 0, BACKWARDS[:, None].expand(-1, 8), y.sin())),
        8,
    ),
    "number": (
        over_nodes(lambda y, i: y.scatter(dim=0, index=i[:, None].expand_as(y), value=0.3)),
        8,
    ),
    "mean": (
        over_nodes(
            lambda y, i: y.new_zeros(4, 8).scatter_reduce(
                0, i[:, None].expand(-1, 8), y, reduce="mean"
            )[i]
        ),
        8,
    ),
    "at the end": (lambda x: x.scatter_add(-1, x.argsort(-1), x.sin()), 8),
    "constant positions": (
        over_nodes(lambda y, i: y.scatter_add(0, torch.zeros(32, 8, dtype=torch.long), y)),
        8,
    ),
    "positions of an axis that is not followed": (
        over_nodes(lambda y, i: y.scatter_add(0, (y.cumsum(1) > 0).long(), y)),
        0,
    ),
    "along channels": (lambda x: x.scatter(1, x.argsort(1), x), 0),
    "fewer positions than channels": (
        over_nodes(lambda y, i: y.scatter_add(0, i[:, None].expand(-1, 3), y[:, :3])),
        0,
    ),
    "graph convolution": (aggregated, 8),
}


@pytest.mark.parametrize("name", SLABS)
def test_law_of_writes_of_slabs(name: str) -> None:
    torch.manual_seed(0)
    operator, units = SLABS[name]
    check_operator(operator, units)


@pytest.mark.parametrize("name", SCATTERED)
def test_law_of_writes_of_elements(name: str) -> None:
    torch.manual_seed(0)
    operator, units = SCATTERED[name]
    check_operator(operator, units)
