"""Regions without gradients keep their meaning; those under autocast are refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from rbpfx.errors import CaptureError
from rbpfx.graph.capture import trace
from rbpfx.graph.groups import analyze
from tests.graph.laws import check_law, check_pickle, compile_random


class Net(nn.Module):
    """A body, of which subclasses do a part without gradients, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 8, 3), nn.Linear(8, 4)
        self.register_buffer("average", torch.zeros(8))
        self.register_buffer("queue", torch.zeros(3, 8))

    def body(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.first(x)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(F.relu(self.second(self.body(x))).mean((2, 3)))
        return y


class With(Net):
    def body(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().body(x)


class Decorated(Net):
    @torch.no_grad()
    def body(self, x: Tensor) -> Tensor:
        return super().body(x)


class Switched(Net):
    def body(self, x: Tensor) -> Tensor:
        torch.set_grad_enabled(False)
        y = super().body(x)
        torch.set_grad_enabled(True)
        return y


class Inferred(Net):
    def body(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            y = super().body(x)
        return y.clone()


class Nested(Net):
    def body(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.first(x)
            with torch.enable_grad():
                y = self.norm(y)
            return y.relu() + y


class SeveralResults(Net):
    def body(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            parts = super().body(x).chunk(2, 1)
        return torch.cat(parts, 1) * parts[0].mean()


class PartlyNamed(Net):
    def body(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            best = super().body(x).max(1, keepdim=True)
        return self.first(x) * best.values


class ComputedWeight(Net):
    def body(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            weight = self.first.weight / self.first.weight.norm()
        return F.conv2d(x, weight, self.first.bias)


class WrittenOutside(Net):
    """What a region has computed is changed in place by what has gradients."""

    def body(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = super().body(x) * 2
        y.add_(self.first(x))
        y *= 0.5
        return y


class WrittenInside(Net):
    """What has gradients is changed in place by a region: the gradient does not see it."""

    def body(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x)) * 1.5
        with torch.no_grad():
            y[:, :4].mul_(2)
            y[:, 1] = y[:, 2].exp()
            y *= 2
            y = y.clamp_(-1, 1).contiguous()
        return y


class Averages(Net):
    """Keeps statistics of its own, always or in train mode."""

    always = True

    def body(self, x: Tensor) -> Tensor:
        y = super().body(x)
        if self.always or self.training:
            with torch.no_grad():
                found = y.mean((0, 2, 3))
                self.average.mul_(0.9).add_(found, alpha=0.1)
                self.queue[1:2].copy_(found)
                self.queue[2] = found
        return y - self.average[:, None, None] * self.queue.sum()


class AveragesInTraining(Averages):
    always = False


MODELS = [Net, With, Decorated, Switched, Inferred, Nested, SeveralResults, PartlyNamed]
MODELS += [ComputedWeight, WrittenOutside, WrittenInside, Averages, AveragesInTraining]


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
    model.zero_grad(set_to_none=True)
    y = model(x)
    y.square().sum().backward()
    return y.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("cls", MODELS)
def test_results_and_gradients_are_those_of_the_model(cls: type[Net]) -> None:
    model = cls()
    gm = copy.deepcopy(trace(model, torch.randn(4, 3, 8, 8)))
    assert isinstance(gm, fx.GraphModule)
    for network in (gm, pickle.loads(pickle.dumps(gm))):
        reference = copy.deepcopy(model)
        for mode in (True, False, True):
            x = torch.randn(5, 3, 8, 8)
            expected, wanted = gradients(reference.train(mode), x)
            actual, got = gradients(network.train(mode), x)
            torch.testing.assert_close(actual, expected)
            assert {n for n, g in got.items() if g is None} == {
                n for n, g in wanted.items() if g is None
            }
            torch.testing.assert_close(
                {n: g for n, g in got.items() if g is not None},
                {n: g for n, g in wanted.items() if g is not None},
            )
        for expected, actual in zip(reference.buffers(), network.buffers(), strict=True):
            assert not actual.requires_grad
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("cls", [With, Nested])
def test_what_lies_in_a_region_is_pruned_like_anything_else(cls: type[Net]) -> None:
    model, inputs = cls().double(), (torch.randn(4, 3, 8, 8, dtype=torch.float64),)
    compiled = compile_random(model, inputs, 0)
    assert {g.name for g in compiled.analysis.groups} == {"first", "second"}
    for train in (False, True):
        check_law(compiled, inputs, train=train)
    check_pickle(compiled, inputs)


@pytest.mark.parametrize("without", [True, False])
def test_train_mode_decides_what_both_modes_share(without: bool) -> None:
    class OneMode(Net):
        def body(self, x: Tensor) -> Tensor:
            with torch.set_grad_enabled(self.training != without):
                return super().body(x)

    gm = trace(OneMode(), torch.randn(4, 3, 8, 8)).train()
    grad = gradients(gm, torch.randn(4, 3, 8, 8))[1]["first.weight"]
    assert (grad is None) == without


def detached(model: nn.Module) -> int:
    gm = trace(model, torch.randn(4, 3, 8, 8))
    return sum(n.target == "detach" for n in gm.graph.nodes)


def test_what_surrounds_a_capture_does_not_reach_into_it() -> None:
    with torch.no_grad():
        assert detached(Net()) == 0
        assert detached(With()) == 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert detached(Net()) == 0


def test_values_without_gradients_are_left_alone() -> None:
    class Positions(Net):
        def body(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                waves = torch.arange(x.shape[-1], device=x.device).to(x.dtype).cos()
            return super().body(x * waves)

    assert detached(Positions()) == 0


# -- autocast ---------------------------------------------------------------------------------


class Mixed(Net):
    def body(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().body(x).float()


class MixedThroughout(Net):
    @torch.autocast("cpu", dtype=torch.bfloat16)
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 3, 1), inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(self.stem(x))
        return y


@pytest.mark.parametrize("build", [Mixed, MixedThroughout, lambda: Around(Mixed())])
def test_autocast_in_a_forward_is_refused(build: Callable[[], nn.Module]) -> None:
    with pytest.raises(CaptureError, match=r"torch.autocast on .*Training\(precision='bfloat16'\)"):
        trace(build(), torch.randn(4, 3, 8, 8))


def test_a_module_under_autocast_may_stay_whole() -> None:
    model, x = Around(Mixed()).eval(), torch.randn(4, 3, 8, 8)
    gm = trace(model, x, leaf_modules=["inner"])
    torch.testing.assert_close(gm(x), model(x), rtol=0, atol=0)


def test_autocast_that_is_switched_off_is_no_obstacle() -> None:
    class Full(Net):
        @torch.autocast("cpu", enabled=False)
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    assert len(analyze(trace(Full(), torch.randn(4, 3, 8, 8))).groups) == 2
