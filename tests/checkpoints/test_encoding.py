"""States as JSON and tensors: what goes in comes out, and nothing else can."""

from __future__ import annotations

import json
import random
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rbpfx import CheckpointError
from rbpfx.checkpoints.encoding import Encoded, decode, encode

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
STATES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=4)
    ),
    max_leaves=12,
)


def through_json(state: Any) -> Any:
    encoded = encode(state)
    return decode(Encoded(json.loads(json.dumps(encoded.content)), encoded.tensors))


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


@given(STATES)
def test_a_round_trip(state: Any) -> None:
    assert equal(through_json(state), state)


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(0, 3),
        torch.tensor(3, dtype=torch.uint8),
        torch.randn(2, 3, dtype=torch.bfloat16),
        torch.randn(3, 4).t(),
        torch.tensor([float("nan"), float("inf")]).nan_to_num(),
        np.arange(5, dtype=np.uint32),
        np.array([True, False]),
        np.float64(1.5).item(),
        random.Random(3).getstate(),
        np.random.RandomState(3).get_state(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_trainings_hold(value: Any) -> None:
    assert equal(through_json({"a": [value], 3: (value,)}), {"a": [value], 3: (value,)})


def test_optimisers() -> None:
    weight = torch.nn.Parameter(torch.randn(4))
    optimizer = torch.optim.Adam([weight])
    weight.sum().backward()
    optimizer.step()
    assert equal(through_json(optimizer.state_dict()), optimizer.state_dict())


def test_both_ways_are_copies() -> None:
    tensor = torch.zeros(2)
    encoded = encode(OrderedDict(a=tensor))
    tensor += 1
    first, second = decode(encoded), decode(encoded)
    first["a"] += 1
    assert second["a"].tolist() == [0, 0]


@pytest.mark.parametrize("value", [object(), {1, 2}, torch.float32, lambda: 0, 1j])
def test_what_cannot_be_saved_is_named_by_its_place(value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"at state\['a'\]\[1\]: it holds numbers"):
        encode({"a": [0, value]})


def test_what_is_not_written_may_be_anything() -> None:
    class Anything:
        number = 0

    value = Anything()
    encoded = encode([value], writable=False)
    value.number = 1
    assert decode(encoded)[0].number == 0


@pytest.mark.parametrize(
    "content",
    [{"tensor": "0"}, {"pickle": "x"}, {}, {"bytes": "?"}, {"dict": 3}, {"a": 1, "b": 2}],
    ids=str,
)
def test_damage_is_an_error(content: Any) -> None:
    with pytest.raises(ValueError, match="damaged"):
        decode(Encoded([content], {}))
