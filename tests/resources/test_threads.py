"""Threads of one process prune, capture and slice at the same time as if each were alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import mobilenet_v3_small, resnet18

import rbpfx
from rbpfx.training.recursion import Progress
from tests.resources.common import BATCHES, X, prune, require_same, toy
from tests.toy import ShortcutNet, trained

pytestmark = pytest.mark.filterwarnings("ignore")
T = TypeVar("T")
THREADS = 4
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def at_once(call: Callable[[int], T]) -> list[T]:
    """`call(0)` to `call(3)`, each in a thread of its own."""
    start = threading.Barrier(THREADS)

    def one(place: int) -> T:
        start.wait()
        return call(place)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(one, range(THREADS)))


class Dropping(ShortcutNet):
    """Draws random numbers of its own."""

    def features(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().features(x), 0.2, self.training)


@pytest.mark.parametrize("method", ["rbp", pytest.param("sbp", marks=pytest.mark.slow)])
def test_prunes_at_once_are_the_prunes_one_by_one(method: str) -> None:
    models = []
    for seed in range(THREADS):
        torch.manual_seed(seed)
        models.append(trained(Dropping(), BATCHES, 1))
    before = torch.get_rng_state()
    alone = [prune(model, seed=seed, method=method) for seed, model in enumerate(models)]
    assert torch.equal(torch.get_rng_state(), before)
    together = at_once(lambda seed: prune(models[seed], seed=seed, method=method))
    assert torch.equal(torch.get_rng_state(), before)
    for one, other in zip(alone, together, strict=True):
        require_same(other, one)


def test_a_model_may_be_shared() -> None:
    model = toy()
    alone = prune(model)
    for result in at_once(lambda _: prune(model)):
        require_same(result, alone)


def test_one_that_fails_does_not_hold_up_the_others() -> None:
    def fail(progress: Progress) -> None:
        raise KeyError("stop")

    model = toy()  # here: it seeds the generator that all threads share

    def one(place: int) -> Any:
        if place % 2:
            return prune(model, seed=place)
        with pytest.raises(KeyError):
            prune(model, seed=place, callback=fail)
        return None

    results = at_once(one)
    require_same(results[1], prune(model, seed=1))
    require_same(results[3], prune(model, seed=3))


def half(model: nn.Module, x: Tensor) -> tuple[Any, ...]:
    """All passes that do not train, and what came of them."""
    gm = rbpfx.trace(model, x)
    analysis = rbpfx.analyze(gm)
    plan = rbpfx.PruningPlan({g.name: range((g.size + 1) // 2) for g in analysis.groups})
    pruned = rbpfx.rewrite(gm, analysis, plan).eval()
    error = rbpfx.verify(rbpfx.apply_mask(gm, analysis, plan), pruned, x)
    with torch.no_grad():
        output = pruned(x).tolist()
    return gm.code, pruned.code, error, output


@pytest.mark.parametrize("shared", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_passes_are_exactly_deterministic(shared: bool) -> None:
    makers = (resnet18, mobilenet_v3_small)
    models = [makers[place % 2](num_classes=10).eval() for place in range(2 if shared else THREADS)]

    def one(place: int) -> tuple[Any, ...]:
        return half(models[place % len(models)], IMAGES)

    alone = [one(place) for place in range(THREADS)]
    assert at_once(one) == alone


def test_deployed_networks_are_the_same() -> None:
    model = toy().eval()

    def one(_: int) -> Any:
        return rbpfx.deploy(model, X, packed=False)(X).tolist()

    assert at_once(one) == [one(0)] * THREADS


def test_a_capture_leaves_the_forwards_of_other_threads_alone() -> None:
    model, stop = toy().eval(), threading.Event()
    with torch.no_grad():
        expected = model(X)

    def run() -> bool:
        same = True
        with torch.no_grad():
            while not stop.is_set():
                same = same and torch.equal(model(X), expected)
        return same

    with ThreadPoolExecutor(1) as pool:
        same = pool.submit(run)
        try:
            for _ in range(10):
                rbpfx.trace(toy(), X)
        finally:
            stop.set()
        assert same.result()
