"""Groups found by the analysis, checked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rbpfx.errors import PlanError, RbpfxError
from rbpfx.graph.capture import trace
from rbpfx.graph.groups import Analysis, ChannelGroup, analyze
from rbpfx.plan import PruningPlan


def analysed(model: nn.Module, *shape: int, unit: str = "channel") -> Analysis:
    return analyze(trace(model, torch.zeros(*shape)), unit=unit)


def sizes(analysis: Analysis) -> dict[str, int]:
    return {group.name: group.size for group in analysis.groups}


def readers(group: ChannelGroup) -> list[str]:
    return [str(read.node.target) for read in group.reads]


class Block(nn.Module):
    """A ResNet block."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.extra = outputs - inputs
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.extra:
            half = self.extra // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        y += x
        return self.relu(y)


class PaddedResNet(nn.Module):
    """Three stages with padded shortcuts, as ResNet-20 on CIFAR."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 1, 1)
        self.layer1 = nn.Sequential(*(Block(16, 16) for _ in range(blocks)))
        self.layer2 = nn.Sequential(Block(16, 32, 2), *(Block(32, 32) for _ in range(blocks - 1)))
        self.layer3 = nn.Sequential(Block(32, 64, 2), *(Block(64, 64) for _ in range(blocks - 1)))
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        return self.fc(x.mean((2, 3)))


def test_padded_shortcuts_give_three_stage_groups() -> None:
    analysis = analysed(PaddedResNet(), 2, 3, 32, 32)
    inner = {f"layer{s}.{b}.conv1": 8 * 2**s for s in (1, 2, 3) for b in (0, 1)}
    stages = {"stem": 16, "layer2.0.conv2": 16, "layer3.0.conv2": 32}
    assert sizes(analysis) == stages | inner
    stem = analysis.group("stem")
    producers = ["stem", *(f"layer{s}.{b}.conv2" for s in (1, 2, 3) for b in (0, 1))]
    assert list(stem.producers) == producers
    # The first stage is read wherever its channels still flow, also inside later stages.
    blocks = [f"layer{s}.{b}.conv1" for s in (1, 2, 3) for b in (0, 1)]
    assert readers(stem) == [*blocks, "fc"]
    assert readers(analysis.group("layer3.0.conv2")) == ["layer3.1.conv1", "fc"]
    assert readers(analysis.group("layer1.0.conv1")) == ["layer1.0.conv2"]
    assert [(f.name, f.reason) for f in analysis.frozen] == [("fc", "output of the model")]


def test_names_are_those_of_named_modules() -> None:
    model = PaddedResNet()
    names = dict(model.named_modules())
    for group in analysed(model, 2, 3, 32, 32).groups:
        assert group.name in names
        assert all(producer in names for producer in group.producers)
        assert all(reader in names for reader in readers(group))


def test_dense_connections() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 4, 1)
            self.b = nn.Conv2d(4, 5, 1)
            self.norm = nn.BatchNorm2d(9)
            self.c = nn.Conv2d(9, 6, 1)
            self.d = nn.Conv2d(15, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            a = self.a(x)
            b = self.b(a)
            c = self.c(torch.relu(self.norm(torch.cat([a, b], 1))))
            y: Tensor = self.d(torch.cat([a, b, c], 1))
            return y

    analysis = analysed(Dense(), 2, 3, 4, 4)
    assert sizes(analysis) == {"a": 4, "b": 5, "c": 6}
    assert readers(analysis.group("a")) == ["b", "c", "d"]
    assert readers(analysis.group("b")) == ["c", "d"]
    assert sorted(analysis.graph.edges) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert analysis.graph.nodes["b"]["size"] == 5


def test_a_unit_of_a_grouped_convolution_is_a_position_in_every_group() -> None:
    model = nn.Sequential(nn.Conv2d(3, 12, 1), nn.Conv2d(12, 8, 1, groups=4), nn.Conv2d(8, 2, 1))
    analysis = analysed(model, 2, 3, 4, 4)
    assert sizes(analysis) == {"0": 3, "1": 2}
    keep = analysis.keep(PruningPlan({"0": [0, 2]}))
    np.testing.assert_array_equal(
        np.flatnonzero(keep[analysis.axes["0.weight", 0]]), [0, 2, 3, 5, 6, 8, 9, 11]
    )


def test_depthwise_convolutions_belong_to_the_group_before() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)
    )
    analysis = analysed(model, 2, 3, 4, 4)
    assert sizes(analysis) == {"0": 4}
    assert readers(analysis.group("0")) == ["3"]


def test_attention_gates_join_the_channels_they_scale() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)
            self.down = nn.Conv2d(8, 4, 1)
            self.up = nn.Conv2d(4, 8, 1)
            self.head = nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            gate = self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))).sigmoid()
            y: Tensor = self.head(x * gate)
            return y

    analysis = analysed(Gated(), 2, 3, 4, 4)
    assert sizes(analysis) == {"conv": 8, "down": 4}
    assert analysis.group("conv").producers == ("conv", "up")
    assert readers(analysis.group("conv")) == ["down", "head"]


def test_channels_that_part_ways_are_groups_of_their_own() -> None:
    """Otherwise a plan could leave one of the ways without a channel."""

    class Parting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 1)
            self.left = nn.Conv2d(3, 2, 1)
            self.right = nn.Conv2d(5, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            left, right = self.stem(x).split([3, 5], 1)
            y: Tensor = self.left(left) + self.right(right)
            return y

    analysis = analysed(Parting(), 2, 3, 4, 4)
    assert sizes(analysis) == {"stem": 3, "stem#2": 5}


@pytest.mark.parametrize("unit", ["channel", "feature"])
def test_flattened_features(unit: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(36, 2))
    analysis = analysed(model, 2, 3, 3, 3, unit=unit)
    expected = {"0": 4} if unit == "channel" else {"0": 4, "2.features": 36}
    assert sizes(analysis) == expected


def test_units_must_be_known() -> None:
    gm = trace(nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(RbpfxError, match="'channel', 'feature'"):
        analyze(gm, unit="filter")


def test_a_graph_without_metadata() -> None:
    gm = torch.fx.symbolic_trace(nn.Linear(2, 2))
    with pytest.raises(RbpfxError, match=r"rbpfx\.trace"):
        analyze(gm)


class Frozen(nn.Module):
    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.last = last
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.last(self.conv(x)))
        return y


class Picks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x[:, 1].unsqueeze(1)


class Compares(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.amax(1, keepdim=True)


class Renorms(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.renorm(2, 1, 1.0)


@pytest.mark.parametrize(
    ("last", "reason", "unknown"),
    [
        (Picks(), "picked by its number", {}),
        (Compares(), "Tensor.amax over channels ('amax')", {}),
        (Renorms(), "no rule for Tensor.renorm", {"renorm": "Tensor.renorm"}),
        (nn.GroupNorm(1, 4), "GroupNorm over channels ('last')", {}),
    ],
)
def test_frozen_axes_say_why(last: nn.Module, reason: str, unknown: dict[str, str]) -> None:
    analysis = analysed(Frozen(last), 2, 3, 4, 4)
    (conv,) = (axis for axis in analysis.frozen if axis.name == "conv")
    assert reason in conv.reason
    assert conv.channels == (1 if "picked" in reason else 4) and conv.size == 4
    assert analysis.unknown == unknown


def test_a_single_unit_is_frozen() -> None:
    analysis = analysed(nn.Sequential(nn.Conv2d(3, 1, 1), nn.Conv2d(1, 2, 1)), 2, 3, 4, 4)
    assert not analysis.groups
    assert analysis.frozen[0].reason == "no other unit like it"


def test_macs_per_unit_where_a_group_is_read_and_written_by_one_layer() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 1)
            self.inner = nn.Conv2d(4, 4, 1)
            self.head = nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            y: Tensor = self.head(x + self.inner(x))
            return y

    (group,) = analysed(Loop(), 2, 3, 5, 5).groups
    assert group.macs_per_unit == 25 * (3 + (16 - 9) + 2)


def test_foldable_only_where_every_weight_can_absorb() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(3, 4)
            self.weight = nn.Parameter(torch.randn(5, 4))
            self.head = nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = F.linear(self.stem(x), self.weight)
            back = F.linear(hidden, self.weight.t())
            y: Tensor = self.head(hidden) + back[:, :2]
            return y

    class Bare(Tied):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(F.linear(self.stem(x), self.weight))
            return y

    assert not any(g.foldable for g in analysed(Tied(), 2, 3).groups if g.name == "stem")
    assert all(g.foldable for g in analysed(Bare(), 2, 3).groups)


def test_plans_that_do_not_fit() -> None:
    analysis = analysed(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), 2, 3)
    with pytest.raises(PlanError, match="no channel group is called 'x'; this network has: 0"):
        analysis.keep(PruningPlan({"x": [0]}))
    with pytest.raises(PlanError, match="unit 4 of group '0', which has units 0 to 3"):
        analysis.keep(PruningPlan({"0": [0, 4]}))


def test_gather_spreads_values_over_atoms() -> None:
    analysis = analysed(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), 2, 3)
    spread = analysis.gather({"0": np.array([1.0, 2.0, 3.0, 4.0])})
    assert spread[analysis.axes["0.weight", 0]].tolist() == [1, 2, 3, 4]
    assert spread[analysis.axes["1.weight", 1]].tolist() == [1, 2, 3, 4]
    assert spread[analysis.axes["1.weight", 0]].tolist() == [1, 1]


def test_close_removes_what_is_useless_in_rounds() -> None:
    class TwoReaders(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 3, 1)
            self.a = nn.Linear(12, 2)
            self.b = nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            y: Tensor = self.a(x.flatten(1)) + self.b(x.relu().flatten(1))
            return y

    analysis = analysed(TwoReaders(), 2, 1, 2, 2, unit="feature")
    assert sizes(analysis) == {"conv": 3, "a.features": 12, "b.features": 12}
    # Channel 0 is dead for both readers; channel 1 for one of them only.
    plan = PruningPlan({"a.features": range(8, 12), "b.features": range(4, 12)})
    closed = analysis.close(plan)
    assert closed.kept == {
        "conv": (1, 2),
        "a.features": tuple(range(8, 12)),
        "b.features": tuple(range(4, 12)),
    }
    gone = analysis.close(PruningPlan({"conv": [2]}))
    assert gone.kept["a.features"] == gone.kept["b.features"] == tuple(range(8, 12))


def test_analysis_in_words() -> None:
    analysis = analysed(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), 2, 3)
    assert repr(analysis) == "Analysis(1 groups, 4 units, 1 frozen axes)"
    assert repr(analysis.groups[0]) == "ChannelGroup('0', size=4, reads=1)"
