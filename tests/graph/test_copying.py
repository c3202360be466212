"""Quick copies are what `copy.deepcopy` makes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torchvision import models

from rbpfx.graph.capture import trace
from rbpfx.graph.copying import copy_model


class Odd(nn.Module):
    """Shared values, a cycle, a slot, and containers that are not empty."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = self.same = nn.Linear(3, 3)
        self.layer.weight.requires_grad_(False)
        self.cache: dict[str, Any] = {}
        self.layer.cache = self.cache
        self.table = {"a": [torch.ones(2), (1, 2)], "b": {3}}
        self.itself = [self]
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


class Guarded(nn.Module):
    """Pickling code of its own."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "copied": True}


def test_structure_survives() -> None:
    model = Odd()
    twin = copy_model(model, {})
    assert twin.layer is twin.same is not model.layer
    assert twin.layer.cache is twin.cache is not model.cache
    assert twin.itself[0] is twin
    assert twin.table["b"] == {3}
    assert twin.table["a"][0] is not model.table["a"][0]
    assert not twin.layer.weight.requires_grad
    assert twin.layer.weight.data_ptr() != model.layer.weight.data_ptr()
    assert (
        twin.state_dict().keys()
        == model.state_dict().keys()
        == {"layer.weight", "layer.bias"}
        | {
            "same.weight",
            "same.bias",
        }
    )


def test_pickling_code_of_a_module_is_run() -> None:
    assert copy_model(nn.Sequential(Guarded()), {})[0].copied


def test_the_memo_is_obeyed() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    weight, relu = nn.Parameter(torch.ones(1, 2)), nn.Tanh()
    twin = copy_model(model, {id(model[0].weight): weight, id(model[1]): relu})
    assert twin[0].weight is weight
    assert twin[1] is relu


@pytest.mark.parametrize(
    "model",
    [models.resnet18(), nn.LSTM(3, 4), nn.MultiheadAttention(4, 2), nn.BatchNorm1d(3)],
    ids=lambda model: type(model).__name__,
)
def test_copies_equal_deep_copies(model: nn.Module) -> None:
    model = trace(model, torch.zeros(1, 3, 32, 32)) if isinstance(model, models.ResNet) else model
    twin, expected = copy_model(model, {}), copy.deepcopy(model)
    assert repr(twin) == repr(model)
    for quick, slow in zip(twin.modules(), expected.modules(), strict=True):
        assert quick.__dict__.keys() == slow.__dict__.keys()
    for (name, quick), (same, slow) in zip(
        twin.state_dict().items(), expected.state_dict().items(), strict=True
    ):
        assert name == same
        assert torch.equal(quick, slow)


def test_a_compiled_module_is_copied_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    for module in (model, model[1]):
        module.compile(backend="eager")
    captured = trace(model, torch.zeros(3, 2))
    captured.compile(backend="eager")
    for network in (model, captured):
        twin = copy_model(network, {})
        twin(torch.rand(3, 2))
        assert model[1].num_batches_tracked == 0
        assert network._compiled_call_impl is not None
        assert all(m._compiled_call_impl is None for m in twin.modules())
