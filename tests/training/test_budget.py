"""The budget: a projection that holds it at every step, a cut that hits it."""

import numpy as np
import pytest
import torch
from torch import nn

from rbpfx import Analysis, PruningPlan, TargetError, analyze, count_macs, rewrite, trace
from rbpfx.methods import Phase
from rbpfx.methods.rbp import RBPGate
from rbpfx.training.budget import BudgetProjection, above, complete, cut, require_reachable


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


class Toy:
    """Two gates, the Adam that trains them, and a price that closing each unit costs the loss."""

    def __init__(self, prices: torch.Tensor) -> None:
        self.gates = [RBPGate(10), RBPGate(6)]
        self.prices = prices.split([10, 6])
        self.optimizer = torch.optim.Adam([g.gate_logit for g in self.gates], 0.05)
        weights = [torch.ones(()), torch.ones(())]
        self.projection = BudgetProjection(self.gates, weights, self.cost)

    def openness(self) -> torch.Tensor:
        return torch.cat([gate.openness(2.0).detach() for gate in self.gates])

    def cost(self) -> float:
        return float(self.openness().mean())

    def step(self) -> None:
        pairs = zip(self.gates, self.prices, strict=True)
        loss = -sum((price * gate.mean()).sum() for gate, price in pairs)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class TestBudgetProjection:
    @pytest.mark.parametrize("budget", [0.05, 0.3, 0.5, 0.9])
    def test_the_budget_holds_at_once_and_is_used(self, budget: float) -> None:
        toy = Toy(torch.rand(16))
        toy.step()
        strength = toy.projection.apply(toy.optimizer, budget)
        assert strength > 0
        assert 0.98 * budget < toy.cost() <= budget

    def test_a_budget_that_holds_already_moves_nothing(self) -> None:
        toy = Toy(torch.rand(16))
        toy.step()
        before = toy.openness()
        assert toy.projection.apply(toy.optimizer, 1.0) == 0
        assert torch.equal(before, toy.openness())

    def test_units_to_which_the_loss_clings_move_less(self) -> None:
        toy = Toy(torch.linspace(0.1, 1, 16))
        toy.step()
        toy.projection.apply(toy.optimizer, 0.5)
        assert (toy.openness().diff() > 0).all()

    def test_dearer_units_move_more(self) -> None:
        toy = Toy(torch.ones(16))
        toy.projection.weights = [torch.tensor(1.0), torch.tensor(3.0)]
        toy.step()
        toy.projection.apply(toy.optimizer, 0.5)
        cheap, dear = toy.openness().split([10, 6])
        assert dear.max() < cheap.min()

    @pytest.mark.parametrize("phase", [Phase.WAITING, Phase.HARDENED])
    def test_only_noisy_gates_move(self, phase: Phase) -> None:
        toy = Toy(torch.ones(16))
        toy.step()
        toy.gates[0].phase = phase
        before = toy.openness()
        toy.projection.apply(toy.optimizer, 0.8)
        assert torch.equal(before[:10], toy.openness()[:10])
        assert (toy.openness()[10:] < before[10:]).all()
        toy.gates[1].phase = phase
        assert toy.projection.apply(toy.optimizer, 0.1) == 0

    def test_a_budget_out_of_reach_leaves_finite_gates(self) -> None:
        toy = Toy(torch.ones(16))
        toy.step()
        toy.gates[0].phase = Phase.HARDENED
        toy.projection.apply(toy.optimizer, 0.1)
        assert all(torch.isfinite(gate.gate_logit).all() for gate in toy.gates)
        assert torch.isfinite(toy.gates[1].divergence(1.0)).all()

    def test_over_many_steps_the_units_of_the_highest_price_stay(self) -> None:
        """A falling budget is never exceeded, and half of the units end up open."""
        toy = Toy(torch.linspace(0.1, 1, 16)[torch.randperm(16)])
        for step in range(150):
            toy.step()
            budget = 1 - 0.5 * min(step / 100, 1)
            toy.projection.apply(toy.optimizer, budget)
            assert toy.cost() <= budget
        stay = toy.openness() > 0.5
        prices = torch.cat(toy.prices)
        assert stay.sum() in (7, 8, 9)
        assert prices[stay].min() > prices[~stay].max()


class Flattened(nn.Module):
    """Two groups of channels flattened side by side, read feature by feature."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(1, 4, 3)
        self.right = nn.Conv2d(1, 3, 3)
        self.head = nn.Linear(28, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat([self.left(x), self.right(x)], 1).relu().flatten(1))


class TestComplete:
    """With features as units a layer may lose all inputs though every group keeps a unit."""

    @pytest.fixture
    def analysis(self) -> Analysis:
        return analyze(trace(Flattened(), torch.zeros(2, 1, 4, 4)), unit="feature")

    def test_the_best_feature_of_a_channel_that_stays_is_kept(self, analysis: Analysis) -> None:
        scores = {g.name: np.zeros(g.size) for g in analysis.groups}
        scores["left"][3] = scores["right"][0] = 1
        scores["head.features"][[0, 14]] = [1, 0.5]  # of channels 0 and 3 of the left
        plan = above(analysis, scores, 2)
        assert plan.kept["left"] == (3,)
        assert 14 in plan.kept["head.features"]
        emitted = rewrite(analysis.gm, analysis, plan)
        assert emitted.head.in_features == 1
        assert emitted(torch.zeros(2, 1, 4, 4)).shape == (2, 2)

    @pytest.mark.parametrize("seed", range(20))
    def test_no_axis_is_ever_empty(self, analysis: Analysis, seed: int) -> None:
        rng = np.random.default_rng(seed)
        scores = {g.name: rng.random(g.size) for g in analysis.groups}
        needed = {name: score > rng.choice([0.8, 0.95, 2]) for name, score in scores.items()}
        plan = complete(analysis, needed, scores)
        emitted = rewrite(analysis.gm, analysis, plan)
        assert all(p.numel() for p in emitted.parameters())
        assert analysis.close(plan) == plan

    def test_what_is_reachable_is_reached(self, analysis: Analysis) -> None:
        dense = analysis.macs(analysis.keep(PruningPlan()))
        smallest = above(analysis, {g.name: np.zeros(g.size) for g in analysis.groups}, np.inf)
        least = analysis.macs(analysis.keep(smallest)) / dense
        require_reachable(analysis, least)
        rng = np.random.default_rng(0)
        plan = cut(analysis, {g.name: rng.random(g.size) for g in analysis.groups}, least)
        assert analysis.macs(analysis.keep(plan)) / dense <= least
