"""Labels index like the tensors they describe; ties resolve to connected components."""

from __future__ import annotations

from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rbpfx.graph.provenance import Block, Identities, Label

SETTINGS = settings(max_examples=80, deadline=None)


def expanded(label: Label) -> np.ndarray[Any, Any]:
    """For every element of the tensor its atoms, one per block: `(*shape, blocks)`."""
    columns = [
        np.broadcast_to(b.aligned(range(label.ndim)), label.shape)
        for b in sorted(label.blocks, key=lambda b: int(b.atoms.min()))
    ]
    return np.stack(columns, axis=-1) if columns else np.zeros((*label.shape, 0))


@st.composite
def labels(draw: st.DrawFn) -> Label:
    """A label with one block over one or two axes, and perhaps another."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    dims = draw(st.permutations(range(len(shape))))
    cut = draw(st.integers(1, len(shape)))
    blocks, start = [], 0
    for chosen in (dims[:cut][:2], dims[cut:][:1]):
        chosen = tuple(sorted(chosen))
        if chosen:
            sizes = [shape[d] for d in chosen]
            count = int(np.prod(sizes))
            blocks.append(Block(chosen, np.arange(start, start + count).reshape(sizes)))
            start += count
    return Label(shape, tuple(blocks))


@SETTINGS
@given(labels(), st.data())
def test_permuted_moves_atoms_like_data(label: Label, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(label.ndim)))
    result = label.permuted([d - label.ndim if d % 2 else d for d in order])
    wanted = expanded(label).transpose([*order, label.ndim])
    assert result.shape == wanted.shape[:-1]
    np.testing.assert_array_equal(expanded(result), wanted)
    assert all(b.dims == tuple(sorted(b.dims)) for b in result.blocks)


@SETTINGS
@given(labels(), st.data())
def test_unsqueezed_moves_atoms_like_data(label: Label, data: st.DataObject) -> None:
    dim = data.draw(st.integers(-label.ndim - 1, label.ndim))
    positive = dim % (label.ndim + 1)
    result = label.unsqueezed(dim)
    np.testing.assert_array_equal(expanded(result), np.expand_dims(expanded(label), positive))


@SETTINGS
@given(labels(), st.data())
def test_indexed_picks_atoms_like_data(label: Label, data: st.DataObject) -> None:
    dim = data.draw(st.integers(-label.ndim, label.ndim - 1))
    size = label.shape[dim]
    bound = st.none() | st.integers(-5, 5)
    index = data.draw(
        st.integers(-size, size - 1)
        | st.builds(slice, bound, bound, st.none() | st.integers(1, 3))
        | st.lists(st.integers(0, size - 1), min_size=1).map(np.array)
    )
    result = label.indexed(dim, index)
    place = (slice(None),) * (dim % label.ndim) + (index,)
    wanted = expanded(label)[place]
    assert result.shape == wanted.shape[:-1]
    # A block of one axis ends with that axis; of the others nothing is lost.
    ended = [b for b in label.blocks if isinstance(index, int) and b.dims == (dim % label.ndim,)]
    still = [i for i, b in enumerate(_in_order(label)) if b not in ended]
    if 0 not in result.shape:
        np.testing.assert_array_equal(expanded(result), wanted[..., still])


def _in_order(label: Label) -> list[Block]:
    return sorted(label.blocks, key=lambda b: int(b.atoms.min()))


def test_block_without_and_with_shape() -> None:
    joint = Block((1, 2), np.arange(6).reshape(2, 3))
    label = Label((5, 2, 3, 7), (joint, Block((3,), np.arange(6, 13))))
    assert label.block(2) is joint
    assert label.block(-1) is label.blocks[1]
    assert label.block(0) is None
    assert label.without(2) == label.blocks[1:]
    assert label.without(1, 3) == ()
    assert label.with_shape((1, 2, 3, 7)).shape == (1, 2, 3, 7)
    assert joint.aligned((0, 1, 2)).shape == (1, 2, 3)


# -- identities -----------------------------------------------------------------------------


@SETTINGS
@given(
    st.integers(1, 30),
    st.lists(st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=12), max_size=6),
)
def test_solve_finds_connected_components(count: int, ties: list[list[tuple[int, int]]]) -> None:
    identities = Identities()
    atoms = identities.new(count)
    graph: nx.Graph[int] = nx.empty_graph(count)
    for tie in ties:
        pairs = [(a % count, b % count) for a, b in tie]
        graph.add_edges_from(pairs)
        first, second = (np.array([p[i] for p in pairs], dtype=np.int64) for i in (0, 1))
        identities.tie(atoms[first], atoms[second])
    channel = identities.solve().channel
    for component in nx.connected_components(graph):
        assert {int(channel[a]) for a in component} == {min(component)}


def test_solve_is_fast_on_long_chains() -> None:
    """Pointer jumping: the number of rounds is logarithmic in the length of a chain."""
    identities = Identities()
    atoms = identities.new(200_000)
    order = np.random.default_rng(0).permutation(200_000)
    identities.tie(atoms[order[1:]], atoms[order[:-1]])
    assert (identities.solve().channel == 0).all()


def test_tie_broadcasts() -> None:
    identities = Identities()
    atoms = identities.new(6).reshape(2, 3)
    identities.tie(atoms, atoms[:, :1])
    assert identities.solve().channel.tolist() == [0, 0, 0, 3, 3, 3]


def test_pin_spreads_over_ties_and_keeps_the_first_reason() -> None:
    identities = Identities()
    first, second, free = identities.new(2), identities.new(2), identities.new(1)
    identities.pin(second[:1], "early")
    identities.tie(first, second)
    identities.pin(first, "late")
    solution = identities.solve()
    assert solution.pinned.tolist() == [True, True, True, True, False]
    assert solution.reasons(first) == ["early", "late"]
    assert solution.reasons(second[:1]) == ["early"]
    assert solution.reasons(free) == [""]


def test_solve_again_after_more_ties() -> None:
    identities = Identities()
    atoms = identities.new(3)
    assert identities.solve().channel.tolist() == [0, 1, 2]
    identities.tie(atoms[:1], atoms[2:])
    assert identities.solve().channel.tolist() == [0, 1, 0]


def test_pinning_nothing_is_allowed() -> None:
    identities = Identities()
    identities.pin(identities.new(0), "nothing")
    assert not identities.solve().pinned.any()


@pytest.mark.parametrize("count", [0, 1])
def test_tiny_problems(count: int) -> None:
    identities = Identities()
    identities.new(count)
    assert identities.solve().channel.tolist() == list(range(count))
