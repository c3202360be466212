"""Choosing widths under a budget: a knapsack whose costs depend on neighbours.

Every group of channels takes one of a few candidate widths. A width loses some score; the time of
an operator depends on the widths of the groups it reads and writes. Wanted are the widths that
lose least within a budget of time.

For a price per second the best widths minimise a sum of small tables, which variable elimination
does exactly (Dechter, Bucket elimination, Artificial Intelligence 113, 1999): networks are chains
with short side branches, so that the tables stay small. The price is found by bisection, as in
Everett's generalized Lagrange multipliers (Operations Research 11, 1963); at any price the
minimum is a lower bound on the score that must be lost, so that the gap of the answer is known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

Table = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]
Scope = tuple[int, ...]
Tables = Mapping[Scope, Table]

LARGEST_TABLE = 2**21
"""Entries of the largest table that elimination may build (ours: 16 MiB)."""

BISECTIONS = 30
"""Halvings of a range of prices that spans twelve orders of magnitude, on a log scale."""


class TooWideError(Exception):
    """Elimination would have to build too large a table."""


@dataclass(frozen=True)
class Choice:
    """What `solve` found.

    Attributes:
        places: For every variable the place of its candidate, `(variables,)`.
        loss: Score lost.
        cost: Time.
        bound: No choice within the budget loses less than this.
    """

    places: Places
    loss: float
    cost: float
    bound: float


class Elimination:
    """Minimises sums of tables over the same variables, exactly.

    Args:
        sizes: How many candidates every variable has.
        scopes: The variables of every table, ascending.

    Raises:
        TooWideError: The tables are coupled so densely that one of more than `LARGEST_TABLE`
            entries would be needed.
    """

    def __init__(self, sizes: Sequence[int], scopes: Iterable[Scope]) -> None:
        self.sizes = sizes
        beside: list[set[int]] = [set() for _ in sizes]
        for scope in scopes:
            for variable in scope:
                beside[variable] |= set(scope) - {variable}
        self.order: list[tuple[int, Scope]] = []
        free = set(range(len(sizes)))
        while free:
            # The cheapest next step; ties go to the first, so that the order is reproducible.
            variable = min(free, key=lambda v: (self._entries({v, *beside[v]}), v))
            around = beside[variable]
            if self._entries({variable, *around}) > LARGEST_TABLE:
                raise TooWideError
            self.order.append((variable, tuple(sorted({variable, *around}))))
            for other in around:
                beside[other] = (beside[other] | around) - {other, variable}
            free.remove(variable)

    def minimise(self, tables: Tables) -> tuple[Places, float]:
        """The best place of every variable, `(variables,)`, and the minimum.

        Args:
            tables: Variables, ascending -> table with one axis for each.
        """
        waiting: dict[Scope, Table] = dict(tables)
        steps = []
        for variable, scope in self.order:
            total = np.zeros([self.sizes[v] for v in scope])
            for of in [of for of in waiting if variable in of]:
                total += waiting.pop(of).reshape([self.sizes[v] if v in of else 1 for v in scope])
            axis = scope.index(variable)
            rest = scope[:axis] + scope[axis + 1 :]
            steps.append((variable, rest, total.argmin(axis)))
            waiting[rest] = waiting.get(rest, 0.0) + total.min(axis)
        places = np.zeros(len(self.sizes), dtype=np.int64)
        for variable, rest, best in reversed(steps):
            places[variable] = best[tuple(places[v] for v in rest)]
        return places, float(waiting[()])

    def _entries(self, scope: Iterable[int]) -> float:
        return prod(float(self.sizes[v]) for v in scope)


def total(places: Places, tables: Tables) -> float:
    """The sum of the tables at an assignment."""
    return float(sum(table[tuple(places[v] for v in of)] for of, table in tables.items()))


def solve(losses: Sequence[Table], costs: Tables, budget: float) -> Choice | None:
    """The candidates that lose least within a budget.

    Args:
        losses: For every variable the loss of every candidate, not negative, `(candidates,)`.
        costs: Variables, ascending -> cost of their candidates, one axis for each variable.
        budget: Largest sum of the costs.

    Returns:
        The choice, with the bound that the Lagrangian gives; None if nothing fits in.

    Raises:
        TooWideError: See `Elimination`.
    """
    lost: dict[Scope, Table] = {(v,): loss for v, loss in enumerate(losses)}
    elimination = Elimination([len(loss) for loss in losses], [*costs, *lost])
    best, least = elimination.minimise(costs)
    if least > budget:
        return None
    bound = 0.0
    # The whole loss per share of the budget is the natural unit of a price.
    unit = max(sum(float(loss.max()) for loss in losses), 1e-30) / max(budget, 1e-30)
    low, high = np.log(unit * 1e-6), np.log(unit * 1e6)
    for _ in range(BISECTIONS):
        price = float(np.exp((low + high) / 2))
        places, value = elimination.minimise(_priced(lost, costs, price))
        bound = max(bound, value - price * budget)
        if total(places, costs) > budget:
            low = np.log(price)
            continue
        high = np.log(price)
        if total(places, lost) < total(best, lost):
            best = places
    best = _filled(best, losses, costs, budget)
    return Choice(best, total(best, lost), total(best, costs), bound)


def _priced(lost: Tables, costs: Tables, price: float) -> dict[Scope, Table]:
    tables = {scope: price * table for scope, table in costs.items()}
    for scope, table in lost.items():
        tables[scope] = tables[scope] + table if scope in tables else table
    return tables


def _filled(places: Places, losses: Sequence[Table], costs: Tables, budget: float) -> Places:
    """Spend what is left: change one variable at a time, the largest gain first."""
    touching: list[dict[Scope, Table]] = [
        {of: table for of, table in costs.items() if variable in of}
        for variable in range(len(losses))
    ]
    spent = total(places, costs)
    while True:
        gains = [
            (float(loss[places[v]] - loss[place]), v, int(place))
            for v, loss in enumerate(losses)
            for place in np.flatnonzero(loss < loss[places[v]])
        ]
        for _, variable, place in sorted(gains, reverse=True):
            moved = places.copy()
            moved[variable] = place
            near = touching[variable]
            cost = spent + total(moved, near) - total(places, near)
            if cost <= budget:
                places, spent = moved, cost
                break
        else:
            return places
