"""The timing of both sides, and how it grows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import analysis


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 1000, 1)).eval()


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    def failing(model: nn.Module, image: Tensor) -> dict[str, Any]:
        raise RuntimeError("the peer's trouble\nmore of it")

    monkeypatch.setattr(analysis, "peer", failing)
    monkeypatch.setattr(analysis, "classifier", lambda name: (net(), torch.randn(1, 3, 8, 8)))
    found: dict[str, Any] = {}
    analysis.compare(("net", 2), found.update)
    return found


def test_the_best_turn_counts(row: dict[str, Any]) -> None:
    ours = row["ours"]
    assert ours["total"] == pytest.approx(
        ours["trace"] + ours["analyze"] + ours["rewrite"], abs=3e-4
    )
    assert ours["parameters"] < sum(p.numel() for p in net().parameters())


def test_a_peer_that_fails_is_told(row: dict[str, Any]) -> None:
    assert row["peer_error"] == "RuntimeError: the peer's trouble"
    assert "ratio" not in row
    assert "the peer's trouble" in analysis.table({"net": row})
    assert "1 models, 1 done here, 0 by the peer" in analysis.summary({"net": row})


def test_a_peer_that_hangs_is_told() -> None:
    row = {"ours": {"total": 1.0, "analyze": 0.1}, "running": "peer", "failure": "time limit"}
    assert analysis._trouble(row, "peer") == "time limit"


def test_the_peer_prunes() -> None:
    pytest.importorskip("torch_pruning")
    model = net()
    result = analysis.peer(model, torch.randn(1, 3, 8, 8))
    assert result["parameters"] < sum(p.numel() for p in model.parameters())


def test_ratios_are_summed_up() -> None:
    rows = {
        name: {"ours": {"analyze": 0.01}, "peer": {}, "ratio": ratio}
        for name, ratio in {"densenet": 20.0, "resnet": 2.0, "vgg": 3.0}.items()
    }
    told = analysis.summary(rows)
    assert "slowest analysis 10 ms" in told
    assert "all: median 3.0x, 2.0x to 20.0x" in told
    assert "DenseNets: median 20.0x" in told


@pytest.mark.parametrize(
    ("name", "groups"), [("residual-20", 11), ("dense-20", 20), ("wide-8", 11)]
)
def test_synthetic_networks_grow(name: str, groups: int) -> None:
    row: dict[str, Any] = {}
    analysis.measure_growth((name, 1), row.update)
    assert row["analyze"] > 0
    assert row["rewrite"] > 0
    found = analysis.rbpfx.analyze(
        analysis.rbpfx.trace(analysis.synthetic(name), torch.randn(1, 3, 8, 8))
    )
    assert len(found.groups) >= groups
    assert name in analysis.growth_table({name: row})
