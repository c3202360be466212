"""The page on writing a method: its code runs, and both methods on it are what they claim to be."""

from __future__ import annotations

import re
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rbpfx
from rbpfx import FineTune, PruningResult, Recursion, Target, TargetError
from tests.toy import ShortcutNet, stripes, trained

BATCHES = stripes()
PAGE = Path(__file__).parents[1] / "docs" / "writing-a-method.md"
METHODS = ["GeometricMedian", "HardConcrete"]


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    torch.manual_seed(0)
    return trained(ShortcutNet(), BATCHES).eval()


@pytest.fixture(scope="module")
def page(dense: nn.Module) -> dict[str, Any]:
    """The names that the page defines, given the model and the loader that it assumes."""
    names: dict[str, Any] = {"__name__": "page", "model": dense, "loader": BATCHES}
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        # Not inherited: this file's `annotations` import would change how dataclasses are read.
        exec(compile(code, str(PAGE), "exec", dont_inherit=True), names)
    return names


def prune(model: nn.Module, method: rbpfx.Method, **options: Any) -> PruningResult:
    settings = {"recovery": FineTune(epochs=0), "progress": False, **options}
    return rbpfx.prune(model, BATCHES, method=method, **settings)


@pytest.mark.parametrize("recursion", [None, Recursion(epochs=2), Recursion(epochs=2, window=1)])
@pytest.mark.parametrize("target", [Target(macs=0.5), Target(params=0.4)])
@pytest.mark.parametrize("name", METHODS)
def test_a_target_is_met_exactly(
    page: dict[str, Any],
    dense: nn.Module,
    name: str,
    target: Target,
    recursion: Recursion | None,
) -> None:
    report = prune(dense, page[name](), target=target, recursion=recursion).report
    assert report.method == page[name].name
    cost, whole = (
        (report.pruned.macs, report.dense.macs)
        if target.macs
        else (report.pruned.parameters, report.dense.parameters)
    )
    asked = target.share(whole)
    assert asked - 0.1 < cost / whole <= asked
    assert report.target is not None
    assert report.target.reached == pytest.approx(cost / whole)
    assert report.verification_error < 1e-9


def test_the_results_on_the_page(page: dict[str, Any]) -> None:
    for name in ("ranked", "halved", "automatic"):
        report = page[name].report
        assert report.verification_error < 1e-9
        assert page[name].model(BATCHES[0][0]).isfinite().all()
    assert page["automatic"].report.target is None
    for name in ("ranked", "halved"):
        report = page[name].report
        assert 0.4 < report.pruned.macs / report.dense.macs <= 0.5


def test_the_ranking_needs_a_target(page: dict[str, Any], dense: nn.Module) -> None:
    with pytest.raises(TargetError, match="'geometric-median' ranks units"):
        prune(dense, page["GeometricMedian"]())


def test_without_a_target_the_strength_decides(page: dict[str, Any], dense: nn.Module) -> None:
    widths = []
    for strength in (1e-3, 16.0):
        recursion = Recursion(epochs=8, strength=strength, noise_lr=0.2, weight_lr=0.001)
        report = prune(dense, page["HardConcrete"](), recursion=recursion).report
        assert report.verification_error < 1e-9
        widths.append(sum(kept for _, kept in report.widths.values()))
    assert widths[1] < widths[0] <= 16


def test_the_sum_of_distances(page: dict[str, Any], dense: nn.Module) -> None:
    """The order is that of a direct computation; two layers produce the units of a shortcut."""
    gm = rbpfx.trace(dense, BATCHES[0][0])
    analysis = rbpfx.analyze(gm)
    noisy = rbpfx.insert_noise(gm, analysis, page["GeometricMedian"]())
    gates = {gate.group: gate for gate in rbpfx.noise_gates(noisy)}
    layers = {"stem": [dense.stem, dense.conv2], "conv1": [dense.conv1]}
    assert gates.keys() == layers.keys()
    for name, convolutions in layers.items():
        filters = [torch.cat([c.weight[i].flatten() for c in convolutions]) for i in range(8)]
        sums = torch.stack([sum((a - b).norm() for b in filters) for a in filters])
        assert torch.equal(gates[name].score().argsort(), sums.argsort())


class TestHardConcrete:
    @pytest.mark.parametrize("rate", [0.05, 0.5, 0.9, 0.97])
    def test_draws_have_the_distribution_of_the_paper(
        self, page: dict[str, Any], rate: float
    ) -> None:
        gate = page["HardConcreteGate"](1, True, rate)
        draws = gate.sample(100_000).detach().double()
        assert draws.min() >= 0
        assert draws.max() <= 1
        log_alpha = log((1 - rate) / rate)
        # P(stretched < x) = sigmoid(beta logit((x - gamma) / (zeta - gamma)) - log alpha)
        for x, share in [(0.0, (draws <= 0)), (0.5, draws <= 0.5), (1.0, draws < 1)]:
            s = torch.tensor((x + 0.1) / 1.2)
            wanted = torch.sigmoid(torch.logit(s) * 2 / 3 - log_alpha)
            assert float(share.double().mean()) == pytest.approx(float(wanted), abs=0.01)

    @pytest.mark.parametrize("rate", [0.05, 0.5, 0.97])
    def test_openness_is_the_chance_of_a_gate_that_is_not_0(
        self, page: dict[str, Any], rate: float
    ) -> None:
        gate = page["HardConcreteGate"](3, True, rate)
        share = (gate.sample(100_000) > 0).double().mean(0)
        assert torch.allclose(gate.openness(1.0).detach().double(), share, atol=0.01)
        assert torch.equal(gate.penalty(0.1, 7), 0.1 * gate.openness(1.0))

    def test_a_unit_is_needed_unless_its_mean_is_0(self, page: dict[str, Any]) -> None:
        gate = page["HardConcreteGate"](3, True, 0.05)
        gate.log_alpha.data = torch.tensor([-log(11) - 0.1, -log(11) + 0.1, 3.0])
        assert gate.needed().tolist() == [False, True, True]
        assert gate.mean()[[0, 2]].tolist() == [0.0, 1.0]
