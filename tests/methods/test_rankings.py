"""Rankings: what they measure, checked against a direct computation, and that they cut."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rbpfx import (
    BatchNormScale,
    Magnitude,
    Method,
    Random,
    RbpfxError,
    Selection,
    Target,
    Taylor,
    analyze,
    insert_noise,
    noise_gates,
    trace,
)
from rbpfx.methods.rankings import TaylorGate
from rbpfx.methods.weights import UnitWeights, in_scope
from rbpfx.training.engine import Stepper
from rbpfx.training.recursion import RecursiveTraining
from rbpfx.training.schedule import Recursion
from rbpfx.training.settings import Training
from rbpfx.training.task import Task
from tests.toy import ShortcutNet, stripes

BATCHES = stripes()


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = ShortcutNet()
    with torch.no_grad():
        for norm in (model.bn, model.bn1, model.bn2):
            norm.weight.uniform_(0.2, 2)
            norm.bias.normal_()
    return model.eval()


def scores(model: nn.Module, method: Method, decide: bool = False) -> dict[str, Tensor]:
    gm = trace(model, BATCHES[0][0])
    analysis = analyze(gm)
    noisy = insert_noise(gm, analysis, method)
    if decide:
        selection = Selection(analysis, Target(macs=0.5))
        training = RecursiveTraining(noisy, selection, method, Task(), Recursion())
        training.decide(BATCHES)
        return {name: torch.from_numpy(score) for name, score in training.decisions.scores.items()}
    return {gate.group: gate.score() for gate in noise_gates(noisy)}


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_magnitude_is_the_norm_of_all_that_goes(model: nn.Module, power: float) -> None:
    found = scores(model, Magnitude(power=power, scope="global"))
    for name, slices in {
        "conv1": lambda c: [model.conv1.weight[c], model.conv2.weight[:, c]],
        "stem": lambda c: [
            model.stem.weight[c],
            model.conv2.weight[c],
            model.conv1.weight[:, c],
            model.head.weight[:, 4 * c : 4 * c + 4],
        ],
    }.items():
        direct = torch.stack(
            [torch.cat([s.flatten() for s in slices(c)]).norm(power) for c in range(8)]
        )
        assert torch.allclose(found[name], direct / direct.mean(), rtol=1e-5)


def test_bn_scale_sums_the_scales_on_a_unit(model: nn.Module) -> None:
    found = scores(model, BatchNormScale())
    both = model.bn.weight.abs() + model.bn2.weight.abs()
    assert torch.allclose(found["stem"], both / both.mean())
    inner = model.bn1.weight.abs()
    assert torch.allclose(found["conv1"], inner / inner.mean())


def test_bn_scale_names_a_group_without_batchnorm() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    gm = trace(model, BATCHES[0][0])
    with pytest.raises(RbpfxError, match=r"group '0', so that method='bn-scale' cannot rank"):
        insert_noise(gm, analyze(gm), "bn-scale")


def test_taylor_is_gradient_times_activation_over_all_reads(model: nn.Module) -> None:
    """Against the derivative of the loss along a multiplier on the activation itself."""
    found = scores(model, Taylor(scope="l2"), decide=True)
    expected = torch.zeros(8)
    for images, labels in BATCHES:
        scale = torch.ones(len(images), 8, 1, 1, requires_grad=True)
        x = F.relu(model.bn(model.stem(images)))
        inner = F.relu(model.bn1(model.conv1(x))) * scale
        x = F.relu(x + model.bn2(model.conv2(inner)))
        logits = model.head(F.adaptive_avg_pool2d(x, 2).flatten(1))
        (grad,) = torch.autograd.grad(F.cross_entropy(logits, labels), scale)
        expected += grad.abs().sum((0, 2, 3))
    assert torch.allclose(found["conv1"].float(), expected / expected.norm(), rtol=1e-4)


def changes(sizes: list[int], precision: str = "float32", factor: float = 1.0) -> Tensor:
    """What Taylor sums up over 40 examples in steps of batches of these sizes.

    Args:
        sizes: The sizes of the batches of one step.
        precision: That of the training.
        factor: Makes the loss large.
    """
    torch.manual_seed(0)
    images, labels = torch.randn(40, 3, 6, 6), torch.randint(0, 4, (40,))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
    gm = trace(model, images[:2])
    noisy = insert_noise(gm, analyze(gm), Taylor())
    task = Task(lambda output, target: factor * F.cross_entropy(output, target))
    optimizer = torch.optim.SGD(noisy.parameters(), 0.0)
    stepper = Stepper(noisy, task, Training(precision=precision), [optimizer])
    rest = list(zip(images.split(sizes), labels.split(sizes), strict=True))
    for _ in range(8):
        stepper.step(rest)
    (gate,) = noise_gates(noisy)
    assert isinstance(gate, TaylorGate)
    return gate.changes / factor


@pytest.mark.parametrize("sizes", [[32, 8], [10] * 4, [1] * 40, [39, 1]])
def test_taylor_counts_every_example_alike(sizes: list[int]) -> None:
    assert torch.allclose(changes(sizes), changes([40]), rtol=1e-4)


@pytest.mark.parametrize("sizes", [[32, 8], [40]])
def test_taylor_with_scaled_gradients(sizes: list[int]) -> None:
    assert torch.allclose(changes(sizes, "float16"), changes([40]), rtol=0.02, atol=1e-3)


def test_taylor_ignores_gradients_that_overflow() -> None:
    found = changes([40], "float16", factor=300.0)
    assert found.isfinite().all()
    assert (found > 0).any()
    assert found.max() < 0.9 * changes([40]).max()  # without the first steps


def test_taylor_across_steps(model: nn.Module) -> None:
    """Steps of unequal batches: the last 8 of 40 examples make no half of the sum."""
    images, labels = (torch.cat(parts)[:40] for parts in zip(*BATCHES, strict=True))
    found = []
    for size in (40, 32):
        gm = trace(model, images[:2])
        noisy = insert_noise(gm, analyze(gm), Taylor()).eval()
        for part, wanted in zip(images.split(size), labels.split(size), strict=True):
            F.cross_entropy(noisy(part), wanted).backward()
        found.append(torch.cat([gate.score() for gate in noise_gates(noisy)]))
    assert torch.allclose(*found, rtol=1e-4)


def test_taylor_leaves_weights_and_statistics_alone(model: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scores(model, Taylor(), decide=True)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_random_is_an_order_of_the_seed(model: nn.Module) -> None:
    torch.manual_seed(1)
    first = scores(model, Random())
    torch.manual_seed(1)
    again = scores(model, Random())
    other = scores(model, Random())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("scope", ["local", "global", "l2"])
def test_scopes_keep_the_order(scope: str) -> None:
    score = torch.rand(50)
    assert torch.equal(in_scope(score, scope).argsort(), score.argsort())


def test_a_local_scope_gives_every_group_the_same_shares() -> None:
    for size in (3, 10, 100):
        shares = in_scope(torch.randn(size), "local")
        assert torch.allclose(shares.sort().values, (torch.arange(size) + 0.5) / size)


def test_a_dead_group_has_finite_scores() -> None:
    assert (in_scope(torch.zeros(4), "global") == 0).all()
    assert (in_scope(torch.zeros(4), "l2") == 0).all()


def test_wrong_options() -> None:
    with pytest.raises(RbpfxError, match="scope must be one of"):
        Magnitude(scope="layer")
    with pytest.raises(RbpfxError, match="must be positive"):
        Magnitude(power=0)


def test_unit_weights_count_everything_once(model: nn.Module) -> None:
    """Over all groups, each weight is counted once per prunable axis."""
    gm = trace(model, BATCHES[0][0])
    analysis = analyze(gm)
    total = 0.0
    for group in analysis.groups:
        weights = UnitWeights(gm, analysis, group)
        total += float(weights.power_sum(weights.filters + weights.readers, 2).sum().detach())
    squares = {n: float(p.detach().square().sum()) for n, p in gm.named_parameters()}
    axes = {"stem": 1, "conv1": 2, "conv2": 2, "head": 1}
    expected = sum(times * squares[f"{name}.weight"] for name, times in axes.items())
    assert math.isclose(total, expected, rel_tol=1e-5)


def test_features_are_ranked_by_the_columns_that_read_them() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3))
    gm = trace(model, torch.zeros(2, 1, 6, 6))
    analysis = analyze(gm, unit="feature")
    (features,) = (g for g in analysis.groups if g.size == 64)
    noisy = insert_noise(gm, analysis, Magnitude(scope="global"))
    found = {gate.group: gate.score() for gate in noise_gates(noisy)}
    columns = model[3].weight.detach().norm(dim=0)
    assert torch.allclose(found[features.name].detach(), columns / columns.mean(), rtol=1e-5)
    (channels,) = (g for g in analysis.groups if g.size == 4)
    rows = model[0].weight.detach().square().sum((1, 2, 3))
    rows += columns.square().reshape(4, 16).sum(1)
    assert torch.allclose(
        found[channels.name].detach(), rows.sqrt() / rows.sqrt().mean(), rtol=1e-5
    )
