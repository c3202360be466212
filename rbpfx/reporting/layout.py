"""Where the groups of the coupling graph are drawn: rows by depth, short ones, few crossings."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from statistics import fmean

import networkx as nx

Places = Collection[tuple[float, int]]

ROW = 6
"""Most groups in one row (ours)."""


def place(
    names: Sequence[str], coupling: Mapping[str, Sequence[str]]
) -> dict[str, tuple[float, int]]:
    """A place for every group.

    A group is one row below the last of those that it is computed from. Edges back to an earlier
    group, such as those of residual additions, do not count.

    Args:
        names: The groups, in the order of the network.
        coupling: Group name -> the groups computed from it.

    Returns:
        Group name -> (x, row): x in steps of one group, 0 in the middle; row 0 is at the input.
    """
    order = {name: index for index, name in enumerate(names)}
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(names)
    graph.add_edges_from(edge for edge in edges(names, coupling) if order[edge[0]] < order[edge[1]])
    placed: dict[str, tuple[float, int]] = {}
    row = 0
    for generation in nx.topological_generations(graph):

        def middle(name: str) -> tuple[float, int]:
            above = [placed[source][0] for source in graph.predecessors(name)]
            return fmean(above) if above else 0.0, order[name]

        line = sorted(generation, key=middle)
        rows = -(-len(line) // ROW)
        for part in (
            line[len(line) * i // rows : len(line) * (i + 1) // rows] for i in range(rows)
        ):
            for index, name in enumerate(part):
                placed[name] = (index - (len(part) - 1) / 2, row)
            row += 1
    return placed


def detour(start: tuple[float, int], end: tuple[float, int], places: Places) -> float:
    """How far to the side an arrow bends, in steps of one group, to pass between the groups.

    Args:
        start: Where it starts.
        end: Where it ends, in a lower row.
        places: Where all groups are.
    """
    between = [(x, row) for x, row in places if start[1] < row < end[1]]

    def hits(bend: float) -> int:
        slope = (end[0] - start[0]) / (end[1] - start[1])
        return sum(abs(start[0] + slope * (row - start[1]) + bend - x) < 0.4 for x, row in between)

    bend = min((0.0, 0.5, -0.5, 1.0, -1.0), key=hits)
    # Arrows that pass many rows bend further, so that they do not lie on one another.
    return bend * min(1 + 0.1 * max(end[1] - start[1] - 3, 0), 4.0)


def edges(names: Sequence[str], coupling: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    """The edges between different groups that exist, as (source, target)."""
    known = set(names)
    return [
        (source, target)
        for source, targets in coupling.items()
        for target in targets
        if source != target and {source, target} <= known
    ]


__all__ = ["detour", "edges", "place"]
