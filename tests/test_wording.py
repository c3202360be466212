"""Settings in words: stable between processes, and different where the settings are."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from rbpfx import FineTune, Gate, Method, Recursion, Strategy, Target, Training
from rbpfx.graph.groups import ChannelGroup
from rbpfx.wording import in_words


@dataclass
class Wanting:
    """Settings that have to be given."""

    bits: int


@dataclass(frozen=True)
class Weighted:
    """Settings that cannot be asked whether they are equal."""

    weights: Tensor


class Own(Method):
    """A method of a user that is no dataclass."""

    name = "own"

    def __init__(self, bits: int) -> None:
        self._bits = bits
        self.me = self

    def gate(self, group: ChannelGroup) -> Gate:
        raise NotImplementedError


class Counting(Strategy):
    """A strategy with a state."""

    def __init__(self) -> None:
        self.calls = id(self)


def factory(rate: float, kind: type = SGD) -> Callable[..., Any]:
    def build(weights: Any) -> Any:
        return kind(weights, rate)

    return build


def scaled(factor: float) -> Callable[..., Tensor]:
    return lambda output, target: factor * (output - target).square().mean()


def test_by_what_differs_from_the_defaults() -> None:
    assert in_words(None) == "None"
    assert in_words(Training()) == "Training()"
    assert in_words(Recursion(epochs=7)) == "Recursion(epochs=7)"
    assert in_words(Target(macs=0.5, exclude=["stem"])) == "Target(macs=0.5, exclude=['stem'])"
    assert in_words(Wanting(3)) == "Wanting(bits=3)"


def test_names_come_with_their_modules() -> None:
    def my_optimizer(weights: object) -> None: ...

    place = f"{__name__}.test_names_come_with_their_modules.<locals>.my_optimizer"
    assert in_words(FineTune(optimizer=my_optimizer)) == f"FineTune(optimizer={place})"
    assert in_words(nn.functional.mse_loss) == "torch.nn.functional.mse_loss"
    assert in_words((nn.ReLU, "head")) == "[torch.nn.modules.activation.ReLU, 'head']"


PAIRS = {
    "functions of a partial": (partial(AdamW, lr=0.1), partial(SGD, lr=0.1)),
    "arguments of a partial": (partial(SGD, lr=0.1), partial(SGD, lr=0.9)),
    "objects": (Own(1), Own(2)),
    "functions made with a number": (factory(0.1), factory(0.9)),
    "functions made with a class": (factory(0.1), factory(0.1, AdamW)),
    "constants of lambdas": (lambda w: SGD(w, 0.1), lambda w: SGD(w, 0.9)),
    "names in lambdas": (lambda w: SGD(w, 0.1), lambda w: AdamW(w, 0.1)),
    "inner code of lambdas": (lambda w: [x + 1 for x in w], lambda w: [x + 2 for x in w]),
    "defaults of lambdas": (lambda w, r=0.1: SGD(w, r), lambda w, r=0.9: SGD(w, r)),
    "lambdas made with a number": (scaled(1.0), scaled(2.0)),
    "losses": (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1)),
    "weights of losses": (
        nn.CrossEntropyLoss(torch.tensor([1.0, 2.0])),
        nn.CrossEntropyLoss(torch.tensor([2.0, 1.0])),
    ),
    "tensors": (Weighted(torch.zeros(2)), Weighted(torch.ones(2))),
    "ends of long lists": ([*range(9999), 1], [*range(9999), 2]),
}


@pytest.mark.parametrize("case", PAIRS)
def test_others_in_other_words(case: str) -> None:
    one, other = (in_words(settings) for settings in PAIRS[case])
    assert one != other
    assert " at 0x" not in one + other
    assert len(one) < 2000


def test_no_words_about_the_spread() -> None:
    assert in_words(Training(strategy=Counting())) == "Training(strategy=Counting)"


def test_the_same_in_another_process() -> None:
    code = (
        "from tests.test_wording import PAIRS, in_words\n"
        "sets = {'one', 'two', 'three'}, lambda x: x in {'one', 'two', 'three'}\n"
        "print([in_words(pair) for pair in PAIRS.values()], in_words(sets))"
    )
    told = set()
    for seed in "12":
        run = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            check=True,
        )
        told.add(run.stdout)
    assert len(told) == 1
