"""The registry: which rule a node gets, and rules of users."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from rbpfx.graph.capture import trace
from rbpfx.graph.gates import apply_mask
from rbpfx.graph.groups import Analysis, analyze
from rbpfx.graph.operands import Labels
from rbpfx.graph.propagation import Propagation
from rbpfx.graph.rules import base
from rbpfx.graph.rules.base import Rule, find_rule, register
from rbpfx.graph.slicing import rewrite
from rbpfx.graph.verification import require_equal
from rbpfx.plan import PruningPlan
from tests.graph.laws import check_again, check_law, check_pickle, compile_random


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))


class Between(nn.Module):
    """A module between two convolutions."""

    def __init__(self, module: nn.Module, inputs: int = 4, outputs: int = 4) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, inputs, 1)
        self.module = module
        self.last = nn.Conv2d(outputs, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.module(self.first(x)))
        return y


def analysed(module: nn.Module, **options: Any) -> Analysis:
    return analyze(trace(Between(module), torch.zeros(2, 3, 4, 4), **options))


class Renamed(nn.Conv2d):
    """Inherits everything."""


class Standardized(nn.Conv2d):
    """Computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


def test_a_subclass_with_the_same_forward_shares_the_rule() -> None:
    analysis = analysed(Renamed(4, 4, 1), leaf_modules=[Renamed])
    assert [g.name for g in analysis.groups] == ["first", "module"]


def test_a_subclass_with_another_forward_does_not() -> None:
    analysis = analysed(Standardized(4, 4, 1), leaf_modules=[Standardized])
    assert not analysis.groups
    assert analysis.unknown == {"module": "Standardized"}


def test_modules_with_hooks_have_no_rule() -> None:
    conv = nn.Conv2d(4, 4, 1)
    conv.register_forward_hook(
        lambda module, inputs, output: output * torch.arange(4.0)[:, None, None]
    )
    analysis = analysed(conv)
    assert not analysis.groups
    assert analysis.unknown == {"module": "Conv2d with forward hooks"}


class Misleading(nn.Module):
    """Has a buffer, a parameter, a layer and an argument that are called like methods."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.5))
        self.repeat = nn.Parameter(torch.rand(1, 4, 1, 1))
        self.expand = nn.Conv2d(3, 4, 1)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, chunk: Tensor, view: Tensor) -> Tensor:
        y: Tensor = self.last(self.expand(chunk - self.mean) * self.repeat + view)
        return y


def test_names_of_methods_are_no_calls_of_them() -> None:
    model, x = Misleading().double(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    inputs = (x, torch.ones(1, dtype=torch.float64))
    gm = trace(model, inputs)
    named = [n for n in gm.graph.nodes if n.op in ("placeholder", "get_attr")]
    assert {str(n.target) for n in named} == {"mean", "repeat", "chunk", "view"}
    assert all(find_rule(n, gm) is None for n in named)
    compiled = compile_random(model, inputs, 0)
    assert [(g.name, g.size) for g in compiled.analysis.groups] == [("expand", 4)]
    check_law(compiled, inputs, train=True)


class Doubled(nn.Module):
    """Every channel twice, side by side."""

    def forward(self, x: Tensor) -> Tensor:
        return x.kron(torch.ones(1, 2, 1, 1, dtype=x.dtype))


class RepeatRule(Rule):
    """A user's rule."""

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        label = state.label(node.args[0])
        return label.indexed(
            1, torch.arange(label.shape[1]).repeat_interleave(2).numpy()
        ).with_shape(node.meta["val"].shape)


@pytest.mark.parametrize("operator", ["kron", Doubled])
def test_users_register_rules(operator: Any) -> None:
    model = Between(Doubled(), 4, 8).double()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    leaves = [operator] if operator is Doubled else []
    gm = trace(model, x, leaf_modules=leaves)
    assert not analyze(gm).groups
    rule = register(RepeatRule(), operator)
    assert any(find_rule(node, gm) is rule for node in gm.graph.nodes)
    analysis = analyze(gm)
    plan = PruningPlan({"first": [0, 3]})
    pruned = rewrite(gm, analysis, plan)
    assert pruned.get_submodule("last").in_channels == 4
    require_equal(apply_mask(gm, analysis, plan), pruned, x)


# -- cases the random networks do not build ----------------------------------------------------


class UpSampling(nn.Module):
    """Pads to the size of a skip connection at run time, as U-Nets do."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 6, 3, stride=2)
        self.skip = nn.Conv2d(3, 4, 1)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip, y = self.skip(x), self.up(self.down(x))
        rows, columns = skip.size(2) - y.size(2), skip.size(3) - y.size(3)
        y = nn.functional.pad(
            y, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2]
        )
        result: Tensor = self.head(torch.cat([skip, y], dim=1))
        return result


class Shuffle(nn.Module):
    """A ShuffleNet unit."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.branch = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        left, right = x.chunk(2, dim=1)
        x = torch.cat((left, self.branch(right)), dim=1)
        n, c, h, w = x.size()
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)
        y: Tensor = self.head(x)
        return y


class ThroughView(nn.Module):
    """Changes channels in place through strided and through flattened views."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x[:, ::2].mul_(2.0)
        x.flatten(1)[:, 1:40].add_(1.0)
        y: Tensor = self.head(x)
        return y


class SqueezedAway(nn.Module):
    """`squeeze` of an axis that only pruning makes one long, and sizes asked in every way."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).squeeze(1).squeeze()
        x = x * x.shape[-3] / x.shape[:2][1] + x.new_zeros(1).expand(1, 1, 1, x.size()[3])
        y: Tensor = self.head(x)
        return y


class Unshared(nn.Module):
    """Parameters that the graph fetches by name in several places."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.gain = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> dict[str, Any]:
        h = self.stem(x)
        y = nn.functional.linear(h * self.gain, self.weight, self.gain)
        z = nn.functional.linear(y, self.weight * self.gain)
        return {"z": [z.sum(1), (z.mean(1), self.gain.sum() * h.sum())]}


@pytest.mark.parametrize("unit", ["channel", "feature"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cls", [UpSampling, Shuffle, ThroughView, SqueezedAway, Unshared])
def test_laws_on_difficult_models(cls: type[nn.Module], seed: int, unit: str) -> None:
    model = cls().double()
    shape = (2, 3) if cls is Unshared else (2, 3, 7, 7)
    inputs = (torch.randn(*shape, dtype=torch.float64),)
    compiled = compile_random(model, inputs, seed, unit=unit)
    for train in (False, True):
        check_law(compiled, inputs, train=train)
    check_again(compiled, inputs, seed)
    check_pickle(compiled, inputs)


def test_run_time_padding_stays_at_run_time() -> None:
    model = UpSampling().double()
    gm = trace(model, torch.zeros(2, 3, 7, 7, dtype=torch.float64))
    analysis = analyze(gm)
    plan = PruningPlan({g.name: [0, 1] for g in analysis.groups})
    pruned = rewrite(gm, analysis, plan)
    for size in (7, 8, 10, 13):
        x = torch.zeros(1, 3, size, size, dtype=torch.float64)
        require_equal(apply_mask(gm, analysis, plan), pruned, x)


def test_channels_changed_in_place_through_a_view_are_frozen() -> None:
    analysis = analyze(trace(ThroughView(), torch.zeros(2, 3, 7, 7)))
    assert not analysis.groups
    assert "changed in place by" in analysis.frozen[0].reason
