"""plan.json: every field is checked; what mutations of it do is in `test_hostile.py`."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rbpfx
from rbpfx import LoadError, parsing
from rbpfx.saving import examples, library
from rbpfx.saving.schema import SavedPlan
from tests.saving.results import edit_plan, halved, sealed
from tests.toy import ShortcutNet, stripes

IMAGES = stripes()[0][0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("net")
    halved(ShortcutNet().eval(), IMAGES).save(directory)
    return directory


@pytest.fixture
def text(saved: Path) -> str:
    return (saved / "plan.json").read_text()


@settings(max_examples=300, deadline=None)
@given(content=st.binary(max_size=200))
def test_any_bytes_are_refused(saved, content) -> None:
    with pytest.raises(LoadError):
        SavedPlan.from_json(content)


@pytest.mark.parametrize(
    "content",
    [
        "[" * 10**5,
        '{"a":' * 10**5,
        "1" * 5000,
        "NaN",
        '{"format": Infinity}',
        "null",
        "[]",
        '"rbpfx pruned network"',
        "\ufeff{}",
    ],
    ids=lambda content: content[:12],
)
def test_odd_json(content) -> None:
    with pytest.raises(LoadError):
        SavedPlan.from_json(content)


def test_the_file_is_not_read_beyond_its_limit(saved, monkeypatch) -> None:
    monkeypatch.setattr(parsing, "MAX_PLAN_BYTES", 100)
    monkeypatch.setattr(rbpfx.saving.files, "MAX_PLAN_BYTES", 100)
    with pytest.raises(LoadError, match="larger than 100 bytes"):
        rbpfx.load(saved, ShortcutNet)


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(plan: dict[str, Any]) -> None:
        *outer, last = path.split("/")
        for key in outer:
            plan = plan[key]
        plan[last] = value

    return apply


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("original/inputs", {"tensor": ["float32", [10**12]]}, "take more than"),
        ("original/inputs", {"tensor": ["float32", [2**40, 2**40]]}, "take more than"),
        ("original/inputs", {"list": [{"tensor": ["int64", [2**26]]}] * 9}, "take more than"),
        ("original/inputs", {"tensor": ["float32", [10**12, 0]]}, "take more than"),
        ("original/inputs", {"tensor": ["float32", [-1]]}, "does not describe an input"),
        ("original/inputs", {"tensor": ["object", [1]]}, "does not describe an input"),
        ("original/inputs", {"eval": "1"}, "does not describe an input"),
        ("original/tensors", {"w": ["parameter", "float32", "x"]}, "'tensors' is"),
        ("original/analysis/unit", "pickle", "unit must be one of"),
        ("original/analysis/code", "1", "field 'analysis'"),
        ("original", 3, "field 'original' is 3"),
        ("kept/conv1", [], "kept units of group 'conv1'"),
        ("kept/conv1", [8], "kept units of group 'conv1'"),
        ("kept/conv1", [1, 1], "kept units of group 'conv1'"),
        ("kept/conv1", [True], "field 'kept'"),
        ("kept/other", [0], "kept units of group 'other'"),
        ("groups/conv1", 10**12, "'conv1' has 8 units here and 1000000000000 there"),
        ("files", {}, "field 'files'"),
        ("files/..~passwd", ["0" * 64, 1], "field 'files'"),
        ("files/weights.safetensors", ["0" * 63, 1], "field 'files'"),
        ("library", "torchvision:resnet18?num_classes=1000000000", "is not allowed"),
        ("library", "os:system", "names no model of a library"),
        ("training", "conv1", "field 'training'"),
        ("format", "another", "is no rbpfx pruned network"),
    ],
)
def test_fields_are_checked(tmp_path, saved, path, value, message) -> None:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edit_plan(tmp_path, change(path, value))
    with pytest.raises(LoadError, match=message):
        rbpfx.load(tmp_path, ShortcutNet)


def test_sizes_are_checked_before_anything_is_made(text, monkeypatch) -> None:
    def make(*_: Any, **__: Any) -> None:
        raise AssertionError("something was made")

    for module, name in ((examples, "build_inputs"), (library.Library, "build")):
        monkeypatch.setattr(module, name, make)
    monkeypatch.setattr(torch, "zeros", make)
    monkeypatch.setattr(torch, "rand", make)
    content = json.loads(text)
    content["original"]["inputs"] = {"tensor": ["float32", [10**12]]}
    with pytest.raises(LoadError, match="take more than"):
        SavedPlan.from_json(sealed(content))
    SavedPlan.from_json(text)


def test_what_is_written_is_read(text) -> None:
    plan = SavedPlan.from_json(text)
    assert plan.to_json() == text
    assert copy.copy(plan) == plan
    assert text.count("\n") < 100 + len(plan.original.architecture.tensors)
