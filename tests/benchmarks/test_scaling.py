"""Long trainings on paper: laws of the model, and the measurements on a tiny network."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import _scaling_report, scaling
from benchmarks._scaling import (
    BACKWARD,
    BUCKET,
    SMALL_MESSAGES,
    Link,
    Network,
    Work,
    all_reduce,
    device_memory,
    sharded_memory,
    training_hours,
    waiting,
)
from benchmarks.overhead import Case
from tests.benchmarks.conftest import REPOSITORY
from tests.benchmarks.test_overhead import net

LINK = Link(bandwidth=1e9, latency=1e-4)
NETWORK = Network(parameters=25_000_000, buffers=50_000, units=10_000, activations=2e8)
WORK = Work(examples=1000, validation=100, noise_epochs=3, tuning_epochs=2)
COUNTS = (1, 2, 3, 4, 8, 64)


class TestModel:
    def test_one_process_waits_for_nobody(self) -> None:
        assert all_reduce(1e9, 1, LINK) == 0
        assert waiting(NETWORK, 1.0, 1, LINK, overlap=0) == 0
        assert device_memory(NETWORK, 8, 1)["noise of the others"] == 0

    @pytest.mark.parametrize("count", COUNTS)
    def test_a_ring(self, count: int) -> None:
        """Every process sends and receives `2 (n - 1) / n` of the bytes."""
        content = 2 * (count - 1) / count * 5e8 / LINK.bandwidth
        assert all_reduce(5e8, count, LINK) == pytest.approx(
            content + 2 * (count - 1) * LINK.latency
        )

    def test_simulated_ring(self) -> None:
        """The formula counts the rounds after which every process has the sum of all parts."""
        for count in COUNTS[1:]:
            held = [[{rank} for _ in range(count)] for rank in range(count)]
            rounds = 0
            while any(len(part) < count for own in held for part in own):
                sent = [set(held[rank][(rank - rounds) % count]) for rank in range(count)]
                for rank, content in enumerate(sent):
                    held[(rank + 1) % count][(rank - rounds) % count] |= content
                rounds += 1
            assert all_reduce(count, count, Link(1, 0)) == rounds

    def test_more_processes_wait_longer_and_less_on_a_better_link(self) -> None:
        waits = [waiting(NETWORK, 0.1, count, LINK) for count in COUNTS]
        assert waits == sorted(waits)
        for better in (replace(LINK, bandwidth=2e9), replace(LINK, latency=1e-5)):
            assert waiting(NETWORK, 0.1, 8, better) < waiting(NETWORK, 0.1, 8, LINK)

    def test_the_backward_pass_hides_all_but_the_last_bucket(self) -> None:
        messages = SMALL_MESSAGES * all_reduce(0, 8, LINK)
        averaging = all_reduce(NETWORK.gradients, 8, LINK)
        last = all_reduce(BUCKET, 8, LINK)
        assert waiting(NETWORK, 1e6, 8, LINK) == pytest.approx(last + messages)
        assert waiting(NETWORK, 0.06, 8, LINK, 0) == pytest.approx(averaging + messages)
        hidden = averaging - waiting(NETWORK, 0.06, 8, LINK) + messages
        assert hidden == pytest.approx(0.06 * BACKWARD)

    def test_memory(self) -> None:
        sizes = [sum(device_memory(NETWORK, 8, count).values()) for count in COUNTS]
        assert sizes == sorted(sizes)
        assert sharded_memory(NETWORK, 4) == sharded_memory(NETWORK, 1) / 4

    def test_hours(self) -> None:
        """100 steps an epoch; forward passes are a third of a step."""
        hours = training_hours(WORK, 10, 1, compute=3.0, wait=1.0, noise=1.5)
        forwards = 3 * 10 + 64
        assert 3600 * hours == pytest.approx(100 * (3 * 5.5 + 2 * 4) + forwards)
        times = [training_hours(WORK, 10, count, 3.0, 0.0, 1.1) for count in (1, 2, 4)]
        assert times == sorted(times, reverse=True)


def small(name: str) -> nn.Module:
    return net()


def test_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "torchvision_model", small)
    case = Case("tiny", False, "cpu", 4, 8, "rbp")
    network = scaling.network_row(case)
    assert network["parameters"] == sum(p.numel() for p in net().parameters())
    assert network["units"] == 16
    assert network["activations"] > 4 * (8 * 36 + 8 * 16)
    checkpoint = scaling.checkpoint_row(case)
    assert 0.8 < checkpoint["size_ratio"] < 1
    assert scaling.step_row(case, 3)["time_ratio"] > 0


def test_the_section_has_a_place() -> None:
    page = "before\n<!-- scaling: generated -->\nold\n<!-- scaling: end -->\nafter\n"
    assert scaling.within_marks(page, "new") == page.replace("old", "\nnew\n")
    with pytest.raises(ValueError, match="no place"):
        scaling.within_marks("a page", "a section")


def test_the_page_holds_what_the_results_say() -> None:
    content = json.loads(scaling.RESULTS.read_text())
    section = _scaling_report.section(content["rows"], content["environments"])
    page = (REPOSITORY / "docs" / "long-trainings.md").read_text()
    assert scaling.within_marks(page, section) == page


@pytest.mark.slow
@pytest.mark.skipif(
    not torch.distributed.is_available() or sys.platform == "win32", reason="needs gloo"
)
def test_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- scaling: generated -->\n<!-- scaling: end -->\n")
    names = ["--network", "squeezenet1_1", "--paper", "squeezenet1_1"]
    sizes = ["--batch-sizes", "2", "--image-size", "32", "--paper-size", "32", "--steps", "2"]
    files = ["--results", str(tmp_path / "scaling.json"), "--markdown", str(page)]
    monkeypatch.setattr(sys, "argv", ["scaling", *names, *sizes, *files])
    scaling.main()
    rows = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    assert [key.split("/")[0] for key in rows] == ["step", "two", "checkpoint", "network"]
    assert rows["two/squeezenet1_1/2/32"]["spread_ratio"] > 0
    assert "predicted/measured" in page.read_text()
