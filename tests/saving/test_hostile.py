"""Files from strangers: whatever they hold, a network comes out or an RbpfxError, and no more."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rbpfx
from rbpfx import LoadError, PlanError, PruningPlan, RbpfxError
from rbpfx.saving.files import read_file, read_plan
from rbpfx.saving.load import _tensors
from rbpfx.saving.schema import PLAN, WEIGHTS, SavedPlan
from tests.saving import hostile
from tests.saving.hostile import Escape, Files, watched
from tests.saving.results import Custom, Tied, edit_plan, halved, outputs


class Small(nn.Module):
    """Two layers, for most of the cases: quick to rebuild."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.hidden(x)).relu())


@dataclass(frozen=True)
class Save:
    """A real save, and what it holds."""

    make: Callable[[], nn.Module]
    inputs: Any
    files: Files
    state: dict[str, Tensor]


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory) -> list[Save]:
    pair = {"pair": [torch.rand(3, 4), torch.rand(3, 4)], "gain": 2.0}
    made = []
    models = ((Small, torch.rand(2, 3)), (Tied, torch.randint(11, (2, 5))), (Custom, pair))
    for make, inputs in models:
        directory = tmp_path_factory.mktemp("save")
        result = halved(make().eval(), inputs)
        result.save(directory)
        files = Files((directory / PLAN).read_bytes(), (directory / WEIGHTS).read_bytes())
        made.append(Save(make, inputs, files, result.model.state_dict()))
    return made


# -- what reads ---------------------------------------------------------------------------------


def pruning_plan(save: Save, files: Files, directory: Path) -> None:
    for text in (files.plan, files.plan.decode("utf-8", "replace")):
        plan = PruningPlan.from_json(text)
        assert PruningPlan.from_json(plan.to_json()) == plan


def saved_plan(save: Save, files: Files, directory: Path) -> None:
    plan = SavedPlan.from_json(files.plan)
    assert SavedPlan.from_json(plan.to_json()) == plan


def from_disk(save: Save, files: Files, directory: Path) -> None:
    plan = read_plan(directory)
    assert hashlib.sha256(read_file(directory, plan, WEIGHTS)).hexdigest() in str(plan.files)


def loaded(save: Save, files: Files, directory: Path) -> None:
    network = rbpfx.load(directory, save.make)
    state = network.state_dict()
    assert all(state[name].shape == tensor.shape for name, tensor in save.state.items())
    if files.weights == save.files.weights:
        plan, real = json.loads(files.plan), json.loads(save.files.plan)
        if plan["tied"] == real["tied"]:
            assert all(torch.equal(state[name], old) for name, old in save.state.items())
    outputs(network, save.inputs)


def tensors(save: Save, files: Files, directory: Path) -> None:
    assert all(isinstance(tensor, Tensor) for tensor in _tensors(files.weights).values())


OF_PLANS = {pruning_plan: 5, saved_plan: 8, from_disk: 2, loaded: 1}  # how often
OF_WEIGHTS = {tensors: 13, from_disk: 2, loaded: 1}


def fuzz(saves: list[Save], directory: Path, cases: int, seed: int) -> Counter[tuple[str, ...]]:
    """Run mutated saves through all that reads them; print the case in which something is wrong.

    Returns:
        How often each mutation was read by what, and with which outcome.
    """
    seen: Counter[tuple[str, ...]] = Counter()
    for save in saves:  # what is imported late is imported now
        read(save, save.files, directory, loaded)
    for case in range(cases):
        rng = Random(f"{seed} {case}")
        save = rng.choices(saves, (8, 1, 1))[0]
        mutate = rng.choice(hostile.MUTATIONS)
        files = mutate(save.files, rng)
        if files == save.files:
            continue
        readers = OF_PLANS if files.weights == save.files.weights else OF_WEIGHTS
        reader = rng.choices(list(readers), list(readers.values()))[0]
        try:
            outcome = read(save, files, directory, reader)
        except BaseException:
            print(f"seed {seed}, case {case}: {mutate.__name__}, read by {reader.__name__}")
            raise
        seen[mutate.__name__.strip("_"), reader.__name__, outcome] += 1
    return seen


def read(save: Save, files: Files, directory: Path, reader: Callable[..., None]) -> str:
    """Whether files were taken or refused; anything else goes through."""
    if reader in (from_disk, loaded):
        (directory / PLAN).write_bytes(files.plan)
        (directory / WEIGHTS).write_bytes(files.weights)
    before = sorted(os.listdir(directory))
    try:
        with watched(directory):
            reader(save, files, directory)
        return "taken"
    except RbpfxError as error:
        message = str(error)
        assert message.encode() and len(message) < 4000, message[:4000]
        assert message.replace("\n", "").isprintable(), ascii(message)
        return "refused"
    finally:
        assert sorted(os.listdir(directory)) == before


def test_fuzzed(saves, tmp_path) -> None:
    seen = fuzz(saves, tmp_path, 2000, seed=0)
    for reader in OF_PLANS | OF_WEIGHTS:
        assert {o for _, name, o in seen if name == reader.__name__} == {"taken", "refused"}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1])
def test_fuzzed_at_length(saves, tmp_path, seed) -> None:
    start = time.process_time()
    seen = fuzz(saves, tmp_path, 120_000, seed)
    for key, count in sorted(seen.items()):
        print(*key, count)
    print(seen.total(), "cases in", round(time.process_time() - start), "s of one core")
    assert seen.total() >= 100_000


# -- the watch watches --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "import this",
        "import socket; socket.socket()",
        "import pickle; pickle.loads(pickle.dumps(print))",
        "import os; os.system('true')",
        "open('/etc/passwd')",
        "open(directory / 'new', 'w')",
        "(directory / 'new').mkdir()",
    ],
)
def test_escapes_are_seen(tmp_path, code) -> None:
    with pytest.raises(Escape), watched(tmp_path):
        exec(code, {"directory": tmp_path})
    assert not list(tmp_path.iterdir())


# -- directories --------------------------------------------------------------------------------


@pytest.fixture
def saved(saves: list[Save], tmp_path: Path) -> Path:
    (tmp_path / PLAN).write_bytes(saves[0].files.plan)
    (tmp_path / WEIGHTS).write_bytes(saves[0].files.weights)
    return tmp_path


def refused(directory: Path, message: str) -> None:
    with watched(directory), pytest.raises(LoadError, match=message):
        rbpfx.load(directory, Small)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes that are files")
@pytest.mark.parametrize("name", [PLAN, WEIGHTS, f"{PLAN}.new"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "passwd", "loop", "nothing"])
def test_what_is_no_file_of_a_save(saved, name, kind) -> None:
    place = saved / name
    place.unlink(missing_ok=True)
    match kind:
        case "pipe":
            os.mkfifo(place)  # to open it for reading would never end
        case "folder":
            place.mkdir()
        case _:
            targets = {"device": "/dev/zero", "passwd": "/etc/passwd", "loop": place}
            place.symlink_to(targets.get(kind, saved / "missing"))
    if name in (PLAN, WEIGHTS):
        refused(saved, name)
    else:
        assert isinstance(rbpfx.load(saved, Small), nn.Module)


def test_links_to_real_files_are_followed(saved, tmp_path_factory) -> None:
    """Caches of downloads are made of them."""
    elsewhere = tmp_path_factory.mktemp("blobs")
    for name in (PLAN, WEIGHTS):
        (saved / name).rename(elsewhere / name)
        (saved / name).symlink_to(elsewhere / name)
    assert isinstance(rbpfx.load(saved, Small), nn.Module)


def test_a_save_writes_through_no_link(saved, tmp_path_factory) -> None:
    mine = tmp_path_factory.mktemp("mine") / "notes.txt"
    mine.write_text("mine")
    names = (PLAN, WEIGHTS, "network.pt2")
    for name in (*names, *(f"{name}.new" for name in names)):
        (saved / name).unlink(missing_ok=True)
        (saved / name).symlink_to(mine)
    halved(Small().eval(), torch.rand(2, 3)).save(saved, program=True)
    assert mine.read_text() == "mine"
    assert not any(file.is_symlink() for file in saved.iterdir())


def test_weights_with_holes_are_not_read(saved) -> None:
    """A terabyte of nothing is a small archive."""
    os.truncate(saved / WEIGHTS, 2**40)
    edit_plan(saved, lambda plan: plan["files"].update({WEIGHTS: ["0" * 64, 2**40]}))
    refused(saved, f"has {2**40} bytes, and what the plan leads to takes .* at most")


# -- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 10**6, "nested more than"),
        ('{"kept":' * 10**6, "nested more than"),
        ("[" * 200 + "]" * 200, "nested more than"),
        ('{"kept": {"a": [1%s]}}' % ("0" * 5000), "a number has 5001 characters"),
        ('{"kept": {"a": [1e999]}}', "1e999 is no number"),
        ('{"kept": {"a": [NaN]}}', "NaN is no number"),
        ('{"kept": {"a": [0], "a": [1]}}', "says a name twice"),
        ('{"kept": {"a": [true]}}', r"group 'a' must list whole numbers, not \[True\]"),
        ('{"kept": {"a": "0"}}', "must list whole numbers"),
        ('{"kept": {"\\u001b": [0.5]}}', r"group '\\x1b' must list"),
        ('{"kept": {"\\ud800": [0]}}', "surrogates not allowed"),
        ('{"kept": [0]}', "has no object 'kept'; a plan is written like"),
        ("[]", "has no object 'kept'"),
        ("[0" + " " * 2**24 + "]", "larger than 16777216 bytes"),
    ],
    ids=lambda text: text[:24],
)
def test_plans_of_ones_own(text, message) -> None:
    with pytest.raises(PlanError, match=message):
        PruningPlan.from_json(text)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32-be", "utf-8-sig"])
def test_plans_are_utf_8(saved, encoding) -> None:
    with pytest.raises(LoadError, match=r"plan.json is truncated, damaged or no plan"):
        SavedPlan.from_json((saved / PLAN).read_text().encode(encoding))


@pytest.mark.parametrize("field", ["rbpfx", "torch", "method"])
@pytest.mark.parametrize("line", ["\x1b[31m", "a\nb", "\u202e", "a" * 1000])
def test_lines_are_fit_for_a_terminal(saved, field, line) -> None:
    edit_plan(saved, lambda plan: plan.update({field: line}))
    refused(saved, f"field '{field}' is")


def test_names_in_errors_are_fit_for_a_terminal(saved) -> None:
    edit_plan(saved, lambda plan: plan["groups"].update({"\x1b[31m" + "a" * 10**6: 3}))
    with pytest.raises(LoadError, match=r"'\\x1b\[31ma+\.\.\.") as caught:
        rbpfx.load(saved, Small)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


def test_a_factory_that_a_plan_names_is_not_called(saved) -> None:
    edit_plan(saved, lambda plan: plan["original"].update(model="this:main"))
    with watched(saved), pytest.raises(LoadError, match="a 'this:main', is not known by name"):
        rbpfx.load(saved)


@pytest.mark.parametrize("library", ["os:system", "torchvision:../../x", "timm:hf-hub:evil/model"])
def test_a_library_that_a_plan_names_is_a_known_one(saved, library) -> None:
    edit_plan(saved, lambda plan: plan.update(library=library))
    with pytest.raises(LoadError, match=r"names no model|has no model|is needed"):
        rbpfx.load(saved)
