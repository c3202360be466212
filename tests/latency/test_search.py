"""Latency targets on a machine whose times are known."""

import re

import numpy as np
import pytest
import torch
import torchvision.models

from rbpfx import Analysis, PruningPlan, Selection, Target, TargetError, analyze, trace
from rbpfx.latency import search
from rbpfx.latency.search import aligned
from tests.latency.machine import BLOCK, StairMeter


@pytest.fixture(scope="module")
def resnet() -> Analysis:
    torch.manual_seed(0)
    return analyze(trace(torchvision.models.resnet18(), torch.zeros(2, 3, 32, 32)))


@pytest.fixture(scope="module")
def densenet() -> Analysis:
    model = torchvision.models.DenseNet(16, (3, 3), 16)
    return analyze(trace(model, torch.zeros(2, 3, 32, 32)))


def random_scores(selection: Selection, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {g.name: rng.random(g.size) for g in selection.groups}


def widths(plan: PruningPlan, analysis: Analysis) -> dict[str, int]:
    return {g.name: len(plan.kept.get(g.name, range(g.size))) for g in analysis.groups}


@pytest.mark.parametrize(
    ("network", "asked"),
    [
        *(("resnet", asked) for asked in (0.35, 0.5, 0.8, "10 ms")),
        ("densenet", 0.5),
        ("densenet", 0.8),
    ],
)
def test_the_measured_latency_meets_the_target(
    request: pytest.FixtureRequest, network: str, asked: float | str
) -> None:
    analysis = request.getfixturevalue(network)
    meter = StairMeter(analysis)
    budget = 0.5 if isinstance(asked, str) else asked
    selection = Selection(analysis, Target(latency=asked), meter)
    assert selection.budget == pytest.approx(budget)
    plan = selection.plan(random_scores(selection))
    assert (0.95 if network == "resnet" else 0.9) * budget < meter(plan) <= budget
    assert meter.asked < 25
    assert selection.reached(plan).reached == meter(plan)
    assert 0.1 < selection.training_budget < 1


def test_widths_lie_on_the_edges_of_the_staircase(resnet: Analysis) -> None:
    selection = Selection(resnet, Target(latency=0.5), StairMeter(resnet))
    found = widths(selection.plan(random_scores(selection)), resnet)
    on_edge = [width % BLOCK == 0 for width in found.values()]
    assert np.mean(on_edge) > 0.8
    assert len(set(found.values())) > 3


def test_the_best_units_stay(resnet: Analysis) -> None:
    selection = Selection(resnet, Target(latency=0.5), StairMeter(resnet))
    scores = random_scores(selection)
    plan = selection.plan(scores)
    for name, units in selection.kept(plan).items():
        if not units.all():
            assert scores[name][units].min() > scores[name][~units].max()


def test_a_worthless_group_goes_first(resnet: Analysis) -> None:
    selection = Selection(resnet, Target(latency=0.7), StairMeter(resnet))
    scores = random_scores(selection)
    scores["layer4.0.conv1"] = np.full(512, 1e-3)
    found = widths(selection.plan(scores), resnet)
    assert found["layer4.0.conv1"] <= BLOCK
    assert found["layer4.0.conv1"] < min(w for n, w in found.items() if n.startswith("layer4.1"))


def test_more_score_is_kept_than_by_uniform_widths(resnet: Analysis) -> None:
    meter = StairMeter(resnet)
    selection = Selection(resnet, Target(latency=0.5), meter)
    scores = random_scores(selection)
    kept = selection.kept(selection.plan(scores))
    uniform = {}
    for share in np.linspace(1, 0.1, 50):
        counts = {g.name: max(round(share * g.size), 1) for g in resnet.groups}
        uniform = {n: np.argsort(-scores[n])[:count] for n, count in counts.items()}
        if meter(PruningPlan(uniform)) <= 0.5:
            break
    value = sum(scores[n][units].sum() for n, units in kept.items())
    assert value > 1.02 * sum(scores[n][units].sum() for n, units in uniform.items())


def test_bounds_hold(resnet: Analysis) -> None:
    target = Target(latency=0.5, exclude=["layer1"], widths={"layer4": (0.5, 0.75)}, min_width=8)
    selection = Selection(resnet, target, StairMeter(resnet))
    found = widths(selection.plan(random_scores(selection)), resnet)
    for name, width in found.items():
        if name.startswith("layer4"):
            assert 256 <= width <= 384
        elif name.startswith("layer1"):
            assert width == 64
        else:
            assert width >= 8


def test_without_elimination(resnet: Analysis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where groups are coupled too densely every group gets a table of its own."""
    monkeypatch.setattr("rbpfx.latency.knapsack.LARGEST_TABLE", 50)
    meter = StairMeter(resnet)
    selection = Selection(resnet, Target(latency=0.5), meter)
    assert 0.93 < meter(selection.plan(random_scores(selection))) / 0.5 <= 1


def test_the_correction_is_remembered(resnet: Analysis) -> None:
    meter = StairMeter(resnet)
    selection = Selection(resnet, Target(latency=0.5), meter)
    before = meter.asked
    selection.plan(random_scores(selection))
    assert meter.asked - before <= search.ROUNDS


def test_unreachable(resnet: Analysis) -> None:
    with pytest.raises(TargetError, match=r"keeps 5\.0% of the latency"):
        Selection(resnet, Target(latency=0.05), StairMeter(resnet))


def test_times_are_said_in_units(resnet: Analysis) -> None:
    """The dense network takes 20 ms."""
    message = r"keeps 1 us of the latency.* still keeps [\d.]+ (ms|us); .*exclude=\['layer1'\]"
    with pytest.raises(TargetError, match=message):
        Selection(resnet, Target(latency="1 us", exclude=["layer1"]), StairMeter(resnet))
    selection = Selection(resnet, Target(latency="10 ms"), StairMeter(resnet))
    reached = selection.reached(selection.plan(random_scores(selection)))
    assert reached is not None and reached.short() == "latency 10 ms"
    assert re.fullmatch(
        r"target: latency 10 ms, reached [\d.]+ ms \([\d.]+% of the dense network\)", str(reached)
    )
    wide = Selection(resnet, Target(latency="30 s"), StairMeter(resnet))
    assert "30 s" in str(wide.reached(wide.plan(random_scores(wide))))


def test_rounding_by_the_staircase(resnet: Analysis) -> None:
    selection = Selection(resnet, Target(macs=0.5, round_to="auto"), StairMeter(resnet))
    plan = selection.plan(random_scores(selection))
    assert all(width % BLOCK == 0 for width in widths(plan, resnet).values())
    assert 0.45 < selection.reached(plan).reached <= 0.5


def test_rounding_without_a_table(resnet: Analysis) -> None:
    with pytest.raises(TargetError, match="need a network"):
        Selection(resnet, Target(macs=0.5, round_to="auto"))


@pytest.mark.parametrize(
    ("allowed", "channels", "expected"),
    [
        (range(1, 65), 1, [1, 8, 16, 24, 32, 40, 48, 56, 64]),
        (range(1, 21), 1, [1, 4, 8, 12, 16, 20]),
        (range(1, 13), 64, list(range(1, 13))),
        (range(1, 4), 1, [1, 2, 3]),
    ],
)
def test_aligned(allowed: range, channels: int, expected: list[int]) -> None:
    assert aligned(np.array(allowed), channels).tolist() == expected
