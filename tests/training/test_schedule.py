"""When groups become noisy and are hardened, and when noise training goes on."""

from __future__ import annotations

import math

import pytest

from rbpfx import Recursion
from rbpfx.training.schedule import Evidence, Schedule


class TestSchedule:
    @pytest.mark.parametrize("groups", [1, 3, 7, 50])
    @pytest.mark.parametrize("steps", [50, 101])
    @pytest.mark.parametrize("window", [None, 1, 4])
    def test_every_group_is_hardened_by_the_last_step(
        self, groups: int, steps: int, window: int | None
    ) -> None:
        schedule = Schedule.plan(groups, steps, Recursion(window=window))
        first = [
            next(step for step in range(steps) if schedule.hardens(step, group))
            for group in range(groups)
        ]
        assert first == sorted(first)
        assert first[-1] == steps - 1

    def test_all_at_once_at_the_end(self) -> None:
        schedule = Schedule.plan(5, 20, Recursion(front=0))
        assert [schedule.hardens(18, g) for g in range(5)] == [False] * 5
        assert [schedule.hardens(19, g) for g in range(5)] == [True] * 5

    def test_the_budget_falls_from_all_to_the_target(self) -> None:
        schedule = Schedule.plan(3, 100, Recursion(front=0.3, budget_ramp=0.5))
        budgets = [schedule.budget(step, 0.4) for step in range(100)]
        assert budgets[0] == 1
        assert budgets == sorted(budgets, reverse=True)
        assert budgets[36] == pytest.approx(0.4)
        assert budgets[30] > 0.4

    def test_a_window_asks_for_the_target_at_once(self) -> None:
        schedule = Schedule.plan(3, 100, Recursion(window=1))
        assert schedule.budget(0, 0.4) == pytest.approx(0.4)

    def test_the_front_may_set_out_earlier_but_not_later(self) -> None:
        schedule = Schedule.plan(2, 100, Recursion(front=0.3))
        early = schedule.started(40)
        assert (early.start, early.steps) == (40, 70)
        assert early.hardens(69, 1)
        assert schedule.started(90) is schedule


class TestEvidence:
    def test_it_settles_when_the_bound_stops_falling(self) -> None:
        evidence = Evidence(interval=5, tolerance=0.02)
        settled = [evidence.settled(math.exp(-step / 20)) for step in range(200)]
        place = settled.index(True)
        assert 55 < place < 110
        assert (place + 1) % 5 == 0

    def test_it_does_not_while_the_bound_falls(self) -> None:
        evidence = Evidence(interval=5, tolerance=0.02)
        assert not any(evidence.settled(-step) for step in range(200))

    def test_a_rise_counts_as_settled(self) -> None:
        evidence = Evidence(interval=1, tolerance=0.02)
        assert [evidence.settled(b) for b in (3.0, 1.0, 2.0)] == [False, False, True]
