"""Data loaders with workers, forked and spawned: the same numbers, no process left behind."""

from __future__ import annotations

import gc
import multiprocessing
import sys
import traceback
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from rbpfx import FineTune, InputError
from tests.resources.common import BATCHES, open_files, prune, require_same, toy

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(sys.platform == "win32", reason="there is nothing to fork"),
]
DATASET = TensorDataset(*(torch.cat(parts) for parts in zip(*BATCHES, strict=True)))


class Failing(Dataset[tuple[Tensor, Tensor]]):
    """Cannot read its example 90, which is in the last batch."""

    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == 90:
            raise OSError("example 90 is damaged")
        return DATASET[index]  # type: ignore[return-value]


def loader(dataset: Any = DATASET, start: str | None = "fork", **options: Any) -> DataLoader[Any]:
    workers: dict[str, Any] = {"num_workers": 2, "multiprocessing_context": start}
    shuffle = not isinstance(dataset, Failing)
    return DataLoader(
        dataset, batch_size=16, shuffle=shuffle, **(workers if start else {}), **options
    )


def test_forked_workers_give_the_numbers_of_none() -> None:
    prune(loader=loader())  # what the first workers leave for good
    files = open_files()
    require_same(prune(loader=loader()), prune(loader=loader(start=None)))
    assert multiprocessing.active_children() == []
    assert open_files() == files


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_that_persist(start: str) -> None:
    result = prune(loader=loader(start=start, persistent_workers=True))
    require_same(result, prune(loader=loader(persistent_workers=True)))
    assert len(multiprocessing.active_children()) == 2  # the result can be swept
    del result
    gc.collect()
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_spawned_workers_give_the_numbers_of_none() -> None:
    options: dict[str, Any] = {"recovery": FineTune(epochs=0), "val_loader": None}
    spawned = prune(loader=loader(start="spawn"), **options)
    require_same(spawned, prune(loader=loader(start=None), **options))
    assert multiprocessing.active_children() == []


def test_what_went_wrong_in_a_worker_can_be_read() -> None:
    model, before = toy(), torch.get_rng_state()
    message = ""
    try:
        prune(model, loader=loader(Failing()))
    except InputError as error:
        message = str(error)
        assert isinstance(error.__cause__, OSError)
        for raised in (error, error.__cause__):
            traceback.clear_frames(raised.__traceback__)  # as garbage, workers take 5 s each
    assert "in DataLoader worker process" in message
    assert "example 90 is damaged" in message and "__getitem__" in message
    assert multiprocessing.active_children() == []
    assert torch.equal(torch.get_rng_state(), before)
