"""Proxies that know values: control flow on sizes, guards, free batch and image sizes."""

from __future__ import annotations

import math
import pickle
import threading
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from rbpfx.errors import CaptureError, GuardError, InputError
from rbpfx.graph.capture import trace
from rbpfx.graph.values import assume


class Function(nn.Module):
    """A module around a function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def traced(function: Any, *example: Any) -> fx.GraphModule:
    """The graph of a function of one tensor."""

    class Model(nn.Module):
        def forward(self, x: Any) -> Any:
            return function(x)

    gm = trace(Model(), example)
    assert isinstance(gm, fx.GraphModule)
    return gm


def windows(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    pad = (4 - w % 4) % 4
    if pad > 0:
        x = F.pad(x, (0, pad))
    return x.view(n, c, h, -1, 4).mean(-1)


def table(x: Tensor) -> Tensor:
    size = x.size(1)
    rows = torch.arange(size, device=x.device)
    grid = torch.stack(torch.meshgrid(rows, rows, indexing="ij"))
    return x[:, :, :1] + grid.sum(0).to(x.dtype).sum(1)[None, :, None]


def loops(x: Tensor) -> Tensor:
    parts = list(x.split(2, dim=1))
    for index in range(1, len(parts)):
        parts[index] = parts[index] + parts[index - 1]
    return torch.cat(parts, 1)


def scaled(x: Tensor) -> Tensor:
    scale = math.sqrt(x.shape[-1]) + x.shape[1] ** -0.5 + round(x.shape[-1] / 3)
    return x * scale + torch.zeros(x.shape[0], 1, *x.shape[2:])


def padded(x: Tensor) -> Tensor:
    excess = x.shape[-1] % 3
    return x[..., :-excess] if excess else x


def finite(x: Tensor) -> Tensor:
    return x.clamp(min=torch.finfo(x.dtype).min).to(x.dtype) * (0 if x.ndim == 3 else 1)


def assigned(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, 1:] = x[:, :-1]
    y[:, 0] = 1
    return y


def constants(x: Tensor) -> Tensor:
    """Constants that are brought to the sizes of the input, in every way."""
    n, c, h = x.shape[:3]
    ones = torch.ones(1, 1, 1, 1)
    row = torch.tensor([0.5, 2.0])
    y = x * ones.expand(n, -1, h, 1) + ones.expand((x.size(0), 1, 1, 1))
    y = y * ones.repeat(n, c, 1, 1) + ones.view(1, 1).tile((n, 1))[..., None, None]
    y = y + torch.eye(2).view(1, 4).repeat(n, 1).sum(1).view(n, 1, 1, 1)
    y = y * row.repeat(x.size(0), 1).prod(1).view(-1, 1, 1, 1) + row.new_ones(n, 1, h, 1)
    return y + torch.arange(100.0)[:h][:, None]


def pooled(x: Tensor) -> Tensor:
    y = F.avg_pool2d(x, (x.size(-2), x.size(-1))) + F.max_pool2d(x, (x.size(2), x.size(3)))
    return y.flatten(1) + F.avg_pool1d(x.flatten(2), x.size(2) * x.size(3)).squeeze(-1)


FREE = [windows, padded, table, loops, scaled, finite, assigned, constants, pooled]


@pytest.mark.parametrize("function", FREE, ids=lambda f: f.__name__)
def test_batch_and_image_size_stay_free(function: Any) -> None:
    shape = (6, 8) if function is table else (6, 8, 8)
    gm = traced(function, torch.randn(2, *shape))
    graphs = [gm, pickle.loads(pickle.dumps(gm))]
    if function in (windows, pooled):
        shape = (6, 9, 12)
    for network in graphs:
        for dtype in (torch.float32, torch.float64):
            x = torch.randn(5, *shape, dtype=dtype)
            torch.testing.assert_close(network(x), function(x), rtol=0, atol=0)


def test_a_constant_of_the_batch_size_is_no_assumption() -> None:
    gm = traced(lambda x: x + torch.arange(4.0).unsqueeze(0).repeat(x.size(0), 1), torch.ones(2, 4))
    assert not any(n.target is assume for n in gm.graph.nodes)


def test_a_broken_guard_says_which_assumption_failed() -> None:
    gm = traced(windows, torch.zeros(1, 2, 4, 8))
    with pytest.raises(GuardError, match=r"test_values.py:\d+ `if pad > 0:`.*False.*True"):
        gm(torch.zeros(1, 2, 4, 7))
    assert issubclass(GuardError, InputError)


def test_the_number_of_parts_is_guarded() -> None:
    gm = traced(loops, torch.zeros(1, 6, 4))
    with pytest.raises(GuardError, match=r"3.*4"):
        gm(torch.zeros(1, 8, 4))


def test_a_size_that_python_needs_is_guarded() -> None:
    gm = traced(lambda x: sum(x[:, i] for i in range(x.shape[1])), torch.zeros(2, 3))
    assert torch.equal(gm(torch.ones(5, 3)), torch.full((5,), 3.0))
    with pytest.raises(GuardError, match="range"):
        gm(torch.ones(5, 4))


def test_constant_arguments_are_guarded() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, scale: float = 1.0, square: bool = False) -> Tensor:
            return x**2 * scale if square else x * scale

    gm = trace(Scaled(), {"x": torch.ones(2), "scale": 3.0, "square": True})
    assert torch.equal(gm(torch.full((2,), 2.0), 3.0, True), torch.full((2,), 12.0))
    with pytest.raises(GuardError, match="'square'"):
        gm(torch.ones(2), 3.0, False)


def test_unused_sizes_leave_no_nodes() -> None:
    gm = traced(lambda x: x.relu() if x.dim() == 2 and len(x.shape) == 2 else x, torch.zeros(2, 3))
    assert [n.op for n in gm.graph.nodes] == ["placeholder", "call_method", "output"]


def test_isinstance_of_sizes() -> None:
    def function(x: Tensor) -> Tensor:
        size = x.shape[1]
        return x * 2 if isinstance(size, int) and isinstance(x.shape, tuple) else x

    gm = traced(function, torch.ones(2, 3))
    assert torch.equal(gm(torch.ones(4, 3)), torch.full((4, 3), 2.0))


@dataclass
class Result:
    first: Tensor
    second: Tensor | None = None


def test_nested_inputs_and_outputs() -> None:
    class Model(nn.Module):
        def forward(self, batch: dict[str, Any], pair: tuple[Tensor, Tensor]) -> Any:
            total = batch["a"] + sum(batch["more"])
            for key in batch:
                assert key in ("a", "more")
            x, y = pair
            return {"out": Result(total * x), "list": [y, (x,)]}

    def inputs(n: int) -> tuple[Any, ...]:
        batch = {"a": torch.randn(n), "more": [torch.randn(n), torch.randn(n)]}
        return batch, (torch.randn(n), torch.randn(n))

    model = Model()
    gm = trace(model, inputs(3))
    example = inputs(5)
    expected, actual = model(*example), gm(*example)
    assert isinstance(actual["out"], Result) and actual["out"].second is None
    assert torch.equal(expected["out"].first, actual["out"].first)
    assert torch.equal(expected["list"][1][0], actual["list"][1][0])


class Doubling(torch.autograd.Function):
    """Its backward is not that of its forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 7


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = Doubling.apply(x)
        return result


def test_a_backward_of_its_own_survives() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.doubled = Doubled()

        def forward(self, x: Tensor) -> Tensor:
            return self.doubled(self.linear(x))

    model = Model()
    gm = trace(model, torch.zeros(2, 3))
    gradients = []
    for network in (model, gm):
        network(torch.ones(2, 3)).sum().backward()
        gradients.append(model.linear.weight.grad)
        model.linear.weight.grad = None
    assert torch.equal(*gradients) and gradients[0].unique().tolist() == [14.0]


@fx.wrap
def marked(x: Tensor, times: int) -> Tensor:
    for _ in range(times):
        x = x.relu() + 1
    return x


@fx.wrap
def marked_and_untraceable(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


def test_functions_marked_with_wrap_are_looked_into() -> None:
    gm = traced(lambda x: marked(x, 2), torch.zeros(2, 3))
    assert [n.target for n in gm.graph.nodes if n.op == "call_method"] == ["relu", "relu"]
    gm = traced(lambda x: marked_and_untraceable(x * 2), torch.zeros(2, 3))
    assert [n.target for n in gm.graph.nodes if n.op == "call_function"][-1] is (
        marked_and_untraceable
    )
    assert torch.equal(gm(-torch.ones(2)), torch.full((2,), 2.0))


@pytest.mark.parametrize("fails", [True, False])
def test_nothing_stays_patched(fails: bool) -> None:
    patched = [
        (nn.Module, "__call__"),
        (nn.Module, "__getattr__"),
        (torch, "arange"),
        (torch, "zeros"),
        (math, "sqrt"),
        (torch.autograd.Function, "apply"),
        (Tensor, "expand"),
        (Tensor, "__getitem__"),
    ]
    before = [getattr(home, name) for home, name in patched]
    own = set(vars(Tensor))
    if fails:
        with pytest.raises(CaptureError):
            traced(lambda x: x.item(), torch.zeros(1))
    else:
        traced(table, torch.zeros(2, 6, 8))
    assert [getattr(home, name) for home, name in patched] == before
    assert set(vars(Tensor)) == own


def test_threads_trace_and_run_beside_each_other() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    other = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    x, y = torch.randn(2, 3, 4, 4), torch.randn(2, 4)
    expected = other(y)
    errors: list[BaseException] = []

    def repeat(action: Any) -> None:
        try:
            for _ in range(10):
                action()
        except BaseException as error:
            errors.append(error)

    def run() -> None:
        assert torch.equal(other(y), expected)

    threads = [
        threading.Thread(target=repeat, args=(action,))
        for action in (lambda: trace(model, x), lambda: trace(model, x), run, run)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(trace(model, x).graph.nodes) == 6


def test_assume() -> None:
    assume(3, 3, "here")
    with pytest.raises(GuardError, match="at here is 3; for this input it is 4"):
        assume(4, 3, "here")
