"""The training step: what it must equal, whatever the settings."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rbpfx import InputError, RbpfxError, analyze, insert_noise, trace
from rbpfx.methods import Phase, noise_gates
from rbpfx.training import engine
from rbpfx.training.engine import Losses, NumericalFault, Stepper, Training
from rbpfx.training.layout import keeping_layout, to_channels_last
from rbpfx.training.task import Task
from tests.toy import ShortcutNet, stripes

BATCHES = stripes()


def stepper(model: nn.Module, task: Task | None = None, **settings: object) -> Stepper:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    return Stepper(model, task or Task(), Training(**settings), [optimizer])


def small(dtype: torch.dtype = torch.float64) -> nn.Module:
    """A network without BatchNorm, which would see batches one by one."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)).to(dtype)


def data(*sizes: int, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(n, 1, 6, 6, dtype=dtype), torch.randint(3, (n,))) for n in sizes]


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def joined(batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def test_frozen_norms_keep_their_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
    model.extend([nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3)]).double()
    model[1].requires_grad_(False)
    before = [model[place].running_mean.clone() for place in (1, 3)]
    stepper(model).step(data(8))
    assert torch.equal(model[1].running_mean, before[0])
    assert not torch.equal(model[3].running_mean, before[1])
    assert model[3].training


class TestAccumulation:
    @pytest.mark.parametrize("sizes", [(5,), (4, 4), (7, 2, 1), (1, 1, 1, 9)])
    @pytest.mark.parametrize("hook", [False, True])
    def test_equals_one_large_batch(self, sizes: tuple[int, ...], hook: bool) -> None:
        batches = data(*sizes)
        many, one = small(), small()
        step = hooked if hook else None
        a = stepper(many, accumulate=len(sizes), train_step=step, clip_norm=0.1)
        b = stepper(one, clip_norm=0.1)
        a.penalty = lambda: many[0].weight.square().sum()
        b.penalty = lambda: one[0].weight.square().sum()
        for _ in range(3):
            lost, wanted = a.step(batches), b.step([joined(batches)])
            assert torch.allclose(torch.stack(lost), torch.stack(wanted), rtol=1e-9)
        assert torch.allclose(weights(many), weights(one), rtol=0, atol=1e-9)

    def test_batches_without_examples_count_alike(self) -> None:
        model = small()
        task = Task(forward=lambda model, batch: batch * model[0].weight.sum())
        assert float(stepper(model, task).step([1.0, 3.0]).data) == pytest.approx(
            2 * float(small()[0].weight.detach().sum())
        )

    def test_schedulers_step_once(self) -> None:
        model = small()
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        rates = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        step = Stepper(model, Task(), Training(accumulate=3), [optimizer], schedulers=[rates])
        for _ in range(2):
            step.step(data(2, 2, 2))
        assert rates.get_last_lr() == [0.25]


def hooked(model: nn.Module, batch: tuple[Tensor, Tensor], update: Callable) -> None:
    assert model.training
    update(F.cross_entropy(model(batch[0]), batch[1]))


class TestPenalty:
    def test_it_is_added_once_and_measured_apart(self) -> None:
        model, calls = small(), []
        step = stepper(model, accumulate=3)

        def penalty() -> Tensor:
            calls.append(torch.is_autocast_enabled("cpu"))
            return model[3].bias.sum()

        step.penalty = penalty
        before, bias = F.cross_entropy(model(joined(DATA)[0]), joined(DATA)[1]), model[3].bias
        wanted = torch.autograd.grad(before + bias.sum(), bias)[0]
        losses = step.step(DATA)
        assert calls == [False]
        assert torch.allclose(losses.data, before.detach())
        assert float(losses.penalty) == pytest.approx(float(small()[3].bias.sum().detach()))
        assert torch.allclose(small()[3].bias - model[3].bias, 0.1 * wanted)

    def test_none_is_zero(self) -> None:
        losses = stepper(small()).step(DATA[:1])
        assert isinstance(losses, Losses)
        assert losses.penalty == 0
        assert not losses.data.requires_grad

    def test_it_is_outside_of_autocast(self) -> None:
        model, calls = small(torch.float32), []

        def penalty() -> Tensor:
            calls.append(torch.is_autocast_enabled("cpu"))
            return model[0].bias.sum()

        step = stepper(model, precision="bfloat16", train_step=hooked)
        step.penalty = penalty
        step.step(data(4, dtype=torch.float32))
        assert calls == [False]


DATA = data(4, 2, 3)


class TestDivergence:
    @pytest.mark.parametrize("factor", [float("nan"), float("inf")])
    @pytest.mark.parametrize("place", [0, 1])
    @pytest.mark.parametrize("precision", ["float32", "float16"])
    def test_nothing_is_updated(self, factor: float, place: int, precision: str) -> None:
        model, calls = small(torch.float32), []

        def loss_fn(output: Tensor, target: Tensor) -> Tensor:
            calls.append(1)
            return F.cross_entropy(output, target) * (factor if len(calls) == place + 1 else 1)

        step = stepper(model, Task(loss_fn), accumulate=2, precision=precision)
        with pytest.raises(NumericalFault, match="not a finite number"):
            step.step(data(2, 2, dtype=torch.float32))
        assert torch.equal(weights(model), weights(small(torch.float32)))
        assert all(p.grad is None for p in model.parameters())

    def test_by_the_penalty(self) -> None:
        model = small()
        step = stepper(model)
        step.penalty = lambda: model[0].bias.sum() * float("nan")
        with pytest.raises(NumericalFault, match="not a finite number"):
            step.step(DATA[:1])
        assert torch.equal(weights(model), weights(small()))

    def test_a_loss_without_gradient(self) -> None:
        task = Task(lambda output, target: F.cross_entropy(output.detach(), target))
        with pytest.raises(InputError, match="the loss does not depend on the network"):
            stepper(small(), task).step(DATA)

    def test_a_loss_that_is_no_scalar(self) -> None:
        task = Task(lambda output, target: F.cross_entropy(output, target, reduction="none"))
        with pytest.raises(InputError, match="must be a scalar tensor"):
            stepper(small(), task).step(DATA)


class TestHook:
    def test_it_equals_the_task(self) -> None:
        plain, own = small(), small()
        stepper(plain).step(DATA[:1])
        stepper(own, train_step=hooked).step(DATA[:1])
        assert torch.equal(weights(plain), weights(own))

    def test_it_goes_on_after_the_update(self) -> None:
        model = small()
        average = torch.optim.swa_utils.AveragedModel(model)

        def train_step(model: nn.Module, batch: tuple[Tensor, Tensor], update: Callable) -> None:
            before = weights(model)
            update(F.cross_entropy(model(batch[0]), batch[1]))
            assert not torch.equal(before, weights(model))
            average.update_parameters(model)

        step = stepper(model, train_step=train_step)
        for batch in DATA:
            step.step([batch])
        assert average.n_averaged == 3

    def test_the_weights_are_fresh_after_the_update_under_autocast(self) -> None:
        outputs = []

        def train_step(model: nn.Module, batch: tuple[Tensor, Tensor], update: Callable) -> None:
            update(F.cross_entropy(model(batch[0]), batch[1]))
            outputs.append(model(batch[0]).detach())

        model, batch = small(torch.float32), data(4, dtype=torch.float32)[0]
        stepper(model, train_step=train_step, precision="bfloat16").step([batch])
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(outputs[0], model(batch[0]))

    @pytest.mark.parametrize(
        ("calls", "message"), [(0, "without calling update"), (2, "a second time")]
    )
    def test_update_is_called_once(self, calls: int, message: str) -> None:
        def train_step(model: nn.Module, batch: tuple[Tensor, Tensor], update: Callable) -> None:
            for _ in range(calls):
                update(F.cross_entropy(model(batch[0]), batch[1]))

        with pytest.raises(InputError, match=message):
            stepper(small(), train_step=train_step).step(DATA[:1])

    def test_nothing_can_be_distilled_into_it(self) -> None:
        model = small()
        with pytest.raises(InputError, match="train_step computes the loss itself"):
            Stepper(model, Task(), Training(train_step=hooked), [], teacher=small())


class Casts(nn.Module):
    """Notes the dtype that a layer computes in."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(36, 3)
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x.flatten(1))
        self.seen.append(x.dtype)
        return x


class TestPrecision:
    @pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
    def test_network_and_teacher_compute_in_it(self, precision: str) -> None:
        model, teacher = Casts(), Casts()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        step = Stepper(model, Task(), Training(precision=precision), [optimizer], teacher=teacher)
        step.step(BATCHES[:1])
        assert model.seen == teacher.seen == [getattr(torch, precision)]
        assert model.linear.weight.dtype == model.linear.weight.grad.dtype == torch.float32
        assert teacher.linear.weight.grad is None

    @pytest.mark.parametrize("precision", ["bfloat16", "float16"])
    def test_it_learns(self, precision: str) -> None:
        model = ShortcutNet()
        step = stepper(model, precision=precision)
        for batch in BATCHES * 6:
            step.step([batch])
        assert Task().accuracy(model, BATCHES) > 0.95

    def test_scaled_gradients_are_clipped_as_they_are(self) -> None:
        batch = data(8, dtype=torch.float32)
        half, full = small(torch.float32), small(torch.float32)
        stepper(half, precision="float16", clip_norm=0.01).step(batch)
        stepper(full, clip_norm=0.01).step(batch)
        assert torch.allclose(weights(half), weights(full), atol=1e-5)
        assert not torch.equal(weights(half), weights(small(torch.float32)))

    def test_an_overflow_skips_optimiser_and_scheduler(self) -> None:
        model = small(torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        rates = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        idle = torch.optim.Adam([nn.Parameter(torch.ones(2))])
        settings = Training(precision="float16")
        step = Stepper(model, Task(), settings, [optimizer, idle], schedulers=[rates])
        handle = model[3].weight.register_hook(lambda grad: grad * float("inf"))
        step.step(data(4, dtype=torch.float32))
        assert rates.get_last_lr() == [1.0]
        assert torch.equal(weights(model), weights(small(torch.float32)))
        handle.remove()
        step.step(data(4, dtype=torch.float32))
        assert rates.get_last_lr() == [0.5]
        assert not torch.equal(weights(model), weights(small(torch.float32)))

    def test_a_device_without_float16(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.amp.GradScaler, "is_enabled", lambda self: False)
        with pytest.raises(RbpfxError, match="float16 on 'cpu'; use precision='bfloat16'"):
            stepper(small(), precision="float16")


class Viewing(nn.Module):
    """`view` refuses images with the channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.stem(x))
        return self.head(x.view(len(x), -1))


class TestLayout:
    def test_it_changes_nothing_else(self) -> None:
        batches = data(4, 4)
        model, wanted = ShortcutNet(6).double(), ShortcutNet(6).double()
        wanted.load_state_dict(model.state_dict())
        parameters = list(model.parameters())
        step, plain = stepper(model, channels_last=True), stepper(wanted)
        for batch in batches:
            step.step([batch])
            plain.step([batch])
        assert torch.allclose(weights(model), weights(wanted), rtol=0, atol=1e-10)
        assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
        assert model.conv1.weight.is_contiguous(memory_format=torch.channels_last)

    def test_nested_batches(self) -> None:
        images = torch.zeros(2, 3, 4, 5)
        batch = to_channels_last({"x": (images, torch.zeros(2)), "y": "text"})
        assert batch["x"][0].is_contiguous(memory_format=torch.channels_last)
        assert batch["y"] == "text"

    @pytest.mark.parametrize("before", [torch.contiguous_format, torch.channels_last])
    def test_it_is_given_back(self, before: torch.memory_format) -> None:
        model = ShortcutNet().to(memory_format=before)
        with keeping_layout(model):
            to_channels_last(model)
        assert model.conv1.weight.is_contiguous(memory_format=before)

    def test_by_default_for_cuda_only(self) -> None:
        model = ShortcutNet()
        assert not stepper(model)._channels_last
        assert stepper(model, task=Task(device="cuda"))._channels_last
        assert not stepper(nn.Linear(2, 2), task=Task(device="cuda"))._channels_last
        assert not stepper(model, task=Task(device="cuda"), channels_last=False)._channels_last

    def test_by_default_it_is_given_up_where_it_does_not_work(self) -> None:
        model = Viewing()
        step = stepper(model)
        step._channels_last = step._on_trial = True
        to_channels_last(model)
        step.step(BATCHES[:1])
        assert not step._channels_last
        assert model.conv.weight.is_contiguous()
        with pytest.raises(RuntimeError, match="view"):
            stepper(model, channels_last=True).step(BATCHES[:1])


def test_each_optimiser_is_clipped_apart() -> None:
    a, b, c = (nn.Parameter(torch.zeros(())) for _ in range(3))
    model = nn.Module()
    model.a, model.b, model.c = a, b, c
    task = Task(forward=lambda model, batch: 3 * model.a + 4 * model.b + 100 * model.c)
    optimizers = [torch.optim.SGD([a, b], 1.0), torch.optim.SGD([c], 1.0)]
    Stepper(model, task, Training(clip_norm=1.0), optimizers).step([0])
    assert torch.allclose(torch.stack([a, b, c]), torch.tensor([-0.6, -0.8, -1.0]), rtol=1e-5)


def test_it_is_in_train_mode() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3), nn.Dropout()).eval()
    stepper(model).step(BATCHES[:1])
    assert model.training


def test_one_batch_equals_a_loop_by_hand() -> None:
    model = ShortcutNet()
    wanted = copy.deepcopy(model)
    optimizer = torch.optim.SGD(wanted.parameters(), 0.1, momentum=0.9)
    step = stepper(model)
    for images, labels in BATCHES:
        step.step([(images, labels)])
        optimizer.zero_grad()
        F.cross_entropy(wanted(images), labels).backward()
        optimizer.step()
    assert torch.equal(weights(model), weights(wanted))


@pytest.mark.parametrize(
    "wrong",
    [
        {"precision": "half"},
        {"channels_last": "yes"},
        {"compile": "default"},
        {"accumulate": 0},
        {"accumulate": 1.5},
        {"clip_norm": 0.0},
        {"clip_norm": float("nan")},
        {"train_step": 1},
    ],
)
def test_settings_are_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(RbpfxError, match=next(iter(wrong))):
        Training(**wrong)


def noisy_graph() -> nn.Module:
    torch.manual_seed(0)
    gm = trace(ShortcutNet(), BATCHES[0][0])
    return insert_noise(gm, analyze(gm))


class TestCompiled:
    @pytest.fixture(autouse=True)
    def _quick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Everything but code generation."""
        compile_ = torch.compile
        monkeypatch.setattr(
            engine.torch, "compile", lambda m, **options: compile_(m, backend="eager", **options)
        )
        torch._dynamo.reset()

    def test_equals_uncompiled_in_every_phase(self) -> None:
        """The phase is no tensor: code compiled for another one must never run."""
        models = noisy_graph(), noisy_graph()
        steppers = [stepper(m, compile=c) for m, c in zip(models, (True, False), strict=True)]
        for phases in itertools.product(Phase, repeat=2):
            losses = []
            for model, step in zip(models, steppers, strict=True):
                torch.manual_seed(0)
                for gate, phase, value in zip(noise_gates(model), phases, (0.3, 0.6), strict=True):
                    gate.phase = phase
                    gate.constants.fill_(value)
                losses.append(float(step.step(BATCHES[:1]).data))
            assert losses[0] == pytest.approx(losses[1], rel=1e-4), phases
        assert torch.allclose(weights(models[0]), weights(models[1]), atol=1e-4)

    def test_gates_are_left_as_they_are(self) -> None:
        model = noisy_graph()
        stepper(model, compile=True).step(BATCHES[:1])
        assert not any("forward" in vars(gate) for gate in noise_gates(model))

    def test_a_hook_gets_the_compiled_network(self) -> None:
        seen = []

        def train_step(model: nn.Module, batch: tuple[Tensor, Tensor], update: Callable) -> None:
            seen.append(model)
            hooked(model, batch, update)

        model = small()
        stepper(model, compile=True, train_step=train_step).step(DATA[:1])
        assert seen[0] is not model
        assert next(seen[0].parameters()) is model[0].weight
        assert not torch.equal(weights(model), weights(small()))


@pytest.mark.slow
@pytest.mark.parametrize("make", [ShortcutNet, noisy_graph])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_with_generated_code(make: Callable[[], nn.Module], precision: str) -> None:
    torch._dynamo.reset()
    model = make()
    wanted = copy.deepcopy(model)
    steppers = [
        stepper(m, compile=c, precision=precision) for m, c in ((model, True), (wanted, False))
    ]
    for place, batch in enumerate(BATCHES):
        losses = []
        for step in steppers:
            torch.manual_seed(place)
            losses.append(float(step.step([batch]).data))
        assert losses[0] == pytest.approx(losses[1], rel=1e-4 if precision == "float32" else 0.03)
    if precision == "float32":
        assert torch.allclose(weights(model), weights(wanted), atol=1e-4)


def test_gradients_of_frozen_rates_do_not_pile_up() -> None:
    model = small()
    step = Stepper(model, Task(), Training(), [torch.optim.SGD(model[0].parameters(), 0.0)])
    for _ in range(2):
        step.step(DATA[:1])
        first = model[3].bias.grad.clone()
    model.zero_grad()
    F.cross_entropy(model(DATA[0][0]), DATA[0][1]).backward()
    assert torch.allclose(first, model[3].bias.grad)
