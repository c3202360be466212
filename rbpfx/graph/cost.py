"""Cost: multiply-accumulates and parameters, counted on the graph from shapes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch import nn

from rbpfx.graph.groups import Analysis
from rbpfx.graph.modes import evaluated_nodes
from rbpfx.graph.parts import captured_parts, example_batch
from rbpfx.graph.rules.base import find_rule


def count_macs(gm: nn.Module) -> int:
    """Multiply-accumulates per example of a graph with metadata.

    Convolutions, linear and recurrent layers, matrix products and attention count; a bias, a
    BatchNorm or an activation does not, as is usual in the pruning literature.

    Args:
        gm: A graph from `rbpfx.trace` or `rbpfx.rewrite`.

    Returns:
        MACs of eval mode for one example of the size that the graph was captured with.
    """
    total = 0
    for part in captured_parts(gm).values():
        rules = ((node, find_rule(node, part)) for node in evaluated_nodes(part.graph))
        total += sum(rule.macs(node, part) for node, rule in rules if rule is not None)
    return total // example_batch(gm)


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, tied ones counted once; buffers are none.

    Args:
        module: Any module.
    """
    return sum(p.numel() for p in module.parameters())


def parameters_kept(analysis: Analysis, share: npt.NDArray[np.float64]) -> float:
    """Number of parameters if channels stay with these probabilities.

    Args:
        analysis: The analysis.
        share: Share of every atom that stays, `(atoms,)`, from `Analysis.gather`.
    """
    named = dict(analysis.gm.named_parameters(remove_duplicate=False))
    kept = {id(parameter): float(parameter.numel()) for parameter in named.values()}
    seen = set()
    for (name, dim), atoms in analysis.axes.items():
        # A tied parameter has several names, and one size.
        if name in named and (id(named[name]), dim) not in seen:
            seen.add((id(named[name]), dim))
            stays = share[atoms]
            if (name, dim) in analysis.features:
                stays = stays * share[analysis.features[name, dim]]
            kept[id(named[name])] *= float(stays.mean())
    return sum(kept.values())
