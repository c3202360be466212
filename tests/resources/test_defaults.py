"""torch's default device and dtype may be others than the model's.

The default device is "meta" here: whatever is made without saying where has no values, and fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

import rbpfx
from rbpfx import METHODS, PruningResult, Target
from tests.resources.common import X, prune, require_same, toy
from tests.toy import ShortcutNet

pytestmark = pytest.mark.filterwarnings("ignore")
MODELS = {method: toy() for method in METHODS}
HALF = Target(macs=0.5)
DEFAULTS: dict[str, tuple[Any, Any, Any]] = {
    "meta": (torch.set_default_device, "meta", None),
    "float64": (torch.set_default_dtype, torch.float64, torch.float32),
}


class Flip(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flip(1)


@pytest.fixture(params=DEFAULTS)
def default(request: pytest.FixtureRequest) -> Iterator[str]:
    """Another default device or dtype; what tests ask for before it is made as usual."""
    setter, other, usual = DEFAULTS[request.param]
    setter(other)
    try:
        yield request.param
    finally:
        setter(usual)


@pytest.fixture(scope="module")
def usual() -> dict[str, PruningResult]:
    """Results of all methods, made under the usual defaults."""
    return {name: prune(model, method=name, target=HALF) for name, model in MODELS.items()}


def adam_keeps_to_itself() -> bool:
    """Whether the steps that Adam counts are elsewhere than the default device."""
    weight = nn.Parameter(torch.ones(1, device="cpu"))
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.Adam([weight])
    with torch.device("meta"), suppress(RuntimeError):
        optimizer.step()
    return bool(optimizer.state[weight]["step"].device.type == "cpu")


@pytest.mark.parametrize("method", METHODS)
def test_prune(usual: dict[str, PruningResult], default: str, method: str) -> None:
    if default == "meta" and METHODS[method].trains and not adam_keeps_to_itself():
        pytest.skip("the Adam of this torch counts its steps on the default device")
    result = prune(MODELS[method], method=method, target=HALF)
    if default == "meta":
        require_same(result, usual[method])
    for name, tensor in result.model.state_dict().items():
        assert tensor.dtype == usual[method].model.state_dict()[name].dtype, name


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return resnet18(num_classes=10).eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32)


def test_passes(network: nn.Module, images: torch.Tensor, default: str) -> None:
    gm = rbpfx.trace(network, images)
    analysis = rbpfx.analyze(gm)
    plan = rbpfx.PruningPlan({g.name: range(g.size // 2) for g in analysis.groups})
    pruned = rbpfx.rewrite(gm, analysis, plan)
    assert rbpfx.verify(rbpfx.apply_mask(gm, analysis, plan), pruned, images) < 1e-12
    assert {(t.device.type, t.dtype) for t in pruned.parameters()} == {("cpu", torch.float32)}
    assert rbpfx.deploy(pruned, images)(images).shape == (2, 10)


def test_channels_that_move(default: str) -> None:
    """What moves where is found out by running the operator."""
    with torch.device("cpu"):
        model = nn.Sequential(nn.Conv2d(3, 8, 1), Flip(), nn.ReLU(), nn.Conv2d(8, 2, 1))
        images = torch.ones(2, 3, 4, 4)
    gm = rbpfx.trace(model, images)
    analysis = rbpfx.analyze(gm)
    plan = rbpfx.PruningPlan({g.name: (0, 1, 5) for g in analysis.groups})
    pruned = rbpfx.rewrite(gm, analysis, plan)
    assert rbpfx.verify(rbpfx.apply_mask(gm, analysis, plan), pruned, images) < 1e-12


def test_what_becomes_of_a_result(
    usual: dict[str, PruningResult], default: str, tmp_path: Path
) -> None:
    result = usual["rbp"]
    result.sweep([0.4])
    result.deploy()(X)
    result.report.write(tmp_path / "report.html")
    assert rbpfx.export(result.model.eval(), X, tmp_path / "net.pt2") < 1e-5
    rbpfx.measure_latency(result.model, X, max_repeats=2)


def test_source(usual: dict[str, PruningResult], default: str, tmp_path: Path) -> None:
    usual["rbp"].to_source(tmp_path / "net.py")
    assert "float64" not in (tmp_path / "net.py").read_text()


def test_save_and_load(usual: dict[str, PruningResult], default: str, tmp_path: Path) -> None:
    result = usual["rbp"]
    result.save(tmp_path, program=True)
    for loaded in (
        rbpfx.load(tmp_path, MODELS["rbp"]),
        rbpfx.load(tmp_path, ShortcutNet, device="cpu"),
        rbpfx.load(tmp_path, trusted=True),
    ):
        loaded.train(result.model.training)
        for name, tensor in result.model.state_dict().items():
            assert torch.equal(loaded.state_dict().get(name, tensor), tensor), name
        assert torch.equal(loaded.eval()(X), result.model.eval()(X))


def test_onnx(usual: dict[str, PruningResult], default: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert rbpfx.export(usual["rbp"].model.eval(), X, tmp_path / "net.onnx") < 1e-4
