"""The budget: a projection that holds it at every step."""

from dataclasses import asdict

import pytest
import torch

from rbpfx.methods import Phase
from rbpfx.methods.rbp import RBP, RBPGate
from rbpfx.training.budget import BudgetProjection


class Toy:
    """Two gates, the Adam that trains them, and a price that closing each unit costs the loss."""

    def __init__(self, prices: torch.Tensor) -> None:
        self.gates = [RBPGate(size, **asdict(RBP())) for size in (10, 6)]
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

    @pytest.mark.parametrize("unit", [1e-9, 1e-5, 1e5, 1e9])
    def test_the_unit_of_the_loss_does_not_matter(self, unit: float) -> None:
        """Gates of a tiny loss are not all closed by the first step that is tried."""
        prices = torch.linspace(0.1, 1, 16)
        reached = []
        for toy in (Toy(prices), Toy(unit * prices)):
            toy.optimizer.param_groups[0]["eps"] = 0
            toy.step()
            strength = toy.projection.apply(toy.optimizer, 0.5)
            reached.append((toy.openness(), toy.cost(), strength))
        (openness, cost, strength), (other, other_cost, other_strength) = reached
        assert cost == pytest.approx(0.5, abs=0.01)
        assert other_cost == pytest.approx(0.5, abs=0.01)
        assert torch.allclose(openness, other, atol=0.01)
        assert other_strength == pytest.approx(unit * strength, rel=0.02)

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

    def test_an_optimiser_that_has_not_stepped_moves_nothing(self) -> None:
        toy = Toy(torch.ones(16))
        before = toy.openness()
        assert toy.projection.apply(toy.optimizer, 0.5) == 0
        assert torch.equal(before, toy.openness())

    def test_gates_without_parameters_move_nothing(self) -> None:
        toy = Toy(torch.ones(16))
        toy.step()
        for gate in toy.gates:
            gate.phase = Phase.HARDENED
        assert toy.projection.apply(toy.optimizer, 0.5) == 0

    def test_a_budget_out_of_reach_leaves_finite_gates(self) -> None:
        toy = Toy(torch.ones(16))
        toy.step()
        toy.gates[0].phase = Phase.HARDENED
        toy.projection.apply(toy.optimizer, 0.1)
        assert all(torch.isfinite(gate.gate_logit).all() for gate in toy.gates)
        assert torch.isfinite(toy.gates[1].penalty(1.0, 1)).all()

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
