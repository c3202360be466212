"""The budget: how strong the noise has to be, and where to cut."""

from __future__ import annotations

from collections.abc import Mapping
from math import exp, log

import numpy as np
import numpy.typing as npt

from rbpfx.errors import TargetError
from rbpfx.graph.groups import Analysis
from rbpfx.plan import PruningPlan

Values = npt.NDArray[np.float64]


class StrengthController:
    """Steers the prior's strength so that the expected cost follows a falling budget.

    A proportional-integral controller of log(strength): the integral finds the strength that
    holds the budget, the proportional part answers at once and damps the swing that an integral
    alone has, because gates answer only after tens of steps.

    Args:
        start: Strength at the start (per unit and example).
        proportional: Gain on the error, relative to the budget.
        integral: Gain per step on the error, relative to the budget.
        span: Largest factor by which the strength may leave `start`, either way.
    """

    def __init__(
        self,
        start: float,
        proportional: float = 5.0,
        integral: float = 0.2,
        span: float = 1e3,
    ) -> None:
        self.proportional = proportional
        self.integral = integral
        self.bounds = (log(start / span), log(start * span))
        self.level = log(start)

    def update(self, cost: float, budget: float, steps: int = 1) -> float:
        """The strength for the next steps.

        Args:
            cost: Expected share of the dense cost under the present gates.
            budget: Share allowed now.
            steps: How many steps it holds.
        """
        error = (cost - budget) / budget
        low, high = self.bounds
        self.level = min(max(self.level + steps * self.integral * error, low), high)
        return exp(min(max(self.level + self.proportional * error, low), high))


def require_reachable(analysis: Analysis, share: float) -> None:
    """Check that a budget leaves room for one unit per group.

    Args:
        analysis: The analysis.
        share: Share of the dense multiply-accumulates.

    Raises:
        TargetError: It does not.
    """
    smallest = PruningPlan({group.name: [0] for group in analysis.groups})
    least = analysis.macs(analysis.keep(smallest)) / analysis.macs(analysis.keep(PruningPlan()))
    if least > share:
        raise TargetError(
            f"the target keeps {share:.1%} of the multiply-accumulates, but with one unit per "
            f"group this network still keeps {least:.1%}; choose a larger target"
        )


def cut(analysis: Analysis, scores: Mapping[str, Values], share: float) -> PruningPlan:
    """The plan that keeps as many of the highest scores as a budget allows.

    One threshold for all groups, found by bisection on the cost of the network that would be
    emitted. The best unit of every group always stays.

    Args:
        analysis: The analysis.
        scores: Group name -> one score per unit, comparable between groups.
        share: Share of the dense multiply-accumulates; reachable (`require_reachable`).
    """
    budget = share * analysis.macs(analysis.keep(PruningPlan()))
    thresholds = np.concatenate([[-np.inf], np.unique(np.concatenate([*scores.values()]))])
    low, high = 0, len(thresholds) - 1
    while low < high:
        middle = (low + high) // 2
        plan = above(analysis, scores, float(thresholds[middle]))
        if analysis.macs(analysis.keep(plan)) <= budget:
            high = middle
        else:
            low = middle + 1
    return above(analysis, scores, float(thresholds[low]))


def above(analysis: Analysis, scores: Mapping[str, Values], threshold: float) -> PruningPlan:
    """The plan that keeps the units that score above a threshold, and the best of every group."""
    kept = {}
    for name, score in scores.items():
        units = np.flatnonzero(score > threshold)
        kept[name] = units.tolist() if len(units) else [int(score.argmax())]
    return analysis.close(PruningPlan(kept))
