"""From scores to a plan: one threshold for all groups, as high as the target asks.

The scores of a method are comparable between groups, so that one threshold decides all widths.
It is found by bisection on the cost of the network that would be emitted. What is left of the
budget then goes to the next best units that still fit in. A latency does not follow from counts:
`rbpfx.latency.search` finds the widths for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from math import gcd
from typing import Protocol

import numpy as np
import numpy.typing as npt

from rbpfx.errors import NothingToPruneError, RbpfxError, TargetError
from rbpfx.graph.cost import parameters_kept
from rbpfx.graph.groups import Analysis, ChannelGroup
from rbpfx.graph.parts import example_batch
from rbpfx.latency.model import LatencyModel
from rbpfx.latency.search import LatencySearch, edges
from rbpfx.plan import PruningPlan
from rbpfx.target import COSTS, Reached, Target, Width, in_units, matches

Values = npt.NDArray[np.float64]
Units = npt.NDArray[np.bool_]


class LatencyMeter(Protocol):
    """Measures the networks that plans emit.

    Attributes:
        dense_seconds: Latency of the dense network.
        model: Times of its operators at any widths.
    """

    @property
    def dense_seconds(self) -> float: ...  # noqa: D102  (said above)

    @property
    def model(self) -> LatencyModel: ...  # noqa: D102

    def __call__(self, plan: PruningPlan) -> float:
        """The share of the dense network's latency that a plan's network has."""


SPENT = 0.001
"""Share of a budget that may be left over where units are small enough."""


class Selection:
    """Chooses the units that stay.

    Args:
        analysis: The analysis.
        target: The budget and the bounds; None for neither.
        latency: What measures latency, for a latency target and for `round_to="auto"`.

    Attributes:
        groups: The groups that may be pruned; channels that nothing reads stay.
        budget: Share of the cost to keep; None without a budget.

    Raises:
        TargetError: A pattern matches no group, or the budget cannot be reached.
        NothingToPruneError: Include and exclude leave no group.
    """

    def __init__(
        self, analysis: Analysis, target: Target | None = None, latency: LatencyMeter | None = None
    ) -> None:
        self.analysis = analysis
        self.target = target or Target()
        self.groups = _chosen_groups(analysis, self.target)
        self._latency = latency
        self._dense = self._count(np.ones(len(analysis.channel)))
        self.budget = None if self.target.cost is None else self.target.share(self._dense_cost())
        self._allowed = {g.name: self._allowed_widths(g) for g in self.groups}
        self._require_reachable()

    def expected(self, shares: Mapping[str, Values | float]) -> float:
        """Share of the dense cost that training counts if units stay with these probabilities.

        A latency is not known for fractions of units; MACs stand for it.

        Args:
            shares: Group name -> probability of every unit, `(size,)`, or of all.
        """
        return self._count(self.analysis.gather(shares)) / self._dense

    def unit_cost(self, group: ChannelGroup) -> float:
        """Share of the dense cost that one unit of a group costs, all others staying."""
        return 1 - self.expected({group.name: 1 - 1 / group.size})

    def plan(
        self, scores: Mapping[str, Values], needed: Mapping[str, Units] | None = None
    ) -> PruningPlan:
        """The units that stay.

        Args:
            scores: Group name -> one score per unit, comparable between groups.
            needed: Group name -> the units that the method's own rule keeps; used without a
                budget.

        Returns:
            With a budget the plan that keeps as many of the highest scores as fits in; else the
            units that are needed; in both cases within the bounds, and with what it takes to
            leave no axis empty.

        Raises:
            RbpfxError: A score is NaN.
        """
        _require_numbers(scores)
        if self.budget is None:
            return self._complete(needed or {n: s > -np.inf for n, s in scores.items()}, scores)
        if self.target.cost == "latency":
            return self._search.plan(scores, self.budget)
        return self._within(scores, self.budget)

    def training_plan(self, scores: Mapping[str, Values]) -> PruningPlan:
        """The units that would stay by the budget of training, which takes no measurement.

        Args:
            scores: Group name -> one score per unit, comparable between groups.
        """
        assert self.training_budget is not None
        return self._within(scores, self.training_budget)

    def reached(self, plan: PruningPlan) -> Reached | None:
        """What the network of a plan costs, beside what was asked for."""
        if self.budget is None or self.target.cost is None:
            return None
        return Reached(self.target.cost, self.budget, self._cost(plan), self._dense_seconds())

    def _within(self, scores: Mapping[str, Values], budget: float) -> PruningPlan:
        """The plan of the lowest threshold that a budget of counted cost allows, filled up."""
        scores = _ranked(scores)
        thresholds = np.unique(np.concatenate([[-np.inf], *scores.values()]))
        low, high = 0, len(thresholds) - 1
        best = self._above(scores, float(thresholds[high]))
        while low < high:
            middle = (low + high) // 2
            plan = self._above(scores, float(thresholds[middle]))
            if self._counted(plan) <= budget:
                high, best = middle, plan
            else:
                low = middle + 1
        return self._filled(best, scores, budget)

    def _filled(
        self, plan: PruningPlan, scores: Mapping[str, Values], budget: float
    ) -> PruningPlan:
        """Spend what is left of a budget: widen group after group, the best score first."""
        full: set[str] = set()
        while self._counted(plan) < (1 - SPENT) * budget:
            kept = self.kept(plan)
            wider = [
                (float(scores[name][~units].max()), name, size)
                for name, units in kept.items()
                if name not in full and (size := self._next_width(name, int(units.sum())))
            ]
            if not wider:
                break
            _, name, size = max(wider)
            more = self._widened(kept[name], scores[name], size)
            candidate = self._complete({**kept, name: more}, scores)
            # What nothing reads is removed again; a plan that did not grow leads nowhere.
            if candidate.kept != plan.kept and self._counted(candidate) <= budget:
                plan = candidate
            else:
                full.add(name)
        return plan

    def _above(self, scores: Mapping[str, Values], threshold: float) -> PruningPlan:
        return self._complete({name: s > threshold for name, s in scores.items()}, scores)

    def _complete(self, needed: Mapping[str, Units], scores: Mapping[str, Values]) -> PruningPlan:
        """The plan that keeps the needed units, in allowed widths, and leaves no axis empty.

        Where flattened features are units beside the channels, a linear layer keeps the best
        feature of the channels that stay.
        """
        kept = {}
        for name, units in needed.items():
            allowed = self._allowed[name]
            count = int(units.sum())
            place = min(int(np.searchsorted(allowed, count)), len(allowed) - 1)
            wanted = int(allowed[place])
            kept[name] = np.flatnonzero(self._widened(units, scores[name], wanted)).tolist()
        analysis = self.analysis
        keep = analysis.keep(PruningPlan(kept))
        score = analysis.gather(scores)
        for *channels, features in (read.atoms for read in analysis.reads):
            if not channels:
                continue
            stays = np.logical_and.reduce([keep[atoms] for atoms in channels])
            if not (stays & keep[features]).any():
                best = features[np.where(stays, score[features], -np.inf).argmax()]
                keep[analysis.channel == analysis.channel[best]] = True
        plan = {g.name: np.flatnonzero(keep[g.channels]).tolist() for g in analysis.groups}
        return analysis.close(PruningPlan(plan))

    @staticmethod
    def _widened(units: Units, score: Values, count: int) -> Units:
        """The best `count` units: those of `units` before all others."""
        order = np.lexsort((-score, ~units))
        chosen = np.zeros(len(score), dtype=bool)
        chosen[order[:count]] = True
        return chosen

    def kept(self, plan: PruningPlan) -> dict[str, Units]:
        """A plan as masks: group name -> which units of `groups` stay, `(size,)`."""
        kept = {g.name: np.zeros(g.size, dtype=bool) for g in self.groups}
        for name, units in kept.items():
            units[list(plan.kept.get(name, range(len(units))))] = True
        return kept

    def _next_width(self, name: str, count: int) -> int | None:
        wider = self._allowed[name][self._allowed[name] > count]
        return int(wider[0]) if len(wider) else None

    def _allowed_widths(self, group: ChannelGroup) -> npt.NDArray[np.int64]:
        """The numbers of units that a group may keep, ascending."""
        least: float = self.target.min_width
        most: float = group.size
        for pattern, (low, high) in self.target.widths.items():
            if _matches(group, [pattern]):
                least = _units(low, group.size, self.target.min_width)
                most = _units(high, group.size, group.size)
        least = min(max(int(least), 1), group.size)
        most = min(max(int(most), least), group.size)
        channels = _channels_per_unit(self.analysis, group)
        if isinstance(self.target.round_to, str):
            return edges(self._meter().model, group.name, np.arange(least, most + 1), channels)
        step = self.target.round_to // gcd(self.target.round_to, channels)
        widths = set(range(-(-least // step) * step, most + 1, step))
        # The width that the network had suits it too; and a bound holds even between multiples.
        if most == group.size or not widths:
            widths.add(most)
        return np.array(sorted(widths))

    def _dense_cost(self) -> float:
        """Cost of the dense network in the units of the target."""
        if self.target.cost == "latency":
            return self._meter().dense_seconds
        per_example = example_batch(self.analysis.gm) if self.target.cost == "macs" else 1
        return self._dense / per_example

    def _cost(self, plan: PruningPlan) -> float:
        """Share of the dense cost that the emitted network has."""
        return self._meter()(plan) if self.target.cost == "latency" else self._counted(plan)

    def _counted(self, plan: PruningPlan) -> float:
        return self._count(self.analysis.keep(plan).astype(np.float64)) / self._dense

    def _count(self, share: Values) -> float:
        if self.target.cost == "params":
            return parameters_kept(self.analysis, share)
        return self.analysis.macs(share)

    def _meter(self) -> LatencyMeter:
        if self._latency is None:
            raise TargetError(
                "a latency target and round_to='auto' are measured and need a network and example "
                "inputs: pass latency=rbpfx.PlanMeter(gm, analysis, inputs)"
            )
        return self._latency

    def _smallest(self) -> PruningPlan:
        flat = {g.name: np.zeros(g.size) for g in self.groups}
        return self._complete({name: s > 0 for name, s in flat.items()}, flat)

    def _require_reachable(self) -> None:
        """Check that the budget leaves room for the least width of every group."""
        if self.budget is None:
            return
        least = self._cost(self._smallest())
        if least > self.budget:
            asked, kept = f"{self.budget:.1%}", f"{least:.1%}"
            seconds = self._dense_seconds()
            if seconds is not None:
                asked, kept = in_units(self.budget * seconds), in_units(least * seconds)
            raise TargetError(
                f"the target keeps {asked} of the {COSTS[str(self.target.cost)]}, but "
                f"with the least width of every group (one unit unless bounded) this network "
                f"still keeps {kept}; {self.target.remedy()}"
            )

    def _dense_seconds(self) -> float | None:
        """What the dense network takes, if the target is a time."""
        return self._meter().dense_seconds if isinstance(self.target.latency, str) else None

    @cached_property
    def training_budget(self) -> float | None:
        """The budget that noise training works towards, as a share of what `expected` counts.

        A latency is translated by a plan that meets it if the units of every group are worth the
        same, from the first to the last: the MACs of that plan.
        """
        if self.target.cost != "latency" or self.budget is None:
            return self.budget
        ranks = {g.name: (np.arange(g.size) + 0.5) / g.size for g in self.groups}
        return self._counted(self._search.plan(ranks, self.budget))

    @cached_property
    def _search(self) -> LatencySearch:
        """What finds the widths for a latency."""

        def complete(counts: Mapping[str, int], scores: Mapping[str, Values]) -> PruningPlan:
            none = {name: np.zeros(len(score), dtype=bool) for name, score in scores.items()}
            best = {n: self._widened(units, scores[n], counts[n]) for n, units in none.items()}
            return self._complete(best, scores)

        channels = {g.name: _channels_per_unit(self.analysis, g) for g in self.groups}
        meter = self._meter()
        return LatencySearch(self.analysis, meter.model, self._allowed, channels, complete, meter)


def _require_numbers(scores: Mapping[str, Values]) -> None:
    for name, score in scores.items():
        if lacking := int(np.isnan(score).sum()):
            raise RbpfxError(
                f"{lacking} of the {len(score)} scores of group {name!r} are NaN, which gives no "
                "order. Look for weights, a batch or a loss that is not finite, or for a "
                "division by 0 in the score() of a method of your own; or leave the group out: "
                f"Target(exclude=[{name!r}])"
            )


def _ranked(scores: Mapping[str, Values]) -> dict[str, Values]:
    """The rank of every unit among all, so that no two are alike.

    Units of one score go in turns from all groups, each group giving an equal share at any time.
    """
    score = np.concatenate([*scores.values()])
    ends = np.cumsum([len(units) for units in scores.values()])
    place = [(units.argsort().argsort() + 0.5) / len(units) for units in scores.values()]
    rank = np.empty(len(score))
    rank[np.lexsort((np.concatenate(place), score))] = np.arange(len(score))
    return dict(zip(scores, np.split(rank, ends[:-1]), strict=True))


def _chosen_groups(analysis: Analysis, target: Target) -> tuple[ChannelGroup, ...]:
    names = [n for g in analysis.groups for n in (g.name, *g.producers)]
    for pattern in (*target.include, *target.exclude, *target.widths):
        if not any(matches(name, [pattern]) for name in names):
            raise TargetError(
                f"the pattern {pattern!r} of the target matches no prunable layer; there are: "
                f"{', '.join(g.name for g in analysis.groups)}"
            )
    chosen = tuple(
        group
        for group in analysis.groups
        if group.reads  # nobody could say what the units of another are worth
        and (not target.include or _matches(group, target.include))
        and not _matches(group, target.exclude)
    )
    if not chosen and analysis.groups:
        raise NothingToPruneError(
            "include and exclude of the target leave no group to prune whose channels are read"
        )
    return chosen


def _matches(group: ChannelGroup, patterns: Iterable[str]) -> bool:
    return any(matches(name, patterns) for name in (group.name, *group.producers))


def _units(bound: Width, size: int, default: int) -> int:
    """A bound as a number of units; shares are rounded."""
    if bound is None:
        return default
    return round(bound * size) if isinstance(bound, float) else int(bound)


def _channels_per_unit(analysis: Analysis, group: ChannelGroup) -> int:
    """How many channels of a producer go with one unit: the width of a head, for example."""
    member = np.zeros(len(analysis.channel), dtype=bool)
    member[group.channels] = True
    counts = [
        int(member[analysis.channel[atoms]].sum()) // group.size
        for (name, _), atoms in analysis.axes.items()
        if name.rpartition(".")[0] in group.producers or name in group.producers
    ]
    return min((c for c in counts if c), default=1)
