"""What holds for every method: it runs, alone or recursively, and what it emits is exact."""

import dataclasses

import pytest
import torch
from torch import nn

import rbpfx
from rbpfx import (
    METHODS,
    RBP,
    SBP,
    FineTune,
    MacKay,
    PruningResult,
    RbpfxError,
    Recursion,
    Target,
    TargetError,
)
from rbpfx.graph.verification import difference
from rbpfx.methods import Gate, Phase, find_method, insert_noise, noise_gates
from tests.toy import ShortcutNet, stripes, trained

BATCHES = stripes()
DECIDING = [name for name, method in METHODS.items() if method.decides]
MODES = {"recursive": 0.3, "joint": 0.0}


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    torch.manual_seed(0)
    return trained(ShortcutNet(), BATCHES).eval()


def prune(model: nn.Module, method: str, **options: object) -> PruningResult:
    settings = {"recovery": FineTune(epochs=0), "progress": False, **options}
    return rbpfx.prune(model, BATCHES, method=method, **settings)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", METHODS)
def test_a_target_is_met_exactly(dense: nn.Module, name: str, mode: str) -> None:
    recursion = Recursion(epochs=3, front=MODES[mode])
    result = prune(dense, name, target=Target(macs=0.5), recursion=recursion)
    report = result.report
    assert report.method == name
    assert 0.4 < report.pruned.macs / report.dense.macs <= 0.5
    assert report.verification_error < 1e-9
    assert len(report.history) == 2
    assert result.model(BATCHES[0][0]).isfinite().all()


def test_a_method_needs_a_name(dense: nn.Module) -> None:
    class Nameless(RBP):
        name = None  # type: ignore[assignment]

    with pytest.raises(RbpfxError, match="Nameless has no name"):
        prune(dense, Nameless())


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [
        (RBP, "initial_rate", 0.0),
        (RBP, "threshold", 1.1),
        (SBP, "threshold", 0.0),
        (SBP, "initial_log_sigma", 50),
        (SBP, "initial_log_sigma", -21.0),
        (MacKay, "initial_log_std", 7),
        (MacKay, "initial_log_std", -10.5),
    ],
)
def test_settings_are_checked(method: type, name: str, value: float) -> None:
    with pytest.raises(RbpfxError, match=name):
        method(**{name: value})


@pytest.mark.parametrize("name", DECIDING)
def test_without_a_target_the_method_decides(dense: nn.Module, name: str) -> None:
    report = prune(dense, name, recursion=Recursion(epochs=3)).report
    assert report.target is None
    assert report.verification_error < 1e-9


@pytest.mark.parametrize("name", ["sbp", "mackay", "bmrs-u"])
def test_a_strong_prior_removes_units(dense: nn.Module, name: str) -> None:
    recursion = Recursion(epochs=20, strength=30.0, noise_lr=0.3, weight_lr=0.001)
    widths = prune(dense, name, recursion=recursion).report.widths
    assert sum(kept for _, kept in widths.values()) < 16


@pytest.mark.parametrize("name", sorted(set(METHODS) - set(DECIDING)))
def test_the_others_ask_for_a_target(dense: nn.Module, name: str) -> None:
    for target in (None, Target(), Target(round_to=8)):
        with pytest.raises(TargetError, match=r"does not say how many go; give a target"):
            prune(dense, name, target=target)


def test_bounds_are_enough_for_a_ranking(dense: nn.Module) -> None:
    """The widths chosen layer by layer, as users of other tools do."""
    target = Target(widths={"stem": (None, 0.5), "conv1": (None, 3)})
    report = prune(dense, "magnitude", target=target).report
    assert report.widths == {"stem": (8, 4), "conv1": (8, 3)}


@pytest.mark.parametrize("name", [n for n, method in METHODS.items() if not method.trains])
def test_rankings_cut_at_once_unless_a_recursion_is_asked_for(dense: nn.Module, name: str) -> None:
    at_once = prune(dense, name, target=Target(macs=0.5))
    assert at_once.report.history == []
    weight = dense.stem.weight
    kept = list(at_once.plan.kept.get("stem", range(8)))
    assert torch.equal(at_once.model.stem.weight, weight[kept])


@pytest.mark.parametrize("name", METHODS)
class TestGates:
    @pytest.fixture
    def gates(self, dense: nn.Module, name: str) -> list[Gate]:
        torch.manual_seed(0)
        gm = rbpfx.trace(dense, BATCHES[0][0])
        return noise_gates(insert_noise(gm, rbpfx.analyze(gm), name))

    def test_shapes(self, gates: list[Gate], name: str) -> None:
        for gate in gates:
            assert gate.mean().shape == gate.score().shape == gate.needed().shape == (8,)
            assert gate.penalty(1.0, 100).shape == gate.pressure().shape == (8,)
            openness = gate.openness(2.0)
            assert ((openness >= 0) & (openness <= 1)).all()
            assert gate.train()(BATCHES[0][0]).shape in [(16, 8), (1, 8)]
            assert gate.eval()(BATCHES[0][0]).shape[1] == 8

    def test_all_units_start_open(self, gates: list[Gate], name: str) -> None:
        for gate in gates:
            assert gate.needed().all()
            assert (gate.openness(2.0) > 0.9).all()
            assert (gate.eval()(None).detach() > 0.9).all()

    def test_gradients_are_finite(self, gates: list[Gate], name: str) -> None:
        for gate in gates:
            total = gate.penalty(1.0, 100).sum() + gate.pressure().sum()
            total = total + gate.train()(BATCHES[0][0]).sum()
            if total.requires_grad:
                total.backward()
            grads = [p.grad for p in gate.parameters()]
            assert all(g is not None and g.isfinite().all() for g in grads)

    def test_removed_units_stay_away(self, gates: list[Gate], name: str) -> None:
        gone = torch.arange(8) < 3
        for gate in gates:
            gate.remove(gone)
            assert (gate.train()(BATCHES[0][0])[:, gone] == 0).all()
            assert (gate.eval()(None)[:, gone] == 0).all()
            gate.harden(torch.ones(8, dtype=torch.bool))
            assert gate.phase is Phase.HARDENED
            assert ((gate(None)[0] == 0) == gone).all()

    def test_masks_equal_slices_with_the_hardened_multipliers(
        self, dense: nn.Module, name: str
    ) -> None:
        """Noise that has hardened is the network that `rewrite` emits with its multipliers."""
        torch.manual_seed(0)
        gm = rbpfx.trace(dense, BATCHES[0][0])
        analysis = rbpfx.analyze(gm)
        noisy = insert_noise(gm, analysis, name)
        keep = torch.arange(8) % 2 == 0
        multipliers = {}
        for gate in noise_gates(noisy):
            multipliers[gate.group] = gate.kept_multiplier().detach()
            gate.harden(keep)
        plan = rbpfx.PruningPlan({g.name: range(0, 8, 2) for g in analysis.groups})
        pruned = rbpfx.rewrite(gm, analysis, plan, multipliers=multipliers)
        x = torch.randn(4, 1, 6, 6)
        assert difference(noisy.eval()(x), pruned.eval()(x)) < 1e-5


class TestDecisionsAtEpochs:
    def test_what_is_redundant_goes_for_good(self, dense: nn.Module) -> None:
        torch.manual_seed(0)
        removed: list[set[int]] = []

        class Forgetful(rbpfx.SBP):
            name = "forgetful"

            def gate(self, group):
                gate = super().gate(group)
                calls = iter([3, 6])
                needed = gate.needed

                def rule():
                    # Unit 3 is redundant after one epoch, unit 6 after two, and never again.
                    units = needed()
                    index = next(calls, None)
                    if index is not None:
                        units[index] = False
                    removed.append({int(i) for i in (~gate.alive).nonzero()})
                    return units

                gate.needed = rule
                return gate

        recursion = Recursion(epochs=4, front=0, decisions="epoch", patience=100)
        result = prune(dense, Forgetful(), recursion=recursion)
        assert removed[0] == removed[1] == set()
        assert removed[-1] >= {3, 6}
        for units in result.plan.kept.values():
            assert not {3, 6} & set(units)

    def test_bmrs_decides_at_epochs(self) -> None:
        for name in ("bmrs-n", "bmrs-u"):
            assert find_method(name).recursion().decisions == "epoch"
        assert find_method("rbp").recursion().decisions == "once"

    def test_an_unknown_time(self) -> None:
        with pytest.raises(RbpfxError, match="it is one of"):
            Recursion(decisions="often")


def test_an_unknown_method_lists_the_known_ones(dense: nn.Module) -> None:
    with pytest.raises(RbpfxError, match=r"no method is called 'rpb'; there are: rbp, sbp"):
        prune(dense, "rpb")


def test_methods_are_values() -> None:
    for method in METHODS.values():
        assert dataclasses.is_dataclass(method)
        assert method() == method()
