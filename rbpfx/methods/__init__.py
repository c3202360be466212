"""Methods: what is learnt of a group's units, and which of them are redundant."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from rbpfx.errors import RbpfxError
from rbpfx.graph.gates import insert_gates
from rbpfx.graph.groups import Analysis
from rbpfx.methods.auto_balanced import AutoBalanced
from rbpfx.methods.base import Gate, Method, NoiseGate, Phase
from rbpfx.methods.bmrs import BMRSN, BMRSU
from rbpfx.methods.mackay import MacKay
from rbpfx.methods.rankings import BatchNormScale, Magnitude, Random, Taylor
from rbpfx.methods.rbp import RBP
from rbpfx.methods.sbp import SBP
from rbpfx.methods.weights import UnitWeights, in_scope
from rbpfx.surroundings import usual_modes

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        RBP,
        SBP,
        BMRSN,
        BMRSU,
        MacKay,
        AutoBalanced,
        Magnitude,
        BatchNormScale,
        Taylor,
        Random,
    )
}
"""Name -> class of the methods that rbpfx comes with; each can be made without arguments."""


def find_method(method: str | Method) -> Method:
    """A method by name, or the object itself.

    Raises:
        RbpfxError: No method has that name, or the object has none.
    """
    if isinstance(method, Method):
        if not isinstance(getattr(method, "name", None), str):
            kind = type(method).__name__
            raise RbpfxError(f"{kind} has no name for the report: give the class one, name = '...'")
        return method
    if isinstance(method, type) and issubclass(method, Method):
        prefix = "rbpfx." if METHODS.get(getattr(method, "name", "")) is method else ""
        raise RbpfxError(
            f"method is the class {method.__name__}; give method={prefix}{method.__name__}(), or "
            "its name"
        )
    if not isinstance(method, str) or method not in METHODS:
        raise RbpfxError(f"no method is called {method!r}; there are: {', '.join(METHODS)}")
    return METHODS[method]()


@usual_modes()
def insert_noise(
    gm: nn.Module,
    analysis: Analysis,
    method: str | Method = "rbp",
    *,
    groups: Iterable[str] | None = None,
) -> nn.Module:
    """Insert trainable noise: one sampling node per group, a multiplication at every read.

    Args:
        gm: The analysed graph.
        analysis: What `rbpfx.analyze` found.
        method: A method's name or a method.
        groups: Names of the groups that get noise; all of them by default.

    Returns:
        A new graph. In train mode every group's multipliers are drawn once per example and call
        and used at all reads; in eval mode they are the posterior means. `noise_gates` lists the
        gates.

    Raises:
        RbpfxError: No method has that name, or it cannot rank a group.
        PlanError: No group has that name.
    """
    method = find_method(method)
    names = [g.name for g in analysis.groups] if groups is None else list(groups)
    reference = next((p for p in gm.parameters() if p.is_floating_point()), torch.empty(0))
    with reference.device:  # whatever the default device is
        gates = {name: method.gate(analysis.group(name)) for name in names}
    noisy = insert_gates(gm, analysis, gates)
    for name, gate in gates.items():
        gate.to(reference)
        gate.group = name
        gate.bind(noisy, analysis)
    return noisy


def noise_gates(noisy: nn.Module) -> list[Gate]:
    """The gates of a graph, those of methods without noise too, in the order of the groups.

    Args:
        noisy: From `insert_noise`.
    """
    return [module for module in noisy.modules() if isinstance(module, Gate)]


__all__ = [
    "BMRSN",
    "BMRSU",
    "METHODS",
    "RBP",
    "SBP",
    "AutoBalanced",
    "BatchNormScale",
    "Gate",
    "MacKay",
    "Magnitude",
    "Method",
    "NoiseGate",
    "Phase",
    "Random",
    "Taylor",
    "UnitWeights",
    "find_method",
    "in_scope",
    "insert_noise",
    "noise_gates",
]
