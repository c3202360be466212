"""The checkpoints in a directory: the last ones of a stage stay, those of later stages go."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rbpfx.checkpoints.encoding import encode
from rbpfx.checkpoints.store import KEPT, STAGES, Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path, {"call": "this one"})


def write(store: Store, stage: str, step: int) -> None:
    store.write(stage, step, encode({"step": torch.tensor(step)}))


def test_the_last_of_a_stage_is_read_and_few_are_kept(store: Store) -> None:
    for step in (9, 10, 200):  # as numbers, not as names
        write(store, "noise", step)
    assert store.latest("noise")["step"] == 200
    assert len(list(store.directory.glob("noise-*"))) == KEPT


@pytest.mark.parametrize("stage", STAGES)
def test_a_new_one_makes_those_of_later_stages_void(store: Store, stage: str) -> None:
    for earlier in STAGES:
        write(store, earlier, 7)
    write(store, stage, 8)
    place = STAGES.index(stage)
    assert [store.latest(s) is not None for s in STAGES] == [i <= place for i in range(len(STAGES))]
    assert store.latest(stage)["step"] == 8
