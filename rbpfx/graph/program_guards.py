"""What an exported program takes for granted of its inputs, as checks in a graph.

A program fixes some sizes, bounds others, and holds one branch of every condition on sizes that
the model asked. Inputs for which it would silently compute something else are refused.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from rbpfx.errors import CaptureError
from rbpfx.graph.calls import call_leaf
from rbpfx.graph.values import assume

_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.And: operator.and_,
    ast.Or: operator.or_,
    ast.Not: operator.not_,
}
_FUNCTIONS = {"max": max, "Max": max, "min": min, "Min": min}
# They ask for the truth of their arguments, which are no numbers while code is traced again.
_ASKING_PYTHON = (max, min, operator.not_)


class Guards:
    """Adds checks to a graph.

    Args:
        program: The program.
        graph: The graph.
        valued: Gives a new node its metadata; returns it.
        arguments: The nodes of the forward arguments by name.
    """

    def __init__(
        self,
        program: ExportedProgram,
        graph: fx.Graph,
        valued: Callable[[fx.Node], fx.Node],
        arguments: Mapping[str, fx.Node],
    ) -> None:
        self.program = program
        self.graph = graph
        self.valued = valued
        self._leaves: list[fx.Node] = []
        self._sizes: dict[Any, fx.Node] = {}
        # Sources of conditions: `L['x']` is an argument, `L['flat_args'][0]` the first tensor.
        self._names: dict[str, Any] = {"L": {"flat_args": self._leaves, **arguments}}

    def check_input(self, node: fx.Node, value: Any, name: str) -> None:
        """Check what the program knows of an input: sizes of a tensor, or a constant.

        Args:
            node: The input in the graph.
            value: Its value in the program.
            name: What users call it.
        """
        self._leaves.append(node)
        if not isinstance(value, Tensor):
            self._check_number(node, value, f"argument {name}")
            return
        for axis, size in enumerate(value.shape):
            asked = self._call(operator.getitem, self._call(getattr, node, "shape"), axis)
            self._check_number(asked, size, f"axis {axis} of argument {name}")

    def check_conditions(self) -> None:
        """Check sizes that depend on each other, and conditions that the model asked.

        Programs of torch 2.8 do not tell the conditions.
        """
        self._names |= {str(symbol): node for symbol, node in self._sizes.items()}
        for expression, node in self._sizes.items():
            symbols = {str(symbol) for symbol in expression.free_symbols}
            if not expression.is_Symbol and symbols <= self._names.keys():
                self._compare(operator.eq, node, self._compiled(str(expression)), str(expression))
        for text in getattr(self.program, "_guards_code", ()):
            self._require(self._compiled(text), text)

    def _check_number(self, node: fx.Node, value: Any, where: str) -> None:
        if isinstance(value, torch.SymInt):
            self._check_symbol(node, value.node.expr, where)
        elif value is None or isinstance(value, (bool, int, float, str)):
            self._assume(node, value, f"{where}, which the exported program fixes,")

    def _check_symbol(self, node: fx.Node, symbol: Any, where: str) -> None:
        first = self._sizes.setdefault(symbol, node)
        if first is not node:
            self._compare(operator.eq, node, first, f"{where} is {first.name}")
        limits = self.program.range_constraints.get(symbol)
        if limits is None:
            return
        if limits.lower > 2:  # torch treats two like any number
            self._compare(operator.ge, node, int(limits.lower), f"{where} ≥ {limits.lower}")
        if limits.upper.is_Integer:
            self._compare(operator.le, node, int(limits.upper), f"{where} ≤ {limits.upper}")

    def _compare(self, function: Callable[..., Any], node: fx.Node, other: Any, text: str) -> None:
        self._require(self._call(function, node, other), text)

    def _require(self, condition: Any, text: str) -> None:
        """Check that a condition holds; the text says it."""
        self._assume(condition, True, f"a condition of the exported program ({text})")

    def _assume(self, node: Any, value: Any, where: str) -> None:
        self.valued(call_leaf(self.graph, assume, (node, value, where)))

    def _call(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        if function in _ASKING_PYTHON:
            return self.valued(call_leaf(self.graph, function, args))
        return self.valued(self.graph.call_function(function, args))

    # -- conditions in the text of the program ------------------------------------------------

    def _compiled(self, text: str) -> Any:
        """The value of an expression over sizes, as nodes. Nothing of the text is executed."""
        try:
            return self._value(ast.parse(text, mode="eval").body)
        except (KeyError, IndexError, SyntaxError) as error:
            raise CaptureError(
                f"the exported program holds for inputs with {text} only, which cannot be checked "
                f"({error!r}); export it with fixed sizes instead of dynamic ones."
            ) from error

    def _value(self, tree: ast.AST) -> Any:
        match tree:
            case ast.Constant(value):
                return value
            case ast.Name(name):
                return self._names[name]
            case ast.Subscript(value, index):
                base, place = self._value(value), self._value(index)
                if isinstance(base, fx.Node):
                    return self._call(operator.getitem, base, place)
                return base[place]
            case ast.Call(ast.Attribute(value, "size"), []):
                return self._call(getattr, self._value(value), "shape")
            case ast.Call(ast.Name(name), args):
                return self._call(_FUNCTIONS[name], *map(self._value, args))
            case ast.BinOp(left, op, right):
                return self._call(_OPERATORS[type(op)], self._value(left), self._value(right))
            case ast.UnaryOp(op, operand):
                return self._call(_OPERATORS[type(op)], self._value(operand))
            case ast.Compare(left, [op], [right]):
                return self._call(_OPERATORS[type(op)], self._value(left), self._value(right))
            case ast.BoolOp(op, values):
                function = _OPERATORS[type(op)]
                return reduce(lambda a, b: self._call(function, a, b), map(self._value, values))
        raise KeyError(ast.unparse(tree))
