"""Gates: one draw per group and call, multiplied in at every read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rbpfx.errors import PlanError, RbpfxError
from rbpfx.graph.capture import trace
from rbpfx.graph.gates import ConstantGate, apply_mask, channel_multiplier, insert_gates
from rbpfx.graph.groups import analyze
from rbpfx.graph.products import multiply
from rbpfx.plan import PruningPlan
from tests.graph.laws import Snapshot


class RandomGate(nn.Module):
    """Counts its calls and keeps what it drew."""

    def __init__(self, size: int, like: str = "examples") -> None:
        super().__init__()
        self.size = size
        self.calls = 0
        self.references: list[Tensor | None] = []
        self.drawn = torch.zeros(0)

    def forward(self, reference: Tensor | None) -> Tensor:
        self.calls += 1
        self.references.append(reference)
        rows = 1 if reference is None else reference.shape[0]
        self.drawn = torch.rand(rows, self.size, dtype=torch.float64)
        return self.drawn


class TwoReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.a = nn.Conv2d(4, 2, 1)
        self.b = nn.Conv2d(4, 2, 3, padding=1)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y: Tensor = self.a(x) + self.b(torch.sigmoid(x)) + self.fc(x.mean((2, 3)))[:, :, None, None]
        return y


def test_all_reads_share_one_draw_per_example() -> None:
    model = TwoReaders().double()
    x = torch.randn(3, 3, 5, 5, dtype=torch.float64)
    gm = trace(model, x)
    analysis = analyze(gm)
    gate = RandomGate(4)
    gated = insert_gates(gm, analysis, {"stem": gate})
    y = gated(x)
    assert gate.calls == 1 and gate.drawn.shape == (3, 4)
    noise = gate.drawn[:, :, None, None]
    h = model.stem(x)
    expected = model.a(h * noise) + model.b(h.sigmoid() * noise)
    expected = expected + model.fc(h.mean((2, 3)) * gate.drawn)[:, :, None, None]
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    gated(x[:2])
    assert gate.calls == 2 and gate.drawn.shape == (2, 4)


@pytest.mark.parametrize("length", [5, 3])
def test_one_draw_per_call_where_axis_0_holds_no_examples(length: int) -> None:
    """As many steps as examples must not be taken for examples."""

    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 4)
            self.b = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(self.a(x).transpose(0, 1))
            return y

    gm = trace(TimeFirst().double(), torch.zeros(3, length, 3))
    before = [node.meta["val"] for node in gm.graph.nodes]
    gate = RandomGate(4)
    gated = insert_gates(gm, analyze(gm), {"a": gate})
    assert all(n.meta["val"] is v for n, v in zip(gm.graph.nodes, before, strict=True))
    gated(torch.randn(2, length, 3, dtype=torch.float64))
    assert gate.references == [None] and gate.drawn.shape == (1, 4)


def test_gates_of_several_groups_meet_at_one_read() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 3, 1)
            self.b = nn.Conv2d(3, 2, 1)
            self.head = nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(torch.cat([self.b(x), x, self.a(x)], 1))
            return y

    model = Joined().double()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    gm = trace(model, x)
    gates = {"a": RandomGate(3), "b": RandomGate(2)}
    y = insert_gates(gm, analyze(gm), gates)(x)
    noise = [gates[name].drawn[:, :, None, None] for name in ("b", "a")]
    expected = model.head(torch.cat([model.b(x) * noise[0], x, model.a(x) * noise[1]], 1))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_a_value_changed_in_place_between_two_reads() -> None:
    class Changed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(3, 4)
            self.a = nn.Linear(4, 2)
            self.b = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            first = self.a(x)
            F.relu(x, inplace=True)
            y: Tensor = first + self.b(x)
            return y

    model = Changed().double()
    x = torch.randn(5, 3, dtype=torch.float64)
    gm = trace(model, x)
    analysis = analyze(gm)
    with torch.no_grad():
        whole = apply_mask(gm, analysis, PruningPlan({"stem": range(4)}))
        torch.testing.assert_close(whole(x), model(x), rtol=1e-12, atol=1e-12)


def test_shared_reads_are_multiplied_once() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 1)
            self.a = nn.Conv2d(4, 2, 1)
            self.b = nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            y: Tensor = self.a(x) + self.b(x)
            return y

    gm = trace(Shared(), torch.zeros(2, 3, 4, 4))
    analysis = analyze(gm)
    masked = apply_mask(gm, analysis, PruningPlan({"stem": [0]}))
    products = [n for n in masked.graph.nodes if n.target is multiply]
    assert len(products) == 1 and len(products[0].users) == 2


def test_gates_leave_the_graph_alone() -> None:
    gm = trace(TwoReaders(), torch.zeros(2, 3, 4, 4))
    analysis = analyze(gm)
    before = Snapshot.of(gm)
    gated = insert_gates(gm, analysis, {"stem": ConstantGate(torch.ones(4))})
    before.check(gm)
    with pytest.raises(RbpfxError, match="has gates already"):
        insert_gates(gated, analysis, {})
    with pytest.raises(PlanError, match="no channel group"):
        insert_gates(gm, analysis, {"fc": ConstantGate(torch.ones(2))})


def test_names_that_differ_by_a_dot_only() -> None:
    model = nn.Sequential()
    model.add_module("a_b", nn.Linear(3, 4))
    model.add_module("a", nn.Sequential())
    model.a.add_module("b", nn.Linear(4, 5))
    model.add_module("head", nn.Linear(5, 2))
    gm = trace(model, torch.zeros(2, 3))
    analysis = analyze(gm)
    assert [g.name for g in analysis.groups] == ["a_b", "a.b"]
    masked = apply_mask(gm, analysis, PruningPlan({"a_b": [1], "a.b": [2, 3]}))
    sizes = [len(g.multipliers) for g in masked.modules() if isinstance(g, ConstantGate)]
    assert sizes == [4, 5]


def test_masks_have_the_dtype_of_the_model() -> None:
    gm = trace(TwoReaders().bfloat16(), torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16))
    masked = apply_mask(gm, analyze(gm), PruningPlan({"stem": [0]}))
    assert masked(torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_multipliers_are_laid_out_along_the_axis() -> None:
    first, second = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]])
    index = torch.tensor([2, 0, 3, 1])  # second gate, first gate, nobody, first gate
    result = channel_multiplier([first, second], index, 2, 4)
    assert result.shape == (2, 1, 4, 1)
    assert result[:, 0, :, 0].tolist() == [[3, 1, 1, 2], [4, 1, 1, 2]]
    assert channel_multiplier([first], None, 0, 3).shape == (2, 1, 1)
