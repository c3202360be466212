"""The budget: a controller that does not swing, a cut that hits its target."""

import numpy as np
import pytest
import torch
from torch import nn

from rbpfx import PruningPlan, TargetError, analyze, count_macs, rewrite, trace
from rbpfx.training.budget import StrengthController, above, cut, require_reachable


@pytest.fixture
def captured():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 48, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(48 * 64, 40),
        nn.ReLU(),
        nn.Linear(40, 10),
    )
    gm = trace(model, torch.zeros(2, 3, 8, 8))
    return gm, analyze(gm)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.8])
def test_cut_reaches_the_budget_and_not_more(captured, share: float) -> None:
    gm, analysis = captured
    rng = np.random.default_rng(0)
    scores = {g.name: rng.random(g.size) for g in analysis.groups}
    plan = cut(analysis, scores, share)
    reached = count_macs(rewrite(gm, analysis, plan)) / count_macs(gm)
    assert reached <= share
    assert reached > share - 0.05


def test_cut_keeps_the_best_of_every_group(captured) -> None:
    _, analysis = captured
    scores = {g.name: np.arange(g.size, dtype=float) for g in analysis.groups}
    plan = cut(analysis, scores, 0.001)
    assert all(g.size - 1 in plan.kept[g.name] for g in analysis.groups)


def test_equal_scores_are_cut_together(captured) -> None:
    _, analysis = captured
    plan = above(analysis, {g.name: np.ones(g.size) for g in analysis.groups}, 0.5)
    assert plan.kept == {}


def test_an_unreachable_target_says_what_is_reachable(captured) -> None:
    _, analysis = captured
    with pytest.raises(TargetError, match="one unit per group this network still keeps"):
        require_reachable(analysis, 1e-6)


def test_expected_macs_equal_the_emitted_ones(captured) -> None:
    gm, analysis = captured
    plan = PruningPlan({"0": range(10), "2": range(7), "5": [1, 2]})
    assert analysis.macs(analysis.keep(plan)) / 2 == count_macs(rewrite(gm, analysis, plan))


@pytest.mark.parametrize("critical", [0.003, 0.03, 0.3])
def test_controller_settles_on_the_budget_without_overshoot(critical: float) -> None:
    """A crude plant: gates drift down above a critical strength and up below, with a lag."""
    controller = StrengthController(start=0.01)
    rng = np.random.default_rng(0)
    price = critical * np.exp(rng.normal(size=200))  # what closing every unit costs the loss
    logits = np.full(200, 3.0)
    costs = []
    for step in range(600):
        cost = float((1 / (1 + np.exp(-logits))).mean())
        budget = 1 - 0.5 * min(step / 200, 1)
        strength = controller.update(cost, budget)
        logits = np.clip(logits + 0.05 * np.sign(price - strength), -6, 6)
        costs.append(cost)
    assert np.abs(np.array(costs[400:]) - 0.5).max() < 0.05
    assert min(costs) > 0.42
