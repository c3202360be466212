"""Measuring the networks of plans: as emitted and deployed, once each."""

import pytest
import torch
from torch import nn

import rbpfx
from rbpfx import Comparison, Latency, PlanMeter, PruningPlan, Target
from rbpfx.latency import meter as meters
from rbpfx.latency.model import LatencyModel
from rbpfx.latency.nodes import Layer
from tests.latency.machine import StairTimes
from tests.toy import ShortcutNet

IMAGES = torch.zeros(2, 1, 8, 8)


@pytest.fixture
def captured():
    torch.manual_seed(0)
    gm = rbpfx.trace(ShortcutNet().eval(), IMAGES)
    return gm, rbpfx.analyze(gm)


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[nn.Module, nn.Module]]:
    """The networks that were compared; the second takes half of the time."""
    seen: list[tuple[nn.Module, nn.Module]] = []

    def compare(baseline: nn.Module, model: nn.Module, inputs: object, **_: object) -> Comparison:
        seen.append((baseline, model))
        return Comparison(
            Latency(2.0, 0.0, 3, times=(2.0,) * 3), Latency(1.0, 0.0, 3, times=(1.0,) * 3)
        )

    monkeypatch.setattr(meters, "compare_latency", compare)
    return seen


def batchnorms(network: nn.Module) -> int:
    return sum(isinstance(m, nn.BatchNorm2d) for m in network.modules())


@pytest.mark.parametrize("deployed", [False, True])
def test_every_plan_is_measured_once_in_its_form(captured, pairs, deployed: bool) -> None:
    gm, analysis = captured
    meter = PlanMeter(gm, analysis, IMAGES, deployed=deployed)
    plan = PruningPlan({g.name: range(g.size // 2) for g in analysis.groups})
    assert meter(plan) == meter(plan) == 0.5
    ((dense, pruned),) = pairs
    assert (batchnorms(dense) == 0) == deployed
    assert (batchnorms(pruned) == 0) == deployed
    assert rbpfx.count_parameters(pruned) < rbpfx.count_parameters(dense)
    meter(PruningPlan())
    assert len(pairs) == 2
    assert pairs[1][0] is dense


def test_a_noisy_machine_is_measured_for_longer(captured, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = iter([(0.2, 0.5, 0.8)] * 2 + [(0.5, 0.5, 0.5)] * 30)
    asked = []

    def compare(*_: object, **__: object) -> Comparison:
        ratios = next(rounds)
        asked.append(ratios)
        return Comparison(
            Latency(1.0, 0.0, 3, times=(1.0,) * 3), Latency(0.5, 0.0, 3, times=ratios)
        )

    monkeypatch.setattr(meters, "compare_latency", compare)
    gm, analysis = captured
    assert PlanMeter(gm, analysis, IMAGES)(PruningPlan()) == 0.5
    assert 2 < len(asked) < 8
    rounds = iter([(0.2, 0.5, 0.8)] * 1000)
    meter = PlanMeter(gm, analysis, IMAGES)
    meter.SECONDS = (0.0, 0.0)
    asked.clear()
    assert meter(PruningPlan()) == 0.5
    assert len(asked) == 1


def test_a_deployed_network_spends_no_time_on_batchnorm(captured) -> None:
    _, analysis = captured
    plain, deployed = (
        LatencyModel(analysis, IMAGES, deployed=deployed, times=StairTimes())
        for deployed in (False, True)
    )
    assert len(deployed.nodes) == len(plain.nodes) - batchnorms(analysis.gm)
    layers = [n for n in deployed.nodes if isinstance(n, Layer)]
    keys = [operator.key for n in layers for operator in n.operators(deployed.sizes)]
    assert keys and all(key.endswith("channels_last") for key in keys)


def test_prune_to_the_latency_of_the_deployed_network(
    pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rbpfx.latency.model, "OperatorTimes", lambda _: StairTimes(block=1))
    batches = [(torch.rand(4, 1, 8, 8), torch.arange(4) % 3)]
    rbpfx.prune(
        ShortcutNet(),
        batches,
        method="magnitude",
        target=Target(latency=0.6, deployed=True),
        recovery=rbpfx.FineTune(epochs=0),
        progress=False,
    )
    assert pairs
    assert all(batchnorms(network) == 0 for pair in pairs for network in pair)
