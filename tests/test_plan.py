"""Pruning plans: checked on entry, and the same after a trip through JSON."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbpfx.errors import PlanError
from rbpfx.plan import PruningPlan


@given(
    st.dictionaries(
        st.text(min_size=1), st.sets(st.integers(0, 10**6), min_size=1, max_size=20).map(list)
    )
)
def test_json_round_trip(kept: dict[str, list[int]]) -> None:
    plan = PruningPlan(kept)
    assert PruningPlan.from_json(plan.to_json()) == plan
    assert plan.to_dict() == {"kept": {name: sorted(units) for name, units in kept.items()}}


def test_units_are_sorted_numbers() -> None:
    plan = PruningPlan({"a": np.array([3, 1]), "b": range(2)})
    assert plan.kept == {"a": (1, 3), "b": (0, 1)}
    assert all(type(unit) is int for unit in plan.kept["a"])


def test_the_callers_mapping_is_copied() -> None:
    kept = {"a": [1]}
    plan = PruningPlan(kept)
    kept["b"] = [2]
    assert plan.kept == {"a": (1,)}


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ([], "removes every unit of group 'conv'"),
        ([-1, 2], "each unit once, from 0 upwards"),
        ([1, 1], "each unit once"),
        ([0.5], "whole numbers"),
        (["a"], "whole numbers"),
        ([None], "whole numbers"),
        (3, "whole numbers"),
    ],
)
def test_wrong_units(units: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        PruningPlan({"conv": units})


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "null", '{"kept": 3}', '{"kept": {"a": 3}}', '{"kept": {"a": []}}']
)
def test_text_that_is_no_plan(text: str) -> None:
    with pytest.raises(PlanError):
        PruningPlan.from_json(text)
