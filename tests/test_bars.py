"""Bars: they pass everything on, show themselves in time, and only then."""

from __future__ import annotations

import time

import pytest

from rbpfx import bars


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bars, "PATIENCE", 0.02)


def slow() -> list[int]:
    """Takes longer than an impatient user waits."""
    time.sleep(0.2)
    return [1, 2]


@pytest.mark.parametrize("visible", [True, False])
def test_items_are_passed_on(visible: bool, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(bars.steps(iter("abc"), "letters", visible=visible)) == ["a", "b", "c"]
    assert not capsys.readouterr().err.strip()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("visible", [True, False])
def test_a_first_item_that_takes_long_shows_the_bar(
    visible: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in bars.steps([1], "waiting", visible=visible):
        slow()
        assert ("waiting" in capsys.readouterr().err) == visible


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("visible", [True, False])
def test_the_stage_is_named(visible: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with bars.stages("network", 2, visible=visible) as begin:
        begin("opening")
        slow()
        assert ("network: opening (1/2)" in capsys.readouterr().err) == visible


def test_errors_pass_through() -> None:
    with pytest.raises(ValueError, match="no"), bars.stages("network", 1) as begin:
        begin("failing")
        raise ValueError("no")
