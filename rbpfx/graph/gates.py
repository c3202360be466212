"""Gates: one sampling node per group, one multiplication at every read.

A *gate* is a module that maps a reference tensor (for the batch size; None for one draw per
call) to multipliers, `(N, size)` or `(1, size)`. Noise and masks are both gates.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from rbpfx.errors import RbpfxError
from rbpfx.graph.aliasing import Memory
from rbpfx.graph.calls import call_leaf
from rbpfx.graph.copying import copy_model
from rbpfx.graph.device import device_of
from rbpfx.graph.groups import Analysis, ChannelGroup
from rbpfx.graph.metadata import follow_examples
from rbpfx.graph.operands import Read
from rbpfx.graph.parts import captured_parts
from rbpfx.graph.products import multiply
from rbpfx.graph.provenance import Atoms
from rbpfx.graph.rules.base import shape_of
from rbpfx.graph.slicing import Multipliers
from rbpfx.plan import PruningPlan
from rbpfx.surroundings import usual_modes

CONTAINER = "channel_gates"


class ConstantGate(nn.Module):
    """The same multipliers for every example.

    Args:
        multipliers: One per unit, `(size,)`.
    """

    multipliers: Tensor

    def __init__(self, multipliers: Tensor) -> None:
        super().__init__()
        self.register_buffer("multipliers", multipliers.detach().clone())

    def forward(self, reference: Tensor | None) -> Tensor:
        """The multipliers, `(1, size)`."""
        return self.multipliers.unsqueeze(0)


def insert_gates(gm: nn.Module, analysis: Analysis, gates: Mapping[str, nn.Module]) -> nn.Module:
    """Multiply the channels of groups by the output of their gates, at every read.

    Args:
        gm: The analysed graph, or a copy of it with other parameter values.
        analysis: What `rbpfx.analyze` found.
        gates: Group name -> gate. The gates become submodules of the result.

    Returns:
        A new graph. Every gate is called once, so all reads of a group see the same draw; it is
        drawn per example where every read has the examples on axis 0, else once per call.
    """
    if any(hasattr(part, CONTAINER) for part in captured_parts(gm).values()):
        raise RbpfxError(f"the network has gates already (submodule {CONTAINER!r})")
    gated = copy_model(gm, {})
    analysed = captured_parts(analysis.gm).values()
    chosen = {analysis.group(name): gate for name, gate in gates.items()}
    for original, part in zip(analysed, captured_parts(gated).values(), strict=True):
        _Inserter(original, part, analysis, chosen).insert()
    return gated


@usual_modes()
def apply_mask(
    gm: nn.Module,
    analysis: Analysis,
    plan: PruningPlan,
    *,
    multipliers: Multipliers | None = None,
) -> nn.Module:
    """The reference meaning of a plan: removed units are multiplied by 0 where they are read.

    Args:
        gm: The analysed graph, or a copy of it with other parameter values.
        analysis: What `rbpfx.analyze` found.
        plan: Which units stay.
        multipliers: Group name -> constants for the units that stay, `(size,)`; 1 by default.

    Returns:
        A new graph of the original size, equal to what `rbpfx.rewrite` emits.

    Raises:
        PlanError: The plan does not fit the network.
    """
    keep = analysis.keep(plan)
    multipliers = multipliers or {}
    gates: dict[str, nn.Module] = {}
    for name in plan.kept.keys() | multipliers.keys():
        group = analysis.group(name)
        mask = torch.from_numpy(keep[group.channels]).to(_dtype(gm))
        if name in multipliers:
            mask = mask * multipliers[name].to(mask)
        gates[name] = ConstantGate(mask)
    return insert_gates(gm, analysis, gates).to(device_of(gm))


def channel_multiplier(values: list[Tensor], index: Tensor | None, dim: int, ndim: int) -> Tensor:
    """Lay gate outputs out along the axis that a read contracts.

    Args:
        values: Outputs of one or several gates, `(N or 1, size)` each.
        index: Position of every index of the axis in the concatenated outputs, `(axis,)`; the
            position one behind the last stands for a multiplier of 1. None for the identity.
        dim: The axis.
        ndim: Number of axes of the value that is read.

    Returns:
        Multipliers of shape `(N or 1, 1, ..., axis, ..., 1)`.
    """
    if index is None:
        flat = values[0]
    else:
        rows = max(value.shape[0] for value in values)
        one = values[0].new_ones(1, 1)
        columns = [value.expand(rows, -1) for value in (*values, one)]
        flat = torch.cat(columns, dim=1).index_select(1, index)
    shape = [1] * ndim
    shape[0] = flat.shape[0]
    if dim == 0:
        return flat.reshape([-1] + [1] * (ndim - 1))
    shape[dim] = flat.shape[1]
    return flat.reshape(shape)


class _Inserter:
    """One pass that adds the gates and multiplications to a graph."""

    def __init__(
        self,
        analysed: fx.GraphModule,
        gm: fx.GraphModule,
        analysis: Analysis,
        gates: Mapping[ChannelGroup, nn.Module],
    ) -> None:
        self.analysed = analysed
        self.gm = gm
        self.graph = gm.graph
        self.analysis = analysis
        self.gates = gates
        # Copies of a graph hold the same nodes in the same order.
        pairs = zip(analysed.graph.nodes, list(gm.graph.nodes), strict=True)
        self.twins: dict[fx.Node, fx.Node] = dict(pairs)
        self.outputs: dict[int, fx.Node] = {}
        self.products: dict[Any, fx.Node] = {}
        self.read_values: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
        self.done: set[tuple[fx.Node, fx.Node, int]] = set()
        self.memory = Memory(analysed)
        self.device = device_of(gm)
        placeholders = [n for n in self.graph.nodes if n.op == "placeholder"]
        self.tensors = [n for n in placeholders if getattr(n.meta.get("val"), "ndim", 0) > 0]
        self.last = next(reversed(placeholders), None)  # gates are called behind the inputs
        self.indices = itertools.count()

    def insert(self) -> None:
        self.gm.add_module(CONTAINER, nn.Module())
        container = self.gm.get_submodule(CONTAINER)
        for index, group in enumerate(self.analysis.groups):
            if group in self.gates and any(read.node in self.twins for read in group.reads):
                name = group.name.replace(".", "_").replace("#", "_")
                while hasattr(container, name):
                    name += "_"
                container.add_module(name, self.gates[group])
                self.outputs[index] = self._sampling_node(group, f"{CONTAINER}.{name}")
        for read in self.analysis.reads:
            if read.node in self.twins:
                self._multiply(read)
        self.graph.lint()
        self.gm.recompile()

    def _sampling_node(self, group: ChannelGroup, target: str) -> fx.Node:
        """Call the gate as soon as the inputs of the model are there."""
        per_example = (
            not isinstance(self.gates[group], ConstantGate)
            and bool(self.tensors)
            and all(read.dim > 0 and read.source in self.by_example for read in group.reads)
        )
        with self.graph.inserting_after(self.last):
            reference = self.tensors[0] if per_example else None
            self.last = self.graph.call_module(target, (reference,))
        return self.last

    @cached_property
    def by_example(self) -> frozenset[fx.Node]:
        """The values with one entry for every example on axis 0."""
        return follow_examples(self.analysed)

    def _multiply(self, read: Read) -> None:
        if (read.node, read.source, read.dim) in self.done:
            return  # a product of a value with itself
        self.done.add((read.node, read.source, read.dim))
        node = self.twins[read.node]
        # An operator may read several axes of a value, one after the other.
        source = self.read_values.get((read.node, read.source), self.twins[read.source])
        key = (source, read.dim, *(id(atoms) for atoms in read.atoms))
        if key not in self.products or self.memory.writes(read.source):
            value = source
            with self.graph.inserting_before(node):
                for atoms in read.atoms:
                    multiplier = self._multiplier(atoms, read, node)
                    if multiplier is not None:
                        value = call_leaf(self.graph, multiply, (value, multiplier))
            self.products[key] = value
        product = self.read_values[read.node, read.source] = self.products[key]
        if product is not source:
            node.replace_input_with(source, product)

    def _multiplier(self, atoms: Atoms, read: Read, before: fx.Node) -> fx.Node | None:
        channels = self.analysis.channel[atoms]
        owner = self.analysis.group_of[channels]
        gated = [int(i) for i in np.unique(owner) if int(i) in self.outputs]
        if not gated:
            return None
        sizes = [self.analysis.groups[i].size for i in gated]
        start = dict(zip(gated, np.cumsum([0, *sizes]).tolist(), strict=False))
        index = np.full(len(atoms), sum(sizes), dtype=np.int64)
        for i in gated:
            index[owner == i] = start[i] + self.analysis.unit_of[channels[owner == i]]
        identity = len(gated) == 1 and np.array_equal(index, np.arange(sizes[0]))
        values = [self.outputs[i] for i in gated]
        ndim = len(shape_of(read.source))
        buffer = None if identity else self._index_buffer(index)
        return call_leaf(self.graph, channel_multiplier, (values, buffer, read.dim, ndim))

    def _index_buffer(self, index: Atoms) -> fx.Node:
        container = self.gm.get_submodule(CONTAINER)
        name = f"index_{next(self.indices)}"
        tensor = torch.from_numpy(index).to(self.device)
        container.register_buffer(name, tensor, persistent=False)
        return self.graph.get_attr(f"{CONTAINER}.{name}")


def _dtype(gm: nn.Module) -> torch.dtype:
    floating = (p.dtype for p in gm.parameters() if p.is_floating_point())
    return next(floating, torch.get_default_dtype())
