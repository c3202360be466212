"""The latency benchmark: a row of a tiny network, resuming, the tables and the pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rbpfx
from benchmarks import _latency_networks as networks
from benchmarks import latency
from benchmarks._latency_networks import PEER
from benchmarks._latency_report import efficiency, page, tables, variants
from benchmarks._record import Deadline, Record
from benchmarks.latency import Case, Setting
from rbpfx import Latency, count_macs, trace

BRIEF = Setting(forms=("emitted",), image_size=16, row_seconds=0, rounds=3)
CASE = Case("tiny", 2.0, 2, "cpu")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(_: str) -> nn.Module:
        first = nn.Conv2d(3, 64, 3, bias=False)
        head = [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
        return nn.Sequential(first, nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3), *head)

    monkeypatch.setattr(networks, "torchvision_model", build)
    networks.source.cache_clear()
    networks.dense.cache_clear()


# -- networks ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", networks.TARGETS)
def test_our_networks_meet_the_budget(name: str) -> None:
    image = torch.zeros(1, 3, 16, 16)
    dense, pruned = (networks.source(n, "tiny", 2.0, 16) for n in ("dense", name))
    assert 0.35 < count_macs(pruned) / count_macs(trace(dense, image)) <= 0.5
    if name == "rounded":
        widths = {m.out_channels for m in pruned.modules() if isinstance(m, nn.Conv2d)}
        assert {width % 16 for width in widths} == {0}


def test_torch_pruning_gets_our_budget() -> None:
    pytest.importorskip("torch_pruning")
    ours, theirs = (networks.source(n, "tiny", 2.0, 16) for n in ("ragged", PEER))
    assert 0.9 < networks.macs(theirs, 16) / networks.macs(ours, 16) <= 1


def test_forms_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "SOURCES", ("ragged",))
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    images = torch.randn(2, 3, 16, 16)
    found = networks.variants("tiny", 2.0, ("emitted", "onnx"), images, threads=1)
    for variant in found.values():
        assert variant.failure is None
        assert variant.difference < 1e-5


def test_a_form_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def deploy(*_: Any) -> nn.Module:
        raise RuntimeError("no such kernel\nmore of it")

    monkeypatch.setattr(rbpfx, "deploy", deploy)
    images = torch.randn(2, 3, 16, 16)
    found = networks.variants("tiny", 2.0, ("emitted", "deployed"), images, threads=1)
    assert found["ragged", "deployed"].failure == "RuntimeError: no such kernel"
    assert found["ragged", "emitted"].failure is None


# -- rows ----------------------------------------------------------------------------------


def test_a_row() -> None:
    row = latency.run(CASE, BRIEF)
    json.dumps(row)
    found = variants(row)
    assert {form for _, form in found} == {"emitted"}
    dense, ragged = found["dense", "emitted"], found["ragged", "emitted"]
    assert ragged["macs"] <= dense["macs"] / 2
    assert ragged["parameter_bytes"] < dense["parameter_bytes"]
    assert ragged["activation_bytes"] > 0
    low, middle, high = ragged["over_dense"]
    assert 0 < low <= middle <= high
    assert "over_dense" not in dense
    assert row["rounds"] == 3


def test_ratios_are_those_of_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(named: dict[str, nn.Module], images: Tensor, **_: Any) -> dict[str, Latency]:
        seconds = {"dense": (4.0, 40.0, 8.0), "ragged": (2.0, 20.0, 4.0)}
        times = {name: seconds.get(name.split("/")[0], (1.0, 10.0, 2.0)) for name in named}
        return {name: Latency(t[2], 0, 3, times=t) for name, t in times.items()}

    monkeypatch.setattr(latency, "measure_latency", measure)
    found = variants(latency.run(CASE, BRIEF))
    assert found["ragged", "emitted"]["over_dense"] == [2, 2, 2]
    macs = found["dense", "emitted"]["macs"] / found["ragged", "emitted"]["macs"]
    assert efficiency(found, "ragged", "emitted") == pytest.approx(2 / macs)
    if "over_torch_pruning" in found["ragged", "emitted"]:
        assert found["ragged", "emitted"]["over_torch_pruning"] == [0.5, 0.5, 0.5]


def test_what_is_done_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Case] = []

    def run(case: Case, _: Setting) -> dict[str, Any]:
        runs.append(case)
        return case._asdict()

    monkeypatch.setattr(latency, "run", run)
    found = latency.cases(["a", "b"], [2, 4], [1, 16], ["cpu"])
    for seconds in (0, None, None):
        record = Record(tmp_path / "latency.json")
        latency.run_missing(record, found, BRIEF, Deadline(seconds))
    assert runs == found
    assert runs[:2] == [Case("a", 2, 1, "cpu"), Case("a", 2, 16, "cpu")]
    assert latency.key_of(CASE, BRIEF) != latency.key_of(CASE, BRIEF._replace(threads=2))


# -- tables and pictures -------------------------------------------------------------------


def row(**changes: Any) -> dict[str, Any]:
    def variant(source: str, form: str, **figures: Any) -> dict[str, Any]:
        common = {"milliseconds": 3.0, "spread": 0.1, "parameter_bytes": 6, "activation_bytes": 4}
        return {"source": source, "form": form, "macs": 100, **common, **figures}

    faster = {"over_dense": [1.9, 2.0, 2.2], "over_dense_in_same_form": [1.4, 1.5, 1.6]}
    found = [
        variant("dense", "emitted"),
        variant("dense", "deployed", over_dense=[1.2, 1.3, 1.4]),
        variant("ragged", "emitted", macs=50, **faster),
        variant("ragged", "deployed", macs=50, activation_bytes=2, **faster),
        {"source": PEER, "form": "emitted", "failure": "RuntimeError: not understood"},
    ]
    common = {"network": "resnet18", "ratio": 2.0, "batch": 1, "device": "cpu", "threads": 1}
    return {**common, "image_size": 224, "environment": 0, "variants": found, **changes}


def test_the_table() -> None:
    text = tables([row()], "github")
    assert "## 2x fewer MACs, batch 1, cpu, 1 thread(s)" in text
    line = next(line for line in text.splitlines() if line.startswith("| resnet18  | rbpfx "))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    ratio = "1.50x (1.40-1.60)"
    assert cells == ["resnet18", "rbpfx", "2.00x", ratio, ratio, "0.75", "0.80", "", ""]
    assert "Not measured: resnet18 (Torch-Pruning 1.6.1, as emitted): RuntimeError" in text


def test_the_page_names_the_machine() -> None:
    text = page([row()], [{"cpu": "a core", "gpu": None, "torch": "2.0"}])
    assert "Measured on: a core, torch 2.0." in text
    assert text.startswith("# What pruning gives in time")


def test_the_pictures_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import plots

    steps = {"convolution": "3x3", "pixels": 28, "batch": 1, "device": "cpu"}
    digits = {"target": "0.5", "dense_accuracy": 0.9, "accuracy": 0.8, "macs_ratio": 2.0}
    rows = {
        "latency": row(),
        "staircase": {**steps, "widths": [8, 16], "microseconds": [1.0, 2.0]},
        "digits": {**digits, "latency_ratio": {"1": 1.5, "64": 1.7}},
    }
    for name, content in rows.items():
        Record(tmp_path / f"{name}.json").add("row", content)
    monkeypatch.setattr("sys.argv", ["plots", "--results", str(tmp_path), "--out", str(tmp_path)])
    plots.main()
    drawn = {file.name for file in tmp_path.glob("*.png")}
    assert drawn == {"latency-macs.png", "staircase.png", "accuracy-latency.png"}
