"""Reductions: mean, sum, maximum over axes that are not channels."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from rbpfx.graph.propagation import Labels, Propagation, unfollowed
from rbpfx.graph.provenance import Label
from rbpfx.graph.rules.base import Rule, argument, register, shape_of, tensor_input


class Reduce(Rule):
    """Ends the axes it reduces over; channels reduced over are pinned."""

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Follow the axes that stay."""
        label = state.label(tensor_input(node))
        if not isinstance(node.meta["val"], Tensor):
            state.pin(label, f"reduction {node.name!r} with several results")
            return unfollowed(node)
        dims = argument(node, 1, "dim")
        if dims is None:
            dims = range(label.ndim)
        elif isinstance(dims, int):
            dims = (dims,)
        reduced = {d % label.ndim for d in dims} or set(range(label.ndim))
        label = state.collapse(label, reduced, f"reduction over channels ({node.name!r})")
        if argument(node, 2, "keepdim", False):
            return Label(shape_of(node), label.blocks)
        stay = [d for d in range(label.ndim) if d not in reduced]
        where = {old: new for new, old in enumerate(stay)}
        return Label(shape_of(node), tuple(b.moved(where) for b in label.blocks))


register(Reduce(), torch.mean, torch.sum, torch.amax, torch.amin, torch.logsumexp)
register(Reduce(), "mean", "sum", "amax", "amin", "logsumexp")
