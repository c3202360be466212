"""Normalisations, softmax, reductions: what may go, and that it goes exactly."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

from rbpfx.errors import RbpfxError, VerificationError
from rbpfx.graph import exact_norms
from rbpfx.graph.capture import trace
from rbpfx.graph.gates import apply_mask
from rbpfx.graph.groups import Analysis, analyze
from rbpfx.graph.slicing import rewrite
from rbpfx.graph.verification import require_equal
from rbpfx.plan import PruningPlan
from rbpfx.testing import randomize
from tests.graph.laws import check_again, check_law, check_pickle, compile_random

Function = Callable[..., Any]
IMAGE, TOKENS = (3, 3, 5, 4), (3, 4, 5)


class Between(nn.Module):
    """An operator between two layers: convolutions of images, linear layers of tokens."""

    def __init__(self, operator: Function, *, tokens: bool = False, width: int = 8) -> None:
        super().__init__()
        self.first: nn.Module = nn.Linear(5, width) if tokens else nn.Conv2d(3, width, 1)
        self.operator = operator
        self.last: nn.Module = nn.Linear(width, 3) if tokens else nn.Conv2d(width, 3, 1)
        self.weight = nn.Parameter(torch.rand(width))
        self.bias = nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        operator = self.operator
        y = operator(y) if isinstance(operator, nn.Module) else operator(y, self.weight, self.bias)
        result: Tensor = self.last(torch.sigmoid(y))
        return result


def between(operator: Function, shape: tuple[int, ...]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    model = Between(operator, tokens=len(shape) == 3).double()
    randomize(model)
    return model, (torch.randn(shape, dtype=torch.float64),)


def check(model: nn.Module, inputs: tuple[Tensor, ...], **options: str) -> Analysis:
    """All laws, for a few plans; something was removed."""
    removed = 0
    for seed in range(4):
        compiled = compile_random(model, inputs, seed, **options)
        removed += compiled.removed
        for train in (False, True):
            check_law(compiled, inputs, train=train)
        check_again(compiled, inputs, seed)
    assert removed
    check_pickle(compiled, inputs)
    return compiled.analysis


def layer_norm_2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    normed = F.layer_norm(x.permute(0, 2, 3, 1), (8,), weight, bias, 1e-6)
    return normed.permute(0, 3, 1, 2)


MIXING: dict[str, tuple[Function, tuple[int, ...]]] = {
    "LayerNorm": (nn.LayerNorm(8), TOKENS),
    "LayerNorm without parameters": (nn.LayerNorm(8, elementwise_affine=False), TOKENS),
    "LayerNorm over two axes": (nn.LayerNorm((4, 8), eps=0.1), TOKENS),
    "LayerNorm of images": (nn.LayerNorm((8, 5, 4)), IMAGE),
    "RMSNorm": (nn.RMSNorm(8), TOKENS),
    "RMSNorm without parameters": (nn.RMSNorm(8, eps=0.1, elementwise_affine=False), TOKENS),
    "GroupNorm": (nn.GroupNorm(1, 8), IMAGE),
    "F.layer_norm": (lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b), TOKENS),
    "F.layer_norm, channels first": (layer_norm_2d, IMAGE),
    "F.rms_norm": (lambda x, w, b: F.rms_norm(x, (8,), weight=w, eps=0.1), TOKENS),
    "F.group_norm": (lambda x, w, b: F.group_norm(x, 1, w, b, eps=0.1), IMAGE),
    "torch.layer_norm": (lambda x, w, b: torch.layer_norm(x, (8,), w * 2.0), TOKENS),
}


@pytest.mark.parametrize("name", MIXING)
def test_channels_that_are_mixed_stay_by_default(name: str) -> None:
    model, inputs = between(*MIXING[name])
    analysis = analyze(trace(model, inputs))
    assert not analysis.groups
    assert not analysis.unknown
    assert "over channels" in analysis.frozen[0].reason
    assert "normalization='exact'" in analysis.frozen[0].reason


@pytest.mark.parametrize("name", MIXING)
def test_exact_normalisations_count_what_has_gone_as_zeros(name: str) -> None:
    analysis = check(*between(*MIXING[name]), normalization="exact")
    assert [(g.name, g.size, g.foldable) for g in analysis.groups] == [("first", 8, False)]
    assert not analysis.inexact()


@pytest.mark.parametrize("name", MIXING)
def test_sliced_normalisations_say_that_they_are_not_exact(name: str) -> None:
    model, inputs = between(*MIXING[name])
    gm = trace(model, inputs)
    analysis = analyze(gm, normalization="sliced")
    assert len(analysis.inexact()) == 1
    plan = PruningPlan({"first": [0, 3, 4]})
    pruned = rewrite(gm, analysis, plan)
    masked = apply_mask(gm, analysis, plan)
    assert require_equal(masked, pruned, inputs, inexact=analysis.inexact()) > 1e-3
    with pytest.raises(VerificationError):
        require_equal(masked, pruned, inputs)
    assert not any("exact_norms" in type(m).__module__ for m in pruned.modules())


def test_an_unknown_option_is_refused() -> None:
    gm = trace(*between(nn.LayerNorm(8), TOKENS))
    with pytest.raises(RbpfxError, match=r"normalization must be one of .* not 'fast'"):
        analyze(gm, normalization="fast")


@pytest.mark.parametrize("groups", [2, 4])
def test_a_whole_group_of_a_group_norm_may_go(groups: int) -> None:
    analysis = check(*between(nn.GroupNorm(groups, 8), IMAGE))
    assert [g.size for g in analysis.groups] == [groups]
    function = between(lambda x, w, b: F.group_norm(x, num_groups=groups, weight=w), IMAGE)
    assert [g.size for g in check(*function).groups] == [groups]


@pytest.mark.parametrize("groups", [2, 4])
def test_groups_of_an_exact_group_norm_become_ragged(groups: int) -> None:
    model, inputs = between(nn.GroupNorm(groups, 8), IMAGE)
    assert check(model, inputs, normalization="exact").groups[0].size == 8
    gm = trace(model, inputs)
    analysis = analyze(gm, normalization="exact")
    per_group = 8 // groups
    whole = rewrite(gm, analysis, PruningPlan({"first": range(per_group)}))
    assert type(whole.get_submodule("operator")) is nn.GroupNorm
    ragged = rewrite(gm, analysis, PruningPlan({"first": [0, *range(per_group, 8)]}))
    norm = ragged.get_submodule("operator")
    assert isinstance(norm, exact_norms.ExactGroupNorm)
    assert norm.group_sizes == (1, *(per_group for _ in range(groups - 1)))


PER_CHANNEL: dict[str, tuple[Function, tuple[int, ...]]] = {
    "InstanceNorm2d": (nn.InstanceNorm2d(8), IMAGE),
    "InstanceNorm2d, affine": (nn.InstanceNorm2d(8, affine=True, track_running_stats=True), IMAGE),
    "F.instance_norm": (lambda x, w, b: F.instance_norm(x, weight=w, bias=b), IMAGE),
    "FrozenBatchNorm2d": (FrozenBatchNorm2d(8), IMAGE),
    "GroupNorm of single channels": (nn.GroupNorm(8, 8), IMAGE),
    "normalize": (lambda x, w, b: F.normalize(x), IMAGE),
    "normalize by another norm": (lambda x, w, b: F.normalize(x, p=1.0, dim=-1), TOKENS),
    "norm": (lambda x, w, b: x / (x.norm(dim=1, keepdim=True) + 0.1), IMAGE),
    "sum": (lambda x, w, b: x * x.sum(1, keepdim=True), IMAGE),
    "mean": (lambda x, w, b: x - x.mean(-1, keepdim=True), TOKENS),
    "mean over everything": (lambda x, w, b: x * x.mean(), IMAGE),
    "RMSNorm by hand": (lambda x, w, b: x * (x.pow(2).mean(-1, True) + 0.1).rsqrt() * w, TOKENS),
    "softmax over space": (lambda x, w, b: x.flatten(2).softmax(-1).unflatten(2, (5, 4)), IMAGE),
    "softmax over tokens": (nn.Softmax(dim=1), TOKENS),
    "cumulative sum": (lambda x, w, b: x.cumsum(2), IMAGE),
    "maximum and its place": (lambda x, w, b: sum(x.max(1, keepdim=True)), TOKENS),
    "variance and mean": (lambda x, w, b: sum(torch.var_mean(x, 1, keepdim=True)), TOKENS),
    "sorting": (lambda x, w, b: x.sort(dim=2)[0], IMAGE),
}


@pytest.mark.parametrize("name", PER_CHANNEL)
def test_operators_that_let_channels_go(name: str) -> None:
    analysis = check(*between(*PER_CHANNEL[name]))
    assert [(g.name, g.size) for g in analysis.groups] == [("first", 8)]
    assert not analysis.unknown


PINNING: dict[str, tuple[Function, tuple[int, ...]]] = {
    "softmax": (nn.Softmax(dim=-1), TOKENS),
    "softmax of images": (nn.Softmax2d(), IMAGE),
    "log_softmax": (lambda x, w, b: F.log_softmax(x, 1), IMAGE),
    "maximum": (lambda x, w, b: x - x.amax(1, keepdim=True), IMAGE),
    "maximum with its place": (lambda x, w, b: x - x.max(1, keepdim=True)[0], IMAGE),
    "variance": (lambda x, w, b: x / (x.var(-1, keepdim=True) + 0.1), TOKENS),
    "cumulative sum": (lambda x, w, b: x.cumsum(-1), TOKENS),
    "local response": (nn.LocalResponseNorm(3), IMAGE),
    "norm of a low order": (lambda x, w, b: F.normalize(x, p=0.5), IMAGE),
    "count": (lambda x, w, b: x * (x > 0).sum(1, keepdim=True), IMAGE),
}


@pytest.mark.parametrize("name", PINNING)
def test_operators_that_keep_channels(name: str) -> None:
    model, inputs = between(*PINNING[name])
    analysis = analyze(trace(model, inputs), normalization="exact")
    assert not analysis.groups
    assert not analysis.unknown
    assert "over channels" in analysis.frozen[0].reason


class Heads(nn.Module):
    """A normalisation of every head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 12), nn.Linear(12, 3)
        self.norm = nn.LayerNorm(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x).unflatten(-1, (4, 3)))
        result: Tensor = self.last((y.softmax(-1) + y).flatten(-2))
        return result


@pytest.mark.parametrize("option", ["freeze", "exact", "sliced"])
def test_a_normalisation_within_heads_keeps_heads_apart(option: str) -> None:
    model = Heads().double()
    randomize(model)
    analysis = check(model, (torch.randn(TOKENS, dtype=torch.float64),), normalization=option)
    assert [(g.name, g.size) for g in analysis.groups] == [("first", 4)]


class Stream(nn.Module):
    """A residual stream that is normalised at every read; one normalisation is shared."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.norm, self.bare = nn.LayerNorm(8), nn.LayerNorm(8, elementwise_affine=False)
        self.up, self.down = nn.Linear(8, 6), nn.Linear(6, 8)
        self.other = nn.Linear(5, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        for _ in range(2):
            y = y + self.down(F.gelu(self.up(self.norm(y))))
        z = self.bare(self.other(x)).sum(-1, keepdim=True)
        result: Tensor = self.head(self.bare(self.norm(y)) * z)
        return result


def test_a_residual_stream_becomes_prunable() -> None:
    model = Stream().double()
    randomize(model)
    inputs = (torch.randn(TOKENS, dtype=torch.float64),)
    frozen = analyze(trace(model, inputs))
    assert [g.name for g in frozen.groups] == ["up"]
    analysis = check(model, inputs, normalization="exact")
    assert {g.name: g.size for g in analysis.groups} == {"embed": 8, "up": 6, "other": 8}
    gm = trace(model, inputs)
    plan = PruningPlan({"embed": [1, 2, 6], "other": [0, 5]})
    pruned = rewrite(gm, analyze(gm, normalization="exact"), plan)
    assert pruned.state_dict().keys() == model.state_dict().keys()
    assert "ExactLayerNorm((3,)" in str(pruned) and "original_count=8" in str(pruned)


@pytest.mark.parametrize("name", ["LayerNorm", "F.layer_norm", "F.rms_norm", "F.group_norm"])
def test_what_is_emitted_lives_on(name: str) -> None:
    """It is copied, pickled, compiled, traced again and analysed with any option."""
    model, inputs = between(*MIXING[name])
    gm = trace(model, inputs)
    plan = PruningPlan({"first": [0, 3, 4]})
    pruned = rewrite(gm, analyze(gm, normalization="exact"), plan).eval()
    expected = pruned(*inputs)
    again = trace(pruned, inputs)
    copies = (copy.deepcopy(pruned), pickle.loads(pickle.dumps(pruned)), again)
    for network in (*copies, torch.compile(pruned, backend="eager", fullgraph=True)):
        torch.testing.assert_close(network(*inputs), expected, rtol=0, atol=1e-12)
    for gm in (pruned, again):
        assert [g.size for g in analyze(gm).groups] == [3]


def test_half_precision_is_normalised_in_float() -> None:
    x = (torch.randn(2, 6, 8) * 3 + 5).bfloat16()
    weight = torch.rand(8).bfloat16()
    expected = F.layer_norm(x.float(), (8,), weight.float(), None, 1e-5)
    result = exact_norms.layer_norm(x, (8,), weight, None, 1e-5, 8)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), expected, rtol=2e-2, atol=2e-2)


# -- weights that are computed ----------------------------------------------------------------


class Standardized(nn.Conv2d):
    """Weight standardisation as in timm."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, eps=0.1).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, 1, self.groups)


class Centred(nn.Conv2d):
    """Weight standardisation by mean and variance."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean(dim=[1, 2, 3], keepdim=True)
        deviation = weight.var(dim=[1, 2, 3], keepdim=True, unbiased=False).sqrt()
        return F.conv2d(x, weight / (deviation + 0.1), self.bias, padding=1, groups=self.groups)


@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("cls", [Standardized, Centred])
def test_rows_of_a_standardised_weight_may_go(cls: type[nn.Conv2d], groups: int) -> None:
    model, inputs = between(cls(8, 8, 3, padding=1, groups=groups), IMAGE)
    analysis = check(model, inputs)
    assert not analysis.unknown
    units = {1: 8, 4: 2, 8: 8}[groups]
    rows = ("first" if groups == 8 else "operator.weight", units)
    expected = [rows] if groups == 8 else [("first", units), rows]
    if cls is Centred and groups != 8:
        # The mean takes part element by element, so the weight is no value of its own.
        expected = [rows]
        assert "mean over channels" in analysis.frozen[0].reason
    assert [(g.name, g.size) for g in analysis.groups] == expected


@pytest.mark.parametrize("name", ["StdConv2d", "ScaledStdConv2d"])
def test_standardised_convolutions_of_timm(name: str) -> None:
    layers = pytest.importorskip("timm.layers")
    layer = getattr(layers, name)(8, 8, 3, padding=1)
    analysis = check(*between(layer, IMAGE))
    groups = [(g.name, g.size) for g in analysis.groups]
    assert groups == [("first", 8), ("operator.weight", 8)]
