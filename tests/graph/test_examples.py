"""Counting, cutting and repeating the examples of a batch agree, whatever its form."""

from __future__ import annotations

from collections import UserDict, namedtuple
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from rbpfx.errors import InputError
from rbpfx.graph.examples import count_examples, first_examples, resize_batch

Pair = namedtuple("Pair", ["x", "mask"])
IMAGES = [torch.full((3, side, 4), float(side)) for side in (8, 9, 7, 6, 5)]
BOXES = [{"boxes": torch.zeros(i, 4), "labels": torch.zeros(i)} for i in range(5)]
X = torch.arange(10.0).reshape(5, 2)

BATCHES: dict[str, Any] = {
    "tensor": X,
    "pair": (X, torch.arange(5)),
    "named": Pair(X, [X, None]),
    "collated pair": [X, torch.arange(5)],
    "collated pair of sequences": [torch.zeros(5, 2, 3), torch.zeros(5, 4, 3)],
    "two inputs and a target": [[X, torch.zeros(5, 7)], torch.arange(5)],
    "keywords": {"flag": True, "nest": {"x": X}, "name": "text"},
    "mapping": UserDict(x=X),
    "mapping in a pair": (UserDict(x=X), torch.arange(5)),
    "images": (IMAGES,),
    "images and boxes": (IMAGES, BOXES),
    "images by name": {"images": IMAGES, "targets": BOXES},
    "stacked images and boxes": (torch.zeros(5, 3, 8, 8), BOXES),
    "examples as mappings": ([{"image": x, "id": str(i)} for i, x in enumerate(IMAGES)],),
    "scale first": (torch.tensor(2.0), X),
    "mask of another length": (X, torch.zeros(2, 2)),
    "list with one input": ([X],),
    "sequences beside a tensor": (X, [torch.zeros(5, 2, 3), torch.zeros(5, 4, 3)]),
}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
class TestLaws:
    def test_examples_are_counted(self, batch: Any) -> None:
        assert count_examples(batch) == 5

    @pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
    def test_cutting_leaves_so_many(self, batch: Any, count: int) -> None:
        assert count_examples(first_examples(batch, count)) == min(count, 5)

    @pytest.mark.parametrize("count", [1, 5, 12])
    def test_resizing_gives_so_many(self, batch: Any, count: int) -> None:
        assert count_examples(resize_batch(batch, count)) == count

    def test_cutting_what_was_repeated_gives_it_back(self, batch: Any) -> None:
        whole, again = first_examples(batch, 5), first_examples(resize_batch(batch, 12), 5)
        for a, b in zip(tree_leaves(whole), tree_leaves(again), strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("batch", [torch.tensor(1.0), [], {}, "text", None, ["a"], (1, None)])
def test_a_batch_that_does_not_tell(batch: Any) -> None:
    assert count_examples(batch) == 1
    assert count_examples(batch, 0) == 0
    assert first_examples(batch, 2) == batch
    with pytest.raises(InputError, match="the examples on axis 0"):
        resize_batch(batch, 4)


class TestFirstExamples:
    def test_every_part_is_cut(self) -> None:
        images, boxes, ids = first_examples((IMAGES, BOXES, torch.arange(5)), 2)
        assert (images, boxes, ids.tolist()) == (IMAGES[:2], BOXES[:2], [0, 1])

    def test_what_is_inside_an_example_stays(self) -> None:
        """Five boxes of one of five examples."""
        _, boxes = first_examples((torch.zeros(5, 3, 8, 8), [{"boxes": torch.zeros(5, 4)}] * 5), 2)
        assert [entry["boxes"].shape for entry in boxes] == [(5, 4)] * 2

    def test_nests_keep_their_form(self) -> None:
        value = {"pair": Pair(X, [X, None]), "flag": True, "tuple": (X, "text", 4)}
        cut = first_examples(value, 1)
        assert isinstance(cut["pair"], Pair)
        assert cut["pair"].x.shape == cut["pair"].mask[0].shape == cut["tuple"][0].shape == (1, 2)
        assert (cut["pair"].mask[1], cut["flag"], cut["tuple"][1:]) == (None, True, ("text", 4))

    def test_what_has_no_examples_stays_whole(self) -> None:
        """An attention mask or a scalar that goes along with the examples."""
        images, mask, scale = torch.zeros(8, 5, 2), torch.zeros(5, 5), torch.tensor(2.0)
        cut = first_examples((scale, images, mask), 2)
        assert [tensor.shape for tensor in cut] == [(), (2, 5, 2), (5, 5)]


class TestResizeBatch:
    @pytest.mark.parametrize("count", [1, 2, 5])
    def test_fewer_examples_are_the_first(self, count: int) -> None:
        assert torch.equal(resize_batch(X, count), first_examples(X, count))

    def test_more_examples_are_repeats(self) -> None:
        x, mask = torch.arange(3), torch.zeros(5, 5)
        images, whole = resize_batch((x, mask), 7)
        assert images.tolist() == [0, 1, 2, 0, 1, 2, 0]
        assert whole is mask
