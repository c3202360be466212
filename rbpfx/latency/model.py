"""What a network takes at any widths, from the times of its operators.

The operators that contract channels (convolutions, linear layers, products of matrices) take most
of the time, in steps: a kernel works on blocks of channels, and a block that is half empty takes
as long as a full one. They are timed at the very shapes in question. All others move memory: they
are timed in networks of a few uniform widths, and interpolated between them by the elements they
touch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rbpfx.bars import steps
from rbpfx.graph.calls import module_of
from rbpfx.graph.capture import ExampleInputs, note_inputs
from rbpfx.graph.copying import copy_model
from rbpfx.graph.device import device_of
from rbpfx.graph.groups import Analysis
from rbpfx.graph.modes import evaluated_nodes
from rbpfx.graph.parts import captured_parts
from rbpfx.graph.slicing import rewrite
from rbpfx.latency.knapsack import Scope, Table
from rbpfx.latency.nodes import Layer, Mover, Node, Widths, is_layer, operator_of
from rbpfx.latency.operators import OperatorTimes
from rbpfx.plan import PruningPlan

PROBES = (0.125, 0.25, 0.5, 0.75, 1.0)
"""Shares of every group at which operators that move memory are timed; ours."""


class LatencyModel:
    """Times of a network's operators as functions of the widths of its groups.

    Args:
        analysis: The analysis.
        inputs: What the network is called with; None for what it was captured with.
        progress: Whether to show a progress bar while operators are timed.
        deployed: Whether it runs in the form that `rbpfx.deploy` gives it: 4-d tensors lie with
            their channels last, and BatchNorms are part of the layers before them.
        times: The table of operators; by default the one on disk.

    Attributes:
        sizes: Units of every group, `(groups,)`.
        nodes: The operators.
    """

    def __init__(
        self,
        analysis: Analysis,
        inputs: ExampleInputs | None = None,
        *,
        progress: bool = False,
        deployed: bool = False,
        times: OperatorTimes | None = None,
    ) -> None:
        self.analysis = analysis
        self.sizes: Widths = np.array([g.size for g in analysis.groups], dtype=np.int64)
        self.progress = progress
        self.deployed = deployed
        self.gm = _with_metadata(analysis.gm, inputs)
        device = device_of(self.gm)
        self.times = times or OperatorTimes(device)
        self.nodes = list(self._found())
        self._probe()

    def seconds(self, widths: Widths) -> float:
        """Time of all operators with so many units in every group, `(groups,)`."""
        self._measure((node, widths) for node in self.nodes)
        return sum(node.seconds(widths, self.times) for node in self.nodes)

    def tables(
        self, candidates: Sequence[Widths], present: Widths, joint: int = 2
    ) -> dict[Scope, Table]:
        """Time as a sum of tables over the candidate widths of the groups.

        Args:
            candidates: For every group the widths in question.
            present: Where to linearise operators that depend on more than `joint` groups.
            joint: Most groups that one table is for.

        Returns:
            Groups, ascending -> seconds, one axis for each group; `()` for what does not change.
        """
        free = [len(widths) > 1 for widths in candidates]
        base = present.copy()
        for group, widths in enumerate(candidates):
            if not free[group]:
                base[group] = widths[0]
        free_groups = [tuple(g for g in node.groups if free[g]) for node in self.nodes]

        def scopes(groups: Scope) -> list[Scope]:
            return [groups] if len(groups) <= joint else [(), *((g,) for g in groups)]

        self._measure(
            (node, widths)
            for node, groups in zip(self.nodes, free_groups, strict=True)
            for scope in scopes(groups)
            for widths in _grid(scope, candidates, base)
        )
        tables: dict[Scope, Table] = {}
        for node, groups in zip(self.nodes, free_groups, strict=True):
            at_base = node.seconds(base, self.times) if len(groups) > joint else 0.0
            for scope in scopes(groups):
                grid = _grid(scope, candidates, base)
                values = np.array([node.seconds(widths, self.times) for widths in grid])
                if scope:
                    values -= at_base
                table = values.reshape([len(candidates[g]) for g in scope])
                tables[scope] = tables[scope] + table if scope in tables else table
        return tables

    def curve(self, group: int, widths: Widths) -> Table:
        """Time of the operators that a group touches at these widths, all others whole."""
        nodes = [node for node in self.nodes if group in node.groups]
        grid = list(_grid((group,), {group: widths}, self.sizes))
        self._measure((node, at) for node in nodes for at in grid)
        return np.array([sum(node.seconds(at, self.times) for node in nodes) for at in grid])

    def _measure(self, asked: Iterable[tuple[Node, Widths]]) -> None:
        operators = (o for node, widths in asked for o in node.operators(widths))
        self.times.measure(operators, self.progress)

    def _found(self) -> Iterator[Node]:
        analysed = captured_parts(self.analysis.gm).values()
        for source, part in zip(analysed, captured_parts(self.gm).values(), strict=True):
            evaluated = evaluated_nodes(source.graph)
            for node, twin in zip(source.graph.nodes, part.graph.nodes, strict=True):
                if node not in evaluated or not node.op.startswith("call_"):
                    continue
                if self.deployed and isinstance(module_of(twin, part), _BatchNorm):
                    continue
                if is_layer(twin, part):
                    yield Layer(self.analysis, node, twin, part, self.deployed)
                else:
                    yield Mover(self.analysis, node, twin)

    def _probe(self) -> None:
        """Time the operators that move memory in networks of uniform widths."""
        movers = {node.name: node for node in self.nodes if isinstance(node, Mover)}
        for share in steps(PROBES, "timing operators", visible=self.progress):
            widths = np.maximum(np.ceil(share * self.sizes), 1).astype(np.int64)
            kept = {
                group.name: range(int(width))
                for group, width in zip(self.analysis.groups, widths, strict=True)
            }
            network = rewrite(self.gm, self.analysis, PruningPlan(kept)).eval()
            found = []
            for part in captured_parts(network).values():
                for node in part.graph.nodes:
                    if node.name in movers and node.op.startswith("call_"):
                        operator = operator_of(node, part, self.deployed)
                        movers[node.name].probe(widths, operator)
                        found.append(operator)
            self.times.measure(found)


def _grid(
    scope: Scope, candidates: Mapping[int, Widths] | Sequence[Widths], base: Widths
) -> Iterator[Widths]:
    """The widths `base` with all combinations of candidates for the groups of a table."""
    for chosen in itertools.product(*(candidates[group] for group in scope)):
        widths = base.copy()
        widths[list(scope)] = chosen
        yield widths


def _with_metadata(analysed: nn.Module, inputs: ExampleInputs | None) -> nn.Module:
    """A copy of a captured network that shares its tensors, with metadata for other inputs."""
    tensors = (*analysed.parameters(), *analysed.buffers())
    gm = copy_model(analysed, {id(tensor): tensor for tensor in tensors}).eval()
    if inputs is not None:
        note_inputs(gm, inputs)
    return gm
