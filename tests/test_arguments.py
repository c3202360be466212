"""Arguments of the wrong kind: what was given is named, and what to give instead."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import rbpfx
from rbpfx import FineTune, InputError, RbpfxError, Recursion, Target
from rbpfx.arguments import as_number, known_leaves, usable_device
from tests.toy import ShortcutNet, stripes

BATCHES = stripes()
DATASET = TensorDataset(*BATCHES[0])


def no_step(progress: object) -> None:
    raise AssertionError("training has begun")


def prune(model: object = None, loader: object = BATCHES, **options: Any) -> Any:
    options = {"callback": no_step, "progress": False, **options}
    return rbpfx.prune(ShortcutNet() if model is None else model, loader, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 0.5}, r"target=0.5 is no rbpfx.Target; did you mean .*Target\(macs=0.5\)\?"),
        ({"target": {"params": 0.5}}, r"did you mean target=rbpfx.Target\(params=0.5\)\?"),
        ({"target": "50%"}, r"target='50%' is no .*for example target=rbpfx.Target\(macs=0.5\)"),
        ({"target": {"mac": 0.5}}, r"for example target=rbpfx.Target\(macs=0.5\)"),
        ({"target": 0.5, "method": "magnitude"}, "did you mean"),
        ({"recursion": 3}, r"did you mean recursion=rbpfx.Recursion\(epochs=3\)\?"),
        ({"recursion": Recursion}, r"did you mean recursion=rbpfx.Recursion\(\)\?"),
        ({"recovery": 3}, r"did you mean recovery=rbpfx.FineTune\(epochs=3\)\?"),
        ({"recovery": -3}, r"for example recovery=rbpfx.FineTune\(epochs=3\)"),
        ({"recovery": Recursion()}, "is no rbpfx.FineTune; for example"),
        ({"training": {}}, r"did you mean training=rbpfx.Training\(\)\?"),
        ({"training": "bfloat16"}, r"did you mean .*Training\(precision='bfloat16'\)\?"),
        ({"loader": None}, "the loader is None, which yields no batches; pass a DataLoader"),
        ({"loader": DATASET}, r"a TensorDataset, .*pass .*DataLoader\(dataset, batch_size=...\)"),
        ({"val_loader": DATASET}, "the val_loader is a TensorDataset"),
        ({"loss_fn": nn.CrossEntropyLoss}, r"give loss_fn=nn.CrossEntropyLoss\(\)"),
        ({"loss_fn": "mse"}, r"loss_fn='mse' cannot be called as loss_fn\(output, target\); for"),
        ({"forward": 3}, r"cannot be called as forward\(model, batch\)"),
        ({"metric": "top5"}, r"cannot be called as metric\(model, val_loader\)"),
        ({"callback": rbpfx.Progress}, r"give callback=rbpfx.Progress\(\)"),
        ({"distill": 0.5}, "distill=0.5 must be True or False"),
        ({"seed": None}, "seed=None must be a whole number"),
        ({"checkpoint_dir": 3}, "must be the path of a directory"),
        ({"checkpoint_interval": "5 min"}, "must be a number of seconds"),
        ({"leaf_modules": "stem"}, r"must be a list .*leaf_modules=\['stem'\]"),
        ({"leaf_modules": nn.Conv2d}, r"leaf_modules=\[Conv2d\]"),
        ({"leaf_modules": ["sten"]}, "no module of the model is called 'sten'; there are: stem, "),
        ({"leaf_modules": [nn.LSTM]}, "no module of the class LSTM; there are: BatchNorm2d"),
        ({"leaf_modules": [nn.ReLU()]}, "holds a module, a ReLU; give its class"),
        ({"leaf_modules": None}, "must be a list"),
        ({"device": "gpu"}, r"device='gpu' cannot be used.*where the model is \(cpu\)"),
        ({"device": "meta"}, "holds no values"),
    ],
)
def test_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        prune(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there() -> None:
    with pytest.raises(InputError, match="device='cuda' cannot be used"):
        prune(device="cuda")


def scripted() -> nn.Module:
    return torch.jit.trace(ShortcutNet().eval(), BATCHES[0][0], check_trace=False)


MODELS = {
    "a class": (lambda: ShortcutNet, "the class ShortcutNet; pass a trained instance"),
    "a function": (lambda: F.relu, "not a torch.nn.Module"),
    "a state": (lambda: ShortcutNet().state_dict(), "a state_dict; pass the network"),
    "a script": (scripted, "TorchScript.*pass the module that was scripted or traced"),
    "a program": (
        lambda: torch.export.export(ShortcutNet().eval(), (BATCHES[0][0],)),
        r"pass rbpfx.trace\(program\)",
    ),
    "parallel": (lambda: nn.DataParallel(ShortcutNet()), "in DataParallel.*pass model.module$"),
    "averaged": (
        lambda: torch.optim.swa_utils.AveragedModel(ShortcutNet()),
        "in AveragedModel.*pass model.module$",
    ),
    "compiled": (
        lambda: torch.compile(ShortcutNet(), backend="eager"),
        "in OptimizedModule.*pass model._orig_mod$",
    ),
    "twice": (
        lambda: nn.DataParallel(torch.compile(ShortcutNet(), backend="eager")),
        "pass model.module._orig_mod$",
    ),
    "meta": (lambda: ShortcutNet().to("meta"), "on the meta device.*load its weights first"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", MODELS)
def test_models(kind: str) -> None:
    make, message = MODELS[kind]
    with pytest.raises(InputError, match=message):
        prune(make())


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (rbpfx.RBP, r"method is the class RBP; give method=rbpfx.RBP\(\)"),
        (["rbp"], r"no method is called \['rbp'\]; there are: rbp"),
        (None, "no method is called None"),
    ],
)
def test_methods(method: object, message: str) -> None:
    with pytest.raises(RbpfxError, match=message):
        prune(method=method)


class Stream(IterableDataset):
    """A data set that yields batches by itself."""

    def __iter__(self) -> Any:
        return iter(BATCHES)


class Indexed:
    """Batches by number, the old way to be gone through."""

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        return BATCHES[number]


@pytest.mark.parametrize("loader", [Stream(), Indexed(), DataLoader(Stream(), None)])
def test_what_yields_batches_is_a_loader(loader: object) -> None:
    prune(
        loader=loader,
        method="magnitude",
        target=Target(macs=0.5),
        recovery=FineTune(epochs=0),
        seed=np.int64(3),
    )


@pytest.mark.parametrize("value", [0.5, 1, True, np.float32(0.5), torch.tensor(0.5), np.ones(1)])
def test_a_metric_is_one_number(value: Any) -> None:
    assert as_number(value) == np.asarray(value).item()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            {"acc": 1.0},
            r"one number, not \{'acc': 1.0\}; return one of its values.*result\['acc'\]",
        ),
        (None, "not None"),
        ("0.5", "not '0.5'"),
        (torch.zeros(2), "not tensor"),
        ((0.5, 0.1), "not "),
    ],
)
def test_anything_else_is_found_before_training(value: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prune(val_loader=BATCHES, metric=lambda model, loader: value)


def test_leaves_are_kept_as_given() -> None:
    shared = nn.ReLU()
    model = nn.Sequential(OrderedDict(a=shared, b=nn.Linear(3, 3), c=shared))
    assert known_leaves(model, (leaf for leaf in ("c", nn.Linear))) == ("c", nn.Linear)
    assert known_leaves(model, ()) == ()


def test_the_device_is_that_of_the_model_by_default() -> None:
    assert usable_device(None, nn.Linear(2, 2)) == torch.device("cpu")
    assert usable_device("cpu", nn.Linear(2, 2)) == torch.device("cpu")
