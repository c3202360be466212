"""Pruned networks to save, without training: every group of a model loses half of its units."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torchvision.models import VisionTransformer

from rbpfx import Figures, PruningPlan, PruningResult, Report, analyze, rewrite, trace
from rbpfx.graph.capture import call_with, evaluating
from rbpfx.saving.origin import Origin
from rbpfx.saving.schema import checksum


def halved(model: nn.Module, inputs: Any, leaf_modules: Any = (), **options: str) -> PruningResult:
    """What `prune` returns, of a plan that keeps every other unit."""
    options = {"unit": "channel", "attention": "heads", "normalization": "freeze", **options}
    gm = trace(model, inputs, leaf_modules=leaf_modules)
    analysis = analyze(gm, **options)
    plan = PruningPlan({g.name: range(0, g.size, 2) for g in analysis.groups})
    figures = Figures(1, 1, {1: float("inf")})
    report = Report(
        method="magnitude",
        dense=figures,
        pruned=figures,
        widths={g.name: (g.size, len(plan.kept[g.name])) for g in analysis.groups},
        verification_error=0.0,
        target=None,
        frozen={},
        accuracy_after_cut=None,
        device="cpu",
        seconds=0.0,
    )
    origin = Origin.of(model, gm, inputs, leaf_modules, **options)
    return PruningResult(
        rewrite(gm, analysis, plan), plan, report, gm, analysis, None, None, origin
    )


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    with evaluating(model), torch.no_grad():
        return [leaf for leaf in tree_leaves(call_with(model, inputs)) if isinstance(leaf, Tensor)]


def same(model: nn.Module, other: nn.Module, inputs: Any) -> bool:
    """Whether two networks compute the same, bit for bit."""
    pairs = zip(outputs(model, inputs), outputs(other, inputs), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def edit_plan(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change plan.json as somebody would who knows the format: with a checksum that fits."""
    file = directory / "plan.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(sealed(content))


def edit_weights(directory: Path, content: bytes) -> None:
    """Put other weights in the place of the saved ones, and say so in plan.json."""
    (directory / "weights.safetensors").write_bytes(content)
    stamp = [hashlib.sha256(content).hexdigest(), len(content)]
    edit_plan(directory, lambda plan: plan["files"].update({"weights.safetensors": stamp}))


def sealed(content: Any) -> str:
    """The text of a plan with a checksum that fits."""
    if isinstance(content, dict):
        content = {k: v for k, v in content.items() if k != "checksum"}
        content["checksum"] = checksum(content)
    return json.dumps(content)


class Doubling(nn.Module):
    """A layer that can be kept whole."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.width = width
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x)


class Custom(nn.Module):
    """Numbered modules, a parameter and a constant of its own, a list of inputs."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, width), nn.Linear(width, width)])
        self.scale = nn.Parameter(torch.rand(width))
        self.register_buffer("offset", torch.rand(1, width), persistent=False)
        self.doubling = Doubling(width)
        self.head = nn.Sequential(nn.Linear(width, 6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 2))

    def forward(self, pair: list[Tensor], gain: float = 1.0) -> dict[str, Tensor]:
        x = self.layers[1](F.relu(self.layers[0](pair[0] + pair[1])))
        return {"scores": self.head(self.doubling(gain * self.scale * x + self.offset))}


class Tied(nn.Module):
    """A head that is the embedding."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.hidden = nn.Linear(width, 2 * width)
        self.out = nn.Linear(2 * width, width)
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.out(F.gelu(self.hidden(self.embedding(ids)))))


def small_vit() -> nn.Module:
    return VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=10)
