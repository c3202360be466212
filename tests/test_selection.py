"""From scores to a plan: budgets of every kind, bounds, rounding, and no empty axis."""

import re
from fnmatch import fnmatchcase

import numpy as np
import pytest
import torch
import torchvision.models
from torch import nn

from rbpfx import (
    Analysis,
    NothingToPruneError,
    PruningPlan,
    RbpfxError,
    Selection,
    Target,
    TargetError,
    analyze,
    count_macs,
    count_parameters,
    rewrite,
    trace,
)


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    gm = trace(torchvision.models.resnet18(), torch.zeros(2, 3, 32, 32))
    return gm, analyze(gm)


def test_channels_that_nothing_reads_stay():
    class Sliced(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.out = nn.Linear(10, 20), nn.Linear(12, 9)

        def forward(self, x):
            return self.out(self.hidden(x).relu()[:, :12])[:, :4]

    gm = trace(Sliced(), torch.zeros(2, 10))
    analysis = analyze(gm)
    unread = [group for group in analysis.groups if not group.reads]
    assert {group.size for group in unread} == {8, 5}
    selection = Selection(analysis, Target(macs=0.6))
    assert [group.size for group in selection.groups] == [12]
    plan = selection.plan(random_scores(selection))
    pruned = rewrite(gm, analysis, plan)
    assert count_macs(pruned) <= 0.6 * count_macs(gm)
    with pytest.raises(NothingToPruneError, match="channels are read"):
        Selection(analysis, Target(exclude=[selection.groups[0].name]))


def random_scores(selection: Selection, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {g.name: rng.random(g.size) for g in selection.groups}


def costs(gm: nn.Module) -> dict[str, float]:
    return {"macs": count_macs(gm), "params": count_parameters(gm)}


def width(plan: PruningPlan, analysis: Analysis, name: str) -> int:
    return len(plan.kept.get(name, range(analysis.group(name).size)))


class TestBudgets:
    @pytest.mark.parametrize("cost", ["macs", "params"])
    @pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.8])
    @pytest.mark.parametrize("network", ["captured", "resnet"])
    def test_within_one_percent_and_not_more(
        self, request: pytest.FixtureRequest, network: str, cost: str, share: float
    ) -> None:
        gm, analysis = request.getfixturevalue(network)
        selection = Selection(analysis, Target(**{cost: share}))
        plan = selection.plan(random_scores(selection))
        emitted = costs(rewrite(gm, analysis, plan))[cost] / costs(gm)[cost]
        assert 0.99 * share < emitted <= share
        reached = selection.reached(plan)
        assert reached.asked == share
        assert reached.reached == pytest.approx(emitted, rel=1e-5)
        assert "too coarse" not in str(reached)

    @pytest.mark.parametrize("cost", ["macs", "params"])
    def test_an_absolute_number_is_that_share(self, resnet, cost: str) -> None:
        gm, analysis = resnet
        number = 0.4 * costs(gm)[cost]
        assert Selection(analysis, Target(**{cost: number})).budget == pytest.approx(0.4)

    @pytest.mark.parametrize("seed", range(5))
    def test_the_expected_cost_of_a_decided_network_is_its_cost(self, resnet, seed: int) -> None:
        gm, analysis = resnet
        rng = np.random.default_rng(seed)
        kept = {g.name: rng.random(g.size) < 0.6 for g in analysis.groups}
        plan = PruningPlan({name: np.flatnonzero(units) for name, units in kept.items()})
        emitted = costs(rewrite(gm, analysis, plan))
        for cost, dense in costs(gm).items():
            selection = Selection(analysis, Target(**{cost: 0.9}))
            expected = selection.expected({n: units.astype(float) for n, units in kept.items()})
            assert expected * dense == pytest.approx(emitted[cost], rel=1e-6)

    def test_higher_scores_stay(self, resnet) -> None:
        """One threshold, but for the last units that fill the budget: those of each group."""
        _, analysis = resnet
        selection = Selection(analysis, Target(macs=0.4))
        scores = random_scores(selection)
        plan = selection.plan(scores)
        for name, units in plan.kept.items():
            removed = np.setdiff1d(np.arange(len(scores[name])), units)
            assert scores[name][list(units)].min() > scores[name][removed].max()
        lowest_kept = max(scores[name][list(units)].min() for name, units in plan.kept.items())
        highest_gone = max(
            np.delete(scores[name], list(units)).max() for name, units in plan.kept.items()
        )
        assert highest_gone - lowest_kept < 0.05

    def test_the_best_of_every_group_stays(self, captured) -> None:
        _, analysis = captured
        selection = Selection(analysis, Target(macs=0.003))
        plan = selection.plan({g.name: np.arange(g.size, dtype=float) for g in analysis.groups})
        assert all(g.size - 1 in plan.kept[g.name] for g in analysis.groups)

    def test_without_budget_the_rule_of_the_method_decides(self, captured) -> None:
        _, analysis = captured
        selection = Selection(analysis)
        scores = random_scores(selection)
        needed = {name: score > 0.7 for name, score in scores.items()}
        plan = selection.plan(scores, needed)
        assert all(
            plan.kept[name] == tuple(np.flatnonzero(units)) for name, units in needed.items()
        )
        assert selection.reached(plan) is None

    def test_an_unreachable_target_says_what_is_reachable(self, captured) -> None:
        _, analysis = captured
        with pytest.raises(TargetError, match=r"least width of every group .* still keeps"):
            Selection(analysis, Target(macs=1e-6))

    def test_coarse_widths_are_owned_up_to(self, captured) -> None:
        _, analysis = captured
        bounds = {g.name: (None, 0.25) for g in analysis.groups}
        selection = Selection(analysis, Target(macs=0.9, widths=bounds))
        reached = selection.reached(selection.plan(random_scores(selection)))
        assert reached.reached < 0.3
        assert "too coarse, or bound" in str(reached)

    def test_expected_macs_equal_the_emitted_ones(self, captured) -> None:
        gm, analysis = captured
        plan = PruningPlan({"0": range(10), "2": range(7), "5": [1, 2]})
        assert analysis.macs(analysis.keep(plan)) / 2 == count_macs(rewrite(gm, analysis, plan))


def test_units_of_one_score_go_in_equal_shares(resnet) -> None:
    """As closed gates do; and without a step for every one of them."""
    _, analysis = resnet
    selection = Selection(analysis, Target(macs=0.3))
    looks = []
    count = selection._counted
    selection._counted = lambda plan: (looks.append(plan), count(plan))[1]
    plan = selection.plan({g.name: np.zeros(g.size) for g in selection.groups})
    shares = [len(plan.kept.get(g.name, range(g.size))) / g.size for g in analysis.groups]
    assert max(shares) - min(shares) < 0.05
    assert 0.297 < selection.reached(plan).reached <= 0.3
    assert len(looks) < 100


def test_a_latency_needs_a_meter(resnet) -> None:
    with pytest.raises(TargetError, match="need a network and example inputs"):
        Selection(resnet[1], Target(latency=0.5))


class TestWidths:
    @pytest.mark.parametrize("multiple", [4, 8, 16])
    def test_rounding(self, resnet, multiple: int) -> None:
        gm, analysis = resnet
        selection = Selection(analysis, Target(macs=0.4, round_to=multiple))
        plan = selection.plan(random_scores(selection))
        assert all(len(units) % multiple == 0 for units in plan.kept.values())
        emitted = count_macs(rewrite(gm, analysis, plan)) / count_macs(gm)
        assert 0.4 - 0.02 * multiple / 4 < emitted <= 0.4

    def test_rounding_counts_the_channels_of_heads(self) -> None:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        analysis = analyze(trace(layer, torch.randn(2, 5, 32)))
        selection = Selection(analysis, Target(macs=0.5, round_to=8))
        plan = selection.plan(random_scores(selection))
        heads = [g for g in analysis.groups if g.size == 4]
        assert heads and width(plan, analysis, heads[0].name) in (1, 2, 3, 4)
        hidden = next(g for g in analysis.groups if g.size == 64)
        assert width(plan, analysis, hidden.name) % 8 == 0

    def test_without_a_budget_rounding_keeps_more(self, captured) -> None:
        _, analysis = captured
        selection = Selection(analysis, Target(round_to=16))
        scores = random_scores(selection)
        needed = {name: score > 0.7 for name, score in scores.items()}
        plan = selection.plan(scores, needed)
        for name, units in needed.items():
            kept = plan.kept.get(name, range(len(units)))
            assert set(np.flatnonzero(units)) <= set(kept)
            assert len(kept) % 16 == 0 or len(kept) == len(units)
            assert len(kept) - units.sum() < 16

    def test_minimum_widths(self, captured) -> None:
        _, analysis = captured
        selection = Selection(analysis, Target(macs=0.05, min_width=6))
        plan = selection.plan(random_scores(selection))
        assert min(map(len, plan.kept.values())) == 6

    def test_bounds_by_pattern(self, resnet) -> None:
        _, analysis = resnet
        bounds = {"layer*": (0.5, None), "layer4.*": (8, 0.25)}
        selection = Selection(analysis, Target(macs=0.45, widths=bounds))
        plan = selection.plan(random_scores(selection))
        for group in analysis.groups:
            kept = width(plan, analysis, group.name)
            if any(fnmatchcase(n, "layer4.*") for n in (group.name, *group.producers)):
                assert 8 <= kept <= group.size / 4
            elif group.name.startswith("layer"):
                assert kept >= group.size / 2

    def test_exclude_and_include(self, resnet) -> None:
        _, analysis = resnet
        excluded = Selection(analysis, Target(macs=0.6, exclude=["layer1"]))
        assert all(not g.name.startswith("layer1") for g in excluded.groups)
        plan = excluded.plan(random_scores(excluded))
        assert not any(name.startswith("layer1") for name in plan.kept)
        included = Selection(analysis, Target(macs=0.9, include=["layer3.*.conv1"]))
        assert [g.name for g in included.groups] == ["layer3.0.conv1", "layer3.1.conv1"]

    @pytest.mark.parametrize("option", ["include", "exclude", "widths"])
    def test_a_pattern_that_matches_nothing_lists_the_layers(self, resnet, option: str) -> None:
        pattern = {"layr1": (1, None)} if option == "widths" else ["layr1"]
        with pytest.raises(TargetError, match=r"'layr1' .* matches no prunable layer.*conv1"):
            Selection(resnet[1], Target(macs=0.5, **{option: pattern}))

    def test_nothing_left(self, captured) -> None:
        with pytest.raises(NothingToPruneError, match="leave no group"):
            Selection(captured[1], Target(macs=0.5, exclude=["*"]))


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
        plan = Selection(analysis).plan(scores, {n: s > 2 for n, s in scores.items()})
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
        plan = Selection(analysis).plan(scores, needed)
        emitted = rewrite(analysis.gm, analysis, plan)
        assert all(p.numel() for p in emitted.parameters())
        assert analysis.close(plan) == plan

    def test_what_is_reachable_is_reached(self, analysis: Analysis) -> None:
        with pytest.raises(TargetError) as error:
            Selection(analysis, Target(macs=1e-6))
        least = float(re.search(r"still keeps ([0-9.]+)%", str(error.value))[1]) / 100
        rng = np.random.default_rng(0)
        scores = {g.name: rng.random(g.size) for g in analysis.groups}
        plan = Selection(analysis, Target(macs=least + 1e-3)).plan(scores)
        assert analysis.macs(analysis.keep(plan)) / analysis.dense_macs <= least + 1e-3


@pytest.mark.parametrize("target", [None, Target(macs=0.5), Target(params=0.5)])
def test_scores_that_are_no_numbers(captured, target: Target | None):
    analysis = captured[1]
    scores = {g.name: np.ones(g.size) for g in analysis.groups}
    Selection(analysis, target).plan(scores)
    scores["2"][[3, 5]] = np.nan
    words = r"2 of the 48 scores of group '2' are NaN.*exclude=\['2'\]"
    with pytest.raises(RbpfxError, match=words):
        Selection(analysis, target).plan(scores)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (Target(macs=50), r"50 % is written Target\(macs=0.5\)"),
        (Target(macs=0.01, round_to=64), "choose a larger target or less of round_to=64$"),
        (Target(params=0.01, min_width=99), "larger target or less of min_width=99$"),
        (Target(macs=1e-6), "choose a larger target$"),
    ],
)
def test_a_target_out_of_reach_says_what_helps(captured, target: Target, words: str):
    with pytest.raises(TargetError, match=words):
        Selection(captured[1], target)
