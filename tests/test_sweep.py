"""A sweep emits networks for other targets from one noise training."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import rbpfx
from rbpfx import (
    FineTune,
    Front,
    InputError,
    PruningResult,
    RbpfxError,
    Recursion,
    Target,
    TargetError,
    apply_mask,
    rewrite,
)
from rbpfx.training.recursion import RecursiveTraining
from tests.toy import ShortcutNet, stripes, trained

pytestmark = pytest.mark.filterwarnings("error")

BATCHES = stripes()
ORIGINAL = Target(macs=0.5)
CUT = FineTune(epochs=0)
SHARES = [0.15, 0.3, 0.5, 0.7, 1.0]


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    torch.manual_seed(0)
    return trained(ShortcutNet(), BATCHES).eval()


def prune(model: nn.Module, **options: Any) -> PruningResult:
    settings = {"recursion": Recursion(epochs=2), "recovery": CUT, "progress": False, **options}
    return rbpfx.prune(model, BATCHES, **settings)


@pytest.fixture(scope="module")
def result(dense: nn.Module) -> PruningResult:
    return prune(dense, target=ORIGINAL, val_loader=BATCHES, recovery=FineTune(epochs=1))


@pytest.fixture(scope="module")
def front(result: PruningResult) -> Front:
    return result.sweep(SHARES)


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever comes after the choice of targets fails."""

    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("work has begun")

    monkeypatch.setattr(RecursiveTraining, "run", work)
    monkeypatch.setattr(rbpfx.emission.Emission, "emit", work)


def state(result: PruningResult) -> dict[str, torch.Tensor]:
    return result.model.state_dict()


def same(first: PruningResult, second: PruningResult) -> bool:
    one, other = state(first), state(second)
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def kept(result: PruningResult, cost: str = "macs") -> float:
    """The share of a cost that is left, counted."""
    count = rbpfx.count_macs if cost == "macs" else rbpfx.count_parameters
    return count(result.model) / count(result.dense)


class TestTargets:
    def test_each_is_met(self, front: Front) -> None:
        assert len(front) == len(SHARES)
        for share, entry in zip(SHARES, front, strict=True):
            assert share - 0.1 < kept(entry) <= share
            reached = entry.report.target
            assert reached is not None
            assert (reached.cost, reached.asked) == ("macs", share)
            assert reached.reached == pytest.approx(kept(entry))

    def test_costs_grow_with_them(self, front: Front) -> None:
        macs = [entry.report.pruned.macs for entry in front]
        assert macs == sorted(set(macs))

    def test_in_the_order_given(self, result: PruningResult, front: Front) -> None:
        backwards = result.sweep(iter(SHARES[::-1]), CUT)
        assert [e.plan for e in backwards[::-1]] == [e.plan for e in front]

    def test_all_of_it_removes_nothing(self, front: Front) -> None:
        assert [n for _, n in front[-1].report.widths.values()] == [8, 8]

    def test_slicing_is_exact(self, front: Front) -> None:
        assert all(entry.report.verification_error < 1e-9 for entry in front)
        x = BATCHES[0][0].double()
        for entry in front:
            gm = copy.deepcopy(entry.dense).double().eval()
            masked = apply_mask(gm, entry.analysis, entry.plan)
            pruned = rewrite(gm, entry.analysis, entry.plan)
            assert torch.allclose(masked(x), pruned(x), rtol=1e-9, atol=1e-9)
            shapes = {n: p.shape for n, p in pruned.named_parameters()}
            assert shapes == {n: p.shape for n, p in entry.model.named_parameters()}

    def test_none_at_all(self, result: PruningResult) -> None:
        assert str(result.sweep([])).startswith("target")

    def test_targets_with_bounds_of_their_own(self, result: PruningResult) -> None:
        targets = [Target(params=0.4), Target(macs=0.5, round_to=4), Target(macs=0.4, min_width=3)]
        params, rounded, bounded = result.sweep(targets, CUT)
        assert kept(params, "params") <= 0.4
        assert {n % 4 for _, n in rounded.report.widths.values()} == {0}
        assert min(n for _, n in bounded.report.widths.values()) >= 3

    @pytest.mark.parametrize("cost", ["macs", "params"])
    def test_numbers_take_the_place_of_the_budget(self, dense: nn.Module, cost: str) -> None:
        original = Target(**{cost: 0.6}, round_to=2, widths={"conv1": (4, None)})
        result = prune(dense, target=original)
        swept, asked = result.sweep([0.4, replace(original, **{cost: 0.4})])
        assert swept.plan == asked.plan
        assert swept.report.target is not None
        assert swept.report.target.cost == cost
        assert kept(swept, cost) <= 0.4
        assert all(n % 2 == 0 for _, n in swept.report.widths.values())
        assert swept.report.widths["conv1"][1] >= 4

    def test_an_absolute_number(self, result: PruningResult) -> None:
        (entry,) = result.sweep([4000], CUT)
        assert entry.report.pruned.macs <= 4000
        assert entry.report.target is not None
        assert entry.report.target.asked == 4000 / entry.report.dense.macs

    def test_without_an_original_one_they_are_macs(self, dense: nn.Module) -> None:
        result = prune(dense)
        assert result.report.target is None
        for share, entry in zip([0.3, 0.6], result.sweep([0.3, 0.6]), strict=True):
            assert share - 0.1 < kept(entry) <= share
            assert entry.report.verification_error < 1e-9

    @pytest.mark.parametrize("method", ["magnitude", "sbp"])
    def test_of_other_methods(self, dense: nn.Module, method: str) -> None:
        result = prune(dense, method=method, target=ORIGINAL)
        small, same_again = result.sweep([0.2, 0.5])
        assert 0.1 < kept(small) <= 0.2
        assert same_again.plan == result.plan
        assert same(same_again, result)


class TestTraining:
    def test_the_gates_are_not_trained_again(
        self, result: PruningResult, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def train(*_: Any, **__: Any) -> None:
            raise AssertionError("the noise is trained again")

        monkeypatch.setattr(RecursiveTraining, "run", train)
        monkeypatch.setattr(RecursiveTraining, "decide", train)
        (entry,) = result.sweep([0.3], CUT)
        assert entry.report.history == result.report.history
        assert entry.dense is result.dense

    def test_the_same_target_gives_the_same_network(
        self, result: PruningResult, front: Front
    ) -> None:
        """Bit for bit: each entry draws the random numbers that `prune` drew."""
        for entry in (front[SHARES.index(0.5)], *result.sweep([ORIGINAL, ORIGINAL])):
            assert entry.plan == result.plan
            assert same(entry, result)
            assert entry.model is not result.model

    def test_another_recovery(self, result: PruningResult) -> None:
        (longer,) = result.sweep([ORIGINAL], FineTune(epochs=2))
        assert longer.plan == result.plan
        assert not same(longer, result)

    def test_without_recovery_weights_are_slices(self, dense: nn.Module) -> None:
        """A ranking that cuts at once trains nothing, so that they are those of the original."""
        options = {"recursion": None, "recovery": FineTune(epochs=1)}
        ranked = prune(dense, method="magnitude", target=ORIGINAL, **options)
        (entry,) = ranked.sweep([0.3], CUT)
        rows = list(entry.plan.kept["stem"])
        inner = list(entry.plan.kept["conv1"])
        assert torch.equal(entry.model.stem.weight, dense.stem.weight[rows])
        assert torch.equal(entry.model.conv1.weight, dense.conv1.weight[inner][:, rows])
        assert torch.equal(entry.model.conv2.weight, dense.conv2.weight[rows][:, inner])
        rows = list(ranked.plan.kept["stem"])
        assert not torch.equal(ranked.model.stem.weight, dense.stem.weight[rows])

    def test_multipliers_are_folded_into_slices(self, result: PruningResult) -> None:
        (entry,) = result.sweep([0.3], CUT)
        emission = result.emission
        assert emission is not None
        folded = rewrite(
            result.dense, result.analysis, entry.plan, multipliers=emission.multipliers
        )
        for name, parameter in folded.named_parameters():
            assert torch.allclose(parameter, entry.model.get_parameter(name)), name

    def test_the_result_it_comes_from_is_left_alone(self, result: PruningResult) -> None:
        def states() -> list[torch.Tensor]:
            networks = (result.model, result.dense, result.emission.original)
            return [t.clone() for n in networks for t in n.state_dict().values()]

        before, report = states(), str(result.report)
        result.sweep([0.2, 0.5], FineTune(epochs=1))
        assert all(torch.equal(a, b) for a, b in zip(before, states(), strict=True))
        assert str(result.report) == report

    def test_an_entry_sweeps_too(self, front: Front) -> None:
        (entry,) = front[0].sweep([SHARES[2]])
        assert entry.plan == front[2].plan
        assert same(entry, front[2])

    def test_the_global_generator_is_not_disturbed(self, result: PruningResult) -> None:
        torch.manual_seed(7)
        wanted = torch.rand(3)
        torch.manual_seed(7)
        result.sweep([0.4], FineTune(epochs=1))
        assert torch.equal(torch.rand(3), wanted)


def test_a_converted_network_is_deployed_as_it_is(result: PruningResult) -> None:
    converted = replace(result, model=copy.deepcopy(result.model).bfloat16())
    x = BATCHES[0][0].bfloat16()
    assert converted.deploy()(x).dtype == torch.bfloat16


@pytest.mark.usefixtures("no_work")
class TestErrors:
    """They are raised before any network is emitted."""

    @pytest.mark.parametrize("value", [None, "half", True])
    def test_what_is_no_target(self, result: PruningResult, value: Any) -> None:
        with pytest.raises(TargetError, match="number"):
            result.sweep([value])

    @pytest.mark.parametrize(
        "unreachable", [1e-6, Target(params=1e-6), Target(macs=0.5, min_width=8)]
    )
    def test_a_target_that_cannot_be_reached(
        self, result: PruningResult, unreachable: float | Target
    ) -> None:
        with pytest.raises(TargetError, match="choose a larger target"):
            result.sweep([0.5, unreachable])

    def test_a_budget_that_makes_no_sense(self, result: PruningResult) -> None:
        with pytest.raises(TargetError, match="must be positive"):
            result.sweep([0.5, -0.1])

    def test_a_pattern_that_matches_nothing(self, result: PruningResult) -> None:
        with pytest.raises(TargetError, match="matches no prunable layer"):
            result.sweep([0.5, Target(macs=0.5, exclude=["conv7"])])


@pytest.fixture(scope="module")
def partial(dense: nn.Module) -> PruningResult:
    """Of a training that left one group out."""
    return prune(dense, target=Target(macs=0.7, exclude=["stem"]))


class TestExcludedGroups:
    def test_stay_excluded(self, partial: PruningResult) -> None:
        (entry,) = partial.sweep([0.6])
        assert entry.report.excluded == ("stem",)
        assert entry.report.widths["stem"] == (8, 8)
        assert kept(entry) <= 0.6

    @pytest.mark.usefixtures("no_work")
    def test_cannot_be_called_in(self, partial: PruningResult) -> None:
        with pytest.raises(InputError, match="the groups stem were excluded when the gates"):
            partial.sweep([0.6, Target(macs=0.5)])

    def test_others_can_be_excluded_too(self, front: Front) -> None:
        (entry,) = front[0].sweep([Target(macs=0.8, exclude=["conv1"])], CUT)
        assert entry.report.excluded == ("conv1",)
        assert entry.report.widths["conv1"] == (8, 8)
        assert kept(entry) <= 0.8


def test_the_table_has_the_figures(front: Front) -> None:
    lines = str(front).splitlines()
    headers = ["target", "MACs kept", "parameters kept", "time kept", "accuracy"]
    assert [word for word in headers if word in lines[0]] == headers
    assert len(lines) == len(SHARES) + 2
    for line, share, entry in zip(lines[2:], SHARES, front, strict=True):
        dense, pruned = entry.report.dense, entry.report.pruned
        assert line.startswith(f"{share:.1%} of the MACs")
        assert f"{pruned.macs / dense.macs:.1%}" in line
        assert f"{pruned.parameters / dense.parameters:.1%}" in line
        assert line.rstrip().endswith(f"{pruned.accuracy:.4g}")


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda result: pickle.loads(pickle.dumps(result))]
)
class TestCopies:
    def test_model_plan_and_report_survive(self, result: PruningResult, copied: Any) -> None:
        twin = copied(result)
        assert twin.model is not result.model
        assert same(twin, result)
        assert torch.equal(twin.model(BATCHES[0][0]), result.model(BATCHES[0][0]))
        assert twin.plan == result.plan
        assert twin.report == result.report
        assert str(twin.report) == str(result.report)

    def test_so_does_the_dense_network(self, result: PruningResult, copied: Any) -> None:
        """And it takes the plan, once it is analysed again."""
        twin = copied(result)
        gm = rbpfx.trace(twin.dense, BATCHES[0][0])
        again = rewrite(gm, rbpfx.analyze(gm), twin.plan)
        wanted = rewrite(result.dense, result.analysis, result.plan)
        x = BATCHES[0][0]
        assert torch.equal(again.eval()(x), wanted.eval()(x))

    def test_but_the_gates_are_gone(self, result: PruningResult, copied: Any) -> None:
        with pytest.raises(RbpfxError, match="sweep the result that prune returned"):
            copied(result).sweep([0.5])


HALVES = Target(widths={"*": (None, 0.5)})


class TestTargetsWithoutABudget:
    """They mean that the method decides, which it cannot do any more after a budget."""

    def test_after_a_budget(self, result: PruningResult, no_work: None) -> None:
        with pytest.raises(TargetError, match="needs a budget in every target"):
            result.sweep([Target(round_to=2)])

    def test_of_a_ranking(self, dense: nn.Module) -> None:
        ranked = prune(dense, method="magnitude", recursion=None, target=HALVES)
        with pytest.raises(TargetError, match="needs a budget in every target"):
            ranked.sweep([Target(min_width=3)])

    def test_of_a_method_that_decided(self, dense: nn.Module) -> None:
        decided = prune(dense)
        (rounded,) = decided.sweep(Target(round_to=4))
        assert all(kept % 4 == 0 for _, kept in rounded.report.widths.values())
        assert rounded.report.target is None


def test_one_target_alone(result: PruningResult) -> None:
    (only,) = result.sweep(0.4, CUT)
    assert only.report.target.asked == 0.4
