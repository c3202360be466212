"""Widths that meet a latency: chosen by the table of operators, checked by measurement."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
import numpy.typing as npt

from rbpfx.graph.groups import Analysis
from rbpfx.latency.knapsack import Choice, TooWideError, solve, total
from rbpfx.latency.model import LatencyModel
from rbpfx.latency.nodes import Widths
from rbpfx.plan import PruningPlan

Values = npt.NDArray[np.float64]

CANDIDATES = 6
"""Widths of a group that the first look is at; ours."""

NEAR = 2
"""Steps to either side of the present width that later rounds look at; ours."""

ROUNDS = 9
PATIENCE = 2
"""How often a network is measured at most, and how often before finer widths are allowed; ours."""

MET = 0.02
"""A plan that takes up to this share of the budget less is as good as one that spends it all."""

BLOCKS = (8, 4, 2, 1)
FEW = 4
"""Widths are multiples of so many channels, as kernels work on blocks: of the first number for
which a group has a few such widths, and of the next ones if the budget cannot be met."""

MOVES = 8
SETTLED = 0.01
"""A linearised table is moved so often at most, as long as it is off by more than this share of
the budget; ours."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chosen:
    """Widths of all groups, `(groups,)`, the score they lose, a bound on it, and their time."""

    widths: Widths
    loss: float
    cost: float
    bound: float


class LatencySearch:
    """Looks for the plan that loses least score within a budget of time.

    The table of operators only steers: what counts is the measured latency of the network that is
    emitted. The budget of the table is corrected by it until the budget is met.

    Args:
        analysis: The analysis.
        model: Times of the operators.
        allowed: Group name -> the numbers of units that it may keep, ascending; other groups stay
            whole.
        channels: Group name -> channels per unit.
        complete: The plan that keeps so many units of every group, the best by their scores.
        measure: The share of the dense network's latency that a plan's network has.
    """

    def __init__(
        self,
        analysis: Analysis,
        model: LatencyModel,
        allowed: Mapping[str, Widths],
        channels: Mapping[str, int],
        complete: Callable[[Mapping[str, int], Mapping[str, Values]], PruningPlan],
        measure: Callable[[PruningPlan], float],
    ) -> None:
        self.analysis = analysis
        self.model = model
        self.complete = complete
        self.measure = measure
        self.correction = 1.0
        self.allowed = allowed
        self.channels = channels

    def plan(self, scores: Mapping[str, Values], budget: float) -> PruningPlan:
        """The plan whose network takes this share of the dense network's latency.

        Args:
            scores: Group name -> score of every unit.
            budget: The share.

        Returns:
            The best plan within the budget that was found; if there is none, the fastest.
        """
        lost = self._losses(scores)
        names = [g.name for g in self.analysis.groups]
        dense = self.model.seconds(self.model.sizes)
        grids = [self._grid(BLOCKS[0])]
        found: list[tuple[float, float, PruningPlan]] = []
        for attempt in range(1, ROUNDS + 1):
            choice = self._narrowed(lost, grids, budget * self.correction * dense)
            plan = self.complete(dict(zip(names, choice.widths.tolist(), strict=True)), scores)
            share = self.measure(plan)
            found.append((choice.loss, share, plan))
            logger.info(
                "latency: asked for %.1f%%, by the table %.1f%%, measured %.1f%%; "
                "score lost %.4g, at least %.4g by the table",
                *(100 * budget, 100 * choice.cost / dense, 100 * share, choice.loss, choice.bound),
            )
            if (1 - MET) * budget <= share <= budget:
                break
            self.correction *= (1 - MET / 2) * budget / share
            if attempt % PATIENCE == 0 and len(grids) < len(BLOCKS):
                grids.append(self._grid(BLOCKS[len(grids)]))
        within = [entry for entry in found if entry[1] <= budget]
        best = min(within, key=itemgetter(0)) if within else min(found, key=itemgetter(1))
        return best[2]

    def _narrowed(
        self, lost: Sequence[Values], grids: Sequence[Sequence[Widths]], budget: float
    ) -> Chosen:
        """The choice by the table: among a few widths of every group first, then ever nearer ones.

        Args:
            lost: For every group the score lost at every width.
            grids: For every group the widths in question, those of the first grid before the finer
                ones.
            budget: Seconds.
        """
        steps = [max((len(widths) - 1) / (CANDIDATES - 1), 1.0) for widths in grids[0]]
        present = np.array([widths[len(widths) // 2] for widths in grids[0]])
        choice = self._choose(lost, [_spread(w) for w in grids[0]], present, budget)
        levels = []
        while max(steps) > 1:
            steps = [max(step / NEAR, 1.0) for step in steps]
            levels.append((grids[0], steps))
        levels += [(grid, [1.0] * len(grid)) for grid in grids[1:]]
        for grid, steps in levels:
            triples = zip(grid, choice.widths, steps, strict=True)
            near = [_around(widths, width, step) for widths, width, step in triples]
            choice = self._choose(lost, near, choice.widths, budget)
        return choice

    def _choose(
        self, lost: Sequence[Values], candidates: Sequence[Widths], present: Widths, budget: float
    ) -> Chosen:
        """The widths that lose least by the table, which is linearised where the answer lies.

        Operators that read many groups are linearised. As long as that is off at the answer, the
        point around which it is done moves half of the way there.
        """
        for _ in range(MOVES):
            choice = self._solve(lost, candidates, present, budget)
            widths = np.array([w[p] for w, p in zip(candidates, choice.places, strict=True)])
            cost = self.model.seconds(widths)
            if abs(cost - choice.cost) <= SETTLED * budget:
                break
            middle = (present + widths) / 2
            present = np.array([_nearest(w, m) for w, m in zip(candidates, middle, strict=True)])
        return Chosen(widths, choice.loss, cost, choice.bound)

    def _solve(
        self, lost: Sequence[Values], candidates: Sequence[Widths], present: Widths, budget: float
    ) -> Choice:
        """The knapsack's choice; the fastest candidates if nothing fits."""
        losses = [lost[g][widths - 1] for g, widths in enumerate(candidates)]
        for joint in (2, 1):
            tables = self.model.tables(candidates, present, joint)
            try:
                choice = solve(losses, tables, budget)
            except TooWideError:
                continue
            if choice is not None:
                return choice
            break
        places = np.zeros(len(candidates), dtype=np.int64)
        loss = sum(float(loss[0]) for loss in losses)
        return Choice(places, loss, total(places, tables), loss)

    def _grid(self, block: int) -> list[Widths]:
        """For every group the widths in question."""
        return [
            aligned(self.allowed[g.name], self.channels[g.name], block)
            if g.name in self.allowed
            else np.array([g.size])
            for g in self.analysis.groups
        ]

    def _losses(self, scores: Mapping[str, Values]) -> list[Values]:
        """For every group the score lost at every width from 1 unit up, `(size,)`.

        Scores may be logarithms or counts; what a unit is worth is how far its score lies above
        the least one, on a scale that ends at 1. That is ours. A little is added, so that of two
        widths that take the same time the wider one is better.
        """
        values = np.concatenate([*scores.values()])
        finite = values[np.isfinite(values)]
        least, span = finite.min(initial=0.0), max(float(np.ptp(finite)), 1e-12)
        losses = []
        for group in self.analysis.groups:
            score = scores.get(group.name, np.zeros(group.size))
            worth = np.sort(np.clip((score - least) / span, 0.0, 1.0)) + 1e-6
            losses.append((np.cumsum(worth) - worth)[::-1])
        return losses


def edges(model: LatencyModel, group: str, allowed: Widths, channels: int) -> Widths:
    """The widths at which going wider begins to cost: the edges of the staircase.

    A width is left out if the next wider one takes hardly longer: less than half of what its
    channels cost on average (ours).

    Args:
        model: Times of the operators.
        group: Name of the group.
        allowed: Numbers of units, ascending.
        channels: Channels per unit.
    """
    widths = aligned(allowed, channels)
    index = [g.name for g in model.analysis.groups].index(group)
    seconds = model.curve(index, widths)
    average = (seconds[-1] - seconds[0]) / max(int(widths[-1] - widths[0]), 1)
    steep = np.diff(seconds) >= 0.5 * average * np.diff(widths)
    return np.asarray(widths[np.append(steep, True)])


def aligned(allowed: Widths, channels: int, largest: int = BLOCKS[0]) -> Widths:
    """The widths that suit kernels, and the first and last one.

    Args:
        allowed: Numbers of units, ascending.
        channels: Channels per unit.
        largest: The largest block that is asked for.
    """
    chosen = allowed
    for block in (block for block in BLOCKS if block <= largest):
        chosen = allowed[allowed * channels % block == 0]
        if len(chosen) >= FEW:
            break
    return np.unique(np.concatenate([allowed[:1], chosen, allowed[-1:]]))


def _nearest(widths: Widths, wanted: float) -> int:
    return int(widths[np.abs(widths - wanted).argmin()])


def _spread(widths: Widths) -> Widths:
    """At most `CANDIDATES` widths over the whole range."""
    places = np.linspace(0, len(widths) - 1, min(CANDIDATES, len(widths)))
    return np.asarray(widths[np.unique(places.round().astype(int))])


def _around(widths: Widths, present: int, step: float) -> Widths:
    """The present width and `NEAR` others to either side of it, some steps apart."""
    place = int(np.searchsorted(widths, present))
    places = place + np.arange(-NEAR, NEAR + 1) * round(step)
    return np.asarray(widths[np.unique(np.clip(places, 0, len(widths) - 1))])
