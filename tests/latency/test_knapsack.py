"""The knapsack: elimination against brute force, the bound, budgets."""

import itertools

import numpy as np
import pytest

from rbpfx.latency import knapsack
from rbpfx.latency.knapsack import Elimination, TooWideError, solve, total


def random_problem(seed: int):
    """Six variables of two to four candidates, tables over one, two or three of them."""
    rng = np.random.default_rng(seed)
    sizes = [int(n) for n in rng.integers(2, 5, size=6)]
    scopes = [tuple(sorted(rng.choice(6, size=n, replace=False).tolist())) for n in (1, 2, 2, 2, 3)]
    costs = {of: rng.random([sizes[v] for v in of]) for of in scopes}
    losses = [np.sort(rng.random(n))[::-1] for n in sizes]
    return sizes, losses, costs


def every(sizes):
    return (np.array(places) for places in itertools.product(*map(range, sizes)))


@pytest.mark.parametrize("seed", range(20))
def test_elimination_finds_the_minimum(seed: int) -> None:
    sizes, _, costs = random_problem(seed)
    places, value = Elimination(sizes, costs).minimise(costs)
    assert value == pytest.approx(min(total(p, costs) for p in every(sizes)))
    assert total(places, costs) == pytest.approx(value)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("share", [0.1, 0.4, 0.8])
def test_the_choice_lies_between_the_bound_and_the_gap(seed: int, share: float) -> None:
    sizes, losses, costs = random_problem(seed)
    lost = {(v,): loss for v, loss in enumerate(losses)}
    spans = [total(p, costs) for p in every(sizes)]
    budget = min(spans) + share * (max(spans) - min(spans))
    choice = solve(losses, costs, budget)
    best = min(total(p, lost) for p in every(sizes) if total(p, costs) <= budget)
    assert choice.cost <= budget
    assert choice.cost == pytest.approx(total(choice.places, costs))
    assert choice.loss == pytest.approx(total(choice.places, lost))
    assert choice.bound <= best + 1e-9 <= choice.loss + 2e-9


def test_the_gap_is_small_where_variables_are_many() -> None:
    rng = np.random.default_rng(0)
    sizes = [8] * 60
    steps = [np.sort(rng.random(8)) for _ in sizes]
    losses = [np.sort(rng.random(8))[::-1] * 10 for _ in sizes]
    costs = {(v, v + 1): np.outer(steps[v], steps[v + 1]) for v in range(59)}
    dense = total(np.full(60, 7), costs)
    choice = solve(losses, costs, dense / 2)
    assert choice.cost <= dense / 2
    assert choice.loss - choice.bound < 0.02 * choice.loss


def test_nothing_fits() -> None:
    assert solve([np.array([1.0, 0.0])], {(0,): np.array([1.0, 2.0])}, 0.5) is None


def test_all_fits() -> None:
    choice = solve([np.array([1.0, 0.0])] * 2, {(0,): np.array([1.0, 2.0])}, 5.0)
    assert choice.places.tolist() == [1, 1]
    assert choice.loss == choice.bound == 0


def test_ties_go_to_the_wider_one() -> None:
    """Two widths on one step of the staircase cost the same: the wider one loses less."""
    costs = {(0,): np.array([1.0, 2.0, 2.0, 3.0])}
    choice = solve([np.array([9.0, 5.0, 4.0, 0.0])], costs, 2.5)
    assert choice.places.tolist() == [2]


def test_too_dense_a_coupling_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knapsack, "LARGEST_TABLE", 100)
    scopes = list(itertools.combinations(range(5), 2))
    with pytest.raises(TooWideError):
        Elimination([4] * 5, scopes)
