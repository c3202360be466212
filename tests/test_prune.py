"""The one call, end to end on a toy task, and what it says when something is wrong."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import rbpfx
from rbpfx import (
    CaptureError,
    DivergenceError,
    FineTune,
    InputError,
    NothingToPruneError,
    PlanError,
    PruningPlan,
    PruningResult,
    RbpfxError,
    Recursion,
    Target,
    TargetError,
    count_macs,
    count_parameters,
)
from tests.toy import ShortcutNet, nan_after, stripes, trained

pytestmark = pytest.mark.filterwarnings("error")

BATCHES = stripes()
DATASET = TensorDataset(*(torch.cat(parts) for parts in zip(*BATCHES, strict=True)))
HALF = Target(macs=0.5)
SHORT = {
    "recursion": Recursion(epochs=2),
    "recovery": FineTune(epochs=1),
    "progress": False,
}


def prune(model: nn.Module, loader: object = BATCHES, **options: object) -> PruningResult:
    return rbpfx.prune(model, loader, **{**SHORT, **options})


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    torch.manual_seed(0)
    return trained(ShortcutNet(), BATCHES).eval()


@pytest.fixture(scope="module")
def normed() -> nn.Module:
    """A network of which all channels are normalised together."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(1, 8), nn.ReLU(), nn.AvgPool2d(3)]
    return trained(nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 3)), BATCHES).eval()


@pytest.fixture(scope="module")
def result(dense: nn.Module) -> PruningResult:
    return prune(dense, target=HALF, val_loader=BATCHES)


def widths(model: nn.Module) -> tuple[int, int]:
    return model.stem.out_channels, model.conv1.out_channels


def tiny(**options: object) -> dict[str, object]:
    """Options of a prune of which only one thing matters."""
    return {"recursion": Recursion(epochs=1), "recovery": FineTune(epochs=0), **options}


class TestNormalization:
    def test_frozen_by_default(self, normed) -> None:
        with pytest.raises(NothingToPruneError, match="normalization='exact' would let them go"):
            prune(normed, **tiny())

    def test_exact(self, normed) -> None:
        result = prune(normed, **tiny(target=HALF, normalization="exact"))
        assert result.report.verification_error < 1e-9
        assert result.model.get_submodule("1").original_count == 8
        assert result.model.get_submodule("0").out_channels <= 4
        assert "NOT EXACT" not in str(result.report)

    def test_sliced(self, normed) -> None:
        result = prune(normed, **tiny(target=HALF, normalization="sliced"))
        assert result.report.inexact == ("1",)
        assert result.report.verification_error > 1e-6
        assert type(result.model.get_submodule("1")) is nn.GroupNorm
        assert "NOT EXACT" in str(result.report)


class TestResult:
    def test_it_is_a_smaller_graph_that_still_solves_the_task(self, dense, result) -> None:
        assert isinstance(result.model, fx.GraphModule)
        assert count_parameters(result.model) < count_parameters(dense)
        assert result.report.dense.accuracy > 0.95
        assert result.report.pruned.accuracy > 0.9
        assert set(result.model.state_dict()) == set(dense.state_dict())

    def test_the_plan_is_what_the_network_has(self, result) -> None:
        kept = {name: len(units) for name, units in result.plan.kept.items()}
        assert widths(result.model) == (kept.get("stem", 8), kept.get("conv1", 8))
        assert result.report.widths == {
            "stem": (8, kept.get("stem", 8)),
            "conv1": (8, kept.get("conv1", 8)),
        }
        assert result.model.head.in_features == 4 * kept.get("stem", 8)

    def test_the_report_counts_what_is_there(self, dense, result) -> None:
        report = result.report
        assert report.pruned.macs == count_macs(result.model)
        assert report.pruned.parameters == sum(p.numel() for p in result.model.parameters())
        assert report.dense.parameters == sum(p.numel() for p in dense.parameters())
        assert report.dense.macs == 36 * 9 * 8 + 2 * 36 * 9 * 64 + 32 * 3
        assert set(report.dense.latency) == set(report.pruned.latency) == {1, 16}
        assert report.frozen == {"head": "output of the model"}
        assert [entry["group"] for entry in report.history] == ["stem", "conv1"]
        assert report.target.asked == 0.5
        assert report.method == "rbp"
        assert 0 <= report.accuracy_after_cut <= 1

    def test_slicing_is_exact(self, result) -> None:
        assert result.report.verification_error < 1e-9

    @pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
    def test_the_target_is_reached_and_hardly_undershot(self, dense, share: float) -> None:
        report = prune(dense, **tiny(target=Target(macs=share))).report
        reached = report.pruned.macs / report.dense.macs
        # Units are an eighth of a group.
        assert share - 0.13 < reached <= share

    def test_an_absolute_target(self, dense) -> None:
        report = prune(dense, **tiny(target=Target(macs=20_000))).report
        assert 14_000 < report.pruned.macs <= 20_000
        assert report.target.asked == pytest.approx(20_000 / report.dense.macs)

    def test_a_target_above_the_network_removes_nothing(self, dense) -> None:
        pruned = prune(dense, **tiny(target=Target(macs=1e9)))
        assert pruned.plan.kept == {}
        assert pruned.report.pruned.macs == pruned.report.dense.macs

    def test_without_a_target_the_strength_decides(self, dense) -> None:
        options = {"noise_lr": 0.3, "epochs": 6}
        weak = prune(dense, recursion=Recursion(strength=1e-5, **options))
        strong = prune(dense, recursion=Recursion(strength=100.0, **options))
        assert weak.report.target is None
        assert strong.report.pruned.macs < 0.2 * strong.report.dense.macs
        assert strong.report.pruned.macs < 0.5 * weak.report.pruned.macs
        assert min(widths(strong.model)) >= 1

    def test_flattened_features_one_by_one(self, dense) -> None:
        pruned = prune(dense, target=HALF, unit="feature")
        assert set(pruned.report.widths) == {"stem", "conv1", "head.features"}
        assert pruned.report.verification_error < 1e-9

    def test_features_and_channels_never_leave_a_layer_without_input(self, dense) -> None:
        pruned = prune(dense, **tiny(target=Target(macs=0.05), unit="feature"))
        assert pruned.model.head.in_features >= 1
        assert pruned.report.pruned.macs <= 0.05 * pruned.report.dense.macs

    def test_strict_recursion(self, dense) -> None:
        pruned = prune(dense, target=HALF, recursion=Recursion(epochs=2, window=1))
        assert pruned.report.pruned.macs <= 0.5 * pruned.report.dense.macs


class TestInputModel:
    def test_it_is_untouched_and_the_result_is_in_its_mode(self, dense) -> None:
        model = copy.deepcopy(dense).train()
        model.bn1.eval()
        model.conv2.weight.requires_grad_(False)
        state = copy.deepcopy(model.state_dict())
        modes = {name: module.training for name, module in model.named_modules()}
        frozen = {name: p.requires_grad for name, p in model.named_parameters()}
        pruned = prune(model, target=HALF).model
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
        assert modes == {name: module.training for name, module in model.named_modules()}
        assert frozen == {name: p.requires_grad for name, p in model.named_parameters()}
        assert frozen == {name: p.requires_grad for name, p in pruned.named_parameters()}
        assert modes.items() <= {n: m.training for n, m in pruned.named_modules()}.items()
        assert all(p.grad is None for p in pruned.parameters() if not p.requires_grad)

    def test_eval_mode_stays_eval_mode(self, result) -> None:
        assert not any(module.training for module in result.model.modules())

    def test_all_parameters_frozen(self, dense) -> None:
        model = copy.deepcopy(dense).requires_grad_(False)
        pruned = prune(model, target=HALF)
        assert pruned.report.pruned.macs <= 0.5 * pruned.report.dense.macs
        units = list(pruned.plan.kept.get("stem", range(8)))
        assert torch.equal(pruned.model.stem.weight, model.stem.weight[units])
        assert not any(p.requires_grad for p in pruned.model.parameters())

    def test_channels_last(self, dense) -> None:
        model = copy.deepcopy(dense).to(memory_format=torch.channels_last)
        batches = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in BATCHES]
        pruned = prune(model, batches, target=HALF)
        assert pruned.report.verification_error < 1e-9
        assert pruned.model(batches[0][0]).shape == (16, 3)

    def test_double_precision(self, dense) -> None:
        batches = [(x.double(), y) for x, y in BATCHES]
        pruned = prune(copy.deepcopy(dense).double(), batches, target=HALF)
        assert all(p.dtype == torch.float64 for p in pruned.model.parameters())

    def test_a_pruned_network_can_be_pruned_again(self, result) -> None:
        again = prune(result.model, target=HALF)
        assert again.report.dense.macs == result.report.pruned.macs
        assert again.report.pruned.macs <= 0.5 * again.report.dense.macs


class TestRandomness:
    def run(self, model: nn.Module, seed: int) -> PruningResult:
        loader = DataLoader(DATASET, 16, shuffle=True)
        return prune(model, loader, target=HALF, seed=seed)

    def test_a_seed_gives_the_same_network_bit_for_bit(self, dense) -> None:
        torch.manual_seed(1)
        first = self.run(dense, seed=3)
        torch.manual_seed(2)
        second = self.run(dense, seed=3)
        assert first.plan == second.plan
        weights = second.model.state_dict()
        assert all(torch.equal(v, weights[k]) for k, v in first.model.state_dict().items())

    def test_another_seed_gives_another_network(self, dense) -> None:
        first, second = (self.run(dense, seed) for seed in (3, 4))
        heads = first.model.head.bias, second.model.head.bias
        assert not torch.equal(*heads)

    def test_the_global_generator_is_not_disturbed(self, dense) -> None:
        before = torch.get_rng_state()
        self.run(dense, seed=3)
        assert torch.equal(torch.get_rng_state(), before)


class Countless(IterableDataset):
    """Examples without a length."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(DATASET)


class ByName(nn.Module):
    """Two inputs that go by name."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, image: Tensor, scale: Tensor) -> dict[str, Tensor]:
        return {"logits": self.inner(image * scale)}


class Auxiliary(ShortcutNet):
    """A second head in train mode, as Inception has it."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor] | Tensor:
        x = F.relu(self.bn(self.stem(x)))
        second = self.second(x.mean((2, 3)))
        x = F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        scores = self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))
        return (scores, second) if self.training else scores


class TestTask:
    @pytest.mark.parametrize("loader", [DataLoader(DATASET, 20), DataLoader(Countless(), 20)])
    def test_loaders(self, dense, loader: DataLoader) -> None:
        report = prune(dense, loader, target=HALF).report
        assert report.pruned.macs <= 0.5 * report.dense.macs
        assert set(report.dense.latency) == {1, 20}

    def test_batches_of_one_example(self, dense) -> None:
        loader = [(x[:1], y[:1]) for x, y in BATCHES]
        assert set(prune(dense, loader, target=HALF).report.dense.latency) == {1}

    def test_regression(self) -> None:
        batches = [(x, x.mean((2, 3)).repeat(1, 3)) for x, _ in BATCHES]
        report = prune(ShortcutNet(), batches, loss_fn=F.mse_loss, target=HALF).report
        assert report.pruned.macs <= 0.5 * report.dense.macs
        assert report.pruned.accuracy is None

    @pytest.mark.parametrize("positional", [True, False])
    def test_a_forward_hook_decides_how_the_model_is_called(self, dense, positional: bool) -> None:
        def forward(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            if positional:
                output = model(batch["image"], scale=batch["scale"])
            else:
                output = model(scale=batch["scale"], image=batch["image"])
            return F.cross_entropy(output["logits"], batch["label"])

        batches = [
            {"name": ["a"] * 16, "label": y, "scale": torch.ones(1), "image": x} for x, y in BATCHES
        ]
        pruned = prune(ByName(dense), batches, forward=forward, target=HALF)
        x, y = BATCHES[0]
        logits = pruned.model(image=x, scale=torch.ones(1))["logits"]
        assert (logits.argmax(1) == y).float().mean() > 0.8
        assert pruned.report.pruned.macs <= 0.5 * pruned.report.dense.macs
        assert set(pruned.report.dense.latency) == {1, 16}

    def test_auxiliary_heads(self) -> None:
        pruned = prune(Auxiliary(), target=HALF, val_loader=BATCHES)
        x = BATCHES[0][0]
        assert [scores.shape for scores in pruned.model.train()(x)] == [(16, 3), (16, 3)]
        assert pruned.model.eval()(x).shape == (16, 3)

    def test_a_metric_is_called_in_eval_mode_and_changes_no_mode(self, dense) -> None:
        seen = []

        def weight_count(network: nn.Module, loader: object) -> float:
            assert loader is BATCHES
            assert not network.training
            network.eval()
            seen.append(sum(p.numel() for p in network.parameters()))
            return seen[-1]

        model = copy.deepcopy(dense).train()
        pruned = prune(model, target=HALF, val_loader=BATCHES, metric=weight_count)
        report = pruned.report
        assert pruned.model.training
        assert report.dense.accuracy == seen[0] == report.dense.parameters
        assert report.pruned.accuracy == seen[-1] == report.pruned.parameters
        assert report.metric == "weight_count"

    def test_accuracy_needs_the_default_loss(self, dense) -> None:
        loss_fn = nn.CrossEntropyLoss(label_smoothing=0.1)
        report = prune(dense, **tiny(target=HALF, loss_fn=loss_fn, val_loader=BATCHES)).report
        assert report.dense.accuracy > 0.95
        with pytest.raises(InputError, match="give metric="):
            prune(dense, loss_fn=F.mse_loss, val_loader=BATCHES)
        with pytest.raises(InputError, match=r"give both"):
            prune(dense, metric=lambda model, loader: 0.0)

    def test_distillation(self, dense) -> None:
        pruned = prune(dense, target=HALF, distill=True)
        plain = prune(dense, target=HALF)
        assert not torch.equal(pruned.model.head.bias, plain.model.head.bias)
        with pytest.raises(InputError, match="distill=True needs class scores"):
            prune(dense, distill=True, forward=lambda model, batch: model(batch[0]).sum())

    def test_the_device_may_be_named(self, dense) -> None:
        pruned = prune(dense, **tiny(target=HALF, device="cpu"))
        assert next(pruned.model.parameters()).device.type == "cpu"
        assert pruned.report.device.startswith("cpu (")

    def test_a_progress_bar_shows_both_kinds_of_training(self, dense, capsys) -> None:
        prune(dense, target=HALF, progress=True)
        printed = capsys.readouterr().err
        assert "noise" in printed
        assert "fine-tuning" in printed


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = ShortcutNet()

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = -x
        return self.block(x)


class Choosing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Deciding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x.flatten(1))
        return y if y.sum() > 0 else -y


class Counting(ShortcutNet):
    """What it computes depends on how often it was called."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


class Drawing(ShortcutNet):
    """Random in eval mode too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.rand(())


class Misled(ShortcutNet):
    """A question that tracing answers otherwise."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if isinstance(x, Tensor) else -x)


class Caching(ShortcutNet):
    """Cannot be copied once it was called."""

    def forward(self, x: Tensor) -> Tensor:
        self.cache = super().forward(x)
        return self.cache


def generator() -> Iterator[tuple[Tensor, Tensor]]:
    yield from BATCHES


class TestErrors:
    def test_an_empty_loader(self, dense) -> None:
        with pytest.raises(InputError, match="yields no batch"):
            prune(dense, [])

    @pytest.mark.parametrize("place", ["loader", "val_loader"])
    def test_a_loader_that_is_used_up(self, dense, place: str) -> None:
        message = f"the {place} is a generator, which can be gone through only once"
        with pytest.raises(InputError, match=message):
            prune(dense, **{place: generator()})

    def test_batches_that_do_not_fit_the_model(self, dense) -> None:
        with pytest.raises(InputError, match=r"tensors of shape \[\(4, 3, 6, 6\)\]"):
            prune(dense, [(torch.zeros(4, 3, 6, 6), torch.zeros(4, dtype=torch.long))])

    def test_targets_that_do_not_fit_the_loss(self, dense) -> None:
        with pytest.raises(InputError, match="pass loss_fn="):
            prune(dense, [(torch.zeros(4, 1, 6, 6), torch.zeros(4, 7))])

    def test_batches_that_are_no_pairs(self, dense) -> None:
        with pytest.raises(InputError, match=r"a list of 3, not \(input, target\) pairs"):
            prune(dense, [[x, y, y] for x, y in BATCHES])
        with pytest.raises(InputError, match="pairs; pass forward="):
            prune(dense, [x for x, _ in BATCHES])

    def test_a_loss_per_example(self, dense) -> None:
        with pytest.raises(InputError, match="must be a scalar tensor, not"):
            prune(dense, loss_fn=nn.CrossEntropyLoss(reduction="none"))
        with pytest.raises(InputError, match=r"must be a scalar tensor, not 1\.0"):
            prune(dense, loss_fn=lambda output, target: 1.0)

    def test_a_loss_that_is_nan_from_the_start(self, dense) -> None:
        with pytest.raises(InputError, match="the loss of the model is nan before anything"):
            prune(dense, [(x * float("nan"), y) for x, y in BATCHES])

    def test_a_loss_without_a_gradient(self, dense) -> None:
        with pytest.raises(InputError, match="does not depend on the network"):
            prune(dense, loss_fn=lambda output, target: F.cross_entropy(output.detach(), target))

    def test_a_hook_that_never_calls_the_model(self, dense) -> None:
        with pytest.raises(InputError, match="never calls the model"):
            prune(dense, forward=lambda model, batch: batch[0].sum())

    def test_a_hook_that_fails(self, dense) -> None:
        with pytest.raises(InputError, match=r"do not run on the loader's first batch.*'image'"):
            prune(dense, [{"x": torch.zeros(2)}], forward=lambda model, batch: batch["image"])

    def test_loss_and_hook_together(self, dense) -> None:
        with pytest.raises(InputError, match="loss_fn or forward, not both"):
            prune(dense, loss_fn=F.cross_entropy, forward=lambda model, batch: None)

    def test_a_model_that_cannot_be_traced(self) -> None:
        with pytest.raises(CaptureError) as caught:
            prune(Deciding())
        assert "`return y if y.sum() > 0 else -y`" in str(caught.value)
        assert "leaf_modules=[...]" in str(caught.value)

    def test_a_model_that_can_be_traced_inside(self) -> None:
        pruned = prune(Untraceable(), **tiny(target=HALF))
        assert pruned.report.pruned.macs <= 0.5 * pruned.report.dense.macs
        assert isinstance(pruned.model, Untraceable)

    @pytest.mark.parametrize("leaf_modules", [(), [Choosing]])
    def test_a_module_that_cannot_be_traced_is_kept_whole(self, leaf_modules) -> None:
        model = nn.Sequential(ShortcutNet(), nn.ReLU(), Choosing(), nn.Linear(3, 3))
        pruned = prune(model, **tiny(target=HALF, leaf_modules=leaf_modules))
        assert pruned.report.pruned.macs <= 0.5 * pruned.report.dense.macs
        assert isinstance(pruned.model.get_submodule("2"), Choosing)

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            (Counting(), "two calls of the model in eval mode with the same input differ"),
            (Drawing(), "draws random numbers in eval mode"),
            (Misled(), "the captured graph differs from the model by"),
        ],
    )
    def test_a_capture_that_differs(self, model: nn.Module, message: str) -> None:
        with pytest.raises(CaptureError, match=message):
            prune(model)

    def test_a_model_that_cannot_be_copied(self) -> None:
        model = Caching()
        model(BATCHES[0][0])
        with pytest.raises(CaptureError, match="cannot be copied"):
            prune(model)

    def test_nothing_to_prune_says_why(self) -> None:
        with pytest.raises(NothingToPruneError, match="1: output of the model"):
            prune(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_low_precision_is_refused(self, dense, dtype: torch.dtype) -> None:
        with pytest.raises(InputError, match=r"too coarse.*pass model\.float\(\)"):
            prune(copy.deepcopy(dense).to(dtype), [(x.to(dtype), y) for x, y in BATCHES])

    def test_targets(self, dense) -> None:
        with pytest.raises(TargetError, match=r"one unit unless bounded.* still keeps"):
            prune(dense, target=Target(macs=0.001))
        for macs in (0, -1, float("nan")):
            with pytest.raises(TargetError, match="must be positive"):
                Target(macs=macs)

    def test_an_unknown_method(self, dense) -> None:
        with pytest.raises(RbpfxError, match="no method is called 'magic'; there are: rbp"):
            prune(dense, method="magic")

    def test_an_unknown_unit(self, dense) -> None:
        with pytest.raises(RbpfxError, match="unit must be one of"):
            prune(dense, unit="layer")

    def test_plans_that_do_not_fit(self, dense) -> None:
        gm = rbpfx.trace(dense, BATCHES[0][0])
        analysis = rbpfx.analyze(gm)
        with pytest.raises(PlanError, match="no channel group is called 'conv9'"):
            rbpfx.rewrite(gm, analysis, PruningPlan({"conv9": [0]}))
        with pytest.raises(PlanError, match="has units 0 to 7"):
            rbpfx.rewrite(gm, analysis, PruningPlan({"stem": [8]}))
        with pytest.raises(PlanError, match="removes every unit of group 'stem'"):
            PruningPlan({"stem": []})


class TestDivergence:
    # Two epochs of six batches train the noise, and one fine-tunes. With window=1 the first
    # group is hardened after six steps.
    @pytest.mark.parametrize(
        ("steps", "good", "group"), [(0, 0, "stem"), (3, 0, "stem"), (8, 6, "conv1")]
    )
    def test_of_the_noise_training(self, dense, steps: int, good: int, group: str) -> None:
        loss_fn = nan_after(steps)
        with pytest.raises(DivergenceError, match=f"group '{group}'") as caught:
            prune(dense, loss_fn=loss_fn, recursion=Recursion(epochs=2, window=1))
        assert caught.value.stage == group
        assert caught.value.step == good + 1  # that of the second try
        model = caught.value.model
        assert all(torch.isfinite(v).all() for v in model.state_dict().values())
        unchanged = torch.equal(model.stem.weight, dense.stem.weight)
        assert unchanged == (group == "stem")

    @pytest.mark.parametrize("window", [1, None])
    def test_of_the_weights(self, dense, window: int | None) -> None:
        recursion = Recursion(epochs=0.5, window=window, weight_lr=1e30)
        with pytest.raises(DivergenceError) as caught:
            prune(dense, recursion=recursion, target=HALF)
        model = caught.value.model
        assert torch.equal(model.head.weight, dense.head.weight)
        assert all(torch.isfinite(v).all() for v in model.state_dict().values())

    @pytest.mark.parametrize("steps", [12, 15])
    def test_of_the_fine_tuning(self, dense, steps: int) -> None:
        with pytest.raises(DivergenceError, match="fine-tuning") as caught:
            prune(dense, loss_fn=nan_after(steps), target=HALF)
        assert caught.value.stage == "fine-tuning"
        assert caught.value.step == 1  # that of the second try
        model = caught.value.model
        assert all(torch.isfinite(v).all() for v in model.state_dict().values())
        assert (model.eval()(BATCHES[0][0]).argmax(1) == BATCHES[0][1]).float().mean() > 0.8

    def test_in_the_last_step(self, dense) -> None:
        """No loss is computed any more that could tell."""
        loader = BATCHES[:1]
        recovery = FineTune(epochs=1, lr=1e38)
        with pytest.raises(DivergenceError, match="fine-tuning") as caught:
            prune(dense, loader, target=HALF, recovery=recovery)
        assert all(torch.isfinite(v).all() for v in caught.value.model.state_dict().values())
