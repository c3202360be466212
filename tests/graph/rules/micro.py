"""A micro-network around one operator, and the laws on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rbpfx.graph.groups import Analysis, analyze
from tests.graph.laws import check_again, check_costs, check_law, check_pickle, compile_random


class Micro(nn.Module):
    """`head(operator(stem(x)))` with eight channels; the head comes to fit the operator.

    Args:
        operator: A function of the channels `(N, 8, 4, 4)`, or a module.
        shape: Shape of one input.
    """

    def __init__(self, operator: Callable[[Tensor], Any], shape: tuple[int, ...] = (3, 4, 4)):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1) if len(shape) == 3 else nn.Linear(shape[-1], 8)
        self.operator = operator
        self.double()
        self.example = torch.randn(2, *shape, dtype=torch.float64)
        with torch.no_grad():
            result = operator(self.stem(self.example).double())
        if result.ndim == 4:
            self.head: nn.Module = nn.Conv2d(result.shape[1], 2, 1).double()
        else:
            self.head = nn.Linear(result.shape[-1], 2).double()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.operator(self.stem(x).cos()))
        return y


def check_operator(operator: Callable[[Tensor], Any], units: int, **options: Any) -> Analysis:
    """The laws around an operator, and how many units there are."""
    model = Micro(operator, **options)
    inputs = (model.example,)
    removed = 0
    for seed in range(4):
        compiled = compile_random(model, inputs, seed)
        found = sum(group.size for group in compiled.analysis.groups)
        assert found == units, compiled.analysis.frozen
        removed += compiled.removed
        for train in (False, True):
            check_law(compiled, inputs, train=train)
    check_again(compiled, inputs, 0)
    check_costs(compiled)
    check_pickle(compiled, inputs)
    assert bool(removed) == bool(units)
    return analyze(compiled.gm)
