"""Code is generated late, and nobody can tell."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from torchvision.models.resnet import BasicBlock, ResNet

import rbpfx
from rbpfx.graph.capture import trace
from rbpfx.graph.lazy import LazyGraphModule


class Scaled(nn.Module):
    """Two arguments, so that a signature says something."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        """A scaled linear map."""
        return self.layer(x) * scale


INPUTS = (torch.randn(2, 3), torch.randn(3))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Scaled()


@pytest.fixture
def gm(model: nn.Module) -> fx.GraphModule:
    captured = trace(model, INPUTS)
    assert isinstance(captured, LazyGraphModule)
    assert "_code" not in vars(captured)
    return captured


def test_code_is_there_when_it_is_asked_for(gm: fx.GraphModule) -> None:
    assert list(inspect.signature(gm.forward).parameters) == ["x", "scale"]
    assert "self.layer(x)" in gm.code


def test_text_shows_the_code(gm: fx.GraphModule) -> None:
    assert "self.layer(x)" in str(gm)


def test_the_class_has_a_forward_too(gm: fx.GraphModule, model: nn.Module) -> None:
    assert inspect.isfunction(type(gm).forward)
    assert torch.equal(type(gm).forward(gm, *INPUTS), model(*INPUTS))


def test_hooks_run_once_on_the_first_call(gm: fx.GraphModule, model: nn.Module) -> None:
    calls = []
    gm.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(gm(*INPUTS), model(*INPUTS))
    assert len(calls) == 1


def test_a_graph_that_is_assigned_again_gives_other_code(gm: fx.GraphModule) -> None:
    before = gm(*INPUTS)
    output = next(iter(reversed(gm.graph.nodes)))
    with gm.graph.inserting_before(output):
        output.args = (gm.graph.call_function(torch.neg, output.args),)
    gm.graph = gm.graph
    assert torch.equal(gm(*INPUTS), -before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda gm: pickle.loads(pickle.dumps(gm))])
def test_copies(gm: fx.GraphModule, model: nn.Module, copied: object) -> None:
    twin = copied(gm)  # type: ignore[operator]
    assert torch.equal(twin(*INPUTS), model(*INPUTS))
    assert "_code" not in vars(gm) or copied is not copy.deepcopy


def test_torch_fx_traces_it_again(gm: fx.GraphModule, model: nn.Module) -> None:
    assert torch.equal(fx.symbolic_trace(gm)(*INPUTS), model(*INPUTS))


def test_it_is_captured_again(gm: fx.GraphModule, model: nn.Module) -> None:
    assert torch.equal(trace(gm, INPUTS)(*INPUTS), model(*INPUTS))


def small_resnet() -> ResNet:
    """Four blocks, two classes."""
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=2)


def saved_and_loaded(result: rbpfx.PruningResult, path: Path) -> nn.Module:
    result.save(path)
    return rbpfx.load(path, small_resnet)


@pytest.mark.parametrize(
    "made",
    [
        lambda result, _: result.model,
        lambda result, _: copy.deepcopy(result.model),
        lambda result, _: pickle.loads(pickle.dumps(result.model)),
        saved_and_loaded,
    ],
    ids=["pruned", "copied", "pickled", "loaded"],
)
@pytest.mark.filterwarnings("ignore")
def test_it_can_be_scripted(
    made: Callable[[rbpfx.PruningResult, Path], nn.Module], tmp_path: Path
) -> None:
    images = torch.rand(4, 3, 32, 32)
    result = rbpfx.prune(
        small_resnet(),
        [(images, torch.tensor([0, 1, 0, 1]))],
        method="magnitude",
        recursion=None,
        target=rbpfx.Target(macs=0.5),
        recovery=rbpfx.FineTune(epochs=0),
        progress=False,
    )
    network = made(result, tmp_path / "saved")
    scripted = torch.jit.script(network)
    for training in (False, True):
        expected = copy.deepcopy(network).train(training)(images)
        assert torch.equal(scripted.train(training)(images), expected)
