"""The progress bar."""

import pytest

from rbpfx.progress import Bar
from rbpfx.training.recursion import Progress


def test_noise_training_shows_group_gates_cost_and_accuracy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # of the terminal, by which bars are cut
    with Bar("noise", True, lambda: 0.875) as bar:
        bar.noise(Progress(4, 4, "layer1.conv1", 0, 0.5, 1.0, 0.01, 0.62, 37))
    shown = capsys.readouterr().err
    for part in ("noise", "4/4", "group=layer1.conv1", "open=37", "cost=62%", "accuracy=87.50%"):
        assert part in shown


def test_accuracy_is_measured_four_times_a_phase() -> None:
    measured = []
    with Bar("fine-tuning", True, lambda: measured.append(1) or 0.5) as bar:
        for step in range(1, 101):
            bar.steps(step, 100, 0.1)
    assert len(measured) == 4


def test_an_invisible_bar_shows_and_evaluates_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> float:
        raise AssertionError("evaluated for nobody")

    with Bar("noise", False, fail) as bar:
        bar.steps(1, 1, 0.5)
    assert capsys.readouterr().err == ""


def test_a_training_without_steps_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("fine-tuning", True):
        pass
    assert capsys.readouterr().err == ""


def test_a_resumed_training_begins_where_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("noise", True) as bar:
        bar.steps(51, 100, 0.1)
        bar.steps(52, 100, 0.1)
    assert "52/100" in capsys.readouterr().err
