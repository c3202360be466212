"""Exports: files compute what the network computes, at any batch size, or are not written."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from rbpfx.deployment import export as exports
from rbpfx.deployment.deploy import deploy
from rbpfx.deployment.export import export
from rbpfx.errors import ExportError, VerificationError
from rbpfx.graph.verification import difference
from rbpfx.testing import randomize
from tests.toy import ShortcutNet

pytestmark = pytest.mark.filterwarnings("ignore")
X = torch.randn(1, 1, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> nn.Module:
    net = ShortcutNet()
    randomize(net)
    return net.eval()


def test_a_program_has_a_free_batch_size(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    deployed = deploy(model, X)
    assert export(deployed, X, path) < 1e-5
    x = torch.randn(7, 1, 6, 6)
    result = torch.export.load(path).module()(x)
    assert difference(deployed(x), result) < 1e-5
    assert list(tmp_path.iterdir()) == [path]


def test_a_model_is_captured_and_folded_first(model: nn.Module, tmp_path: Path) -> None:
    export(model, X, tmp_path / "net.pt2")
    program = torch.export.load(tmp_path / "net.pt2")
    assert not any("running_mean" in name for name in program.state_dict)


def test_onnx(model: nn.Module, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    deployed = deploy(model, X)
    assert export(deployed, X, tmp_path / "net.onnx") < 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"))
    x = torch.randn(5, 1, 6, 6)
    (result,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert difference(deployed(x), torch.from_numpy(result)) < 1e-4


@pytest.mark.slow
def test_machine_code(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "net.aoti.pt2"
    try:
        assert export(deploy(model, X), X, path) < 1e-4
    except ExportError as error:
        pytest.skip(str(error))
    compiled = torch._inductor.aoti_load_package(str(path))
    x = torch.randn(5, 1, 6, 6)
    assert difference(model(x), compiled(x)) < 1e-4


class Two(nn.Module):
    """Two inputs, one of which is no batch; a dictionary of results."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, tokens: Tensor, weights: Tensor) -> dict[str, Tensor]:
        hidden = self.embed(tokens) * weights
        return {"hidden": hidden, "logits": self.head(hidden.mean(1))}


def test_several_inputs_and_results(tmp_path: Path) -> None:
    inputs = {"tokens": torch.randint(9, (2, 5)), "weights": torch.randn(4)}
    assert export(Two(), inputs, tmp_path / "net.pt2") < 1e-5


def test_an_unknown_format(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"\*\.onnx, \*\.aoti\.pt2, \*\.pt2"):
        export(model, X, tmp_path / "net.tflite")


def test_a_missing_package(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ExportError, match=r"rbpfx\[export\]"):
        export(model, X, tmp_path / "net.onnx")


def test_a_failed_export_replaces_nothing(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "net.pt2"
    path.write_text("good")
    monkeypatch.setattr(exports, "_difference", lambda *_: 1.0)
    with pytest.raises(VerificationError, match="not written"):
        export(model, X, path)
    assert path.read_text() == "good"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_code_of_its_own_cannot_be_exported(tmp_path: Path) -> None:
    model = models.detection.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3
    )
    with pytest.raises(ExportError, match="Python code of its own"):
        export(model.eval(), ([torch.rand(3, 320, 320)],), tmp_path / "net.pt2")
