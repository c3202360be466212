"""The options of `prune`, end to end: how steps are carried out, and what a target bounds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import rbpfx
from rbpfx import (
    METHODS,
    Comparison,
    FineTune,
    InputError,
    Latency,
    NothingToPruneError,
    PlanMeter,
    PruningResult,
    Recursion,
    Target,
    Training,
    count_macs,
    count_parameters,
)
from rbpfx.methods import Gate
from rbpfx.plan import PruningPlan
from tests.latency.machine import StairTimes
from tests.toy import ShortcutNet, stripes, trained

pytestmark = pytest.mark.filterwarnings("error")

BATCHES = stripes()
HALF = Target(macs=0.5)
CUT = FineTune(epochs=0)


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    torch.manual_seed(0)
    return trained(ShortcutNet(), BATCHES).eval()


def prune(model: nn.Module, **options: Any) -> PruningResult:
    settings = {
        "recursion": Recursion(epochs=2),
        "recovery": FineTune(epochs=1),
        "target": HALF,
        "progress": False,
        **options,
    }
    return rbpfx.prune(model, BATCHES, **settings)


@pytest.fixture(scope="module")
def plain(dense: nn.Module) -> PruningResult:
    """The result without any option."""
    return prune(dense)


def state(result: PruningResult) -> dict[str, Tensor]:
    return result.model.state_dict()


def same(first: PruningResult, second: PruningResult) -> bool:
    one, other = state(first), state(second)
    return (
        first.plan == second.plan
        and one.keys() == other.keys()
        and all(torch.equal(one[n], other[n]) for n in one)
    )


def accuracy(model: nn.Module) -> float:
    with torch.no_grad():
        hits = [(model(x).argmax(1) == y).float().mean() for x, y in BATCHES]
    return float(torch.stack(hits).mean())


def is_noisy(model: nn.Module) -> bool:
    return any(isinstance(module, Gate) for module in model.modules())


def count_steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The optimiser classes, one entry per step."""
    steps: list[str] = []
    for kind in (torch.optim.SGD, torch.optim.Adam):
        original = kind.step

        def step(self: Any, *args: Any, _original: Any = original, **kwargs: Any) -> Any:
            steps.append(type(self).__name__)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(kind, "step", step)
    return steps


@contextmanager
def lenient() -> Iterator[None]:
    """The compiler looks at what it warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def reference_step(model: nn.Module, batch: Any, update: Callable[[Tensor], None]) -> None:
    images, labels = batch
    update(F.cross_entropy(model(images), labels))


class TestTraining:
    OPTIONS = {  # noqa: RUF012
        "bfloat16": Training(precision="bfloat16"),
        "accumulate": Training(accumulate=2),
        "clip_norm": Training(clip_norm=0.1),
        "channels_last": Training(channels_last=True),
        "train_step": Training(train_step=reference_step),
        "together": Training(
            precision="bfloat16", accumulate=2, clip_norm=1.0, train_step=reference_step
        ),
    }

    @pytest.mark.parametrize("name", OPTIONS)
    def test_the_result_is_exact_small_and_good(self, dense: nn.Module, name: str) -> None:
        result = prune(dense, training=self.OPTIONS[name], recovery=FineTune(epochs=2))
        report = result.report
        assert 0.4 < report.pruned.macs / report.dense.macs <= 0.5
        assert report.verification_error < 1e-9
        for parameter in result.model.parameters():
            assert parameter.dtype == torch.float32
            assert parameter.is_contiguous()
            assert parameter.isfinite().all()
        assert accuracy(result.model) > 0.9

    @pytest.mark.parametrize(
        "option", [Training(precision="bfloat16"), Training(accumulate=2), Training(clip_norm=1e-3)]
    )
    def test_it_reaches_both_phases(self, dense: nn.Module, option: Training) -> None:
        one_phase = prune(dense, training=option, recovery=CUT)
        reference = prune(dense, recovery=CUT)
        weights = [dict(r.dense.named_parameters()) for r in (one_phase, reference)]
        assert any(not torch.equal(weights[0][n], weights[1][n]) for n in weights[0])
        # A ranking that cuts at once has no phase but the fine-tuning.
        ranked = [
            prune(dense, method="magnitude", recursion=None, training=training)
            for training in (option, None)
        ]
        assert ranked[0].plan == ranked[1].plan
        assert not same(*ranked)

    def test_defaults_and_a_hook_that_does_the_same_change_nothing(
        self, dense: nn.Module, plain: PruningResult
    ) -> None:
        assert same(prune(dense, training=Training()), plain)
        assert same(prune(dense, training=self.OPTIONS["train_step"]), plain)
        assert same(prune(dense, training=Training(clip_norm=1e9)), plain)

    def test_the_hook_is_called_in_both_phases(self, dense: nn.Module) -> None:
        seen: list[bool] = []

        def train_step(model: nn.Module, batch: Any, update: Callable[[Tensor], None]) -> None:
            assert model.training
            seen.append(is_noisy(model))
            reference_step(model, batch, update)

        prune(dense, training=Training(train_step=train_step))
        assert seen == [True] * 12 + [False] * 6

    def test_accumulation_takes_fewer_steps(
        self, dense: nn.Module, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        steps = count_steps(monkeypatch)
        prune(dense)
        assert (steps.count("SGD"), steps.count("Adam")) == (12 + 6, 12)
        steps.clear()
        prune(dense, training=Training(accumulate=2))
        assert (steps.count("SGD"), steps.count("Adam")) == (6 + 3, 6)

    def test_forwards_are_in_the_precision_asked_for(self, dense: nn.Module) -> None:
        seen: set[tuple[bool, torch.dtype]] = set()

        def train_step(model: nn.Module, batch: Any, update: Callable[[Tensor], None]) -> None:
            scores = model(batch[0])
            seen.add((is_noisy(model), scores.dtype))
            update(F.cross_entropy(scores.float(), batch[1]))

        prune(dense, training=Training(precision="bfloat16", train_step=train_step))
        assert seen == {(True, torch.bfloat16), (False, torch.bfloat16)}

    def test_images_are_laid_out_as_asked_for(self) -> None:
        """Images of one channel are laid out both ways at once, so these have two."""
        torch.manual_seed(0)
        layers = [nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU()]
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 3))
        batches = [(images.repeat(1, 2, 1, 1), labels) for images, labels in BATCHES]
        seen: set[tuple[bool, bool]] = set()

        def train_step(model: nn.Module, batch: Any, update: Callable[[Tensor], None]) -> None:
            last = batch[0].is_contiguous(memory_format=torch.channels_last)
            seen.add((is_noisy(model), last))
            reference_step(model, batch, update)

        for asked in (True, False):
            seen.clear()
            options = {"recursion": Recursion(epochs=1), "recovery": FineTune(epochs=1)}
            training = Training(channels_last=asked, train_step=train_step)
            result = rbpfx.prune(
                model, batches, target=HALF, training=training, progress=False, **options
            )
            assert seen == {(True, asked), (False, asked)}
            assert result.report.verification_error < 1e-9
            assert all(p.is_contiguous() for p in result.model.parameters())

    def test_nothing_is_distilled_into_a_hook(self, dense: nn.Module) -> None:
        with pytest.raises(InputError, match="does not go with a train_step of your own"):
            prune(dense, distill=True, training=Training(train_step=reference_step))

    def test_a_hook_that_forgets_to_update(self, dense: nn.Module) -> None:
        with pytest.raises(InputError, match="without calling update"):
            prune(dense, training=Training(train_step=lambda model, batch, update: None))

    @pytest.mark.slow
    @pytest.mark.parametrize("precision", ["float32", "bfloat16"])
    def test_compiled(self, dense: nn.Module, precision: str) -> None:
        torch._dynamo.reset()
        with lenient():
            report = prune(dense, training=Training(compile=True, precision=precision)).report
        assert 0.4 < report.pruned.macs / report.dense.macs <= 0.5
        assert report.verification_error < 1e-9

    def test_compiled_without_code_generation(
        self, dense: nn.Module, plain: PruningResult, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        compile_, compiled = torch.compile, []

        def quick(model: nn.Module, **options: Any) -> Any:
            compiled.append(is_noisy(model))
            return compile_(model, backend="eager", **options)

        monkeypatch.setattr(torch, "compile", quick)
        torch._dynamo.reset()
        with lenient():
            result = prune(dense, training=Training(compile=True))
        assert compiled == [True, False]
        assert isinstance(result.model, fx.GraphModule)  # and no compiled wrapper of one
        assert result.plan == plain.plan
        for name, tensor in state(result).items():
            assert torch.allclose(tensor, state(plain)[name], atol=1e-3), name


class TestRecovery:
    def test_an_optimiser_and_a_scheduler_of_ones_own(self, dense: nn.Module) -> None:
        made: list[torch.optim.Optimizer] = []
        rates: list[float] = []

        def optimizer(weights: Any) -> torch.optim.Optimizer:
            made.append(torch.optim.AdamW(weights, 0.01))
            return made[-1]

        class Halving(torch.optim.lr_scheduler.LambdaLR):
            def step(self, *args: Any) -> None:
                super().step(*args)
                rates.append(self.get_last_lr()[0])

        def scheduler(optimizer: torch.optim.Optimizer, steps: int) -> Halving:
            assert (optimizer, steps) == (made[0], 6)
            return Halving(optimizer, lambda step: 0.5**step)

        result = prune(dense, recovery=FineTune(1, optimizer=optimizer, scheduler=scheduler))
        assert len(made) == 1
        trained = [id(p) for group in made[0].param_groups for p in group["params"]]
        assert trained == [id(p) for p in result.model.parameters()]
        assert rates == [0.01 * 0.5**step for step in range(7)]
        assert result.report.verification_error < 1e-9

    def test_a_warm_up(
        self, dense: nn.Module, plain: PruningResult, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rates: list[float] = []
        original = torch.optim.SGD.step

        def step(self: torch.optim.SGD, *args: Any) -> Any:
            rates.append(self.param_groups[0]["lr"])
            return original(self, *args)

        monkeypatch.setattr(torch.optim.SGD, "step", step)
        warm = prune(dense, recovery=FineTune(epochs=1, lr=0.02, warmup=0.5))
        rates = rates[12:]
        assert rates[:4] == pytest.approx([0.005, 0.01, 0.015, 0.02])
        assert rates[3:] == sorted(rates[3:], reverse=True)
        assert warm.plan == plain.plan
        assert not same(warm, plain)

    def test_distillation_needs_no_labels(self, dense: nn.Module) -> None:
        """It pulls the outputs towards those of the dense network."""
        distances = []
        for distill in (False, True):
            recovery = FineTune(epochs=5, lr=0.02)
            model = prune(dense, distill=distill, recovery=recovery).model
            with torch.no_grad():
                pairs = [(model(x).softmax(1), dense(x).softmax(1)) for x, _ in BATCHES]
            distances.append(sum(float((a - b).abs().sum()) for a, b in pairs))
        assert distances[1] < distances[0]


class Wide(nn.Sequential):
    """Convolutions whose time falls with their widths."""

    def __init__(self) -> None:
        widths = [1, 64, 64, 64]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 3))


class TestLatency:
    BATCHES = [(torch.rand(16, 1, 16, 16), torch.arange(16) % 3)]  # noqa: RUF012

    def prune(self, target: Target, **options: Any) -> PruningResult:
        torch.manual_seed(0)
        settings = {"recovery": CUT, "progress": False, "method": "magnitude", **options}
        return rbpfx.prune(Wide(), self.BATCHES, target=target, **settings)

    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """A machine on which a network takes a microsecond for every 1000 MACs of an example.

        It tells the batch sizes that it was asked about.
        """
        sizes: list[int] = []

        def measure(models: Any, inputs: Any, **_: Any) -> Any:
            batch = inputs if isinstance(inputs, Tensor) else inputs[0]
            sizes.append(len(batch))
            networks = models if isinstance(models, list) else [models]
            graphs = [
                m if isinstance(m, fx.GraphModule) else rbpfx.trace(m, batch) for m in networks
            ]
            seconds = [1e-9 * len(batch) * count_macs(g) for g in graphs]
            found = [Latency(s, 0.0, 3, times=(s,) * 3) for s in seconds]
            return found if isinstance(models, list) else found[0]

        def compare(baseline: nn.Module, model: nn.Module, inputs: Any, **_: Any) -> Comparison:
            return Comparison(*measure([baseline, model], inputs))

        monkeypatch.setattr(rbpfx.emission, "measure_latency", measure)
        monkeypatch.setattr(rbpfx.latency.meter, "measure_latency", measure)
        monkeypatch.setattr(rbpfx.latency.meter, "compare_latency", compare)
        monkeypatch.setattr(
            rbpfx.latency.meter, "OperatorTimes", lambda *_, **__: StairTimes(block=1)
        )
        return sizes

    @pytest.mark.parametrize(
        ("method", "recursion"), [("magnitude", None), ("rbp", Recursion(epochs=6))]
    )
    def test_it_is_met(self, clock: list[int], method: str, recursion: Recursion | None) -> None:
        result = self.prune(Target(latency=0.5), method=method, recursion=recursion)
        target = result.report.target
        assert target is not None
        share = count_macs(result.model) / count_macs(result.dense)
        assert (target.cost, target.asked) == ("latency", 0.5)
        assert target.reached == pytest.approx(share)
        assert 0.4 < share <= 0.5
        assert result.report.verification_error < 1e-9
        assert "target: 50.0% of the latency, reached" in str(result.report)
        assert set(clock[:-2]) == {16}

    def test_a_time(self, clock: list[int]) -> None:
        result = self.prune(Target(latency="100 ms"))
        seconds = 16e-9 * count_macs(result.model)
        assert 0.08 < seconds <= 0.1

    def test_for_another_batch_size(self, clock: list[int]) -> None:
        self.prune(Target(latency=0.5, batch_size=4))
        assert set(clock[:-2]) == {4}
        assert clock[-2:] == [1, 16]  # the figures of the report

    def test_on_this_machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The widths chosen are among those that were measured, and held when they were."""
        looks: list[tuple[list[int], float]] = []
        measure = PlanMeter.__call__

        def look(self: PlanMeter, plan: PruningPlan) -> float:
            share = measure(self, plan)
            looks.append(([len(units) for _, units in sorted(plan.kept.items())], share))
            return share

        monkeypatch.setattr(PlanMeter, "SECONDS", (0.05, 0.05))
        monkeypatch.setattr(PlanMeter, "__call__", look)
        result = self.prune(Target(latency=0.6))
        kept = [len(units) for _, units in sorted(result.plan.kept.items())]
        before = looks[:-1]  # the last one is for the report
        assert min(share for widths, share in before if widths == kept) <= 0.6
        assert max(kept) < 64
        assert result.report.target is not None
        assert result.report.target.reached == looks[-1][1]
        assert result.report.verification_error < 1e-9


class TestTargets:
    @pytest.mark.parametrize(
        ("target", "words"),
        [
            (Target(macs=0.5), "target: 50.0% of the MACs, reached"),
            (Target(params=0.4), "target: 40.0% of the parameters, reached"),
        ],
    )
    def test_the_report_has_a_line(self, dense: nn.Module, target: Target, words: str) -> None:
        report = prune(dense, target=target, recovery=CUT).report
        assert report.target is not None
        assert f"{words} {report.target.reached:.1%}" in str(report)

    def test_none_without_a_target(self, dense: nn.Module) -> None:
        report = prune(dense, target=None, recovery=CUT).report
        assert report.target is None
        assert "target:" not in str(report)

    @pytest.mark.parametrize("method", ["rbp", "magnitude"])
    @pytest.mark.parametrize("asked", [0.3, 700, 0.8])
    def test_parameters(self, dense: nn.Module, method: str, asked: float) -> None:
        result = prune(dense, target=Target(params=asked), method=method, recovery=CUT)
        whole, left = count_parameters(dense), count_parameters(result.model)
        budget = asked if asked > 1 else asked * whole
        assert budget - 0.1 * whole < left <= budget
        assert result.report.target is not None
        assert result.report.target.reached == left / whole
        assert result.report.verification_error < 1e-9

    @pytest.mark.parametrize("method", ["rbp", "magnitude", "taylor"])
    @pytest.mark.parametrize(
        ("choice", "whole"),
        [
            ({"exclude": ["stem"]}, "stem"),
            ({"include": ["conv1"]}, "stem"),
            ({"exclude": ["conv[1]"]}, "conv1"),
            ({"include": ["s*"]}, "conv1"),
        ],
    )
    def test_excluded_groups_stay_whole(
        self, dense: nn.Module, method: str, choice: dict[str, Any], whole: str
    ) -> None:
        result = prune(dense, target=Target(macs=0.7, **choice), method=method)
        report = result.report
        (other,) = {"stem", "conv1"} - {whole}
        assert report.excluded == (whole,)
        assert report.widths[whole] == (8, 8)
        assert report.widths[other][1] < 8
        assert report.pruned.macs / report.dense.macs <= 0.7
        assert f"excluded by the target: {whole}" in str(report)
        assert getattr(result.model, whole).out_channels == 8
        assert report.verification_error < 1e-9

    def test_bounds_without_a_budget(self, dense: nn.Module) -> None:
        """The method decides, within them."""
        strong = Recursion(epochs=4, strength=100.0, noise_lr=0.3, weight_lr=0.001)
        free = prune(dense, target=None, recursion=strong, recovery=CUT).report.widths
        target = Target(widths={"conv1": (5, None)}, exclude=["stem"])
        report = prune(dense, target=target, recursion=strong, recovery=CUT).report
        assert free["conv1"][1] < 5
        assert report.target is None
        assert report.widths == {"stem": (8, 8), "conv1": (8, 5)}

    @pytest.mark.parametrize("method", ["rbp", "magnitude"])
    def test_bounds_hold(self, dense: nn.Module, method: str) -> None:
        def widths(**bounds: Any) -> dict[str, int]:
            report = prune(dense, target=Target(macs=0.4, **bounds), method=method).report
            assert report.pruned.macs / report.dense.macs <= 0.4
            assert report.verification_error < 1e-9
            return {name: kept for name, (_, kept) in report.widths.items()}

        assert widths(widths={"stem": (2, 3)})["stem"] in (2, 3)
        assert widths(widths={"conv1": (None, 0.25)})["conv1"] <= 2
        assert widths(widths={"conv1": (6, 6)})["conv1"] == 6
        assert {n % 2 for n in widths(round_to=2).values()} == {0}
        assert min(widths(min_width=4).values()) >= 4

    def test_nothing_is_left_to_prune(self, dense: nn.Module) -> None:
        with pytest.raises(NothingToPruneError, match="leave no group"):
            prune(dense, target=Target(macs=0.5, exclude=["*"]))


@pytest.mark.parametrize("name", ["rbp", "magnitude", "sbp"])
def test_a_method_by_name_is_the_object(dense: nn.Module, name: str) -> None:
    by_name = prune(dense, method=name)
    assert same(by_name, prune(dense, method=METHODS[name]()))
    assert by_name.report.method == name


def test_the_settings_of_a_method_object_count(dense: nn.Module) -> None:
    """A threshold above every gate leaves one unit of each group, the best."""
    result = prune(dense, method=rbpfx.RBP(threshold=1.0), target=None, recovery=CUT)
    assert [kept for _, kept in result.report.widths.values()] == [1, 1]
