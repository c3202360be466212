"""torchvision's models obey the law; some groups are checked by hand."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import nn
from torchvision import models

from rbpfx.graph.capture import trace
from rbpfx.graph.groups import Analysis, analyze
from rbpfx.graph.verification import require_equal
from rbpfx.testing import randomize
from tests.graph.laws import check_again, check_close, check_costs, check_law, compile_random

SIZES = {"inception_v3": 96, "googlenet": 48, "vgg16_bn": 32, "alexnet": 64}
NO_INIT = {"googlenet", "inception_v3"}
QUICK = ["resnet18", "mobilenet_v2", "squeezenet1_1", "shufflenet_v2_x0_5"]
SLOW = [
    "resnet50",
    "vgg16_bn",
    "densenet121",
    "googlenet",
    "resnext50_32x4d",
    "inception_v3",
    "alexnet",
    "mnasnet0_5",
    "efficientnet_b0",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "convnext_tiny",
    "vit_b_32",
    "swin_t",
]
# MACs (in millions) of one 224-pixel image, from the publications (299 for Inception).
PUBLISHED_MACS = {"resnet18": 1814, "resnet50": 4089, "vgg16_bn": 15470, "mobilenet_v2": 301}


def build(name: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    options: dict[str, Any] = {"init_weights": False} if name in NO_INIT else {}
    if name in ("mobilenet_v2", "squeezenet1_1", "efficientnet_b0", "mobilenet_v3_small"):
        options["dropout"] = 0.0
    if name == "inception_v3":  # its auxiliary head fits large images only; GoogLeNet has two
        options["aux_logits"] = False
    if name == "vit_b_32":
        options["image_size"] = 64
    model = getattr(models, name)(weights=None, num_classes=10, **options).double()
    for module in model.modules():  # what is drawn in train mode differs between two networks
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if type(module).__name__ == "StochasticDepth":
            module.p = 0.0
    randomize(model)
    size = SIZES.get(name, 64)
    return model, (torch.randn(2, 3, size, size, dtype=torch.float64),)


def check_model(name: str, unit: str) -> Analysis:
    model, inputs = build(name)
    compiled = compile_random(model, inputs, seed=1, unit=unit)
    assert compiled.removed > 0
    if not any("Dropout" in n or "dropout" in n for n in _operators(compiled.gm)):
        check_law(compiled, inputs, train=True)
    check_law(compiled, inputs, train=False)
    require_equal(compiled.masked, compiled.sliced, inputs)
    return compiled.analysis


def _operators(gm: Any) -> set[str]:
    return {str(n.target) for n in gm.graph.nodes if n.op == "call_function"}


@pytest.mark.parametrize("name", QUICK)
def test_models(name: str) -> None:
    check_model(name, "channel")


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["channel", "feature"])
@pytest.mark.parametrize("name", QUICK + SLOW)
def test_models_in_full(name: str, unit: str) -> None:
    check_model(name, unit)
    model, inputs = build(name)
    compiled = compile_random(model, inputs, seed=2, unit=unit)
    check_close(compiled, inputs)
    check_again(compiled, inputs, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_costs_of_models(name: str) -> None:
    model, inputs = build(name)
    check_costs(compile_random(model, inputs, seed=1))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_macs_are_the_published_ones(name: str) -> None:
    check_published(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "vgg16_bn"])
def test_macs_of_large_models_are_the_published_ones(name: str) -> None:
    check_published(name)


def check_published(name: str) -> None:
    from rbpfx.graph.cost import count_macs

    gm = trace(getattr(models, name)(weights=None), torch.zeros(1, 3, 224, 224))
    assert count_macs(gm) / 1e6 == pytest.approx(PUBLISHED_MACS[name], rel=2e-3)


class Stack(nn.Module):
    """A residual network of any depth."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(depth))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(depth))
        self.head = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = torch.relu(norm(conv(x)))
            x = y if index == 0 else x + y
        result: torch.Tensor = self.head(x)
        return result


def seconds(depth: int) -> float:
    gm = trace(Stack(depth), torch.zeros(1, 4, 4, 4))
    analyze(gm)
    start = time.process_time()
    analysis = analyze(gm)
    assert [g.size for g in analysis.groups] == [4]
    assert len(analysis.groups[0].reads) == depth
    return time.process_time() - start


def test_the_analysis_is_linear_in_the_depth() -> None:
    assert seconds(240) < 10 * max(seconds(60), 0.01)


@pytest.mark.slow
def test_two_thousand_layers() -> None:
    assert seconds(2000) < 3.0
