"""Modes of torch around a call do not reach into it, and are still there afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rbpfx
from rbpfx import PruningResult, Target
from rbpfx.methods import noise_gates
from tests.resources.common import BATCHES, X, prune, require_same, toy
from tests.toy import ShortcutNet

pytestmark = pytest.mark.filterwarnings("ignore")


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": deterministic,
}
FLAGS = (
    torch.is_grad_enabled,
    torch.is_inference_mode_enabled,
    lambda: torch.is_autocast_enabled("cpu"),
    torch.are_deterministic_algorithms_enabled,
)


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test in a mode, and looks whether the mode is still there at the end."""
    with MODES[request.param]():
        flags = [flag() for flag in FLAGS]
        yield request.param
        assert [flag() for flag in FLAGS] == flags


@pytest.fixture(scope="module")
def usual() -> PruningResult:
    return prune(target=Target(macs=0.5))


def require_trainable(network: nn.Module) -> None:
    """Every tensor of a network can take part in training."""
    with torch.inference_mode(False), torch.enable_grad():
        assert not any(t.is_inference() for t in (*network.parameters(), *network.buffers()))
        optimizer = torch.optim.SGD(network.parameters(), 0.1)
        F.cross_entropy(network.train()(BATCHES[0][0].clone()), BATCHES[0][1].clone()).backward()
        optimizer.step()


def test_prune(mode: str, usual: PruningResult) -> None:
    result = prune(toy(), target=Target(macs=0.5))  # made in the mode as well
    require_same(result, usual)
    require_trainable(result.model)
    require_trainable(result.dense)


def test_sweep(mode: str, usual: PruningResult) -> None:
    (result,) = usual.sweep([0.4])
    require_trainable(result.model)


def test_passes(mode: str) -> None:
    gm = rbpfx.trace(toy(), X)
    analysis = rbpfx.analyze(gm)
    plan = rbpfx.PruningPlan({g.name: range(g.size // 2) for g in analysis.groups})
    pruned, masked = rbpfx.rewrite(gm, analysis, plan), rbpfx.apply_mask(gm, analysis, plan)
    assert rbpfx.verify(masked, pruned, X) < 1e-12
    noisy = rbpfx.insert_noise(gm, analysis)
    assert noise_gates(noisy)
    for network in (pruned, masked, noisy):
        require_trainable(network)


def test_a_graph_records_the_dtypes_of_the_model(mode: str) -> None:
    values = [node.meta["val"] for node in rbpfx.trace(toy(), X).graph.nodes]
    assert {v.dtype for v in values if isinstance(v, Tensor)} == {torch.float32}


def test_deploy_and_export(mode: str, usual: PruningResult, tmp_path: Path) -> None:
    deployed = usual.deploy()
    assert rbpfx.export(usual.model.eval(), X, tmp_path / "net.pt2") < 1e-5
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        assert torch.allclose(deployed(X), usual.model.eval()(X), atol=1e-5)


def test_save_and_load(mode: str, usual: PruningResult, tmp_path: Path) -> None:
    usual.save(tmp_path, program=True)
    loaded = rbpfx.load(tmp_path, ShortcutNet)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, usual.model.state_dict()[name])
    require_trainable(loaded)


def test_an_optimizer_that_was_rebound(mode: str) -> None:
    with torch.inference_mode(False), torch.enable_grad():
        model = toy()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        F.cross_entropy(model(BATCHES[0][0]), BATCHES[0][1]).backward()
        optimizer.step()
        result = prune(model)
    rebound = rbpfx.rebind(optimizer, result)
    with torch.inference_mode(False), torch.enable_grad():
        F.cross_entropy(result.model.train()(BATCHES[0][0]), BATCHES[0][1]).backward()
        before = [parameter.detach().clone() for parameter in result.model.parameters()]
        rebound.step()
        after = list(result.model.parameters())
    assert all(p.grad is not None and p.grad.any() for p in after)
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_batches_may_be_made_in_inference_mode(usual: PruningResult) -> None:
    with torch.inference_mode():
        batches = [(images.clone(), labels.clone()) for images, labels in BATCHES]
    require_same(prune(loader=batches, val_loader=batches, target=Target(macs=0.5)), usual)
