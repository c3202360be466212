"""Capture: one graph that equals the model in both modes, and errors that help."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rbpfx.errors import CaptureError, InputError, RbpfxError
from rbpfx.graph.capture import (
    bind_inputs,
    call_with,
    evaluating,
    trace,
)
from rbpfx.graph.groups import analyze
from rbpfx.graph.metadata import record_metadata
from rbpfx.graph.modes import TrainingMode
from tests.graph.laws import Snapshot


class Dropping(nn.Module):
    """Functional dropout, and an auxiliary result in train mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.aux = nn.Linear(4, 2)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.norm(self.conv(x)).mean((2, 3))
        x = F.dropout(x, 0.5, training=self.training)
        if self.training:
            return self.head(x), self.aux(x)
        return self.head(x)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: float = 2.0, bias: Tensor | None = None) -> Tensor:
        x = self.linear(x) * scale
        return x if bias is None else x + bias


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.inner = Branching()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.first(x))


def same(model: nn.Module, gm: nn.Module, *inputs: Tensor, **kwargs: Any) -> None:
    results = []
    for network in (model, gm):
        torch.manual_seed(0)
        results.append(network(*inputs, **kwargs))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_both_modes_in_one_graph() -> None:
    model = Dropping()
    x = torch.randn(4, 3, 5, 5)
    gm = trace(model, x)
    for mode in (True, False, True):
        model.train(mode)
        gm.train(mode)
        same(model, gm, x)
    assert isinstance(gm.train()(x), tuple)
    assert isinstance(gm.eval()(x), Tensor)
    assert gm.state_dict().keys() == model.state_dict().keys()


def test_a_model_that_ignores_the_mode_needs_no_flag() -> None:
    gm = trace(Plain(), torch.zeros(2, 4))
    assert not any(isinstance(m, TrainingMode) for m in gm.modules())


class Counted(nn.Module):
    """Counts its traces, and looks at the mode in some way."""

    runs = 0

    def __init__(self, look: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(4, 4), nn.Dropout(0.5)
        self.look = look

    def forward(self, x: Tensor) -> Tensor:
        Counted.runs += 1
        return self.drop(self.linear(x)) * (2 if self.look(self) else 1)


LOOKS = {
    "not at all": lambda model: True,
    "own flag": lambda model: model.training,
    "by name": lambda model: getattr(model, "training"),  # noqa: B009
    "a layer's flag": lambda model: model.drop.training,
    "any flag": lambda model: any(m.training for m in model.modules()),
}


@pytest.mark.parametrize("how", LOOKS)
def test_a_model_is_traced_again_only_if_it_asks_for_the_mode(how: str) -> None:
    model, x = Counted(LOOKS[how]), torch.randn(2, 4)
    Counted.runs = 0
    gm = trace(model, x)
    assert Counted.runs == (1 if how == "not at all" else 2)
    assert "training" not in vars(nn.Module)
    for mode in (True, False):
        same(model.train(mode), gm.train(mode), x)


def test_a_mode_that_is_more_than_a_flag() -> None:
    class Switching(Plain):
        factor = 3.0

        def train(self, mode: bool = True) -> nn.Module:
            self.factor = 3.0 if mode else 1.0
            return super().train(mode)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * self.factor

    model, x = Switching(), torch.randn(2, 4)
    gm = trace(model, x)
    for mode in (True, False):
        same(model.train(mode), gm.train(mode), x)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_the_mode_survives_copies(duplicate: Any) -> None:
    model = Dropping()
    x = torch.randn(4, 3, 5, 5)
    gm = duplicate(trace(model, x))
    for mode in (True, False):
        model.train(mode)
        gm.train(mode)
        same(model, gm, x)


def test_training_flags_of_every_module_are_kept() -> None:
    model = Dropping().train()
    model.norm.eval()
    gm = trace(model, torch.randn(2, 3, 5, 5))
    assert gm.training and gm.get_submodule("conv").training
    assert not gm.get_submodule("norm").training
    assert not trace(Dropping().eval(), torch.randn(2, 3, 5, 5)).training


def test_nothing_leaks_into_the_users_model() -> None:
    model = Dropping()
    x = torch.randn(4, 3, 5, 5)
    before, attributes = Snapshot.of(model), set(vars(model))
    gm = trace(model, x)
    gm.eval()(x)
    before.check(model)
    assert set(vars(model)) == attributes
    assert not set(model.modules()) & set(gm.modules())


def test_the_graph_shares_the_models_tensors() -> None:
    model = Dropping()
    gm = trace(model, torch.randn(4, 3, 5, 5))
    tensors = model.state_dict(keep_vars=True)
    shared = gm.state_dict(keep_vars=True)
    assert shared.keys() == tensors.keys()
    assert all(shared[name] is tensor for name, tensor in tensors.items())


def test_metadata_on_every_node() -> None:
    gm = trace(Dropping(), torch.zeros(2, 3, 5, 5))
    for node in gm.graph.nodes:
        assert "val" in node.meta, node
    (conv,) = (n for n in gm.graph.nodes if n.target == "conv")
    assert tuple(conv.meta["val"].shape) == (2, 4, 5, 5)


@pytest.mark.parametrize(
    "inputs",
    [
        torch.zeros(2, 4),
        (torch.zeros(2, 4),),
        [torch.zeros(2, 4), 3.0],
        {"x": torch.zeros(2, 4), "scale": 3.0},
        {"x": torch.zeros(2, 4), "bias": torch.ones(4)},
        (torch.zeros(2, 4), 0.5, torch.ones(4)),
        {"x": torch.zeros(2, 4), "bias": None},
    ],
)
def test_inputs_of_every_form(inputs: Any) -> None:
    model = Plain()
    gm = trace(model, inputs)
    torch.testing.assert_close(call_with(gm, inputs), call_with(model, inputs), rtol=0, atol=0)


def test_arguments_without_value_are_fixed_at_their_default() -> None:
    gm = trace(Plain(), torch.zeros(2, 4))
    assert [n.target for n in gm.graph.nodes if n.op == "placeholder"] == ["x"]


@pytest.mark.parametrize("inputs", [(), (1, 2, 3, 4), {"wrong": torch.zeros(2, 4)}])
def test_inputs_that_do_not_fit(inputs: Any) -> None:
    with pytest.raises(InputError, match=r"Plain\.forward\(x"):
        bind_inputs(Plain(), inputs)


def test_variable_arguments_are_refused() -> None:
    class Variable(nn.Module):
        def forward(self, *xs: Tensor) -> Tensor:
            return xs[0]

    with pytest.raises(InputError, match="variable argument"):
        trace(Variable(), torch.zeros(1))


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(InputError, match=r"\(2, 7\)"):
        trace(Plain(), torch.zeros(2, 7))


def test_the_error_names_the_line_and_the_remedy() -> None:
    with pytest.raises(CaptureError, match="the forward of Branching itself") as caught:
        trace(Branching(), torch.zeros(2))
    message = str(caught.value)
    assert "test_capture.py" in message and "if x.sum() > 0:" in message
    assert "a tensor's values. Rewrite the line without control flow on tensor values" in message
    assert isinstance(caught.value, RbpfxError)


def test_a_module_that_cannot_be_traced_stays_whole() -> None:
    model = Outer().eval()
    gm = trace(model, torch.zeros(2, 3, 4, 4))
    for x in (torch.rand(2, 3, 4, 4), -torch.rand(2, 3, 4, 4)):
        same(model, gm, x)
    analysis = analyze(gm)
    assert analysis.unknown == {"inner": "Branching"}
    assert "if x.sum() > 0:" in analysis.frozen[0].reason


def test_the_remedy_is_one_for_the_cause() -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if type(x) is not Tensor:
                raise TypeError("no tensor.")
            return x

    with pytest.raises(CaptureError, match=r": no tensor\. Rewrite the line, or move it"):
        trace(Failing(), torch.zeros(2))


def test_a_module_kept_whole_is_named_even_if_nothing_else_is_pruned() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.second(self.first(x))
            return y if y.sum() > 0 else -y

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.inner(x) * 2
            return y

    (axis,) = analyze(trace(Twice(), torch.zeros(2, 4))).frozen
    assert (axis.name, axis.channels, axis.size) == ("inner", 9, 9)
    assert "if y.sum() > 0" in axis.reason


class Sliced(nn.Module):
    """Calls parts of a sequence of layers, and a sequence of its own making."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(4, 6), nn.ReLU(), nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))]
        self.layers = nn.Sequential(*layers, nn.ReLU())
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = self.layers[:2](x)
        second = self.layers[2:](first)
        y: Tensor = nn.Sequential(*list(self.children())[1:], nn.Tanh())(first + second)
        return y


@pytest.mark.parametrize("inside", [False, True])
def test_slices_of_sequences_are_followed(inside: bool) -> None:
    model: nn.Module = Sliced()
    model = nn.Sequential(model, nn.Linear(3, 2)) if inside else model
    x = torch.randn(5, 4)
    gm = trace(model, x)
    check_both_modes(model, x)
    assert gm.state_dict().keys() == model.state_dict().keys()
    prefix = "0." if inside else ""
    assert analyze(gm).group(f"{prefix}layers.0").producers == (
        f"{prefix}layers.0",
        f"{prefix}layers.2.0",
    )


@pytest.mark.parametrize("leaf", [Branching, "inner"])
def test_leaf_modules_stay_whole(leaf: Any) -> None:
    model = Outer().eval()
    x = torch.randn(2, 3, 4, 4)
    gm = trace(model, x, leaf_modules=[leaf])
    same(model, gm, x)
    assert analyze(gm).unknown == {"inner": "Branching"}


def test_a_model_that_cannot_be_copied() -> None:
    model = Plain()
    model.cache = model.linear(torch.ones(1, 4))
    with pytest.raises(CaptureError, match="detach tensors"):
        trace(model, torch.zeros(2, 4))


def test_an_operator_of_both_modes_on_values_of_each() -> None:
    class TwoPaths(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x if self.training else x * 2)

    check_both_modes(TwoPaths(), torch.randn(3, 4))


def test_statistics_that_only_one_mode_updates() -> None:
    class Extra(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return x if self.training else self.norm(x)

    with pytest.raises(CaptureError, match="running statistics"):
        trace(Extra(), torch.zeros(2, 4))


def check_both_modes(model: nn.Module, x: Tensor) -> None:
    """Alternating modes, results and buffers of graph and model stay the same."""
    gm = copy.deepcopy(trace(model, x))
    for mode in (True, False, True, True, False):
        same(model.train(mode), gm.train(mode), x)
        for expected, actual in zip(model.buffers(), gm.buffers(), strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("in_train", [True, False])
def test_in_place_in_one_mode_only(in_train: bool) -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x * 2
            if self.training == in_train:
                x.add_(1.0)
                x[:, 0] = 3.0
                x[:, 1].mul_(2)
                x *= 2
            return x + 1

    check_both_modes(Noisy(), torch.randn(2, 4))


def test_a_function_that_works_in_place_in_one_mode_only() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x * 2
            if self.training:
                F.relu(x, inplace=True)
            return x + 1

    with pytest.raises(CaptureError, match="in place"):
        trace(Noisy(), torch.zeros(2, 4))


def test_paths_that_differ_by_mode() -> None:
    class TwoPaths(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            if self.training:
                return {"y": F.relu(self.linear(x) + 1, inplace=True)}
            return {"y": self.linear(x).sigmoid() * torch.tensor([2.0])}

    model = TwoPaths()
    gm = trace(model, torch.zeros(2, 4))
    for mode in (True, False):
        same(model.train(mode), gm.train(mode), torch.randn(3, 4))


def test_what_only_eval_mode_runs_keeps_its_place() -> None:
    class Between(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            z = y if self.training else y + 1
            y.relu_()
            return z * y

    model = Between()
    gm = trace(model, torch.zeros(4))
    for mode in (True, False):
        same(model.train(mode), gm.train(mode), torch.randn(4))


def test_augmented_assignment_stays_in_place() -> None:
    class Augmented(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = x * 2
            z = y
            z += 1
            z *= 3
            z -= 0.5
            z /= 2
            return y, z

    model = Augmented()
    same(model, trace(model, torch.zeros(3)), torch.randn(3))


def test_buffers_are_read_at_run_time() -> None:
    class Average(nn.Module):
        mean: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
            return x - self.mean * 2

    model = Average()
    trace(model, torch.randn(3, 4))
    assert torch.equal(model.mean, torch.zeros(4))
    check_both_modes(model, torch.randn(3, 4))

    class Shifted(Average):
        def forward(self, x: Tensor) -> Tensor:
            return x - self.mean * 2

    shifted = Shifted()
    traced = trace(shifted, torch.randn(3, 4))
    for network in (shifted, traced):
        network.mean.fill_(1.5)
    same(shifted, traced, torch.randn(3, 4))


def test_record_metadata_after_an_edit() -> None:
    gm = trace(Plain(), torch.zeros(2, 4))
    for node in gm.graph.nodes:
        if node.op != "placeholder":
            node.meta.clear()
    record_metadata(gm)
    assert all("val" in n.meta for n in gm.graph.nodes if n.op != "output")


def test_evaluating_gives_every_flag_back() -> None:
    model = Dropping().train()
    model.norm.eval()
    with pytest.raises(RuntimeError), evaluating(model):
        assert not any(m.training for m in model.modules())
        raise RuntimeError
    assert model.training and model.conv.training and not model.norm.training
