"""Code is generated late, and nobody can tell."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch import Tensor, fx, nn

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
