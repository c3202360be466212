"""Captured parts: a model whose own code cannot be traced is pruned inside."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torchvision.models import get_model

from rbpfx.errors import CaptureError
from rbpfx.graph.capture import call_with, trace
from rbpfx.graph.cost import count_macs
from rbpfx.graph.gates import apply_mask
from rbpfx.graph.groups import Analysis, analyze
from rbpfx.graph.parts import captured_parts, example_batch
from rbpfx.graph.slicing import rewrite
from rbpfx.graph.verification import require_equal
from rbpfx.plan import PruningPlan


def block(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, outputs, 1),
    )


class Choosing(nn.Module):
    """Its forward depends on the values it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = block(4, 8, 4)
        self.layers = nn.ModuleList([block(4, 6, 4), block(4, 6, 4)])
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x) * self.scale if float(x.mean()) > -1e6 else x
        return x


class Detector(nn.Module):
    """A graph around a module that stays whole; or, with `rooted`, none around it."""

    def __init__(self, rooted: bool) -> None:
        super().__init__()
        self.rooted = rooted
        self.stem = block(3, 8, 4)
        self.inner = Choosing()
        self.head = block(4, 8, 2)

    def forward(self, images: list[Tensor], scale: float = 1.0) -> dict[str, Tensor]:
        x = self.stem(torch.stack(images))
        if self.rooted and float(x.sum()) > 1e9:
            x = x * 2
        return {"scores": self.head(self.inner(x)) * scale}


PARTS = {
    True: ["stem", "inner.first", "inner.layers.0", "inner.layers.1", "head"],
    False: ["", "inner.first", "inner.layers.0", "inner.layers.1"],
}


def halved(analysis: Analysis) -> PruningPlan:
    return PruningPlan({g.name: range(0, g.size, 2) for g in analysis.groups})


@pytest.fixture
def images() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(3, 6, 6) for _ in range(2)]


@pytest.mark.parametrize("rooted", [True, False])
def test_parts_are_captured_and_pruned(rooted: bool, images: list[Tensor]) -> None:
    model = Detector(rooted).eval()
    before = copy.deepcopy(model.state_dict())
    traced = trace(model, (images,))
    assert list(captured_parts(traced)) == PARTS[rooted]
    assert isinstance(traced, Detector if rooted else fx.GraphModule)
    assert example_batch(traced) == 2
    assert traced.state_dict().keys() == before.keys()
    for mode in (False, True):
        networks = [copy.deepcopy(network).train(mode) for network in (model, traced)]
        expected, actual = (call_with(network, (images,)) for network in networks)
        assert torch.equal(expected["scores"], actual["scores"])
    analysis = analyze(traced)
    names = ["stem.0", "inner.first.0", "inner.layers.0.0", "inner.layers.1.0", "head.0"]
    assert sorted(g.name for g in analysis.groups) == sorted(names)
    plan = halved(analysis)
    pruned = rewrite(traced, analysis, plan)
    assert require_equal(apply_mask(traced, analysis, plan), pruned, (images,)) < 1e-12
    assert pruned.get_submodule("inner.first.0").out_channels == 4
    assert count_macs(pruned) < 0.6 * count_macs(traced)
    assert round(analysis.macs(analysis.keep(plan)) / 2) == count_macs(pruned)
    twin = pickle.loads(pickle.dumps(pruned))
    assert torch.equal(twin(images)["scores"], pruned(images)["scores"])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_parameter_of_several_parts_stays(images: list[Tensor]) -> None:
    model = Detector(rooted=True)
    model.head[0] = model.inner.first[0]
    analysis = analyze(trace(model, (images,)))
    assert {g.name for g in analysis.groups} == {"stem.0", "inner.layers.0.0", "inner.layers.1.0"}
    assert any("several graphs" in axis.reason for axis in analysis.frozen)


def test_a_part_must_serve_every_call() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = block(2, 4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x) if x.shape[-1] > 3 else x * 2

    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> Tensor:
            while float(x.sum()) > -1 and x.shape[-1] > 2:
                x = self.inner(x).abs()[..., : x.shape[-1] // 2]
            return x

    model = Pyramid().eval()
    traced = trace(model, torch.rand(1, 2, 6, 6))
    assert list(captured_parts(traced)) == ["inner.layers"]
    x = torch.rand(1, 2, 12, 12)
    assert torch.equal(traced(x), model(x))


def test_nothing_to_capture() -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return y if y.sum() > 0 else -y

    with pytest.raises(CaptureError, match="the forward of Alone itself"):
        trace(Alone(), torch.zeros(2, 3))


DETECTORS: dict[str, dict[str, Any]] = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": {"min_size": 64, "max_size": 96},
    "ssdlite320_mobilenet_v3_large": {},
}


@pytest.mark.parametrize("name", DETECTORS)
def test_detectors(name: str) -> None:
    torch.manual_seed(0)
    model = get_model(name, weights=None, weights_backbone=None, **DETECTORS[name]).eval()
    inputs = ([torch.rand(3, 64, 80), torch.rand(3, 72, 64)],)
    traced = trace(model, inputs)
    expected, actual = model(*inputs)[0], traced(*inputs)[0]
    assert all(torch.equal(expected[k], actual[k]) for k in expected)
    analysis = analyze(traced)
    plan = halved(analysis)
    pruned = rewrite(traced, analysis, plan)
    assert require_equal(apply_mask(traced, analysis, plan), pruned, inputs) < 1e-9
    sizes = [sum(p.numel() for p in network.parameters()) for network in (model, pruned)]
    assert sizes[1] < 0.7 * sizes[0]
    assert type(pruned).__mro__[1] is not fx.GraphModule


class Around(nn.Module):
    """A block and a scripted module."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first, self.head = first, nn.Conv2d(6, 2, 1)
        self.scripted = torch.jit.script(nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.scripted(self.first(x)))
        return y


@pytest.mark.filterwarnings("ignore")
def test_torchscript_stays_and_what_is_beside_it_is_pruned() -> None:
    model, x = Around(block(3, 8, 6)).train(), torch.rand(2, 3, 5, 5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    gm = trace(model, x)
    analysis = analyze(gm)
    pruned, masked = (f(gm, analysis, halved(analysis)) for f in (rewrite, apply_mask))
    assert pruned.get_parameter("first.0.weight").shape[0] == 4
    assert require_equal(masked, pruned, x) < 1e-12
    pruned.train()(x).sum().backward()
    assert all(p.grad is not None for p in pruned.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.filterwarnings("ignore")
def test_nothing_beside_torchscript() -> None:
    for leaves in ((), ("scripted",)):
        with pytest.raises(CaptureError, match=r"'scripted' is TorchScript.*scripted from in its"):
            trace(Around(nn.Conv2d(3, 6, 1)), torch.rand(2, 3, 5, 5), leaf_modules=leaves)


class Asking(nn.Module):
    """Stays whole, and asks a submodule for more than its result."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = block(4, 8, 4), block(4, 6, 4)
        self.second.limit = 1e9

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x))
        return x if float(x.mean()) < self.second.limit else -x


class AroundAsking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = block(3, 8, 4), Asking()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(self.stem(x))
        return y


def test_a_module_that_does_not_run_around_parts_keeps_its_own_submodules() -> None:
    model, x = AroundAsking().eval(), torch.rand(2, 3, 5, 5)
    gm = trace(model, x)
    assert torch.equal(gm(x), model(x))
    assert list(captured_parts(gm)) == [""]
    with pytest.raises(CaptureError, match="the forward of Asking itself"):
        trace(Asking(), torch.rand(2, 4, 5, 5))
