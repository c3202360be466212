"""Products between values, and between values and parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rbpfx.graph.capture import trace
from rbpfx.graph.cost import count_macs
from rbpfx.graph.groups import analyze
from tests.graph.rules.test_attention import BATCH, TOKENS, check

IN, WIDTH, OUT = 6, 4, 3


def value(*shape: int) -> Tensor:
    torch.manual_seed(len(shape))
    return torch.randn(shape, dtype=torch.float64)


class Two(nn.Module):
    """A function of two linear layers' results."""

    def __init__(self, function: Callable[..., Any], second: int = WIDTH) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(IN, WIDTH), nn.Linear(IN, second)
        self.function = function

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.function(self.first(x), self.second(y))


CONTRACTED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "@": lambda a, b: a @ b.transpose(-1, -2),
    "matmul": lambda a, b: torch.matmul(a, b.mT),
    "method": lambda a, b: a.matmul(b.permute(0, 2, 1)),
    "bmm": lambda a, b: torch.bmm(a, b.transpose(1, 2)),
    "baddbmm": lambda a, b: torch.baddbmm(a.new_zeros(1, 1, 1), a, b.transpose(1, 2), alpha=2),
    "addbmm": lambda a, b: torch.addbmm(a.new_zeros(1, 1), a, b.transpose(1, 2)),
    "einsum": lambda a, b: torch.einsum("bid,bjd->bij", a, b),
    "implicit": lambda a, b: torch.einsum("bid, bjd", a, b),
    "ellipsis": lambda a, b: torch.einsum("...id,...jd->...ij", a, b),
    "sublists": lambda a, b: torch.einsum(a, [0, 1, 3], b, [0, 2, 3], [0, 1, 2]),
    "list": lambda a, b: torch.einsum("bid,bjd->bj", [a, b]),
    "rowwise": lambda a, b: torch.einsum("bid,bid->bi", a, b[:, :TOKENS]),
    "mm": lambda a, b: torch.mm(a.flatten(0, 1), b.flatten(0, 1).t()),
    "mv": lambda a, b: torch.mv(a.flatten(0, 1), b.mean((0, 1))),
    "dot": lambda a, b: torch.dot(a.flatten(), b[:, :TOKENS].flatten()),
    "vector": lambda a, b: b.mean((0, 1)) @ a.transpose(1, 2),
    "linear": lambda a, b: F.linear(a, b[0]),
}


@pytest.mark.parametrize("spelling", CONTRACTED)
def test_contracted_channels_are_tied_and_read(spelling: str) -> None:
    x, y = value(BATCH, TOKENS, IN), value(BATCH, TOKENS + 1, IN)
    compiled = check(Two(CONTRACTED[spelling]), x, y, groups={"first": WIDTH})
    (group,) = compiled.analysis.groups
    assert group.producers == ("first", "second")
    assert not group.foldable
    assert len(group.reads) == 1


def test_free_axes_pass_through() -> None:
    model = nn.Sequential()
    model.inner = Two(lambda a, b: a.transpose(1, 2) @ b, second=5)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = model.inner, nn.Linear(5, OUT)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.last(self.inner(x, y)).mean(1)

    x, y = value(BATCH, TOKENS, IN), value(BATCH, TOKENS, IN)
    check(Outer(), x, y, groups={"inner.first": WIDTH, "inner.second": 5})


def test_a_value_with_itself() -> None:
    class Gram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, WIDTH, 1), nn.Linear(WIDTH, OUT)

        def forward(self, x: Tensor) -> Any:
            y = self.first(x).flatten(2)
            return self.last(y @ y.transpose(1, 2)).mean(1), torch.einsum("bci,bcj->bij", y, y)

    check(Gram(), value(BATCH, 3, 2, 2), groups={"first": WIDTH})


def test_the_diagonal_of_a_contraction_stays() -> None:
    model = Two(lambda a, b: torch.einsum("bii,bij->bj", a[:, :WIDTH], b[:, :WIDTH]))
    check(model, value(BATCH, TOKENS, IN), value(BATCH, TOKENS, IN), groups={})


def test_a_channel_that_meets_unfollowed_values_stays() -> None:
    class Meeting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(IN, WIDTH)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.first(x) @ y

    gm = trace(Meeting(), (torch.zeros(2, 5, IN), torch.zeros(2, WIDTH, 3)))
    (frozen,) = analyze(gm).frozen
    assert frozen.reason == "contracted with a value that is not followed"


class Parameters(nn.Module):
    """A function of a value, a weight (in, width) and the layers around it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.after = nn.Linear(IN, IN), nn.Linear(WIDTH, OUT)
        self.weight = nn.Parameter(torch.randn(IN, WIDTH))
        self.bias = nn.Parameter(torch.randn(WIDTH))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.after(self.function(self.before(x), self.weight, self.bias))


PROJECTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "matmul": lambda x, w, b: x @ w + b,
    "transposed": lambda x, w, b: (w.t() @ x.transpose(1, 2)).transpose(1, 2),
    "addmm": lambda x, w, b: torch.addmm(b, x.reshape(-1, IN), w).view(*x.shape[:-1], -1),
    "named": lambda x, w, b: torch.addmm(input=b, mat1=x.reshape(-1, IN), mat2=w),
    "beta": lambda x, w, b: b.addmm(x.reshape(-1, IN), w, beta=0.5, alpha=2),
    "einsum": lambda x, w, b: torch.einsum("b...i,io->b...o", x, w) * b,
    "baddbmm": lambda x, w, b: torch.baddbmm(b, x, w.expand(x.shape[0], -1, -1)),
    "addmv": lambda x, w, b: torch.stack([torch.addmv(b, w.t(), x[i, 0]) for i in range(BATCH)]),
}


@pytest.mark.parametrize("spelling", PROJECTIONS)
def test_parameters_read_and_produce(spelling: str) -> None:
    model = Parameters(PROJECTIONS[spelling])
    groups = {"before": IN, "weight": WIDTH}
    compiled = check(model, value(BATCH, TOKENS, IN), groups=groups)
    computed = spelling in ("transposed", "baddbmm", "addmv")
    assert compiled.analysis.group("before").foldable != computed


def test_a_product_of_parameters_is_a_weight() -> None:
    """A low-rank update: its rank is nobody's channel, its ends are those of the layer."""

    class LowRank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.layer = nn.Linear(IN, IN), nn.Linear(IN, WIDTH)
            self.down, self.up = (nn.Parameter(torch.randn(*s)) for s in ((2, IN), (WIDTH, 2)))
            self.after = nn.Linear(WIDTH, OUT)

        def forward(self, x: Tensor) -> Tensor:
            x = self.before(x)
            return self.after(self.layer(x) + F.linear(x, self.up @ self.down))

    check(LowRank(), value(BATCH, IN), groups={"before": IN, "layer": WIDTH})


def test_weights_per_group_share_the_axis_of_groups() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.before, self.after = nn.Conv1d(3, WIDTH, 1), nn.Conv1d(WIDTH, OUT, 1)
            self.weight = nn.Parameter(torch.randn(WIDTH, TOKENS, 5))

        def forward(self, x: Tensor) -> Tensor:
            return self.after(torch.einsum("gio,bgi->bgo", self.weight, self.before(x)))

    compiled = check(Grouped(), value(BATCH, 3, TOKENS), groups={"before": WIDTH})
    kept = len(compiled.plan.kept.get("before", range(WIDTH)))
    assert compiled.sliced.get_parameter("weight").shape == (kept, TOKENS, 5)


def test_bilinear() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(IN, WIDTH), nn.Linear(IN, 5)
            self.bilinear, self.last = nn.Bilinear(WIDTH, 5, 7), nn.Linear(7, OUT)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.bilinear(self.first(x), self.second(x)))

    groups = {"first": WIDTH, "second": 5, "bilinear": 7}
    compiled = check(Pair(), value(BATCH, IN), groups=groups)
    assert all(group.foldable for group in compiled.analysis.groups)
    bilinear = compiled.sliced.get_submodule("bilinear")
    sizes = (bilinear.out_features, bilinear.in1_features, bilinear.in2_features)
    assert tuple(bilinear.weight.shape) == sizes


def test_macs_of_a_product() -> None:
    x, y = value(2, 3, 5), value(2, 5, 7)

    class Products(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Any:
            return x @ y, torch.einsum("bij,bjk->b", x, y), F.scaled_dot_product_attention(x, x, x)

    assert count_macs(trace(Products(), (x, y))) == 2 * 3 * 5 * 7 + 2 * 3 * 3 * 5


# -- embeddings ---------------------------------------------------------------------------


class Tokens(nn.Module):
    """A table, chosen from by the sign of a value."""

    def __init__(self, table: nn.Module, size: int = WIDTH) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.last = table, nn.Linear(size, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.table((x > 0).long()))


@pytest.mark.parametrize(
    "table",
    [
        nn.Embedding(3, WIDTH),
        nn.Embedding(3, WIDTH, padding_idx=0, scale_grad_by_freq=True),
        nn.EmbeddingBag(3, WIDTH),
        nn.EmbeddingBag(3, WIDTH, mode="max"),
    ],
    ids=str,
)
def test_embeddings_produce_their_columns(table: nn.Module) -> None:
    compiled = check(Tokens(table), value(BATCH, TOKENS), groups={"table": WIDTH})
    kept = len(compiled.plan.kept.get("table", range(WIDTH)))
    assert compiled.sliced.get_submodule("table").embedding_dim == kept
    assert compiled.sliced.get_parameter("table.weight").shape == (3, kept)


def test_a_bound_on_the_norm_keeps_the_columns() -> None:
    gm = trace(Tokens(nn.Embedding(3, WIDTH, max_norm=1.0)), torch.zeros(2, 4))
    analysis = analyze(gm)
    assert not analysis.groups
    assert any("max_norm" in frozen.reason for frozen in analysis.frozen)


def test_tables_as_parameters() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Parameter(torch.randn(3, WIDTH))
            self.last = nn.Linear(WIDTH, OUT)

        def forward(self, x: Tensor) -> Tensor:
            bags = F.embedding_bag((x > 0).long(), self.rows, mode="sum")
            return self.last(F.embedding((x > 0.5).long(), weight=self.rows) + bags[:, None])

    check(Functional(), value(BATCH, TOKENS), groups={"rows": WIDTH})


def test_tied_input_and_output_embeddings() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(3, WIDTH), nn.Linear(WIDTH, 3, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.table((x > 0).long()))

    compiled = check(Tied(), value(BATCH, TOKENS), groups={"table": WIDTH})
    assert compiled.sliced.get_submodule("head").weight is compiled.sliced.table.weight
