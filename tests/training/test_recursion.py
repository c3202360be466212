"""The recursion: when groups become noisy and are hardened, and what strength and budget do."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rbpfx import (
    RBP,
    Analysis,
    DivergenceError,
    InputError,
    Progress,
    PruningPlan,
    RbpfxError,
    Recursion,
    Selection,
    Target,
    analyze,
    insert_noise,
    trace,
)
from rbpfx.methods import Phase
from rbpfx.methods.rbp import RBPGate
from rbpfx.training.recursion import RecursiveTraining
from rbpfx.training.schedule import Schedule
from rbpfx.training.task import TEN_CLASSES, LossScale, Task
from tests.toy import ShortcutNet, stripes, trained

BATCHES = stripes()


class FourGroups(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.fc1, self.fc2, self.fc3 = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x)).amax((2, 3))
        return self.head(F.relu(self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))))


class Tied(nn.Module):
    """A weight that is read along both axes, so that no multiplier can be folded into it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(36, 6), nn.Linear(6, 3)
        self.weight = nn.Parameter(torch.randn(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(self.stem(x.flatten(1)).relu(), self.weight).relu()
        return self.head(F.linear(hidden, self.weight.t()))


def recursive(
    model: nn.Module, budget: float | None = None, task: Task | None = None, **settings: object
) -> RecursiveTraining:
    gm = trace(model, BATCHES[0][0])
    analysis = analyze(gm)
    method = RBP()
    noisy = insert_noise(gm, analysis, method)
    selection = Selection(analysis, None if budget is None else Target(macs=budget))
    return RecursiveTraining(noisy, selection, method, task or Task(), Recursion(**settings))


@pytest.mark.parametrize("budget", [None, 0.5])
@pytest.mark.parametrize("learnt", [0.1, 1.0, 2.0])
def test_what_the_prior_is_told(
    budget: float | None, learnt: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A unit's share of the price, at most of what was learnt; enough examples for every unit."""
    told: list[tuple[float, int]] = []
    penalty = RBPGate.penalty

    def note(gate: RBPGate, strength: float, examples: int) -> Tensor:
        told.append((strength, examples))
        return penalty(gate, strength, examples)

    monkeypatch.setattr(RBPGate, "penalty", note)
    task = Task()
    task.scale = LossScale(learnt=learnt * TEN_CLASSES)
    training = recursive(FourGroups(), budget, task, epochs=1, strength=3.0)
    training.run(BATCHES)
    units = sum(gate.size for gate in training.gates)
    price = 3.0 * min(learnt, 1) / units if budget is None else 0.0
    assert sum(len(y) for _, y in BATCHES) < 20 * units
    assert [strength for strength, _ in told] == pytest.approx([price] * len(told))
    assert {examples for _, examples in told} == {20 * units}


def phases_per_step(training: RecursiveTraining) -> list[list[Phase]]:
    """Train, and return the phase of every gate in every forward pass of the training."""
    seen: list[list[Phase]] = []

    def note(*_: object) -> None:
        if training.noisy.training:
            seen.append([gate.phase for gate in training.gates])

    handle = training.noisy.register_forward_pre_hook(note)
    training.run(BATCHES)
    handle.remove()
    return seen


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    torch.manual_seed(0)
    return trained(ShortcutNet(), BATCHES).eval()


class TestOrder:
    def test_the_strict_recursion_has_one_noisy_group(self) -> None:
        training = recursive(FourGroups(), window=1, epochs=2)
        seen = phases_per_step(training)
        assert len(seen) == 12
        for step, phases in enumerate(seen):
            front = step // 3
            assert phases == [
                *[Phase.HARDENED] * front,
                Phase.NOISY,
                *[Phase.WAITING] * (3 - front),
            ]

    def test_waiting_groups_multiply_by_one(self) -> None:
        training = recursive(FourGroups(), window=1)
        outputs: dict[str, list[Tensor]] = {}
        for gate in training.gates:
            gate.register_forward_hook(lambda g, _, y: outputs.setdefault(g.group, []).append(y))
        with pytest.raises(StopIteration):
            training.run(BATCHES, stop_at_once)
        assert outputs["conv"][0].shape == (16, 6)
        assert outputs["conv"][0].std() > 0
        for name in ("fc1", "fc2", "fc3"):
            assert (outputs[name][0] == 1).all()

    @pytest.mark.parametrize("window", [1, 2, 3, None])
    @pytest.mark.parametrize("budget", [None, 0.5])
    def test_groups_are_hardened_in_order(self, window: int | None, budget: float | None) -> None:
        training = recursive(FourGroups(), budget, window=window, epochs=2)
        for phases in phases_per_step(training):
            front = phases.count(Phase.HARDENED)
            noisy = phases.count(Phase.NOISY)
            assert phases == sorted(phases, key=[Phase.HARDENED, Phase.NOISY, Phase.WAITING].index)
            assert noisy == min(4 - front, window or 4)
        assert [gate.phase for gate in training.gates] == [Phase.HARDENED] * 4
        assert [entry["group"] for entry in training.history] == ["conv", "fc1", "fc2", "fc3"]
        steps = [entry["step"] for entry in training.history]
        assert steps == sorted(steps)
        assert steps[-1] <= 12

    def test_as_many_steps_as_groups_at_least(self) -> None:
        training = recursive(FourGroups(), window=1, epochs=0.1)
        assert len(phases_per_step(training)) == 4

    def test_progress(self) -> None:
        reports: list[Progress] = []
        training = recursive(FourGroups(), 0.5, epochs=2)
        training.run(BATCHES, reports.append)
        assert [r.step for r in reports] == list(range(1, 13))
        assert {r.steps for r in reports} == {12}
        assert reports[0].open_gates >= 26
        assert reports[-1].open_gates < reports[0].open_gates
        assert all(isinstance(r.loss, float) and math.isfinite(r.bound) for r in reports)


def stop_at_once(_: Progress) -> None:
    raise StopIteration


class TestRecords:
    def test_scores_and_multipliers_of_all_units(self) -> None:
        training = recursive(FourGroups(), 0.4, epochs=2)
        training.run(BATCHES)
        sizes = {group.name: group.size for group in training.selection.analysis.groups}
        assert {name: score.shape for name, score in training.decisions.scores.items()} == {
            name: (size,) for name, size in sizes.items()
        }
        decisions = training.decisions
        for gate in training.gates:
            score, mean = decisions.scores[gate.group], decisions.multipliers[gate.group]
            assert torch.allclose(mean.double(), torch.from_numpy(score))
            needed = decisions.needed[gate.group]
            assert needed.any()
            assert torch.equal(gate.constants, torch.where(torch.from_numpy(needed), mean, 0))

    def test_a_group_that_cannot_be_folded_stays_at_one(self) -> None:
        training = recursive(Tied(), epochs=1)
        assert not all(g.foldable for g in training.selection.analysis.groups)
        training.run(BATCHES)
        for gate in training.gates:
            ones = (training.decisions.multipliers[gate.group] == 1).all()
            assert ones == (not training.selection.analysis.group(gate.group).foldable)

    def test_the_plan_follows_the_scores(self) -> None:
        training = recursive(FourGroups(), 0.4, epochs=2)
        training.run(BATCHES)
        plan = plan_of(training)
        for name, units in plan.kept.items():
            score = training.decisions.scores[name]
            removed = np.setdiff1d(np.arange(len(score)), units)
            assert score[list(units)].min() >= score[removed].max()


class TestStrength:
    def test_a_larger_strength_keeps_fewer(self, dense: nn.Module) -> None:
        kept = []
        for strength in (1e-5, 0.5, 16.0):
            torch.manual_seed(0)
            training = recursive(dense, strength=strength, noise_lr=0.2, epochs=5)
            training.run(BATCHES)
            kept.append(sum(int(needed.sum()) for needed in training.decisions.needed.values()))
        assert kept[0] > kept[1] > kept[2]
        assert kept[2] == 2  # the best unit of either group stays

    @pytest.mark.parametrize("width", [6, 96])
    def test_it_is_the_price_of_the_whole_network(self, width: int) -> None:
        """Closing every gate earns it, however many units share it."""
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, width), nn.ReLU(), nn.Linear(width, 3))
        training = recursive(model, strength=2.0)
        (gate,) = training.gates
        gate.phase = Phase.NOISY

        def pull(openness: float) -> float:
            nn.init.constant_(gate.gate_logit, math.log(openness / (1 - openness)))
            return training._penalty(examples=10_000).item()

        # The entropy of the noise is the same for a gate and its opposite.
        assert pull(0.9) - pull(0.1) == pytest.approx(2.0 * (0.9 - 0.1), rel=1e-4)

    def test_the_method_decides_without_a_budget(self, dense: nn.Module) -> None:
        training = recursive(dense, strength=5.0, noise_lr=0.2, epochs=5)
        training.run(BATCHES)
        plan = plan_of(training)
        for group in training.selection.analysis.groups:
            kept = plan.kept.get(group.name, tuple(range(group.size)))
            assert kept == tuple(np.flatnonzero(training.decisions.needed[group.name]))

    def test_cost_weighs_the_divergence(self, dense: nn.Module) -> None:
        aware = recursive(dense, cost_aware=True)
        blind = recursive(dense, cost_aware=False)
        sizes = [group.size for group in aware.selection.analysis.groups]
        costs = [group.macs_per_unit for group in aware.selection.analysis.groups]
        weights = [float(w) for w in aware.weights]
        assert weights[0] / weights[1] == pytest.approx(costs[0] / costs[1])
        assert np.dot(weights, sizes) == pytest.approx(sum(sizes))
        assert [float(w) for w in blind.weights] == pytest.approx([1, 1])

    def test_weights_learn_along_unless_their_rate_is_zero(self, dense: nn.Module) -> None:
        for rate, same in ((0.0, True), (0.01, False)):
            training = recursive(dense, weight_lr=rate, epochs=1)
            training.run(BATCHES)
            assert torch.equal(training.noisy.head.weight, dense.head.weight) == same


class TestBudget:
    def test_groups_that_wait_do_not_count_as_kept(self) -> None:
        """In a strict recursion the early groups must not pay for all that come later."""
        training = recursive(FourGroups(), 0.3, window=1, epochs=6)
        training.run(BATCHES)
        for name in ("conv", "fc1", "fc2"):
            rule = training.decisions.scores[name] > 0.5
            rule[training.decisions.scores[name].argmax()] = True
            assert (training.decisions.needed[name] == rule).all()

    def test_the_first_group_keeps_what_it_needs_while_the_others_wait(self) -> None:
        training = recursive(FourGroups(), 0.3, window=1)
        first, *later = training.gates
        for gate in later:
            gate.phase = Phase.WAITING
        with torch.no_grad():
            first.gate_logit.copy_(torch.tensor([2.0, 2.0, -2.0, 2.0, -2.0, 2.0]))
        training.decisions.harden(first, training.decisions.choice())
        assert training.decisions.needed["conv"].tolist() == [True, True, False, True, False, True]

    @pytest.mark.parametrize("window", [1, None])
    @pytest.mark.parametrize("budget", [0.25, 0.6])
    def test_the_plan_is_within_it(
        self, dense: nn.Module, budget: float, window: int | None
    ) -> None:
        training = recursive(dense, budget, window=window, epochs=2)
        training.run(BATCHES)
        assert share(training.selection.analysis, training) <= budget

    def test_the_expected_cost_follows_it_down(self, dense: nn.Module) -> None:
        training = recursive(dense, 0.4, epochs=5)
        costs: list[float] = []
        training.run(BATCHES, lambda progress: costs.append(progress.cost))
        schedule = Schedule.plan(2, 30, training.settings)
        noisy = [step for step in range(30) if step < schedule.start]
        assert all(costs[step] <= schedule.budget(step, 0.4) + 1e-6 for step in noisy)
        assert costs[0] > 0.9

    def test_expected_cost_of_untouched_gates_is_all_of_it(self, dense: nn.Module) -> None:
        training = recursive(dense, 0.25, window=1)
        for gate in training.gates:
            gate.harden(torch.ones(gate.size, dtype=torch.bool))
        assert training.decisions.expected_cost() == pytest.approx(1)
        for gate in training.gates:
            gate.harden(torch.arange(gate.size) < 4)
        macs = 36 * 9 * 4 + 2 * 36 * 9 * 16 + 16 * 3
        assert training.decisions.expected_cost() == pytest.approx(macs / 44160)


def plan_of(training: RecursiveTraining) -> PruningPlan:
    return training.selection.plan(training.decisions.scores, training.decisions.needed)


def share(analysis: Analysis, training: RecursiveTraining) -> float:
    return analysis.macs(analysis.keep(plan_of(training))) / analysis.dense_macs


class TestTeacherAndErrors:
    def test_a_teacher_takes_half_of_the_loss(self, dense: nn.Module) -> None:
        losses = []
        for teacher in (None, nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).eval()):
            torch.manual_seed(0)
            training = recursive(dense, epochs=1)
            training.teacher = teacher
            training.run(BATCHES, lambda progress: losses.append(progress.loss))
        assert losses[0] != losses[len(losses) // 2]

    def test_a_loss_without_gradient_is_noticed(self, dense: nn.Module) -> None:
        task = Task(lambda output, target: F.cross_entropy(output.detach(), target))
        with pytest.raises(InputError, match="does not depend on the network"):
            recursive(dense, task=task).run(BATCHES)

    def test_divergence_restores_weights_noise_and_phases(self, dense: nn.Module) -> None:
        calls = []

        def loss_fn(output: Tensor, target: Tensor) -> Tensor:
            calls.append(1)
            return F.cross_entropy(output, target) * (float("nan") if len(calls) > 8 else 1)

        training = recursive(dense, task=Task(loss_fn), window=1, epochs=2)
        with pytest.raises(DivergenceError, match=r"step 7, with group .conv1.*again") as caught:
            training.run(BATCHES)
        assert caught.value.model is training.noisy
        assert [gate.phase for gate in training.gates] == [Phase.HARDENED, Phase.WAITING]
        assert (training.gates[1].mean() > 0.94).all()
        assert all(torch.isfinite(v).all() for v in training.noisy.state_dict().values())

    @pytest.mark.parametrize(
        "wrong",
        [
            {"epochs": 0},
            {"strength": -1},
            {"noise_lr": float("nan")},
            {"patience": 0},
            {"weight_lr": -0.01},
            {"weight_decay": -1},
            {"tolerance": float("nan")},
            {"sharpness": (0, 8)},
            {"window": 0},
            {"front": 1},
            {"budget_ramp": 0},
        ],
    )
    def test_settings_are_checked(self, wrong: dict[str, float]) -> None:
        with pytest.raises(RbpfxError, match=next(iter(wrong))):
            Recursion(**wrong)


def test_training_ends_early_without_a_budget(dense: nn.Module) -> None:
    training = recursive(dense, epochs=20, patience=0.5, tolerance=10, noise_lr=0.01)
    training.run(BATCHES)
    # Three readings of half an epoch each, then the front passes as it would have.
    assert training.history[-1]["step"] == 9 + 36
