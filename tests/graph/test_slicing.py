"""What the rewrite emits: small modules, the same names, nothing else changed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rbpfx.errors import PlanError, RuleError
from rbpfx.graph.capture import trace
from rbpfx.graph.gates import apply_mask
from rbpfx.graph.groups import analyze
from rbpfx.graph.rules import base
from rbpfx.graph.rules.elementwise import ELEMENTWISE
from rbpfx.graph.slicing import kept_indices, rewrite
from rbpfx.graph.verification import verify
from rbpfx.plan import PruningPlan
from tests.graph.laws import Snapshot, assert_close


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.PReLU(8)
        self.depthwise = nn.Conv2d(8, 16, 3, groups=8)
        self.up = nn.ConvTranspose2d(16, 6, 2, stride=2)
        self.fc = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.depthwise(self.act(self.norm(self.conv(x)))))
        y: Tensor = self.fc(x.mean((2, 3)))
        return y


PLAN = PruningPlan({"conv": [1, 4, 7], "up": [0, 5]})


def test_modules_show_their_new_sizes() -> None:
    gm = trace(Net(), torch.zeros(2, 3, 6, 6))
    pruned = rewrite(gm, analyze(gm), PLAN)
    assert str(pruned.get_submodule("conv")) == (
        "Conv2d(3, 3, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))"
    )
    assert "BatchNorm2d(3," in str(pruned)
    assert "PReLU(num_parameters=3)" in str(pruned)
    assert "Conv2d(3, 6, kernel_size=(3, 3), stride=(1, 1), groups=3)" in str(pruned)
    assert "ConvTranspose2d(6, 2," in str(pruned)
    assert "Linear(in_features=2, out_features=2" in str(pruned)
    assert pruned.state_dict().keys() == gm.state_dict().keys()
    (conv,) = (n for n in pruned.graph.nodes if n.target == "conv")
    assert tuple(conv.meta["val"].shape) == (2, 3, 6, 6)


def test_nothing_is_modified() -> None:
    model = Net()
    gm = trace(model, torch.zeros(2, 3, 6, 6))
    analysis = analyze(gm)
    snapshots = Snapshot.of(model), Snapshot.of(gm)
    pruned = rewrite(gm, analysis, PLAN)
    pruned(torch.randn(2, 3, 6, 6)).sum().backward()
    snapshots[0].check(model)
    snapshots[1].check(gm)
    assert all(p.grad is None for p in gm.parameters())
    storages = {p.untyped_storage().data_ptr() for p in gm.parameters()}
    assert not storages & {p.untyped_storage().data_ptr() for p in pruned.parameters()}


def test_flags_of_parameters_and_modules_are_kept() -> None:
    model = Net().train()
    model.conv.weight.requires_grad_(False)
    model.fc.bias.requires_grad_(False)
    model.norm.eval()
    gm = trace(model, torch.zeros(2, 3, 6, 6))
    pruned = rewrite(gm, analyze(gm), PLAN)
    flags = {name: p.requires_grad for name, p in pruned.named_parameters()}
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    assert pruned.get_submodule("conv").training and not pruned.get_submodule("norm").training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_kept(dtype: torch.dtype) -> None:
    gm = trace(Net().to(dtype), torch.zeros(2, 3, 6, 6, dtype=dtype))
    pruned = rewrite(gm, analyze(gm), PLAN, multipliers={"conv": torch.full((8,), 0.5)})
    assert all(p.dtype == dtype for p in pruned.parameters())
    assert pruned.get_buffer("norm.running_mean").dtype == dtype
    assert pruned.get_buffer("norm.num_batches_tracked").dtype == torch.int64


def test_tied_parameters_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(3, 4)
            self.a = nn.Linear(4, 4)
            self.b = nn.Linear(4, 4)
            self.b.weight = self.a.weight
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.b(self.a(self.stem(x))))
            return y

    gm = trace(Tied().double(), torch.zeros(2, 3, dtype=torch.float64))
    analysis = analyze(gm)
    # b reads what a writes and both own one weight: all its channels are one group.
    assert [g.name for g in analysis.groups] == ["stem"]
    plan = PruningPlan({"stem": [0, 3]})
    pruned = rewrite(gm, analysis, plan)
    a, b = (pruned.get_submodule(n).weight for n in "ab")
    assert a is b and a.shape == (2, 2)
    assert verify(apply_mask(gm, analysis, plan), pruned, torch.zeros(2, 3)) < 1e-12


def test_a_copy_with_other_values_can_be_rewritten() -> None:
    gm = trace(Net().double(), torch.zeros(2, 3, 6, 6, dtype=torch.float64))
    analysis = analyze(gm)
    other = copy.deepcopy(gm)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    pruned = rewrite(other, analysis, PLAN)
    assert verify(apply_mask(other, analysis, PLAN), pruned, torch.zeros(2, 3, 6, 6)) < 1e-12
    torch.testing.assert_close(
        pruned.get_parameter("conv.weight"), other.get_parameter("conv.weight")[[1, 4, 7]]
    )


def test_kept_indices() -> None:
    gm = trace(Net(), torch.zeros(2, 3, 6, 6))
    analysis = analyze(gm)
    kept = kept_indices(analysis, analysis.keep(PLAN))
    assert {n: sorted(d) for n, d in kept.items()} == {
        "conv.weight": [0],
        "conv.bias": [0],
        "norm.running_mean": [0],
        "norm.running_var": [0],
        "norm.weight": [0],
        "norm.bias": [0],
        "act.weight": [0],
        "depthwise.weight": [0],
        "depthwise.bias": [0],
        "up.weight": [0, 1],
        "up.bias": [0],
        "fc.weight": [1],
    }
    assert kept["depthwise.weight"][0].tolist() == [2, 3, 8, 9, 14, 15]


def test_multipliers_fold_into_the_reads() -> None:
    gm = trace(Net().double(), torch.zeros(2, 3, 6, 6, dtype=torch.float64))
    analysis = analyze(gm)
    values = {"conv": torch.linspace(0.5, 2, 8), "up": torch.linspace(-1, 1, 6)}
    masked = apply_mask(gm, analysis, PLAN, multipliers=values)
    pruned = rewrite(gm, analysis, PLAN, multipliers=values)
    assert verify(masked, pruned, torch.zeros(2, 3, 6, 6)) < 1e-12


def test_multipliers_that_cannot_be_folded() -> None:
    class Autoencoder(nn.Module):
        """The weight contracts along one axis here and along the other one there."""

        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(3, 4)
            self.weight = nn.Parameter(torch.randn(5, 4))

        def forward(self, x: Tensor) -> Tensor:
            hidden = F.linear(self.stem(x), self.weight).relu()
            return F.linear(hidden, self.weight.t())

    gm = trace(Autoencoder(), torch.zeros(2, 3))
    analysis = analyze(gm)
    (group,) = (g for g in analysis.groups if not g.foldable)
    with pytest.raises(PlanError, match="cannot be folded"):
        rewrite(gm, analysis, PruningPlan({}), multipliers={group.name: torch.rand(group.size)})
    rewrite(gm, analysis, PruningPlan({}), multipliers={group.name: torch.ones(group.size)})


def test_shared_modules_without_parameters_get_a_copy_each() -> None:
    class SharedPad(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pad = nn.ConstantPad1d((1, 1), 0.5)
            self.a = nn.Linear(3, 4)
            self.b = nn.Linear(6, 4)
            self.head = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.b(self.pad(self.a(x)[:, :, None].squeeze(2)))
            y: Tensor = self.head(self.pad(x).tanh()[:, 1:-1].repeat(1, 2)[:, :6])
            return y

    model = SharedPad().double()
    gm = trace(model, torch.zeros(2, 3))
    analysis = analyze(gm)
    plan = PruningPlan({g.name: [0] for g in analysis.groups})
    pruned = rewrite(gm, analysis, plan)
    assert verify(apply_mask(gm, analysis, plan), pruned, torch.zeros(2, 3)) < 1e-12


def test_new_constants_are_no_state() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(36, 2)).double()
    gm = trace(model, torch.zeros(2, 3, 3, 3, dtype=torch.float64))
    analysis = analyze(gm, unit="feature")
    plan = PruningPlan({"0": [0, 2], "2.features": [0, 1, 5, 20, 22, 30]})
    pruned = rewrite(gm, analysis, plan)
    assert pruned.get_submodule("2").in_features == 5
    assert pruned.state_dict().keys() == model.state_dict().keys()
    assert verify(apply_mask(gm, analysis, plan), pruned, torch.zeros(2, 3, 3, 3)) < 1e-12


def test_sizes_keep_their_original_meaning() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 4)
            self.b = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            n, c = x.shape[:2]
            y: Tensor = self.b(x.reshape(n, c) * c**-0.5 / x.size(1) + len(x.shape) * 0.1)
            return y

    class Asked(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            n, c = x.shape[:2]
            y: Tensor = self.b(x.reshape(n, c) * c**-0.5 / x.size(1) * x.shape[-1])
            return y

    model = Asked().double()
    gm = trace(model, torch.zeros(2, 3))
    analysis = analyze(gm)
    plan = PruningPlan({"a": [3]})
    pruned = rewrite(gm, analysis, plan)
    x = torch.randn(5, 3, dtype=torch.float64)
    hidden = F.linear(x, model.a.weight[3:], model.a.bias[3:]) * 4**-0.5 / 4 * 4
    expected = F.linear(hidden, model.b.weight[:, 3:], model.b.bias)
    assert_close(expected, pruned(x), "scaled")


def test_a_rule_that_is_wrong_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 4)
            self.b = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(self.a(x).repeat(1, 2))
            return y

    monkeypatch.setitem(base._REGISTRY, "repeat", ELEMENTWISE)
    gm = trace(Rolled(), torch.zeros(2, 3))
    with pytest.raises(RuleError, match=r"does not fit Tensor\.repeat"):
        analyze(gm)


def test_an_emitted_graph_that_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)), torch.zeros(2, 3, 4, 4))
    analysis = analyze(gm)
    monkeypatch.delitem(analysis.axes, ("1.weight", 1))
    with pytest.raises(RuleError, match="does not run"):
        rewrite(gm, analysis, PruningPlan({"0": [0]}))


def test_a_plan_that_leaves_nothing_of_a_layer_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    gm = trace(model, torch.zeros(2, 1, 4, 4))
    analysis = analyze(gm, unit="feature")
    plan = PruningPlan({"0": [2, 3], "2.features": [0]})
    with pytest.raises(PlanError, match=r"leaves nothing of axis 1 of '2\.weight'"):
        rewrite(gm, analysis, plan)
