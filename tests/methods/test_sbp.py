"""Structured Bayesian Pruning: the gate, its clamps and its rule."""

from dataclasses import asdict
from typing import Any

import pytest
import torch

from rbpfx.methods import log_normal
from rbpfx.methods.base import Phase
from rbpfx.methods.sbp import SBP, SBPGate


def fresh(size: int, foldable: bool = True, **settings: Any) -> SBPGate:
    return SBPGate(size, foldable, **{**asdict(SBP()), **settings})


def gate_at(mu: list[float], log_sigma: list[float], **options: float) -> SBPGate:
    gate = fresh(len(mu), **options)
    with torch.no_grad():
        gate.mu.copy_(torch.tensor(mu))
        gate.log_sigma.copy_(torch.tensor(log_sigma))
    return gate


def test_it_starts_as_published() -> None:
    gate = fresh(3)
    assert gate.mu.tolist() == [0, 0, 0]
    assert gate.log_sigma.tolist() == [-5, -5, -5]
    assert gate.needed().all()
    assert SBP().strength == 1.0


def test_penalty_is_the_divergence_per_example() -> None:
    gate = gate_at([-1.0, 0.0], [0.0, 2.0])
    expected = 0.5 * log_normal.kl_to_log_uniform(gate.mu, gate.log_sigma) / 1000
    assert torch.allclose(gate.penalty(0.5, 1000), expected)
    assert torch.allclose(gate.penalty(1.0, 1), gate.pressure())


def test_a_unit_without_signal_goes_and_one_with_a_signal_stays() -> None:
    gate = fresh(2)
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        lost = (gate(torch.empty(16, 1))[:, 1] - 1).square().mean()
        (100 * lost + gate.penalty(1.0, 1).sum()).backward()
        optimizer.step()
        gate.update()
    assert gate.needed().tolist() == [False, True]


def test_the_rule_is_the_signal_to_noise_ratio() -> None:
    gate = gate_at([0.0, 0.0, 0.0], [-5.0, 0.0, 4.0])
    with torch.no_grad():
        draws = gate.sample(100_000)
    snr = draws.mean(0) / draws.std(0)
    assert torch.allclose(gate.score().exp(), snr, rtol=0.02)
    assert gate.needed().tolist() == [True, True, False]
    assert gate_at([0.0] * 3, [-5.0, 0.0, 4.0], threshold=3.0).needed().tolist() == [
        True,
        False,
        False,
    ]


def test_openness_of_sharpness_two_is_the_share_of_the_signal_and_sharpens() -> None:
    gate = gate_at([0.0, -3.0, 0.0], [-1.0, 0.5, 4.0])
    with torch.no_grad():
        draws = gate.sample(400_000).double()
        share = draws.mean(0).square() / draws.square().mean(0)
        assert torch.allclose(gate.openness(2.0).double(), share, rtol=0.03)
        hard = gate.openness(1000.0)
    assert torch.equal(hard > 0.5, gate.needed())
    assert ((hard < 1e-3) | (hard > 1 - 1e-3)).all()


@pytest.mark.parametrize("mu", [-25.0, -20.0, 0.0, 3.0])
@pytest.mark.parametrize("log_sigma", [-30.0, -20.0, 5.0, 9.0])
def test_outside_the_range_everything_is_that_of_its_edge(mu: float, log_sigma: float) -> None:
    gate = gate_at([mu], [log_sigma])
    edge = gate_at([min(max(mu, -20.0), 0.0)], [min(max(log_sigma, -20.0), 5.0)])
    assert torch.equal(gate.pressure(), edge.pressure())
    assert torch.equal(gate.score(), edge.score())
    total = gate.pressure() + gate.openness(1.0) + gate.sample(5).sum() + gate.mean()
    total.sum().backward()
    assert torch.isfinite(gate.mu.grad).all()
    assert torch.isfinite(gate.log_sigma.grad).all()
    gate.update()
    assert gate.mu.item() == edge.mu.item()
    assert gate.log_sigma.item() == edge.log_sigma.item()


def test_update_leaves_other_phases_alone() -> None:
    gate = gate_at([1.0], [9.0])
    for phase in (Phase.WAITING, Phase.HARDENED):
        gate.phase = phase
        gate.update()
        assert (gate.mu.item(), gate.log_sigma.item()) == (1.0, 9.0)


def test_a_gate_at_the_edge_of_the_range_has_a_gradient() -> None:
    gate = gate_at([5.0, -30.0], [-3.0, 9.0])
    gate.update()
    (gate.mean() + gate.pressure()).sum().backward()
    assert (gate.mu.grad != 0).all()
    assert (gate.log_sigma.grad != 0).all()


def test_harden_and_remove() -> None:
    gate = gate_at([-1.0, -1.0, -1.0], [-2.0, -2.0, -2.0])
    gate.remove(torch.tensor([False, True, False]))
    assert (gate(torch.empty(4, 1)) == 0).tolist() == [[False, True, False]] * 4
    gate.harden(torch.tensor([True, True, False]))
    assert (gate.constants != 0).tolist() == [True, False, False]
    assert gate.constants[0] == gate.mean()[0]
    rigid = fresh(2, foldable=False)
    rigid.harden(torch.tensor([True, False]))
    assert rigid(None).tolist() == [[1.0, 0.0]]
