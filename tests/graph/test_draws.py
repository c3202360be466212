"""Random draws are drawn anew in every call; what a graph cannot draw or keep is refused."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from rbpfx import CaptureError, analyze, trace
from rbpfx.graph.gates import apply_mask
from rbpfx.graph.slicing import rewrite
from rbpfx.graph.verification import difference
from rbpfx.plan import PruningPlan

X = torch.randn(5, 6)


class Net(nn.Module):
    """A network that changes its input in train mode."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 2)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        if self.training:
            h = self.change(h)
        y: Tensor = self.b(h)
        return y


def emptied(_: Tensor) -> Tensor:
    noise = torch.empty(8)
    noise.normal_()
    return noise


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "rand": lambda h: h * (torch.rand(8) > 0.5),
    "one": lambda h: h * torch.rand(1),
    "normal_": lambda h: h + torch.empty(8).normal_(),
    "filled": lambda h: h + emptied(h),
    "bernoulli": lambda h: h * torch.bernoulli(torch.full((8,), 0.5)),
    "permutation": lambda h: h[:, torch.randperm(8)],
    "dropout": lambda h: h * nn.functional.dropout(torch.ones(8), 0.5),
}


@pytest.mark.parametrize("name", DRAWS)
def test_every_call_draws_anew_and_as_the_model_does(name: str) -> None:
    model = Net(DRAWS[name])
    gm = trace(model, X)
    assert isinstance(gm, fx.GraphModule)
    for network in (gm, pickle.loads(pickle.dumps(gm))):
        for training in (True, False):
            model.train(training), network.train(training)
            seen = set()
            for seed in range(5):
                torch.manual_seed(seed)
                wanted = model(X)
                torch.manual_seed(seed)
                assert difference(wanted, network(X)) < 1e-6
                seen.add(float(wanted.detach().sum()))
            assert len(seen) > 1 if training else len(seen) == 1


def test_a_draw_is_sliced_with_the_channels_it_multiplies() -> None:
    gm = trace(Net(DRAWS["rand"]).double(), X.double())
    analysis, plan = analyze(gm), PruningPlan({"a": [0, 3, 4]})
    masked, pruned = apply_mask(gm, analysis, plan), rewrite(gm, analysis, plan)
    assert difference(masked.eval()(X.double()), pruned.eval()(X.double())) < 1e-12
    assert pruned.train()(X.double()).shape == (5, 2)


class Skipping(nn.Module):
    """Layers that are left out at random."""

    def __init__(self, rate: float, draw: Callable[[], Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.rate, self.draw = rate, draw

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.training and self.draw() < self.rate:
                continue
            x = x + layer(x).relu()
        return x


@pytest.mark.parametrize(
    "draw",
    [
        random.random,
        lambda: np.random.uniform(),
        lambda: torch.rand([]),
        lambda: torch.rand(1).item(),
    ],
    ids=["random", "numpy", "tensor", "number"],
)
def test_layers_that_are_skipped_at_random_are_not_skipped_for_ever(
    draw: Callable[[], Any],
) -> None:
    model = nn.Sequential(nn.Linear(6, 6), Skipping(0.5, draw))
    gm = trace(model, X).train()
    seen = {float(gm(X).detach().sum()) for _ in range(20)}
    assert len(seen) > 2
    sum(gm(X).sum() for _ in range(20)).backward()
    assert all(p.grad is not None for p in gm.parameters())


def test_layers_that_are_never_skipped_are_captured() -> None:
    gm = trace(Skipping(0.0, lambda: torch.rand([])), X)
    assert isinstance(gm, fx.GraphModule)
    assert "rand" not in gm.code and "<" not in gm.code


# -- state ----------------------------------------------------------------------------------


class Replacing(nn.Module):
    """Keeps a mean by an assignment."""

    mean: Tensor

    def __init__(self, data: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.register_buffer("mean", torch.zeros(6))
        self.data = data

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            new = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            if self.data:
                self.mean.data = new
            else:
                self.mean = new
        y: Tensor = self.layer(x - self.mean)
        return y


@pytest.mark.parametrize("data", [False, True])
def test_a_replaced_buffer_is_never_lost(data: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 6), Replacing(data), nn.Linear(6, 2))
    gm = trace(copy.deepcopy(model), X).train()
    for _ in range(2):
        assert difference(model.train()(X), gm(X)) < 1e-6
    torch.testing.assert_close(gm.state_dict()["1.mean"], model.state_dict()["1.mean"])
    assert float(gm.state_dict()["1.mean"].abs().max()) > 0
    with pytest.raises(CaptureError, match=r"copy_|cannot assign"):  # the latter torch 2.8 says
        trace(Replacing(data), X)


class Moved(nn.Module):
    """Puts its buffer where the input is."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.register_buffer("scale", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        self.scale = self.scale.to(x.device)
        y: Tensor = self.layer(x * self.scale)
        return y


def _require_proxies_for_buffers() -> None:
    try:
        Moved().scale = fx.Proxy(fx.Graph().placeholder("x"))
    except TypeError:
        pytest.skip("this torch takes no proxy for a buffer")


def test_a_buffer_that_is_moved_to_where_it_is_stays() -> None:
    _require_proxies_for_buffers()
    assert isinstance(trace(Moved(), X), fx.GraphModule)


class Table(nn.Module):
    """Keeps a table that follows from the number of positions."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.register_buffer("table", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.table.shape[0] != x.shape[0]:
            places = torch.zeros(x.shape[0], 1)
            places[:, 0] = torch.arange(x.shape[0]) / 10
            self.table = places
        y: Tensor = self.layer(x) + self.table
        return y


def test_a_table_of_positions_is_a_cache() -> None:
    _require_proxies_for_buffers()
    model = Table()
    gm = trace(copy.deepcopy(model), X)
    assert isinstance(gm, fx.GraphModule)
    assert difference(model(X), gm(X)) < 1e-6


class Counting(nn.Module):
    """Updates a buffer in place that eval mode never looks at."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.register_buffer("count", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        if self.training:
            self.count.mul_(0.9).add_(y.detach().sum(0), alpha=0.1)
        return y


def test_what_train_mode_writes_eval_mode_leaves() -> None:
    gm = trace(Counting(), X)
    gm.eval()(X)
    count = gm.state_dict()["count"]
    assert not count.any()
    gm.train()(X)
    assert count.any()
