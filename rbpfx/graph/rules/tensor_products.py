"""Products of two tensors that are an einsum under another name: inner, outer, tensordot, ..."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from rbpfx.graph.operands import Labels
from rbpfx.graph.propagation import Propagation, unfollowed
from rbpfx.graph.rules.base import argument, register, shape_of, value_of
from rbpfx.graph.rules.contraction import Contraction, Letters


class Inner(Contraction):
    """`inner`: contracts the last axes; all others stand side by side."""

    names = ("input", "other")

    def equation(self, node: fx.Node) -> tuple[list[fx.Node], list[Letters], Letters]:
        """The contracted axes have the same letters, all others have their own."""
        operands = [argument(node, place, name) for place, name in enumerate(self.names)]
        first, second = (len(shape_of(n)) for n in operands)
        a, b = [f"a{d}" for d in range(first)], [f"b{d}" for d in range(second)]
        for place, other in zip(*self.contracted(node, first, second), strict=True):
            b[other % second] = a[place % first]
        result = tuple(x for x in (*a, *b) if (x in a) != (x in b))
        return operands, [tuple(a), tuple(b)], result

    def contracted(self, node: fx.Node, first: int, second: int) -> tuple[list[int], list[int]]:
        """The contracted axes of both."""
        return [-1], [-1]

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Contract."""
        if self.is_opaque(node):
            state.pin_call(node, f"product over axes that are not known ({node.name!r})")
            return unfollowed(node)
        return super().propagate(node, state)

    def macs(self, node: fx.Node, gm: fx.GraphModule) -> int:
        """One per element of the product before it is summed."""
        return 0 if self.is_opaque(node) else super().macs(node, gm)

    def is_opaque(self, node: fx.Node) -> bool:
        """Whether an operand is a number, or the axes are in a tensor."""
        operands = [value_of(argument(node, i, name)) for i, name in enumerate(self.names)]
        numbers = any(value.ndim == 0 for value in operands)
        return numbers or isinstance(value_of(argument(node, 2, "dims")), Tensor)


class Outer(Inner):
    """`outer`: contracts nothing."""

    names = ("input", "vec2")

    def contracted(self, node: fx.Node, first: int, second: int) -> tuple[list[int], list[int]]:
        """None."""
        return [], []


class TensorDot(Inner):
    """`tensordot`, over the last and the first axes, or over those that it is given."""

    names = ("a", "b")

    def contracted(self, node: fx.Node, first: int, second: int) -> tuple[list[int], list[int]]:
        """As `dims` says."""
        dims = value_of(argument(node, 2, "dims", 2))
        if isinstance(dims, int):
            return [*range(first - dims, first)], [*range(dims)]
        left, right = ([d] if isinstance(d, int) else list(d) for d in dims)
        return left, right


register(Inner(), torch.inner, "inner")
register(Outer(), torch.outer, "outer", torch.ger, "ger")
register(TensorDot(), torch.tensordot)
