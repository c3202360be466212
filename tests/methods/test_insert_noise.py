"""Noise in the graph: one draw for all reads, means in eval mode, hardened means fold away."""

import pytest
import torch
from torch import nn

from rbpfx import (
    PruningPlan,
    RbpfxError,
    analyze,
    insert_noise,
    noise_gates,
    rewrite,
    trace,
)
from rbpfx.graph.verification import difference
from rbpfx.methods import Phase


class Shortcut(nn.Module):
    """A stream read by two blocks and the head, with an inner group."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.inner = nn.Conv2d(6, 4, 3, padding=1)
        self.outer = nn.Conv2d(4, 6, 3, padding=1)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        x = torch.sigmoid(self.stem(x))
        x = x + self.outer(torch.sigmoid(self.inner(x)))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def captured():
    torch.manual_seed(0)
    gm = trace(Shortcut(), torch.zeros(5, 3, 8, 8))
    return gm, analyze(gm)


def test_one_sampling_node_per_group_and_one_draw_per_call(captured) -> None:
    gm, analysis = captured
    noisy = insert_noise(gm, analysis, "rbp").train()
    calls: dict[str, list[torch.Tensor]] = {}
    for gate in noise_gates(noisy):
        gate.register_forward_hook(lambda g, _, out: calls.setdefault(g.group, []).append(out))
    noisy(torch.randn(5, 3, 8, 8))
    assert set(calls) == {"stem", "inner"}
    assert all(len(draws) == 1 for draws in calls.values())
    assert calls["stem"][0].shape == (5, 6)
    assert len(torch.unique(calls["stem"][0])) == 30


def test_eval_mode_uses_the_means(captured) -> None:
    gm, analysis = captured
    noisy = insert_noise(gm, analysis, "rbp").eval()
    x = torch.randn(5, 3, 8, 8)
    assert torch.equal(noisy(x), noisy(x))


def test_waiting_noise_changes_nothing(captured) -> None:
    gm, analysis = captured
    noisy = insert_noise(gm, analysis, "rbp").train()
    for gate in noise_gates(noisy):
        gate.phase = Phase.WAITING
    x = torch.randn(5, 3, 8, 8)
    assert torch.allclose(noisy(x), gm.train()(x), atol=1e-6)


def test_only_the_named_groups_get_noise(captured) -> None:
    gm, analysis = captured
    noisy = insert_noise(gm, analysis, "rbp", groups=["inner"])
    assert [gate.group for gate in noise_gates(noisy)] == ["inner"]


@pytest.mark.parametrize("unit", ["channel", "feature"])
def test_hardened_noise_equals_the_emitted_network(unit: str) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3),
        nn.Sigmoid(),
        nn.Conv2d(6, 4, 3, groups=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(4 * 16, 10),
        nn.ReLU(),
        nn.Linear(10, 3),
    ).double()
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    gm = trace(model, x)
    analysis = analyze(gm, unit=unit)
    noisy = insert_noise(gm, analysis, "rbp")
    plan, means = {}, {}
    for gate in noise_gates(noisy):
        with torch.no_grad():
            gate.gate_logit.normal_()
        keep = torch.rand(gate.size) < 0.6
        keep[0] = True
        means[gate.group] = gate.mean().detach()
        plan[gate.group] = keep.nonzero().flatten().tolist()
        gate.harden(keep)
    emitted = rewrite(gm, analysis, PruningPlan(plan), multipliers=means)
    assert difference(noisy.eval()(x), emitted.eval()(x)) < 1e-12
    assert difference(noisy.train()(x), emitted.train()(x)) < 1e-12


def test_an_unknown_method_is_named() -> None:
    gm = trace(Shortcut(), torch.zeros(2, 3, 8, 8))
    with pytest.raises(RbpfxError, match="no method is called 'rpb'; there are: rbp"):
        insert_noise(gm, analyze(gm), "rpb")
