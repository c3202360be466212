"""Recovery: the schedule, the mode, and what happens when it diverges."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LRScheduler

from rbpfx import DivergenceError, FineTune, InputError, RbpfxError
from rbpfx.training.engine import Training
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


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The learning rate of every step of SGD."""
    rates: list[float] = []
    step = torch.optim.SGD.step

    def recorded(self: torch.optim.SGD, *args: object) -> object:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", recorded)
    return rates


def test_the_learning_rate_falls_along_a_cosine(rates: list[float]) -> None:
    finetune(ShortcutNet(), BATCHES, Task(), FineTune(epochs=1, lr=0.2))
    wanted = 0.1 * (1 + torch.cos(torch.arange(6) / 6 * torch.pi))
    assert torch.allclose(torch.tensor(rates), wanted)


def test_it_rises_first(rates: list[float]) -> None:
    finetune(ShortcutNet(), BATCHES, Task(), FineTune(epochs=2, lr=0.2, warmup=0.25))
    cosine = 0.1 * (1 + torch.cos(torch.arange(9) / 9 * torch.pi))
    wanted = torch.cat([torch.tensor([0.05, 0.1, 0.15]), cosine])
    assert torch.allclose(torch.tensor(rates), wanted)


def test_a_scheduler_of_ones_own(rates: list[float]) -> None:
    planned = []

    def scheduler(optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
        planned.append(steps)
        return torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)

    settings = FineTune(epochs=1, lr=0.2, scheduler=scheduler)
    finetune(ShortcutNet(), BATCHES, Task(), settings)
    assert planned == [6]
    assert rates == pytest.approx([0.2, 0.2, 0.1, 0.1, 0.05, 0.05])


def test_an_optimiser_of_ones_own() -> None:
    made = []

    def optimizer(weights: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        made.append(torch.optim.AdamW(weights, 0.01))
        return made[0]

    model = ShortcutNet()
    model.stem.requires_grad_(False)
    finetune(model, BATCHES, Task(), FineTune(epochs=6, optimizer=optimizer))
    assert Task().accuracy(model, BATCHES) > 0.95
    assert all(p.requires_grad for p in made[0].param_groups[0]["params"])
    assert made[0].param_groups[0]["lr"] == pytest.approx(0)


def test_something_else_than_an_optimiser_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"FineTune\(optimizer=...\) must return a torch optimiser"
    ):
        finetune(ShortcutNet(), BATCHES, Task(), FineTune(optimizer=lambda weights: None))


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_momentum(momentum: float) -> None:
    model, wanted = ShortcutNet(), ShortcutNet()
    wanted.load_state_dict(model.state_dict())
    settings = FineTune(epochs=1 / 3, lr=0.1, weight_decay=0.0, momentum=momentum)
    finetune(model, BATCHES, Task(), settings)
    optimizer = torch.optim.SGD(wanted.parameters(), momentum=momentum, nesterov=momentum > 0)
    for rate, (images, labels) in zip([0.1, 0.05], BATCHES, strict=False):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        F.cross_entropy(wanted(images), labels).backward()
        optimizer.step()
    pairs = zip(model.parameters(), wanted.parameters(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in pairs)


def test_the_step_is_carried_out_as_asked_for() -> None:
    steps, hooked = [], []

    def train_step(model: nn.Module, batch: tuple[Tensor, Tensor], update: Callable) -> None:
        hooked.append(len(batch[0]))
        update(F.cross_entropy(model(batch[0]), batch[1]))

    model = ShortcutNet()
    training = Training("bfloat16", accumulate=4, train_step=train_step, channels_last=True)
    settings = FineTune(epochs=2)
    finetune(model, BATCHES, Task(), settings, report=lambda *s: steps.append(s), training=training)
    assert [planned for _, planned, _ in steps] == [4] * 4
    assert hooked == [16] * 12
    assert all(p.is_contiguous() for p in model.parameters())


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


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochs": -1}, "lr must be positive"),
        ({"epochs": float("inf")}, "infinite"),
        ({"epochs": float("nan")}, "epochs must not be negative"),
        ({"lr": 0}, "lr must be positive"),
        ({"lr": float("nan")}, "lr must be positive"),
        ({"weight_decay": -1}, "weight_decay must not be negative"),
        ({"momentum": 1}, "momentum must be"),
        ({"warmup": 1}, "warmup is a share"),
    ],
)
def test_settings_are_checked(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(RbpfxError, match=message):
        FineTune(**wrong)
