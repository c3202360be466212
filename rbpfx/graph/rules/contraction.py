"""Contractions: products of several tensors, summed over some of their axes.

Every operator here is an einsum: a letter per axis, shared letters are multiplied index by index,
letters that the result lacks are summed over. The product is an element-wise combination, so its
labels combine like those of any other; a summed axis is a read, because a zero there in one
operand is a zero in the sum.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from rbpfx.graph.calls import module_of
from rbpfx.graph.operands import Labels, Operand, Read
from rbpfx.graph.propagation import Propagation
from rbpfx.graph.provenance import Block, Label
from rbpfx.graph.rules.base import (
    Rule,
    argument,
    register,
    shape_of,
    tensor_input,
    value_of,
)
from rbpfx.graph.rules.combine import broadcast
from rbpfx.graph.slicing import Slicing

Letters: TypeAlias = tuple[str, ...]
_REASON = "contracted with a value that is not followed"


@dataclass(frozen=True, eq=False)
class Factor:
    """One operand of a contraction.

    Attributes:
        label: Its label.
        letters: The letter of every axis.
        source: The value that a multiplier can be put on; None if the operand is not read.
        weight: The operand as a weight, if it is made of parameters alone.
    """

    label: Label
    letters: Letters
    source: fx.Node | None
    weight: Operand | None = None

    def spans(self, letter: str) -> bool:
        """Whether the operand has an axis of its own along a letter, not one to be repeated."""
        if letter not in self.letters:
            return False
        dim = self.letters.index(letter)
        return self.label.shape[dim] > 1 or self.label.block(dim) is not None


def contract(
    state: Propagation,
    node: fx.Node,
    factors: Sequence[Factor],
    result: Letters,
    macs: int | None = None,
) -> Label:
    """Label of a contraction; its reads, producers and cost are recorded.

    Args:
        state: The walk.
        node: The operator.
        factors: The operands.
        result: The letters of the result.
        macs: What this contraction costs, if it is not all that the operator does.
    """
    counts = Counter(letter for factor in factors for letter in set(factor.letters))
    summed = [x for x in dict.fromkeys(x for f in factors for x in f.letters) if x not in result]
    shared = [letter for letter, count in counts.items() if count > 1 and letter in result]
    letters = (*result, *summed)
    factors = [_separated(state, factor, summed, shared) for factor in factors]
    shapes = [_spread_shape(factor, letters) for factor in factors]
    shape = torch.broadcast_shapes(*shapes)
    labels = [
        Label(spread, tuple(b.moved(_places(f.letters, letters)) for b in f.label.blocks))
        for f, spread in zip(factors, shapes, strict=True)
    ]
    product = broadcast(state, labels, shape, _REASON)
    made = _produce(state, node, factors, result)
    reads, kept = [], []
    for block in product.blocks:
        if block.dims[0] < len(result):
            kept.append(block)
        else:
            reads.append(block)
            _read(state, node, factors, letters[block.dims[0]], block)
    # Produced channels right behind the contracted ones, as the cost model asks.
    ordered = sorted(kept, key=lambda block: not made & {letters[d] for d in block.dims})
    state.contract(node, *((block.atoms.ravel(),) for block in (*reads, *ordered)), macs=macs)
    return Label(tuple(shape[: len(result)]), tuple(kept))


def _separated(state: Propagation, factor: Factor, summed: list[str], shared: list[str]) -> Factor:
    """A factor whose blocks lie over one summed letter, or over none.

    Where positions are the units, a joint block over (heads, head_dim) is one over head_dim.
    """
    letters = factor.letters
    repeated = {d for d, letter in enumerate(letters) if letters.count(letter) > 1}
    label = state.collapse(factor.label, repeated, "diagonal of a contraction")
    label = state.separate(label, (d for d, letter in enumerate(letters) if letter in summed))
    for block in label.blocks if state.attention == "positions" else ():
        if len(block.dims) > 1 and any(letters[d] in shared for d in block.dims):
            ended = set(block.dims) - {state.unit_axis(block.dims)}
            label = state.collapse(label, ended, "heads of narrower heads")
    return Factor(label, letters, factor.source, factor.weight)


def _spread_shape(factor: Factor, letters: Letters) -> tuple[int, ...]:
    sizes = dict(zip(factor.letters, factor.label.shape, strict=True))
    return tuple(sizes.get(letter, 1) for letter in letters)


def _places(own: Letters, letters: Letters) -> dict[int, int]:
    return {dim: letters.index(letter) for dim, letter in enumerate(own)}


def _produce(
    state: Propagation, node: fx.Node, factors: Sequence[Factor], result: Letters
) -> set[str]:
    """Channels come to life along the axes that parameters alone bring into a result."""
    values = [factor for factor in factors if factor.weight is None]
    made: set[str] = set()
    for factor in factors if values else ():
        for dim, letter in enumerate(factor.letters):
            followed = letter in result and factor.label.block(dim) is not None
            if factor.weight is None or not followed or any(v.spans(letter) for v in values):
                continue
            state.produce(node, factor.weight, dim)
            made.add(letter)
    return made


def _read(
    state: Propagation, node: fx.Node, factors: Sequence[Factor], letter: str, block: Block
) -> None:
    """Record the read of a summed letter: one masked operand suffices, an activation rather."""
    spanning = [factor for factor in factors if factor.spans(letter)]
    readable = [factor for factor in spanning if factor.source is not None]
    factor = min(readable, key=lambda f: f.weight is not None)
    weights = ((f.weight, f.letters.index(letter)) for f in spanning if f is not factor)
    axes = (weight.parameter_axis(dim) for weight, dim in weights if weight is not None)
    axis = next((axis for axis in axes if axis is not None), None)
    assert factor.source is not None
    if tree_leaves((node.args, node.kwargs)).count(factor.source) > 1:
        axis = None  # a multiplier sits on all uses of a value, on a weight it would count once
    state.add_read(Read(node, factor.source, factor.letters.index(letter), (block.atoms,), axis))


def value_factor(
    state: Propagation, node: fx.Node, letters: Sequence[str], user: fx.Node | None = None
) -> Factor:
    """A value of the graph as a factor, of an operator that may slice it if it is a weight."""
    weight = None if state.is_activation(node) else state.value_operand(node, user)
    return Factor(state.label(node), tuple(letters), node, weight)


def _with_cuts(factor: Factor, result: Letters) -> Factor:
    """A factor that is followed along contracted axes too where it is no more than a weight.

    One that is computed over a whole axis, as by a normalisation, is sliced where it is used.
    """
    label, weight = factor.label, factor.weight
    if weight is None or weight.name is not None:
        return factor
    sizes = enumerate(label.shape)
    whole = [d for d, size in sizes if size > 1 and label.block(d) is None]
    cut = [Block((d,), weight.axis(d)) for d in whole if factor.letters[d] not in result]
    return Factor(Label(label.shape, (*label.blocks, *cut)), factor.letters, factor.source, weight)


class Contraction(Rule):
    """An operator that is an einsum of its operands; a subclass says which."""

    def equation(self, node: fx.Node) -> tuple[list[fx.Node], list[Letters], Letters]:
        """The operands, the letters of each, the letters of the result."""
        raise NotImplementedError

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Contract."""
        operands, letters, result = self.equation(node)
        factors = [value_factor(state, n, x, node) for n, x in zip(operands, letters, strict=True)]
        if len(set(operands)) == len(operands) and any(f.weight is None for f in factors):
            factors = [_with_cuts(factor, result) for factor in factors]
        return contract(state, node, factors, result)

    def macs(self, node: fx.Node, gm: fx.GraphModule) -> int:
        """One per element of the product before it is summed."""
        operands, letters, _ = self.equation(node)
        return contraction_macs([shape_of(n) for n in operands], letters)


def contraction_macs(shapes: Sequence[tuple[int, ...]], letters: Sequence[Sequence[str]]) -> int:
    """Number of elements of a product before it is summed."""
    sizes: dict[str, int] = {}
    for shape, names in zip(shapes, letters, strict=True):
        for name, size in zip(names, shape, strict=True):
            sizes[name] = max(sizes.get(name, 1), size)
    return prod(sizes.values())


def matmul_letters(first: int, second: int) -> tuple[Letters, Letters, Letters]:
    """Letters of `torch.matmul` for operands of these numbers of axes, and of its result."""

    def batch(ndim: int) -> Letters:
        return tuple(str(place) for place in range(-ndim, -2))

    a = ("k",) if first == 1 else (*batch(first), "i", "k")
    b = ("k",) if second == 1 else (*batch(second), "k", "j")
    free = (*(("i",) if first > 1 else ()), *(("j",) if second > 1 else ()))
    return a, b, (*batch(max(first, second)), *free)


class Matmul(Contraction):
    """matmul, @, bmm, mm, mv, dot.

    Args:
        second: Name of the second operand.
    """

    def __init__(self, second: str = "other") -> None:
        self.second = second

    def equation(self, node: fx.Node) -> tuple[list[fx.Node], list[Letters], Letters]:
        """Contract the last axis with the last but one, behind broadcast batch axes."""
        operands = [tensor_input(node), argument(node, 1, self.second)]
        a, b, result = matmul_letters(*(len(shape_of(n)) for n in operands))
        return operands, [a, b], result


class AddMatmul(Contraction):
    """addmm, addmv, baddbmm, addbmm: a product is added to the first argument.

    Args:
        second: Name of the second argument.
        third: Name of the third argument.
        sums_batch: Whether the product is summed over the batch, as in addbmm.
    """

    def __init__(self, second: str, third: str, *, sums_batch: bool = False) -> None:
        self.names = (second, third)
        self.sums_batch = sums_batch

    def equation(self, node: fx.Node) -> tuple[list[fx.Node], list[Letters], Letters]:
        """That of the product."""
        operands = [argument(node, place, name) for place, name in enumerate(self.names, start=1)]
        a, b, result = matmul_letters(*(len(shape_of(n)) for n in operands))
        return operands, [a, b], result[-2:] if self.sums_batch else result

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Tie the product to what it is added to."""
        product = super().propagate(node, state)
        assert isinstance(product, Label)
        added = state.label(tensor_input(node))
        return broadcast(state, [added, product], shape_of(node))


class Einsum(Contraction):
    """einsum, with letters or lists of axis numbers."""

    def equation(self, node: fx.Node) -> tuple[list[fx.Node], list[Letters], Letters]:
        """Parse the equation; the axes of an ellipsis get letters of their own."""
        first, *rest = node.args
        if isinstance(first, str):
            given = rest[0] if len(rest) == 1 and isinstance(rest[0], (list, tuple)) else rest
            left, arrow, right = first.replace(" ", "").partition("->")
            terms = [_tokens(term) for term in left.split(",")]
            result = _tokens(right) if arrow else None
        else:
            given = node.args[: len(node.args) // 2 * 2 : 2]
            terms = [_tokens(term) for term in node.args[1::2]]
            result = _tokens(node.args[-1]) if len(node.args) % 2 else None
        operands: list[fx.Node] = list(given)  # type: ignore[arg-type]
        letters = [_written_out(t, len(shape_of(n))) for t, n in zip(terms, operands, strict=True)]
        pairs = zip(terms, letters, strict=True)
        rank = max((len(x) - len(t) + 1 for t, x in pairs if "..." in t), default=0)
        ellipsis = tuple(str(place) for place in range(-rank, 0))
        if result is None:
            named = [letter for term in terms for letter in term if letter != "..."]
            once = sorted(letter for letter in set(named) if named.count(letter) == 1)
            return operands, letters, (*ellipsis, *once)
        return operands, letters, _replaced(result, ellipsis)


def _tokens(term: Any) -> list[str]:
    """The letters of one operand; "..." for an ellipsis."""
    if isinstance(term, str):
        before, dots, after = term.partition("...")
        return [*before, *([dots] if dots else []), *after]
    return ["..." if item is Ellipsis else f"axis {value_of(item):02}" for item in term]


def _written_out(term: list[str], ndim: int) -> Letters:
    """Letters of every axis: the axes of an ellipsis are numbered from the right."""
    return _replaced(term, tuple(str(place) for place in range(len(term) - 1 - ndim, 0)))


def _replaced(term: list[str], ellipsis: Letters) -> Letters:
    if "..." not in term:
        return tuple(term)
    place = term.index("...")
    return (*term[:place], *ellipsis, *term[place + 1 :])


class Bilinear(Rule):
    """`Bilinear`: both inputs are contracted with one weight, (out, in1, in2)."""

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """An einsum of three operands, and a bias."""
        first, second = _bilinear_inputs(node)
        weight = state.operand(node, 2, "weight")
        bias = state.operand(node, 3, "bias")
        assert weight is not None
        batch = tuple(str(place) for place in range(len(shape_of(first)) - 1))
        factors = [
            value_factor(state, first, (*batch, "i")),
            value_factor(state, second, (*batch, "j")),
            Factor(weight.as_label(), ("o", "i", "j"), None, weight),
        ]
        label = contract(state, node, factors, (*batch, "o"))
        if bias is not None:
            bias.bind(0, state.axis(label, -1, "bias of an axis that is not followed"))
        return label

    def rewrite(self, node: fx.Node, state: Slicing) -> None:
        """Name the new widths."""
        module = module_of(state.twin(node), state.gm)
        if isinstance(module, nn.Bilinear):
            shape = module.weight.shape
            module.out_features, module.in1_features, module.in2_features = shape

    def macs(self, node: fx.Node, gm: fx.GraphModule) -> int:
        """One per output element and pair of input features."""
        first, second = _bilinear_inputs(node)
        return prod(shape_of(node)) * shape_of(first)[-1] * shape_of(second)[-1]


def _bilinear_inputs(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    first, second = argument(node, 0, "input1"), argument(node, 1, "input2")
    assert isinstance(first, fx.Node) and isinstance(second, fx.Node)
    return first, second


register(Matmul(), torch.matmul, torch.linalg.matmul, operator.matmul, "matmul", "__matmul__")
for _name, _second in {"bmm": "mat2", "mm": "mat2", "mv": "vec", "dot": "tensor"}.items():
    register(Matmul(_second), getattr(torch, _name), _name)
register(Einsum(), torch.einsum)
for _names, _rule in {
    "addmm": AddMatmul("mat1", "mat2"),
    "addmv": AddMatmul("mat", "vec"),
    "baddbmm": AddMatmul("batch1", "batch2"),
    "addbmm": AddMatmul("batch1", "batch2", sums_batch=True),
}.items():
    register(_rule, getattr(torch, _names), _names, f"{_names}_")
register(Bilinear(), nn.Bilinear, F.bilinear)
