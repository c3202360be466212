"""Rebinding: the state of an optimiser is sliced as the parameters were."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rbpfx
from rbpfx import FineTune, InputError, PruningPlan, PruningResult, Target, analyze, rewrite, trace
from rbpfx.rebinding import rebind
from tests.toy import ShortcutNet, stripes

BATCHES = stripes()

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    "sgd-plain": lambda p: torch.optim.SGD(p, 0.05),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
    "adam-looped": lambda p: torch.optim.Adam(p, 0.01, foreach=False),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, 0.01),
}


class GroupedNet(nn.Module):
    """A residual group, a grouped and a depthwise convolution, and a tied linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.expand, self.head = nn.Linear(8, 12), nn.Linear(12, 3)
        self.again = self.expand
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.depthwise(F.relu(self.grouped(x)))) * self.scale
        x = x.mean((2, 3))
        return self.head(F.relu(self.expand(x)) + F.relu(self.again(-x)))


def half(model: nn.Module) -> SimpleNamespace:
    """What `prune` would return for a random half of every group."""
    gm = trace(model, BATCHES[0][0])
    analysis = analyze(gm)
    assert analysis.groups
    order = torch.Generator().manual_seed(3)
    kept = {
        g.name: torch.randperm(g.size, generator=order)[: g.size // 2].tolist()
        for g in analysis.groups
    }
    plan = analysis.close(PruningPlan(kept))
    return SimpleNamespace(
        model=rewrite(gm, analysis, plan),
        dense=gm,
        analysis=analysis,
        plan=plan,
        source=weakref.ref(model),
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 6) -> float:
    for images, labels in BATCHES[:steps]:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize("network", [ShortcutNet, GroupedNet])
class TestState:
    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_it_is_sliced_as_the_parameters(self, network: type[nn.Module], name: str) -> None:
        """A state that equals the weight must equal the weight that is left."""
        model = network()
        optimizer = OPTIMIZERS[name](model.parameters())
        train(model, optimizer, 1)
        tensors = 0
        for parameter, state in optimizer.state.items():
            for value in state.values():
                if isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim:
                    value.copy_(parameter)
                    tensors += 1
        assert tensors or name == "sgd-plain"
        result = half(model)
        assert rebind(optimizer, result) is optimizer
        for parameter, state in optimizer.state.items():
            for value in state.values():
                if isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim:
                    assert torch.equal(value, parameter)
                    tensors -= 1
        assert tensors == 0
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        assert {id(p) for p in trained} == {id(p) for p in result.model.parameters()}

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_training_goes_on(self, network: type[nn.Module], name: str) -> None:
        model = network()
        optimizer = OPTIMIZERS[name](model.parameters())
        train(model, optimizer)
        steps = [float(s["step"]) for s in optimizer.state.values() if s and "step" in s]
        result = half(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            rebind(optimizer, result)
        assert [float(s["step"]) for s in optimizer.state.values() if "step" in s] == steps
        dense = {n: p.detach().clone() for n, p in model.named_parameters()}
        train(result.model, optimizer)
        assert all(torch.equal(dense[n], p) for n, p in model.named_parameters())
        assert all(torch.isfinite(p).all() for p in result.model.parameters())


def test_a_plan_that_removes_nothing_changes_no_step() -> None:
    model = ShortcutNet()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    train(model, optimizer)
    gm = trace(model, BATCHES[0][0])
    analysis = analyze(gm)
    whole = rewrite(gm, analysis, PruningPlan())
    result = SimpleNamespace(
        model=whole, dense=gm, analysis=analysis, plan=PruningPlan(), source=weakref.ref(model)
    )
    twin = OPTIMIZERS["adam"](model.parameters())
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    rebind(optimizer, result)
    assert train(whole, optimizer) == train(model, twin)
    pairs = zip(whole.parameters(), model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_factored_state_is_sliced_where_it_has_the_axis() -> None:
    model = ShortcutNet()
    optimizer = OPTIMIZERS["adafactor"](model.parameters())
    train(model, optimizer)
    result = half(model)
    rebind(optimizer, result)
    weight = result.model.get_parameter("conv1.weight")
    assert weight.shape == (4, 4, 3, 3)
    assert optimizer.state[weight]["row_var"].shape == (4, 4, 3, 1)
    assert optimizer.state[weight]["col_var"].shape == (4, 4, 1, 3)


def test_state_of_another_shape_starts_anew() -> None:
    model = ShortcutNet()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    train(model, optimizer)
    optimizer.state[model.conv1.weight]["sketch"] = torch.zeros(5)
    result = half(model)
    with pytest.warns(UserWarning, match=r"'sketch' of parameter 'conv1.weight'.*starts anew"):
        rebind(optimizer, result)
    assert not optimizer.state[result.model.get_parameter("conv1.weight")]
    assert optimizer.state[result.model.get_parameter("conv2.weight")]
    train(result.model, optimizer)


def test_groups_keep_their_settings() -> None:
    model = ShortcutNet()
    model.stem.requires_grad_(False)
    head = {id(p) for p in model.head.parameters()}
    body = [(n, p) for n, p in model.named_parameters() if id(p) not in head]
    groups = [
        {"params": list(model.head.named_parameters()), "lr": 0.3},
        {"params": body, "weight_decay": 0.1},
    ]
    optimizer = torch.optim.SGD(groups, 0.05, momentum=0.9, nesterov=True)
    train(model, optimizer)
    before = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    result = half(model)
    rebind(optimizer, result)
    after = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    assert before == after
    named = dict(result.model.named_parameters())
    wanted = [["head.weight", "head.bias"], [n for n, _ in body]]
    for group, names in zip(optimizer.param_groups, wanted, strict=True):
        assert [id(p) for p in group["params"]] == [id(named[n]) for n in names]
    assert not named["stem.weight"].requires_grad


def test_several_optimisers_and_parameters_without_one() -> None:
    model = ShortcutNet()
    first = torch.optim.Adam(model.conv1.parameters())
    second = torch.optim.SGD(model.head.parameters(), 0.1)
    result = half(model)
    rebind(first, result)
    rebind(second, result)
    assert [p.shape for p in first.param_groups[0]["params"]] == [(4, 4, 3, 3)]
    assert [p.shape for p in second.param_groups[0]["params"]] == [(3, 16), (3,)]


def test_schedulers_and_scalers_go_on() -> None:
    model = ShortcutNet()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20)
    scaler = torch.amp.GradScaler("cpu")
    wanted = torch.optim.lr_scheduler.OneCycleLR(
        OPTIMIZERS["sgd"]([nn.Parameter(torch.ones(1))]), 0.1, total_steps=20
    )
    network: nn.Module = model
    for step in range(12):
        if step == 6:
            result = half(model)
            rebind(optimizer, result)
            network = result.model
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(network(BATCHES[0][0]), BATCHES[0][1])).backward()
        before = network.get_parameter("head.weight").detach().clone()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        wanted.optimizer.step()
        wanted.step()
        assert optimizer.param_groups[0]["lr"] == wanted.optimizer.param_groups[0]["lr"]
    assert not torch.equal(before, network.get_parameter("head.weight"))


class TestErrors:
    def test_an_optimiser_of_another_model(self) -> None:
        model, other = ShortcutNet(), ShortcutNet()
        optimizer = OPTIMIZERS["adam"](other.parameters())
        train(other, optimizer)
        before = list(optimizer.state)
        with pytest.raises(InputError, match=r"trains 11 parameters \(of shape \(8, 1, 3, 3\)"):
            rebind(optimizer, half(model))
        assert all(a is b for a, b in zip(before, optimizer.state, strict=True))

    def test_twice(self) -> None:
        model = ShortcutNet()
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        result = half(model)
        rebind(optimizer, result)
        with pytest.raises(InputError, match="rebind it only once"):
            rebind(optimizer, result)

    @pytest.mark.parametrize("source", [None, "dead"])
    def test_the_model_is_gone(self, source: str | None) -> None:
        model = ShortcutNet()
        result = half(model)
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        if source is None:
            result.source = None
        else:
            result.source = weakref.ref(ShortcutNet())
        with pytest.raises(InputError, match="does not exist any more"):
            rebind(optimizer, result)

    def test_a_result_from_elsewhere(self) -> None:
        model, wider = ShortcutNet(), ShortcutNet(12)
        result = half(wider)
        result.source = weakref.ref(model)
        with pytest.raises(InputError, match=r"parameter 'stem.weight' is \(8, 1, 3, 3\)"):
            rebind(OPTIMIZERS["sgd"](model.parameters()), result)

    def test_lists_of_its_own(self) -> None:
        model = ShortcutNet()
        optimizer = torch.optim.LBFGS(model.parameters())
        with pytest.raises(InputError, match="LBFGS keeps parameters in its attribute '_params'"):
            rebind(optimizer, half(model))


class TestEndToEnd:
    """With what `prune` returns."""

    def prune(self, model: nn.Module, **options: Any) -> PruningResult:
        settings = {"recovery": FineTune(epochs=0), "progress": False, **options}
        return rbpfx.prune(model, BATCHES, target=Target(macs=0.5), **settings)

    @pytest.mark.parametrize("name", ["sgd", "adam", "adafactor"])
    def test_pruning_in_the_middle_of_a_training(self, name: str) -> None:
        model = ShortcutNet()
        optimizer = OPTIMIZERS[name](model.parameters())
        for _ in range(4):
            train(model, optimizer)
        dense = copy.deepcopy(model)
        result = self.prune(model)
        rebind(optimizer, result)
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        assert {id(p) for p in trained} == {id(p) for p in result.model.parameters()}
        for _ in range(4):
            loss = train(result.model, optimizer)
        assert loss < 0.3
        pairs = zip(model.parameters(), dense.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)

    @pytest.mark.parametrize(
        "network",
        [
            ShortcutNet,
            GroupedNet,
        ],
    )
    def test_state_is_sliced_as_the_weights(self, network: type[nn.Module]) -> None:
        """A ranking that cuts at once leaves slices of the weights; so must be their momentum."""
        model = network()
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        train(model, optimizer)
        for parameter, state in optimizer.state.items():
            state["momentum_buffer"].copy_(parameter)
        result = self.prune(model, method="magnitude")
        sizes = [p.numel() for p in model.parameters()]
        rebind(optimizer, result)
        assert sum(p.numel() for p in result.model.parameters()) < sum(sizes)
        for name, parameter in result.model.named_parameters():
            assert torch.equal(optimizer.state[parameter]["momentum_buffer"], parameter), name

    def test_with_an_entry_of_a_sweep(self) -> None:
        model = ShortcutNet()
        optimizer = OPTIMIZERS["adam"](model.parameters())
        train(model, optimizer)
        small, _ = self.prune(model, method="magnitude").sweep([0.2, 0.7])
        rebind(optimizer, small)
        for parameter in small.model.parameters():
            assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
        train(small.model, optimizer)
        assert all(p.isfinite().all() for p in small.model.parameters())

    def test_a_copy_of_a_result_does_not_know_the_model(self) -> None:
        model = ShortcutNet()
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        result = self.prune(model, method="magnitude")
        with pytest.raises(InputError, match="does not exist any more"):
            rebind(optimizer, copy.deepcopy(result))
        rebind(optimizer, result)

    def test_a_result_does_not_keep_the_model_alive(self) -> None:
        model = ShortcutNet()
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        result = self.prune(model, method="magnitude")
        del model
        gc.collect()
        with pytest.raises(InputError, match="does not exist any more"):
            rebind(optimizer, result)


def test_wrong_arguments() -> None:
    model = ShortcutNet()
    result = half(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for first, second, message in (
        (None, result, "no optimiser"),
        (result, optimizer, "comes first"),
        (scheduler, result, "attribute `optimizer`"),
        (optimizer, model, "no result"),
    ):
        with pytest.raises(InputError, match=message):
            rebind(first, second)
    rebind(optimizer, result)
