"""Tensors that the model makes up: constants of a given size take part in slicing.

Every index of a constant, or of independent draws, is as good as any other, so each axis is
followed as that of a parameter would be; `x.new_zeros(n, c)` then shrinks with the channels that it
meets.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from rbpfx.graph.operands import Labels
from rbpfx.graph.propagation import Propagation
from rbpfx.graph.provenance import Block, Label
from rbpfx.graph.rules.base import Rule, register, shape_of
from rbpfx.graph.rules.movement import sizes_of
from rbpfx.graph.slicing import Slicing


class Constant(Rule):
    """zeros, ones, full, empty, rand, randn: the same everywhere.

    Args:
        has_value: Whether the value follows the size.
    """

    def __init__(self, has_value: bool = False) -> None:
        self.has_value = has_value

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Follow every axis anew."""
        shape = shape_of(node)
        return Label(
            shape,
            tuple(
                Block((dim,), state.identities.new(size))
                for dim, size in enumerate(shape)
                if size > 1
            ),
        )

    def rewrite(self, node: fx.Node, state: Slicing) -> None:
        """Write the new sizes."""
        label = state.label(node)
        new_sizes = state.changed_sizes(label)
        if not new_sizes:
            return
        twin = state.twin(node)
        start = 1 if node.op == "call_method" else 0
        end = start + 1 if self.has_value else len(twin.args)
        given = twin.args[start:end] or (twin.kwargs["size"],)
        sizes = sizes_of(given, twin, label.ndim, state)
        for dim, size in new_sizes.items():
            sizes[dim] = size
        twin.args = (*twin.args[:start], tuple(sizes), *twin.args[end:])
        twin.kwargs = {name: value for name, value in twin.kwargs.items() if name != "size"}


for _name in ("zeros", "ones", "empty", "full", "rand", "randn"):
    _rule = Constant(has_value=_name == "full")
    register(_rule, getattr(torch, _name))
    if hasattr(Tensor, f"new_{_name}"):
        register(_rule, f"new_{_name}")
