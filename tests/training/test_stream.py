"""The stream: no batch lost, none twice, and the same ones again after a return."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from rbpfx import InputError
from rbpfx.checkpoints import random_state, set_random_state
from rbpfx.checkpoints.encoding import decode, encode
from rbpfx.training.loop import steps_per_epoch
from rbpfx.training.stream import Stream
from rbpfx.training.task import Task

DATA = TensorDataset(torch.arange(22.0))


class Augmented(Dataset[Tensor]):
    """Draws from all three global generators, as augmentations do."""

    def __len__(self) -> int:
        return 22

    def __getitem__(self, index: int) -> Tensor:
        return index + torch.rand(()) + random.random() + np.random.rand()


class Countless:
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


def seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


def taken(stream: Stream, groups: int) -> list[Any]:
    return [batch for _ in range(groups) for batch in stream.take()]


class TestGroups:
    @pytest.mark.parametrize("length", [1, 4, 7])
    @pytest.mark.parametrize("size", [1, 2, 3, 9])
    def test_an_epoch_loses_no_batch_and_is_not_crossed(self, length: int, size: int) -> None:
        loader = list(range(length))
        steps = steps_per_epoch(Task(), loader, size)
        stream = Stream(loader, size)
        for _ in range(2):
            epoch = [stream.take() for _ in range(steps)]
            assert [batch for group in epoch for batch in group] == loader
            assert all(len(group) == size for group in epoch[:-1])
            assert 0 < len(epoch[-1]) <= size

    def test_without_a_length(self) -> None:
        stream = Stream(Countless(), 2)
        assert [stream.take() for _ in range(3)] == [[0, 1], [2], [0, 1]]

    @pytest.mark.parametrize(("loader", "message"), [([], "no batch"), (iter([0]), "only once")])
    def test_errors(self, loader: Any, message: str) -> None:
        stream = Stream(loader, 2)
        with pytest.raises(InputError, match=message):
            taken(stream, 2)

    def test_a_loader_that_raises(self) -> None:
        def broken() -> Iterator[int]:
            yield 0
            raise OSError("photo.jpg is truncated")

        stream = Stream(broken())
        assert stream.take() == [0]
        with pytest.raises(InputError, match=r"OSError after 1 batches of epoch 0: photo\.jpg"):
            stream.take()

    def test_samplers_hear_of_the_epoch(self) -> None:
        sampler = DistributedSampler(DATA, num_replicas=2, rank=0, shuffle=True)
        stream = Stream(DataLoader(DATA, 4, sampler=sampler))
        epochs = [torch.cat([b for (b,) in taken(stream, 3)]) for _ in range(2)]
        assert not torch.equal(*epochs)


def loaders() -> dict[str, Any]:
    own = torch.Generator().manual_seed(5)
    weighted = torch.utils.data.WeightedRandomSampler(torch.arange(1.0, 23.0), 22)
    return {
        "list": list(DATA.tensors[0].split(4)),
        "shuffled": DataLoader(DATA, 4, shuffle=True),
        "own generator": DataLoader(DATA, 4, shuffle=True, generator=own),
        "weighted": DataLoader(DATA, 4, sampler=weighted),
        "augmented": DataLoader(Augmented(), 4, shuffle=True),
        "workers": DataLoader(Augmented(), 4, shuffle=True, num_workers=2),
    }


class TestReturn:
    @pytest.mark.parametrize("kind", list(loaders()))
    @pytest.mark.parametrize(("before", "size"), [(0, 1), (3, 1), (6, 1), (8, 1), (2, 2), (4, 2)])
    def test_the_same_batches_come_again(self, kind: str, before: int, size: int) -> None:
        """Also when the training draws from the same generators in between."""
        if kind == "workers" and (before, size) not in ((3, 1), (8, 1)):
            pytest.skip("slow to start")
        seed(1)
        loader = loaders()[kind]
        stream = Stream(loader, size)
        for _ in range(before):
            stream.take()
            torch.rand(3)
            random.random()
        state = encode(stream.state_dict())
        generators = encode(random_state(loader, torch.device("cpu")))
        expected = taken(stream, 7)
        seed(2)
        again = loaders()[kind]
        resumed = Stream(again, size)
        resumed.load_state_dict(decode(state))
        set_random_state(decode(generators), again, torch.device("cpu"))
        found = taken(resumed, 7)
        assert len(found) == len(expected)
        for batch, wanted in zip(found, expected, strict=True):
            pairs = (
                zip(batch, wanted, strict=True) if isinstance(batch, list) else [(batch, wanted)]
            )
            assert all(torch.equal(a, b) for a, b in pairs)
        assert resumed.state_dict()["group"] == stream.state_dict()["group"]

    def test_a_stateful_loader_finds_its_place_itself(self) -> None:
        class Stateful:
            place = 0

            def __iter__(self) -> Iterator[int]:
                start, self.place = self.place, 0
                for index in range(start, 9):
                    self.place = index + 1
                    yield index
                self.place = 0

            def state_dict(self) -> dict[str, int]:
                return {"place": self.place}

            def load_state_dict(self, state: dict[str, int]) -> None:
                self.place = state["place"]

        stream = Stream(Stateful())
        assert taken(stream, 4) == [0, 1, 2, 3]
        loader = Stateful()
        resumed = Stream(loader)
        resumed.load_state_dict(decode(encode(stream.state_dict())))
        assert taken(resumed, 6) == [4, 5, 6, 7, 8, 0]
        assert (resumed.epoch, resumed.taken) == (1, 1)

    def test_a_wrapper_of_a_loader_without_a_state(self) -> None:
        """As that of Accelerate, which has the methods for loaders that have them."""

        class Wrapper(list[int]):
            def state_dict(self) -> Any:
                raise AttributeError("'DataLoader' object has no attribute 'dl_state_dict'")

            def load_state_dict(self, state: Any) -> None:
                raise AssertionError

        stream = Stream(Wrapper(range(5)))
        taken(stream, 3)
        resumed = Stream(Wrapper(range(5)))
        resumed.load_state_dict(decode(encode(stream.state_dict())))
        assert taken(resumed, 3) == [3, 4, 0]

    @pytest.mark.parametrize("kind", ["other order", "fewer batches"])
    def test_a_loader_that_does_not_repeat_itself_starts_the_epoch(
        self, kind: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        stream = Stream(list(range(8)))
        taken(stream, 8 + 3)
        other = [7, 6, 5, 4, 3, 2, 1, 0] if kind == "other order" else [0, 1]
        resumed = Stream(other)
        with caplog.at_level(logging.WARNING):
            resumed.load_state_dict(decode(encode(stream.state_dict())))
        assert "epoch 1 begins anew" in caplog.text
        assert taken(resumed, 2) == other[:2]
        assert (resumed.epoch, resumed.taken) == (1, 2)
