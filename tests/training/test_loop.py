"""Passes over a loader: endless batches, a last check, the BatchNorm refresh."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from rbpfx import InputError
from rbpfx.graph.capture import keeping_modes
from rbpfx.training.loop import (
    batches,
    frozen_norms,
    refresh_batchnorm,
    steps_per_epoch,
    still_finite,
)
from rbpfx.training.task import Task


class Countless:
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


class TestBatches:
    @pytest.mark.parametrize("loader", [[0, 1, 2], DataLoader(range(3), None), Countless()])
    def test_go_round(self, loader: object) -> None:
        assert [int(b) for b in batches(loader, 7)] == [0, 1, 2, 0, 1, 2, 0]
        assert list(batches(loader, 0)) == []
        assert steps_per_epoch(Task(), loader) == 3

    def test_an_empty_loader(self) -> None:
        with pytest.raises(InputError, match="yields no batch"):
            list(batches([], 3))

    def test_a_generator_ends(self) -> None:
        with pytest.raises(InputError, match="only once"):
            list(batches(iter([0, 1]), 3))

    def test_no_batch_is_fetched_in_vain(self) -> None:
        fetched = []

        class Loader:
            def __iter__(self) -> Iterator[int]:
                for index in range(9):
                    fetched.append(index)
                    yield index

        list(batches(Loader(), 4))
        assert fetched == [0, 1, 2, 3]


def test_steps_without_a_length() -> None:
    assert [steps_per_epoch(Task(), Countless(), size) for size in (1, 2, 3, 4)] == [3, 2, 1, 1]


def test_modes_are_kept_when_something_fails() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Linear(2, 2).eval())
    with pytest.raises(ZeroDivisionError), keeping_modes(model):
        model.eval()
        raise ZeroDivisionError
    assert [m.training for m in model.modules()] == [True, True, False]


def test_finite_means_the_loss_in_eval_mode() -> None:
    model, batch = nn.Linear(2, 3), (torch.ones(4, 2), torch.zeros(4, dtype=torch.long))
    assert still_finite(model, batch, Task())
    nn.init.constant_(model.weight, float("inf"))
    assert not still_finite(model, batch, Task())


def test_frozen_are_norms_whose_parameters_are_not_trained() -> None:
    model = nn.Sequential(*(nn.BatchNorm1d(2) for _ in range(4)), nn.BatchNorm1d(2, affine=False))
    model.eval()  # says nothing: whole networks come in eval mode
    model[1].requires_grad_(False)
    model[2].weight.requires_grad_(False)
    assert frozen_norms(model) == [model[1]]


class TestRefreshBatchNorm:
    def test_frozen_statistics_stay(self) -> None:
        model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
        model[0].requires_grad_(False)
        refresh_batchnorm(model, self.data(), self.task())
        assert not model[0].running_mean.any()
        assert model[1].running_mean.all()
        assert model[0].momentum == model[1].momentum == 0.1

    def task(self) -> Task:
        return Task(lambda output, target: output.mean())

    def data(self) -> list[tuple[Tensor, int]]:
        return [(3 * torch.randn(8, 4) + step, 0) for step in range(5)]

    def test_statistics_are_the_averages_over_batches(self) -> None:
        data = self.data()
        model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
        data = [(x.double(), y) for x, y in data]
        for x, _ in data[:2]:
            model(x)
        refresh_batchnorm(model, data, self.task())
        outputs = [model[0](x).detach() for x, _ in data]
        mean = torch.stack([z.mean(0) for z in outputs]).mean(0)
        variance = torch.stack([z.var(0) for z in outputs]).mean(0)
        assert torch.allclose(model[1].running_mean, mean, rtol=1e-12)
        assert torch.allclose(model[1].running_var, variance, rtol=1e-12)
        assert model[1].num_batches_tracked == 5

    def test_momentum_and_modes_are_restored(self) -> None:
        norms = [nn.BatchNorm1d(4, momentum=m) for m in (0.3, None)]
        model = nn.Sequential(*norms, nn.Dropout()).train()
        norms[1].eval()
        refresh_batchnorm(model, self.data(), self.task())
        assert [n.momentum for n in norms] == [0.3, None]
        assert [m.training for m in model.modules()] == [True, True, False, True]

    def test_also_when_it_fails(self) -> None:
        model = nn.BatchNorm1d(4).eval()
        with pytest.raises(ValueError, match="expected 2D"):
            refresh_batchnorm(model, [(torch.zeros(1), 0)], self.task())
        assert model.momentum == 0.1
        assert not model.training

    def test_dropout_is_off(self) -> None:
        model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(4)).train()
        x = torch.ones(8, 4)
        refresh_batchnorm(model, [(x, 0)], self.task())
        assert torch.equal(model[1].running_mean, torch.ones(4))
        assert torch.equal(model[1].running_var, torch.zeros(4))

    def test_a_limited_number_of_batches(self) -> None:
        model = nn.BatchNorm1d(4)
        refresh_batchnorm(model, self.data(), self.task(), max_batches=2)
        assert model.num_batches_tracked == 2

    def test_weights_stay_and_get_no_gradient(self) -> None:
        model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        before = model[0].weight.clone()
        refresh_batchnorm(model, self.data(), self.task())
        assert torch.equal(before, model[0].weight)
        assert model[0].weight.grad is None

    def test_networks_without_statistics_are_not_run(self) -> None:
        model = nn.BatchNorm1d(4, track_running_stats=False)
        refresh_batchnorm(model, [], self.task())
