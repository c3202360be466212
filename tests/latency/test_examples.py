"""Example inputs of other batch sizes."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch

from rbpfx.errors import InputError
from rbpfx.latency import first_examples, resize_batch

Pair = namedtuple("Pair", ["x", "mask"])


class TestFirstExamples:
    def test_tensors_are_cut(self) -> None:
        x = torch.arange(6).reshape(3, 2)
        assert torch.equal(first_examples(x, 2), x[:2])
        assert torch.equal(first_examples(x, 5), x)

    def test_nests_keep_their_form(self) -> None:
        x = torch.zeros(4, 2)
        value = {"pair": Pair(x, [x, None]), "flag": True, "tuple": (x, "text", 4)}
        cut = first_examples(value, 1)
        assert isinstance(cut["pair"], Pair)
        assert cut["pair"].x.shape == cut["pair"].mask[0].shape == cut["tuple"][0].shape == (1, 2)
        assert (cut["pair"].mask[1], cut["flag"], cut["tuple"][1:]) == (None, True, ("text", 4))

    def test_what_has_no_examples_stays_whole(self) -> None:
        """An attention mask or a scalar that goes along with the examples."""
        images, mask, scale = torch.zeros(8, 5, 2), torch.zeros(5, 5), torch.tensor(2.0)
        cut = first_examples((scale, images, mask), 2)
        assert [tensor.shape for tensor in cut] == [(), (2, 5, 2), (5, 5)]

    def test_nothing_to_cut(self) -> None:
        assert first_examples((1, None), 2) == (1, None)


class TestResizeBatch:
    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_fewer_examples_are_the_first(self, count: int) -> None:
        x = torch.arange(6).reshape(3, 2)
        assert torch.equal(resize_batch(x, count), first_examples(x, count))

    def test_more_examples_are_repeats(self) -> None:
        x, mask = torch.arange(3), torch.zeros(5, 5)
        images, whole = resize_batch((x, mask), 7)
        assert images.tolist() == [0, 1, 2, 0, 1, 2, 0]
        assert whole is mask

    def test_inputs_without_examples(self) -> None:
        with pytest.raises(InputError, match="the examples on axis 0"):
            resize_batch((1, torch.tensor(2.0)), 4)
