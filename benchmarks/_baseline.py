"""The baseline: magnitude pruning on the same groups, the same cut, the same fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from rbpfx import FineTune, PruningPlan, analyze, apply_mask, count_macs, rewrite, trace, verify
from rbpfx.graph.groups import Analysis
from rbpfx.training.budget import cut
from rbpfx.training.finetune import finetune
from rbpfx.training.loop import refresh_batchnorm
from rbpfx.training.task import Task


@dataclass(frozen=True)
class BaselineResult:
    """A network pruned by magnitude.

    Attributes:
        model: The emitted network.
        plan: What was kept.
        macs: Multiply-accumulates of the dense and of the pruned network.
        accuracy_after_cut: Before fine-tuning, with BatchNorm refreshed.
        accuracy: After it.
        verification_error: Sliced against masked.
    """

    model: nn.Module
    plan: PruningPlan
    macs: tuple[int, int]
    accuracy_after_cut: float
    accuracy: float
    verification_error: float


def group_norms(gm: nn.Module, analysis: Analysis) -> dict[str, np.ndarray[Any, Any]]:
    """L2 norm of everything that would go with each unit, over the axes of all weights it is on.

    As Torch-Pruning's GroupNorm importance: the rows of producers and the columns at the reads
    count alike (Fang et al., DepGraph, CVPR 2023).
    """
    squares = np.zeros(len(analysis.channel))
    parameters = dict(gm.named_parameters())
    for (name, dim), atoms in analysis.axes.items():
        if name in parameters and parameters[name].ndim > 1:
            weight = parameters[name].detach().double()
            others = [d for d in range(weight.ndim) if d != dim]
            np.add.at(squares, analysis.channel[atoms], weight.square().sum(others).numpy())
    return {g.name: np.sqrt(squares[g.channels]) for g in analysis.groups}


def uniform_ranks(norms: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """Rank within the group as a share, so that one threshold keeps the same share everywhere."""
    return {name: (n.argsort().argsort() + 0.5) / len(n) for name, n in norms.items()}


def prune_by_magnitude(
    model: nn.Module,
    loader: Any,
    test_loader: Any,
    share: float,
    recovery: FineTune,
    *,
    distill: bool,
    seed: int,
) -> BaselineResult:
    """Cut the smallest norms, the same share of every group, and fine-tune.

    Args:
        model: A trained network; left untouched.
        loader: Training batches.
        test_loader: Test batches.
        share: Share of the multiply-accumulates to keep.
        recovery: The fine-tuning: give it all the epochs that the other method has.
        distill: Whether to learn from the dense network, as the other method does.
        seed: Seed of the training.
    """
    torch.manual_seed(seed)
    task = Task()
    inputs = next(iter(loader))[0]
    gm = trace(model, inputs)
    analysis = analyze(gm)
    plan = cut(analysis, uniform_ranks(group_norms(gm, analysis)), share)
    pruned = rewrite(gm, analysis, plan)
    error = verify(apply_mask(gm, analysis, plan), pruned, inputs[:2])
    refresh_batchnorm(pruned, loader, task)
    after_cut = task.accuracy(pruned, test_loader)
    finetune(pruned, loader, task, recovery, model.eval() if distill else None)
    accuracy = task.accuracy(pruned, test_loader)
    macs = (count_macs(gm), count_macs(pruned))
    return BaselineResult(pruned, plan, macs, after_cut, accuracy, error)
