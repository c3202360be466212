"""What a loss is worth: its unit must not matter, and nothing may be sold above its value."""

from __future__ import annotations

import logging
from collections.abc import Callable
from math import isnan, log

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rbpfx import FineTune, Recursion, Training, prune
from rbpfx.training.scale import measure_scale, share_forgotten
from rbpfx.training.task import LEARNING_RATE, LossScale, Task

Batches = list[tuple[Tensor, Tensor]]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class Linear(nn.Module):
    """Answers with the first `outputs` of its inputs, `factor` times."""

    def __init__(self, factor: float = 1.0, outputs: int = 1) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))
        self.outputs = outputs

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x[:, : self.outputs]


def regression(std: float = 1.0, mean: float = 0.0, batch: int = 16) -> Batches:
    """Targets spread by `std` around `mean`, 64 of them; the inputs are the answers."""
    target = torch.randn(64, 1, dtype=torch.float64).float()
    target = std * (target - target.mean()) / target.std(correction=0) + mean
    return [(t, t) for t in target.split(batch)]


def classes(count: int, batch: int = 16) -> Batches:
    """Every class as often; the inputs are its one-hot scores."""
    labels = torch.arange(64) % count
    return [(5.0 * F.one_hot(y, count).float(), y) for y in labels.split(batch)]


def scale_of(model: nn.Module, batches: Batches, task: Task | None = None) -> LossScale:
    return measure_scale(model, batches, task or Task(), Training(), len(batches[0][1]))


class TestMeasured:
    @pytest.mark.parametrize("std", [1e-3, 1.0, 1e3])
    def test_a_mean_output_loses_the_variance(self, std: float) -> None:
        scale = scale_of(Linear(), regression(std), Task(F.mse_loss))
        assert scale.dense == 0
        assert scale.nat == pytest.approx(std**2 / log(10), rel=1e-5)
        assert scale.learnt == pytest.approx(log(10))
        assert scale.learning_rate == pytest.approx(LEARNING_RATE / 2 / max(1, scale.nat))

    @pytest.mark.parametrize("mean", [-30.0, 7.0])
    def test_where_the_answers_lie_does_not_matter(self, mean: float) -> None:
        scale = scale_of(Linear(), regression(1.0, mean), Task(F.mse_loss))
        assert scale.nat == pytest.approx(1 / log(10), rel=1e-4)

    @pytest.mark.parametrize("batch", [1, 4, 64])
    def test_the_mean_is_over_all_examples(self, batch: int) -> None:
        scale = scale_of(Linear(), regression(batch=batch), Task(F.mse_loss))
        assert scale.nat == pytest.approx(1 / log(10), rel=1e-5)

    def test_a_sum_is_worth_as_much_more(self) -> None:
        task = Task(lambda output, target: F.mse_loss(output, target, reduction="sum"))
        assert scale_of(Linear(), regression(), task).nat == pytest.approx(16 / log(10), rel=1e-5)

    @pytest.mark.parametrize("count", [2, 4, 16])
    def test_cross_entropy_is_in_nats(self, count: int) -> None:
        scale = scale_of(Linear(1.0, count), classes(count))
        assert scale.nat == 1
        dense = float(F.cross_entropy(5.0 * torch.eye(count), torch.arange(count)))
        assert scale.dense == pytest.approx(dense, rel=1e-5)
        assert scale.learnt == pytest.approx(log(count) - dense, rel=1e-5)

    def test_too_confident_a_mean_is_weakened(self) -> None:
        labels = torch.zeros(64, dtype=torch.long)
        labels[:16] = 1
        scores = 40.0 * F.one_hot(labels, 2).float()
        batches = list(zip(scores.split(16), labels.split(16), strict=True))
        at_the_mean = float(F.cross_entropy(scores.mean(0).expand_as(scores), labels))
        assert at_the_mean > 3
        assert scale_of(Linear(1.0, 2), batches).learnt <= log(2) + 1e-6

    def test_through_a_forward_and_a_mapping(self) -> None:
        class Named(Linear):
            def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
                return {"answer": super().forward(x), "count": torch.tensor(3)}

        task = Task(forward=lambda model, batch: F.mse_loss(model(batch[0])["answer"], batch[1]))
        assert scale_of(Named(), regression(), task).nat == pytest.approx(1 / log(10), rel=1e-5)


class TestUnknown:
    def test_a_loss_that_the_model_computes_counts_as_nats(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        class WithLoss(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.factor = nn.Parameter(torch.tensor(1.1))

            def forward(self, x: Tensor, target: Tensor) -> Tensor:
                return F.mse_loss(self.factor * x, target)

        task = Task(forward=lambda model, batch: model(*batch))
        with caplog.at_level(logging.WARNING):
            scale = scale_of(WithLoss(), regression(), task)
        assert (scale.nat, scale.learnt) == (1, log(10))
        assert isnan(scale.dense)
        assert "counts as nats" in caplog.text

    def test_a_loss_that_does_not_bear_the_mean(self) -> None:
        def strict(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            output = model(batch[0])
            if output.std() == 0:
                raise RuntimeError("all answers are the same")
            return F.mse_loss(output, batch[1])

        assert scale_of(Linear(), regression(), Task(forward=strict)).nat == 1

    def test_who_has_learnt_nothing(self) -> None:
        scale = scale_of(Linear(0.0, 4), classes(4))
        assert (scale.nat, scale.learnt) == (1, log(10))

    def test_a_step_of_the_users_own(self) -> None:
        training = Training(train_step=lambda model, batch, update: update(model(batch).mean()))
        scale = measure_scale(Linear(), regression(), Task(), training, 8)
        assert scale.nat == 1
        assert scale.learning_rate == LEARNING_RATE / 4


def test_nothing_is_left_behind() -> None:
    model, batches = Linear(), regression()
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*map(torch.cat, zip(*batches, strict=True))), 8, shuffle=True
    )
    state = torch.get_rng_state()
    measure_scale(model, loader, Task(F.mse_loss), Training(), 8)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model._forward_hooks


class TestForgotten:
    @pytest.mark.parametrize(("factor", "share"), [(1.0, 0.0), (0.5, 0.25), (0.0, 1.0)])
    def test_runs_from_the_dense_loss_to_that_of_the_mean(
        self, factor: float, share: float
    ) -> None:
        task, batches = Task(F.mse_loss), regression(30.0)
        task.scale = scale_of(Linear(), batches, task)
        found = share_forgotten(Linear(factor), batches, task, Training(), 16)
        assert found == pytest.approx(share, abs=1e-5)

    def test_unknown(self) -> None:
        assert share_forgotten(Linear(), regression(), Task(F.mse_loss), Training(), 16) is None

    def test_the_report_says_so(self) -> None:
        result = pruned(1.0)
        assert result.report.forgotten is not None
        assert result.report.forgotten < 0.1
        assert "MUCH IS LOST" not in str(result.report)
        lost = result.report.from_dict(result.report.to_dict() | {"forgotten": 0.7})
        assert "MUCH IS LOST: 70% of what" in str(lost)
        assert "Recursion(strength=...)" in str(lost)
        assert (
            result.report.from_dict(result.report.to_dict() | {"forgotten": None}).forgotten is None
        )


# -- end to end ----------------------------------------------------------------------------


def fit(model: nn.Module, x: Tensor, y: Tensor, loss_fn: Callable[..., Tensor]) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(200):
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()


def pruned(unit: float, **options):  # type: ignore[no-untyped-def]
    """A wide network that has learnt a smooth function, pruned by a loss in another unit."""
    torch.manual_seed(0)
    x = torch.randn(512, 4)
    y = (x[:, :1] * x[:, 1:2]).tanh() + x[:, 2:3]
    model = nn.Sequential(
        nn.Linear(4, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 1)
    )
    fit(model, x, y, F.mse_loss)
    batches = list(zip(x.split(32), y.split(32), strict=True))
    return prune(
        model,
        batches,
        loss_fn=lambda output, target: unit * F.mse_loss(output, target),
        val_loader=batches,
        metric=lambda net, data: float(
            torch.cat([(net(inputs) - target).square() for inputs, target in data]).mean()
        ),
        progress=False,
        **options,
    )


def test_the_unit_of_the_loss_does_not_matter() -> None:
    """From a millionth to a million the automatic mode comes to about the same network."""
    networks = [pruned(unit).report for unit in (1e-6, 1.0, 1e6)]
    for report in networks:
        kept = report.pruned.macs / report.dense.macs
        assert 0.02 < kept < 0.8
        assert report.accuracy_after_cut < 0.2  # the mean output's is 1.3
    assert networks[2].pruned.accuracy < 0.05


@pytest.mark.parametrize("count", [2, 10])
def test_classes_are_never_sold_for_the_price_of_more(count: int) -> None:
    """A network that tells classes apart goes on doing so, few of them too."""
    torch.manual_seed(0)
    x = torch.randn(512, 6)
    y = x[:, :count].argmax(1) if count < 6 else (x[:, 0] > 0).long() * 5 + (x[:, 1] > 0).long()
    model = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, count))
    fit(model, x, y, F.cross_entropy)
    batches = list(zip(x.split(32), y.split(32), strict=True))
    report = prune(model, batches, val_loader=batches, progress=False).report
    assert report.pruned.macs < 0.8 * report.dense.macs
    assert report.accuracy_after_cut > 0.9
    assert report.pruned.accuracy > 0.93


class TestDefaults:
    def test_short_loaders_get_enough_steps(self) -> None:
        steps: dict[str, int] = {}
        told = lambda p: steps.update({p.phase: p.steps})  # noqa: E731
        data = regression()
        prune(mlp(), data, loss_fn=F.mse_loss, progress=False, callback=told)
        assert steps["fine-tuning"] == 300
        settings = {"recursion": Recursion(epochs=2), "recovery": FineTune(epochs=1)}
        prune(mlp(), data, loss_fn=F.mse_loss, progress=False, callback=told, **settings)
        assert steps["fine-tuning"] == len(data)

    def test_long_loaders_get_their_epochs(self) -> None:
        steps: list[int] = []
        data = regression(batch=1) * 3
        recursion = Recursion(epochs=0.02)
        prune(
            mlp(),
            data,
            loss_fn=F.mse_loss,
            progress=False,
            recursion=recursion,
            callback=lambda p: steps.append(p.steps),
        )
        assert steps[-1] == 3 * len(data) == 576


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1))


def test_the_default_scale_is_that_of_a_classifier() -> None:
    assert LossScale() == LossScale(1.0, log(10), LEARNING_RATE, LossScale().dense)
    assert isnan(LossScale().dense)
