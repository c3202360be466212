"""The layout of the coupling graph."""

from __future__ import annotations

import random

import pytest
import torch
from torchvision.models import resnet50

import rbpfx
from rbpfx.reporting.layout import ROW, detour, edges, place


def test_groups_lie_below_what_they_are_computed_from() -> None:
    rng = random.Random(0)
    names = [f"g{i}" for i in range(40)]
    coupling = {name: rng.sample(names, 3) for name in names}
    placed = place(names, coupling)
    assert placed.keys() == set(names)
    for source, target in edges(names, coupling):
        if names.index(source) < names.index(target):
            assert placed[source][1] < placed[target][1]
    assert len(set(placed.values())) == len(names)  # no two in one place


def test_rows_are_short() -> None:
    names = [f"head{i}" for i in range(2 * ROW + 1)]
    placed = place(names, {})
    for row in range(3):
        xs = [x for x, y in placed.values() if y == row]
        assert 1 <= len(xs) <= ROW
        assert sum(xs) == pytest.approx(0)


def test_edges_to_nowhere_and_to_itself_are_no_edges() -> None:
    assert edges(["a", "b"], {"a": ("a", "b", "gone"), "gone": ("a",)}) == [("a", "b")]


def test_arrows_pass_between_groups() -> None:
    assert detour((0.0, 0), (0.0, 2), [(0.0, 0), (-0.5, 1), (0.5, 1), (0.0, 2)]) == 0
    assert (
        abs(detour((0.0, 0), (0.0, 2), [(0.0, 0), (-1.0, 1), (0.0, 1), (1.0, 1), (0.0, 2)])) == 0.5
    )


def test_resnet50_fits_on_a_page() -> None:
    with torch.device("meta"):
        model = resnet50()
    model = model.to_empty(device="cpu").eval()
    analysis = rbpfx.analyze(rbpfx.trace(model, torch.zeros(1, 3, 64, 64)))
    placed = place([g.name for g in analysis.groups], dict(analysis.graph.adj.items()))
    assert max(row for _, row in placed.values()) < 15
    assert max(x for x, _ in placed.values()) <= (ROW - 1) / 2
