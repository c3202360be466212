"""Order statistics, differences and norms: law and groups, one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from tests.graph.rules.micro import check_operator

SEVERAL = torch.tensor([0.2, 0.8], dtype=torch.float64)
STATISTICS: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "topk": (lambda x: x.topk(2, -1)[0], 8),
    "topk by name": (lambda x: torch.topk(x, k=2, dim=2).values, 8),
    "topk by default": (lambda x: torch.topk(x, 2)[0], 8),
    "topk of channels": (lambda x: torch.topk(x, 8, 1)[0], 0),
    "kthvalue": (lambda x: x * x.kthvalue(2, dim=-1, keepdim=True)[0], 8),
    "kthvalue by default": (lambda x: torch.kthvalue(x, 2)[0][..., None], 8),
    "kthvalue of channels": (lambda x: x * x.kthvalue(k=2, dim=1, keepdim=True).values, 0),
    "quantile": (lambda x: x * torch.quantile(x, 0.3, dim=-1, keepdim=True), 8),
    "several quantiles": (lambda x: x.quantile(SEVERAL.to(x), -1).permute(1, 2, 3, 0), 8),
    "several quantiles, kept": (
        lambda x: x.quantile(q=SEVERAL.to(x), dim=2, keepdim=True)[0] * x,
        8,
    ),
    "quantile of all": (lambda x: torch.nanquantile(x, 0.5) * x, 0),
    "diff": (lambda x: x.diff(), 8),
    "diff by name": (lambda x: torch.diff(x, n=1, dim=-2), 8),
    "diff of channels": (lambda x: torch.diff(x, dim=1), 0),
    "diff with more in front": (lambda x: torch.diff(x, 1, -1, prepend=x[..., :1]), 0),
}
NORMS: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "over channels": (lambda x: x * torch.linalg.norm(x, dim=1, keepdim=True), 8),
    "order one": (lambda x: x * torch.linalg.norm(x, ord=1, dim=-3, keepdim=True), 8),
    "order zero": (lambda x: x * torch.linalg.norm(x, 0, dim=1, keepdim=True), 0),
    "of everything": (lambda x: x * torch.linalg.norm(x), 8),
    "of matrices over space": (lambda x: x * torch.linalg.norm(x, 2, (2, 3))[..., None, None], 8),
    "of matrices over channels": (lambda x: x * torch.linalg.norm(x, 2, (1, 2))[:, None, None], 0),
    "of Frobenius": (lambda x: x * torch.linalg.norm(x, "fro", (1, 2))[:, None, None], 8),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_law_of_order_statistics(name: str) -> None:
    if "quantile" in name:
        with FakeTensorMode():
            try:
                torch.ones(2).quantile(0.5)
            except DataDependentOutputException:
                pytest.skip("this torch looks at the values to compute a quantile's shape")
    torch.manual_seed(0)
    operator, units = STATISTICS[name]
    check_operator(operator, units)


@pytest.mark.parametrize("name", NORMS)
def test_law_of_norms(name: str) -> None:
    torch.manual_seed(0)
    operator, units = NORMS[name]
    check_operator(operator, units)
