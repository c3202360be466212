"""Recovery: the schedule, the mode, and what happens when it diverges."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rbpfx import DivergenceError, FineTune, RbpfxError
from rbpfx.training.finetune import finetune
from rbpfx.training.task import Task
from tests.toy import ShortcutNet, stripes

BATCHES = stripes()


def test_it_learns() -> None:
    model = ShortcutNet().eval()
    finetune(model, BATCHES, Task(), FineTune(epochs=6, lr=0.1))
    assert Task().accuracy(model, BATCHES) > 0.95


def test_every_step_is_reported() -> None:
    steps = []
    settings = FineTune(epochs=1.5)
    finetune(ShortcutNet(), BATCHES, Task(), settings, report=lambda *step: steps.append(step))
    assert [(done, planned) for done, planned, _ in steps] == [(i, 9) for i in range(1, 10)]
    assert all(isinstance(loss, float) for _, _, loss in steps)


def test_the_learning_rate_falls_along_a_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = []
    step = torch.optim.SGD.step

    def recorded(self: torch.optim.SGD, *args: object) -> object:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", recorded)
    finetune(ShortcutNet(), BATCHES, Task(), FineTune(epochs=1, lr=0.2))
    wanted = 0.1 * (1 + torch.cos(torch.arange(6) / 6 * torch.pi))
    assert torch.allclose(torch.tensor(rates), wanted)


def test_no_epochs_change_nothing() -> None:
    model = ShortcutNet()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    finetune(model, BATCHES, Task(), FineTune(epochs=0))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_frozen_parameters_stay() -> None:
    model = ShortcutNet()
    model.stem.requires_grad_(False)
    before = model.stem.weight.clone()
    finetune(model, BATCHES, Task(), FineTune(epochs=1))
    assert torch.equal(before, model.stem.weight)


def test_every_submodule_keeps_its_mode() -> None:
    model = ShortcutNet().train()
    model.bn1.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    finetune(model, BATCHES, Task(), FineTune(epochs=1))
    assert modes == {name: module.training for name, module in model.named_modules()}


def test_a_teacher_is_imitated() -> None:
    teacher, start = nn.Linear(36, 3).eval(), nn.Linear(36, 3)
    data = [(x.flatten(1), y) for x, y in BATCHES]

    def distance_after(teacher_or_none: nn.Module | None) -> float:
        model = copy.deepcopy(start)
        finetune(model, data, Task(), FineTune(epochs=10, lr=0.05), teacher_or_none)
        pairs = [(model(x).log_softmax(1), teacher(x).softmax(1)) for x, _ in data]
        return sum(float(F.kl_div(p, q, reduction="sum").detach()) for p, q in pairs)

    assert distance_after(teacher) < 0.5 * distance_after(None)


@pytest.mark.parametrize("epochs", [1 / 6, 1])
def test_divergence_restores_state_and_mode(epochs: float) -> None:
    """With one step only, no later loss tells that the network is lost."""
    model = ShortcutNet().eval()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(DivergenceError, match=r"fine-tuning.*Lower FineTune\(lr=") as caught:
        finetune(model, BATCHES, Task(), FineTune(epochs=epochs, lr=1e38))
    assert caught.value.model is model
    assert caught.value.stage == "fine-tuning"
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())
    assert all(torch.isfinite(v).all() for v in model.state_dict().values())
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize("wrong", [{"epochs": -1}, {"lr": 0}, {"lr": float("nan")}])
def test_settings_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(RbpfxError, match="must be positive"):
        FineTune(**wrong)
