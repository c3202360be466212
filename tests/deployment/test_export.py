"""Exports: files compute what the network computes, at any batch size, or are not written."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from rbpfx.deployment import export as exports
from rbpfx.deployment.deploy import deploy
from rbpfx.deployment.export import export
from rbpfx.errors import ExportError, InputError, VerificationError
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


class ByName(nn.Module):
    """An argument that is given by name only."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 3)

    def forward(self, x: Tensor, *, mask: Tensor) -> dict[str, Tensor]:
        return {"logits": self.linear(x) * mask}


def test_files_are_called_as_the_examples(tmp_path: Path) -> None:
    inputs = {"x": torch.randn(4, 8), "mask": torch.ones(4, 1)}
    model, path = ByName().eval(), tmp_path / "net.pt2"
    export(model, inputs, path)
    result = torch.export.load(path).module()(**inputs)
    assert type(result) is dict and difference(model(**inputs), result) < 1e-5


class Named(NamedTuple):
    """Fields, one of which is called like an operator, another like the input."""

    relu: Tensor
    x: Tensor
    rest: list[Tensor]


class Namer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Named:
        x = self.linear(x)
        return Named(x, torch.relu(x) + 1, [x * 2, torch.relu(x)])


def test_a_result_that_no_program_can_hold(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="let the forward return"):
        export(Namer(), torch.randn(4, 8), tmp_path / "net.pt2")
    assert not list(tmp_path.iterdir())


def onnx_shapes(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    session = pytest.importorskip("onnxruntime").InferenceSession(str(path))
    inputs, outputs = (
        {v.name: v.shape for v in values}
        for values in (session.get_inputs(), session.get_outputs())
    )
    return inputs, outputs


def test_outputs_in_onnx_have_the_names_of_the_result(model: nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    path = tmp_path / "net.onnx"
    assert export(Namer(), torch.randn(4, 8), path) < 1e-4
    inputs, outputs = onnx_shapes(path)
    assert inputs == {"x": ["batch", 8]}
    assert outputs == {name: ["batch", 3] for name in ("relu", "x_1", "rest", "rest_1")}
    export(model, X, path)
    assert list(onnx_shapes(path)[1]) == ["output"]


def test_types_that_onnxruntime_lacks(model: nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    deployed = deploy(model, X, dtype=torch.bfloat16)
    with pytest.raises(ExportError, match="float16"):
        export(deployed, X, tmp_path / "net.onnx")
    export(deploy(model, X, dtype=torch.float16), X, tmp_path / "net.onnx")


def test_a_directory_in_the_way(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "net.pt2").mkdir()
    with pytest.raises(ExportError, match="directory"):
        export(model, X, tmp_path / "net.pt2")


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


@pytest.mark.parametrize("inputs", [None, torch.randn(1, 3, 6, 6)], ids=type)
def test_wrong_examples(model: nn.Module, inputs: Any, tmp_path: Path) -> None:
    deployed = deploy(model, X)
    with pytest.raises(InputError, match="inputs"):
        export(deployed, inputs, tmp_path / "net.pt2")
