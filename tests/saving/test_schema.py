"""plan.json from strangers: whatever it says, nothing but a LoadError comes out."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import rbpfx
from rbpfx import LoadError
from rbpfx.saving import examples, library, schema
from rbpfx.saving.schema import SavedPlan
from tests.saving.results import edit_plan, halved, sealed
from tests.toy import ShortcutNet, stripes

IMAGES = stripes()[0][0]
CASES = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("net")
    halved(ShortcutNet().eval(), IMAGES).save(directory)
    return directory


@pytest.fixture
def text(saved: Path) -> str:
    return (saved / "plan.json").read_text()


def load_with(saved: Path, content: bytes) -> None:
    """Load a network of which only plan.json is another; anything but a LoadError goes through."""
    file = saved / "plan.json"
    before = file.read_bytes()
    file.write_bytes(content)
    try:
        assert isinstance(rbpfx.load(saved, ShortcutNet), nn.Module)
    except LoadError as error:
        assert str(error)
    finally:
        file.write_bytes(before)


@CASES
@given(data=st.data())
def test_random_bytes_are_refused(saved, data) -> None:
    content = bytearray((saved / "plan.json").read_bytes())
    start = data.draw(st.integers(0, len(content)))
    stop = data.draw(st.integers(start, min(len(content), start + 40)))
    content[start:stop] = data.draw(st.binary(max_size=40))
    load_with(saved, bytes(content))


@CASES
@given(content=st.binary(max_size=200))
def test_any_bytes_are_refused(saved, content) -> None:
    with pytest.raises(LoadError):
        SavedPlan.from_json(content)


def odd_values(data: st.DataObject) -> Any:
    """JSON that is likely to hit something."""
    odd = [None, True, False, -1, 0, 1, 0.5, 10**12, 2**64, 10**4000, "", "weight", "\ud800"]
    odd += [[], {}, [[]], [10**12], {"tensor": ["float32", [10**12]]}, "../../etc/passwd"]
    odd += ["torchvision:resnet18?num_classes=65536", "timm:hf-hub:x/y", 1e308, ["float32", []]]
    leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
    trees = st.recursive(leaves, lambda c: st.lists(c) | st.dictionaries(st.text(), c))
    return data.draw(st.sampled_from(odd) | trees)


def mutated(content: Any, data: st.DataObject) -> None:
    """Change something, anywhere."""
    place = content
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return
        key = data.draw(st.sampled_from(keys))
        deeper = isinstance(place[key], (dict, list)) and len(place[key])
        if not deeper or data.draw(st.integers(0, 2)) == 0:
            break
        place = place[key]
    action = data.draw(st.sampled_from(["replace", "replace", "delete", "add"]))
    if action == "delete":
        del place[key]
    elif action == "replace":
        place[key] = odd_values(data)
    elif isinstance(place, dict):
        place[data.draw(st.text())] = odd_values(data)
    else:
        place.insert(data.draw(st.integers(0, len(place))), odd_values(data))


def resealed(content: dict[str, Any]) -> str:
    """The text of a plan whose hashes fit, as far as they can."""
    try:
        original = content["original"]
        table = {n: (k, d, tuple(s)) for n, (k, d, s) in original["tensors"].items()}
        operators = tuple(original["operators"])
        original["sha256"] = rbpfx.saving.architecture.Architecture(table, operators).sha256
    except (KeyError, TypeError, ValueError, AttributeError):
        pass
    return sealed(content)


@settings(CASES, max_examples=200)
@given(data=st.data())
def test_well_made_lies_are_refused_or_harmless(saved, data) -> None:
    content = json.loads((saved / "plan.json").read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        mutated(content, data)
    try:
        lie = resealed(content)
    except ValueError:  # no JSON: numbers of more than 4300 digits
        return
    load_with(saved, lie.encode("utf-8", "surrogatepass"))


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
    monkeypatch.setattr(schema, "MAX_PLAN_BYTES", 100)
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
