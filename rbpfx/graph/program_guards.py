"""What an exported program takes for granted of its inputs, as checks in a graph.

A program fixes sizes, bounds others, and holds one branch of every condition on sizes that the
model asked. Run on other inputs it would silently compute something else.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from rbpfx.errors import CaptureError
from rbpfx.graph.calls import call_leaf
from rbpfx.graph.overloads import Call
from rbpfx.graph.values import assume

AddNode = Callable[[Call], fx.Node]

_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.And: operator.and_,
    ast.Or: operator.or_,
    ast.Not: operator.not_,
    ast.USub: operator.neg,
}
_FUNCTIONS = {"max": max, "Max": max, "min": min, "Min": min}


class Guards:
    """Adds checks of the inputs to a graph.

    Args:
        program: The program.
        add: Adds a call to the graph.
        arguments: The forward arguments by name.
        check: Adds the node that checks a value: called with the node, the value, and where.
    """

    def __init__(
        self,
        program: ExportedProgram,
        add: AddNode,
        arguments: Mapping[str, fx.Node],
        check: Callable[[fx.Node, Any, str], None],
    ) -> None:
        self.program = program
        self.add = add
        self.arguments = arguments
        self.check = check
        self._sizes: dict[Any, fx.Node] = {}
