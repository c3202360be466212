"""Similarities and distances: law and groups, one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.graph.rules.micro import check_operator

SIMILARITIES: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "function": (lambda x: F.cosine_similarity(x, x.sin(), 1)[:, None] * x, 8),
    "default axis": (lambda x: F.cosine_similarity(x, x.sin())[:, None] * x, 8),
    "module": (lambda x: nn.CosineSimilarity(eps=1e-2)(x, x.cos()).unsqueeze(1) * x, 8),
    "another axis": (lambda x: nn.CosineSimilarity(dim=-1)(x, x.cos())[..., None] * x, 8),
    "fewer axes": (
        lambda x: torch.cosine_similarity(x, x.mean((0, 2, 3))[:, None, None], dim=-3)[:, None] * x,
        8,
    ),
    "with itself": (lambda x: F.cosine_similarity(x1=x, x2=x)[:, None] * x, 8),
    "with one channel": (lambda x: F.cosine_similarity(x, x.mean(1, keepdim=True))[:, None] * x, 0),
    "inside of heads": (
        lambda x: (
            F.cosine_similarity(
                x.unflatten(1, (2, 4)), x.sin().unflatten(1, (2, 4)), 2
            ).repeat_interleave(4, 1)
            * x
        ),
        2,
    ),
}


def rows(x: Tensor) -> Tensor:
    return x.flatten(2).mT


DISTANCES: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "cdist": (
        lambda x: torch.cdist(rows(x), rows(x).sin()).mean((1, 2))[:, None, None, None] * x,
        8,
    ),
    "cdist by name": (
        lambda x: (
            torch.cdist(x1=rows(x), x2=x.mean((2, 3))[:, None], p=1.0).mean((1, 2))[
                :, None, None, None
            ]
            * x
        ),
        8,
    ),
    "cdist below order one": (
        lambda x: torch.cdist(rows(x), rows(x).sin(), 0.5).mean((1, 2))[:, None, None, None] * x,
        0,
    ),
    "cdist between channels": (
        lambda x: (torch.cdist(x.flatten(2), x.sin().flatten(2)) @ x.flatten(2)).view_as(x),
        8,
    ),
    "eps": (
        lambda x: F.pairwise_distance(rows(x), rows(x).sin()).mean(1)[:, None, None, None] * x,
        0,
    ),
    "no eps": (
        lambda x: (
            F.pairwise_distance(rows(x), rows(x).sin(), eps=0.0, keepdim=True).mean(1)[
                :, None, None
            ]
            * x
        ),
        8,
    ),
    "module": (
        lambda x: (
            nn.PairwiseDistance(1.0, 0.0)(rows(x), rows(x).sin()).mean(1)[:, None, None, None] * x
        ),
        8,
    ),
    "module over space": (lambda x: nn.PairwiseDistance()(x, x.sin())[..., None] * x, 8),
}


class Directions(nn.Module):
    """A function of the channels' means and directions, (8, 5)."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 5, dtype=torch.float64))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x.mean((2, 3)), self.weight)[:, :, None, None]


DIRECTIONS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {
    "@": (lambda x, w: x @ F.normalize(w, dim=0), 13),
    "both normalised": (lambda x, w: F.normalize(x) @ F.normalize(w, dim=0), 13),
    "einsum": (lambda x, w: torch.einsum("ni,io->no", x, F.normalize(w, dim=0)), 13),
    "tensordot": (lambda x, w: torch.tensordot(x, F.normalize(w, dim=0), 1), 13),
    "linear": (lambda x, w: F.linear(F.normalize(x), F.normalize(w.t())), 13),
    "along the other axis": (lambda x, w: x @ F.normalize(w, dim=1), 8),
    "cosine_similarity": (lambda x, w: F.cosine_similarity(x[:, None], w.t(), dim=-1), 8),
}


@pytest.mark.parametrize("name", SIMILARITIES)
def test_law_of_similarities(name: str) -> None:
    torch.manual_seed(0)
    operator, units = SIMILARITIES[name]
    check_operator(operator, units)


@pytest.mark.parametrize("name", DISTANCES)
def test_law_of_distances(name: str) -> None:
    torch.manual_seed(0)
    operator, units = DISTANCES[name]
    check_operator(operator, units)


@pytest.mark.parametrize("name", DIRECTIONS)
def test_law_of_normalised_weights(name: str) -> None:
    torch.manual_seed(0)
    function, units = DIRECTIONS[name]
    check_operator(Directions(function), units)
