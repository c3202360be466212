"""One row of the accuracy benchmark: a network made smaller by one method, and what it lost."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import _modelopt, _torch_pruning
from benchmarks._data import ImageData, TensorLoader
from benchmarks._train import evaluation_loader, training_loader
from rbpfx import FineTune, Recursion, Target, count_macs, prune, trace
from rbpfx.errors import TargetError
from rbpfx.graph.cost import count_parameters
from rbpfx.methods import find_method
from rbpfx.training.finetune import finetune
from rbpfx.training.loop import refresh_batchnorm
from rbpfx.training.task import Task

LEARNING_RATES = {"lenet300100": 0.02, "lenet5": 0.02}
LEARNING_RATE = 0.01

NOISE = ("rbp", "sbp", "bmrs-n", "bmrs-u", "mackay")
TRAINED = (*NOISE, "auto-balanced")
RANKINGS = ("magnitude", "bn-scale", "taylor", "random")
AUTO = "auto"


class Case(NamedTuple):
    """A row to be: times fewer multiply-accumulates, or `auto` for no target.

    `auto@8` is without a target too, with `Recursion(strength=8)`.
    """

    network: str
    method: str
    mode: str
    ratio: str
    seed: int

    @property
    def strength(self) -> float | None:
        """Of an automatic row; None is the method's own."""
        _, _, strength = self.ratio.partition("@")
        return float(strength) if strength else None


def is_automatic(ratio: str) -> bool:
    """Whether the method decides how far to go."""
    return ratio.partition("@")[0] == AUTO


class Budget(NamedTuple):
    """What every method may use: epochs, the share of them before the cut, training images."""

    epochs: float
    noise_share: float
    images: int

    @property
    def noise_epochs(self) -> float:
        """Epochs before the cut, of methods that train there."""
        return self.epochs * self.noise_share


@dataclass(frozen=True)
class Inputs:
    """What every method is given.

    Attributes:
        dense: The trained network, left untouched.
        data: Where the batches come from.
        loader: Training batches.
        test: Test batches; nothing is decided on them.
        budget: Of training.
        device: Of training.
        lr: Learning rate of the weights.
    """

    dense: nn.Module
    data: ImageData
    loader: TensorLoader
    test: TensorLoader
    budget: Budget
    device: torch.device
    lr: float

    @property
    def images(self) -> Tensor:
        """A small batch, for tracing."""
        return self.loader.dataset.tensors[0][:2].to(self.device)

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates of the dense network per example."""
        return count_macs(trace(self.dense, self.images))


def run(
    case: Case, dense: nn.Module, data: ImageData, budget: Budget, device: str = "cpu"
) -> dict[str, Any]:
    """One row; a row that fails says why."""
    loader, test = training_loader(data, budget.images, case.seed), evaluation_loader(data)
    lr = LEARNING_RATES.get(case.network, LEARNING_RATE)
    given = Inputs(dense, data, loader, test, budget, torch.device(device), lr)
    row: dict[str, Any] = {
        **case._asdict(),
        "data": data.name,
        "images": len(loader.dataset),
        "test_images": len(data.test_images),
        "epochs": budget.epochs,
        "noise_share": budget.noise_share,
        "noise_epochs": 0,
    }
    started = time.perf_counter()
    try:
        if case.method in _torch_pruning.METHODS:
            row |= _with_torch_pruning(case, given)
        elif case.method == _modelopt.METHOD:
            row |= _with_modelopt(case, given)
        else:
            row |= _with_rbpfx(case, given)
    except TargetError as error:
        row |= {"failure": "unreachable", "reason": str(error)}
    except Exception as error:  # a long run goes on; the row is there to be looked at
        row |= {"failure": type(error).__name__, "reason": str(error).split("\n")[0][:300]}
    return row | {"seconds": round(time.perf_counter() - started, 1)}


def _with_rbpfx(case: Case, given: Inputs) -> dict[str, Any]:
    recursion: Recursion | None = None
    if case.method in TRAINED or case.mode == "recursive":
        recursion = replace(
            find_method(case.method).recursion(),
            epochs=given.budget.noise_epochs,
            weight_lr=given.lr,
            strength=case.strength,
        )
        if case.mode == "joint":
            recursion = replace(recursion, front=0.0)
    noise_epochs = given.budget.noise_epochs if recursion else 0
    result = prune(
        given.dense,
        given.loader,
        method=case.method,
        target=None if is_automatic(case.ratio) else Target(macs=1 / float(case.ratio)),
        val_loader=given.test,
        recursion=recursion,
        recovery=FineTune(epochs=given.budget.epochs - noise_epochs, lr=given.lr),
        distill=True,
        device=given.device,
        seed=case.seed,
        progress=False,
    )
    report = result.report
    return {
        "scope": "all groups",
        "noise_epochs": noise_epochs,
        "dense_accuracy": report.dense.accuracy,
        "macs_kept": round(report.pruned.macs / report.dense.macs, 5),
        "params_kept": round(report.pruned.parameters / report.dense.parameters, 5),
        "accuracy_after_cut": report.accuracy_after_cut,
        "accuracy": report.pruned.accuracy,
        "verification_error": report.verification_error,
        "widths": "-".join(str(kept) for _, kept in report.widths.values()),
    }


def _with_torch_pruning(case: Case, given: Inputs) -> dict[str, Any]:
    settings = _torch_pruning.METHODS[case.method]
    torch.manual_seed(case.seed)
    model = _torch_pruning.understood(given.dense)
    noise_epochs = given.budget.noise_epochs if settings.sparse else 0
    if settings.sparse:
        task = Task(device=given.device)
        model = _torch_pruning.learn_sparsity(
            model, given.loader, task, noise_epochs, given.lr, settings, given.dense
        )
    macs = given.macs / float(case.ratio)
    cut = _torch_pruning.cut_to(model, given.images, macs, settings)
    scope = _torch_pruning.scope(given.dense, settings)
    facts = {"scope": scope, "noise_epochs": noise_epochs}
    return facts | _recovered(cut, given, given.budget.epochs - noise_epochs)


def _with_modelopt(case: Case, given: Inputs) -> dict[str, Any]:
    torch.manual_seed(case.seed)
    macs = given.macs / float(case.ratio)
    cut = _modelopt.cut_to(given.dense, given.loader, given.data, given.images, macs)
    return {"scope": _modelopt.SCOPE} | _recovered(cut, given, given.budget.epochs)


def _recovered(cut: _torch_pruning.Cut | None, given: Inputs, epochs: float) -> dict[str, Any]:
    """What fine-tuning makes of a peer's cut, if it made one."""
    task = Task(device=given.device)
    facts = {"dense_accuracy": task.accuracy(given.dense, given.test)}
    if cut is None:
        return facts | {"failure": "unreachable", "reason": "no ratio reaches the target"}
    pruned = cut.model.to(memory_format=torch.channels_last)
    refresh_batchnorm(pruned, given.loader, task)
    after_cut = task.accuracy(pruned, given.test)
    finetune(pruned, given.loader, task, FineTune(epochs, given.lr), given.dense)
    layers = [m for m in pruned.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return facts | {
        "macs_kept": round(cut.macs / given.macs, 5),
        "params_kept": round(count_parameters(pruned) / count_parameters(given.dense), 5),
        "accuracy_after_cut": after_cut,
        "accuracy": task.accuracy(pruned, given.test),
        "channel_ratio": cut.ratio,
        "widths": "-".join(str(layer.weight.shape[0]) for layer in layers[:-1]),
    }


def in_brief(row: dict[str, Any]) -> str:
    """A row in one line."""
    if "failure" in row:
        return f"{row['failure']}: {row['reason']}"
    shares = [f"{100 * row[n]:.2f}" for n in ("dense_accuracy", "accuracy_after_cut", "accuracy")]
    return f"{' -> '.join(shares)} % at {row['macs_kept']:.1%} MACs, {row['seconds']} s"
