"""The target: a share, a number or a time, and bounds that make sense."""

import pytest

from rbpfx import Target, TargetError


@pytest.mark.parametrize("cost", ["macs", "params"])
@pytest.mark.parametrize(("value", "share"), [(0.3, 0.3), (1, 1), (1.0, 1), (250, 0.25), (2000, 2)])
def test_share(cost: str, value: float, share: float) -> None:
    target = Target(**{cost: value})
    assert target.cost == cost
    assert target.share(1000) == share


@pytest.mark.parametrize(
    ("value", "share"), [(0.3, 0.3), (1, 1), ("5 ms", 0.25), ("5ms", 0.25), ("0.01 s", 0.5)]
)
def test_latency(value: float | str, share: float) -> None:
    assert Target(latency=value).share(0.02) == pytest.approx(share)


@pytest.mark.parametrize("cost", ["macs", "params"])
@pytest.mark.parametrize("value", [0, -0.5, float("nan")])
def test_not_positive(cost: str, value: float) -> None:
    with pytest.raises(TargetError, match="must be positive, for example"):
        Target(**{cost: value})


@pytest.mark.parametrize("value", [0, -1, 3, "3", "fast", "0 ms", "1.2.3 ms", "nan ms"])
def test_no_latency(value: float | str) -> None:
    with pytest.raises(TargetError, match=r"must be a share, for example 0.5, or a time"):
        Target(latency=value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"macs": 0.5, "params": 0.5}, "one budget, not macs and params"),
        ({"macs": "half"}, "must be a number, for example 0.5"),
        ({"macs": True}, "must be a number"),
        ({"params": [0.5]}, "must be a number"),
        ({"latency": [0.5]}, "must be a number"),
        ({"round_to": "8"}, "a number, or round_to='auto'"),
        ({"round_to": [8]}, "a number, or round_to='auto'"),
        ({"min_width": "auto"}, r"Target\(min_width='auto'\) must be a whole number"),
        ({"include": None}, "must be a list of patterns"),
        ({"exclude": [3]}, "must be a list of patterns"),
        ({"widths": [4, 8]}, "must map patterns to bounds"),
        ({"widths": {"a": ("4", None)}}, "must be a number, or None"),
        ({"round_to": 0}, "whole number"),
        ({"min_width": 1.5}, "whole number"),
        ({"batch_size": 0}, "whole number"),
        ({"exclude": "conv1"}, "a list of patterns"),
        ({"include": "conv1"}, "a list of patterns"),
        ({"widths": {"a": 3}}, r"must be \(least, most\)"),
        ({"widths": {"a": (1.5, None)}}, "between 0 and 1"),
        ({"widths": {"a": (0, None)}}, "too few"),
        ({"widths": {"a": (8, 4)}}, "exclude it"),
    ],
)
def test_what_makes_no_sense(options: dict[str, object], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        Target(**options)


def test_bounds_alone_limit_no_cost() -> None:
    target = Target(round_to=8)
    assert target.cost is None
    with pytest.raises(TargetError, match="limits no cost"):
        target.share(100)


def test_the_form_is_that_of_a_latency() -> None:
    with pytest.raises(TargetError, match="deployed=True"):
        Target(macs=0.5, deployed=True)
    Target(latency=0.5, deployed=True)
    Target(macs=0.5, round_to="auto", deployed=True)
