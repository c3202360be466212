"""What is written down of a training: a bounded number of moments, spread evenly over it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt

POINTS = 100
"""Points of a curve, about (ours)."""
MOMENTS = 12
"""Moments at which the openness of all gates is counted (ours)."""
BINS = 20
"""Bins of such a count, from closed to open (ours)."""

Series = dict[str, list[tuple[int, float]]]
"""Name of a figure -> (step, value) pairs."""


def due(step: int, steps: int, times: int) -> bool:
    """Whether a step, counted from 1, is one of about `times` even ones, the first or the last."""
    return step == 1 or step * times // steps > (step - 1) * times // steps


class Curves:
    """Figures over one phase of training.

    Attributes:
        series: Name of a figure -> (step, value) pairs.
    """

    def __init__(self) -> None:
        self.series: Series = {}
        self._since: dict[str, list[float]] = {}

    def add(self, step: int, steps: int, **figures: float) -> bool:
        """Hear the figures of every step; write down their means from moment to moment.

        Args:
            step: Steps done.
            steps: Steps planned.
            figures: Name -> value at this step.

        Returns:
            Whether this is a moment at which something is written down.
        """
        for name, value in figures.items():
            self._since.setdefault(name, []).append(value)
        if not due(step, steps, POINTS):
            return False
        self.point(step, **{name: fmean(values) for name, values in self._since.items()})
        self._since.clear()
        return True

    def state_dict(self) -> dict[str, Any]:
        """What was written down, and heard since."""
        return {"series": self.series, "since": self._since}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Return to a state."""
        self.series, self._since = state["series"], state["since"]

    def point(self, step: int, **figures: float) -> None:
        """Write down the figures of one step, to six significant digits."""
        for name, value in figures.items():
            self.series.setdefault(name, []).append((step, float(f"{value:.6g}")))


@dataclass(frozen=True)
class GateHistograms:
    """How open the gates of every group were, from time to time.

    Attributes:
        steps: Optimiser steps done at each moment.
        counts: Group name -> for each moment the number of units in `BINS` equal bins of
            openness from 0 to 1.
    """

    steps: list[int] = field(default_factory=list)
    counts: dict[str, list[list[int]]] = field(default_factory=dict)

    def add(self, step: int, openness: Mapping[str, npt.NDArray[np.float64]]) -> None:
        """Count the units of every group, `(size,)` each, by how open they are."""
        self.steps.append(step)
        for name, values in openness.items():
            counts, _ = np.histogram(values, BINS, (0.0, 1.0))
            self.counts.setdefault(name, []).append(counts.tolist())


__all__ = ["BINS", "MOMENTS", "POINTS", "Curves", "GateHistograms", "Series", "due"]
