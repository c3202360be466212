"""`int` and `len` of sizes leave them free, and what names them otherwise as it is."""

from __future__ import annotations

import builtins
import math
import pickle
import sys
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, fx, nn

from rbpfx.errors import GuardError
from rbpfx.graph.capture import trace
from rbpfx.graph.gates import apply_mask
from rbpfx.graph.groups import analyze
from rbpfx.graph.slicing import rewrite
from rbpfx.graph.values import assume
from rbpfx.graph.verification import require_equal
from rbpfx.plan import PruningPlan


def reversed_windows(windows: Tensor, size: int, height: int, width: int) -> Tensor:
    """As in Microsoft's Swin transformer."""
    examples = int(windows.shape[0] / (height * width / size / size))
    x = windows.view(examples, height // size, width // size, size, size, -1)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(examples, height, width, -1)


def swin(x: Tensor) -> Tensor:
    return reversed_windows(torch.cat([x, x + 1, x - 1, x * 2]), 3, 6, 6)


def expanded(x: Tensor) -> Tensor:
    return x + torch.ones(1, 3).expand(len(x), 3, 3)


def counted(x: Tensor) -> Tensor:
    return x.view(int(x.size(0)), -1) + torch.arange(len(x)).unsqueeze(1)


def halved(x: Tensor) -> Tensor:
    return x[: int(math.sqrt(x.shape[0])), : int(len(x) * 0.5)]


def nested(x: Tensor) -> Tensor:
    def tokens() -> int:
        return len(x) * int(x.shape[1])

    return x.reshape(tokens(), *[int(size) for size in x.shape[2:]])


def of_both_kinds(x: Tensor) -> Tensor:
    size = int(x.shape[0])
    kind = float if not isinstance(size, int) else torch.float64
    return x.reshape(size, -1).to(kind)


since_python_3_11 = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="code does not tell calls of a name from other uses"
)
CONVERSIONS = [swin, expanded, counted, halved, nested]


class Model(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def guards(gm: nn.Module) -> int:
    assert isinstance(gm, fx.GraphModule)
    return sum(n.target is assume for n in gm.graph.nodes)


@since_python_3_11
@pytest.mark.parametrize("function", CONVERSIONS, ids=lambda f: f.__name__)
def test_sizes_stay_free(function: Any) -> None:
    codes = function.__code__, reversed_windows.__code__
    gm = trace(Model(function), torch.randn(4, 3, 3))
    assert (function.__code__, reversed_windows.__code__) == codes
    assert not guards(gm)
    for graph in (gm, pickle.loads(pickle.dumps(gm))):
        for examples in (1, 4, 7):
            x = torch.randn(examples, 3, 3)
            assert torch.equal(graph(x), function(x))


def test_a_name_that_is_not_only_called_is_left_alone() -> None:
    gm = trace(Model(of_both_kinds), torch.randn(4, 3, 3))
    assert gm(torch.randn(4, 3, 3)).dtype == torch.float64
    with pytest.raises(GuardError, match=r"size = int\(x.shape\[0\]\)"):
        gm(torch.randn(5, 3, 3))


def test_names_of_ones_own_are_left_alone() -> None:
    space: dict[str, Any] = {"int": lambda size: 2, "len": lambda x: 3}
    exec("def function(x): return x.view(int(x.shape[0]), -1)[:, :len(x)]", space)
    x = torch.randn(2, 6)
    assert torch.equal(trace(Model(space["function"]), x)(x), x[:, :3])


TABLE = {4: 1.0}


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * TABLE[int(x.shape[0])],
        lambda x: x * TABLE.get(int(x.shape[0]) + 0, 2.0),
        lambda x: x if len(x) // 2 in {2, 5} else -x,
    ],
)
def test_where_only_a_number_will_do_it_is_guarded(function: Any) -> None:
    gm = trace(Model(function), torch.ones(4, 2))
    assert torch.equal(gm(torch.ones(4, 2)), torch.ones(4, 2))
    with pytest.raises(GuardError, match="is 4; for this input it is 5"):
        gm(torch.ones(5, 2))


class Reshaping(nn.Module):
    """Names its channels through `int`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x.view(len(x), int(x.shape[1]), 1) / int(x.size(-1) ** 0.5)
        y: Tensor = self.second(x.view(-1, int(x.numel() / len(x))))
        return y


@since_python_3_11
def test_channels_named_by_conversions_are_pruned() -> None:
    model, x = Reshaping().double(), torch.randn(5, 4, dtype=torch.float64)
    gm = trace(model, x)
    analysis = analyze(gm)
    plan = PruningPlan({"first": [0, 3, 5]})
    masked, pruned = (f(gm, analysis, plan) for f in (apply_mask, rewrite))
    assert require_equal(masked, pruned, x) < 1e-12
    assert pruned.get_parameter("second.weight").shape == (2, 3)
    assert torch.equal(gm(x[:2]), model(x[:2]))


def test_a_failure_that_conversions_cause_is_none() -> None:
    class Wants(int):
        def __new__(cls, value: Any) -> Wants:
            assert type(value) is int
            return super().__new__(cls, value)

    gm = trace(Model(lambda x: x * Wants(int(x.shape[0]))), torch.ones(4, 2))
    assert guards(gm) == 1


def test_nothing_stays_led_elsewhere_after_a_failure() -> None:
    def fails(x: Tensor) -> Tensor:
        return x.view(len(x), -1) if x.sum() > 0 else x

    code = fails.__code__
    with pytest.raises(Exception, match="tensor's values"):
        trace(Model(fails), torch.ones(2, 3))
    assert fails.__code__ is code
    assert builtins.len([1]) == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x / numpy.sqrt(x.shape[0]),
        lambda x: x * numpy.power(x.size(0), 0.5) + numpy.float64(0.5) * x,
        lambda x: x[: numpy.floor_divide(x.shape[0] + 1, 2)],
        pytest.param(lambda x: x[: int(numpy.ceil(x.shape[0] / 2))], marks=since_python_3_11),
        lambda x: x.view(x.shape[0], numpy.prod(x.shape[1:])),
    ],
)
def test_numbers_of_numpy(function: Any) -> None:
    gm = trace(Model(function), torch.randn(4, 3, 3))
    assert not guards(gm)
    for examples in (1, 4, 7):
        x = torch.randn(examples, 3, 3)
        torch.testing.assert_close(gm(x), function(x))


def test_constants_of_numpy_are_plain_numbers() -> None:
    scale, size = numpy.sqrt(16.0), numpy.int64(3)
    gm = trace(Model(lambda x: (x * scale).view(-1, size)[:, :size]), torch.ones(2, 3))
    assert torch.equal(gm(torch.ones(4, 3)), torch.full((4, 3), 4.0))
