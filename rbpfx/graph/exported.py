"""Exported programs: a `torch.export.ExportedProgram` becomes a graph like any captured model.

The program holds overloads of operators, and constants in place of the model's mode. Every
overload is spelled as the torch call that it came from (`rbpfx.graph.overloads`), so that the same
rules apply; a spelling counts if torch gives the same kind of value for it. Constants that stand
for the mode ask the graph's mode again.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx.node import map_aggregate, map_arg
from torch.utils._pytree import (
    GetAttrKey,
    MappingKey,
    SequenceKey,
    tree_flatten_with_path,
    tree_leaves,
    tree_unflatten,
)

from rbpfx.errors import CaptureError, InputError
from rbpfx.graph.calls import call_leaf
from rbpfx.graph.metadata import compute, fake_inputs, fake_mode
from rbpfx.graph.modes import by_mode, in_mode, mode_flag
from rbpfx.graph.overloads import Call, named_arguments, spellings
from rbpfx.graph.parts import count_examples, note_examples
from rbpfx.graph.rules.base import find_rule
from rbpfx.graph.tracer import GraphTracer
from rbpfx.graph.values import assume

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

# Names that schemas have for "in train mode"; normalisations ask whether to use batch statistics.
_MODE_ARGUMENTS = frozenset({"train", "training", "use_input_stats"})
# Checks of the program that hold by construction, or for one data type only.
_CHECKS = frozenset({"_assert_tensor_metadata"})
_COUNTER = "num_batches_tracked"


def trace_program(program: ExportedProgram, inputs: Inputs | None = None) -> fx.GraphModule:
    """Turn an exported program into a captured graph.

    Args:
        program: What `torch.export.export` returned, or `torch.export.load`.
        inputs: Positional and keyword arguments; by default the program's example inputs.

    Returns:
        A graph with metadata, over the parameters of the program.

    Raises:
        CaptureError: The program holds what a graph of ours cannot hold.
        InputError: The inputs are missing, or do not fit.
    """
    source = program.module()
    values = _named_inputs(program, source, inputs)
    translation = _Translation(program, source, values)
    translation.run()
    gm = translation.gm
    gm.graph._tracer_cls = GraphTracer
    gm.graph.lint()
    gm.recompile()
    note_examples(gm, count_examples(values))
    return gm.train(translation.trained)


def _named_inputs(
    program: ExportedProgram, source: nn.Module, inputs: Inputs | None
) -> dict[str, Any]:
    """Values of the forward arguments by name, in the order of the program."""
    given = program.example_inputs if inputs is None else inputs
    if given is None:
        raise InputError("the program was saved without example inputs; pass example_inputs=...")
    signature = inspect.signature(source.forward)
    try:
        bound = signature.bind(*given[0], **given[1]).arguments
    except TypeError as error:
        raise InputError(
            f"the example inputs do not fit the program's forward{signature}: {error}"
        ) from error
    return {name: bound[name] for name in signature.parameters if name in bound}


class _Translation:
    """One walk over the graph of a program.

    Attributes:
        gm: The graph module that is built.
        trained: Whether the program was exported in train mode.
    """

    def __init__(
        self, program: ExportedProgram, source: fx.GraphModule, values: Mapping[str, Any]
    ) -> None:
        self.program = program
        self.source = source
        self.values = values
        self.mode = fake_mode()
        self.gm = _with_state_of(source)
        self.graph = fx.Graph()
        self.twin: dict[fx.Node, fx.Node] = {}
        self.attributes: dict[str, fx.Node] = {}
        self.flag: fx.Node | None = None
        self.trained = False

    def run(self) -> None:
        """Build the graph."""
        placeholders = [n for n in self.source.graph.nodes if n.op == "placeholder"]
        arguments = self._inputs(placeholders)
        self.flag = mode_flag(self.graph, self.gm)
        for name, structure in arguments.items():
            self._unpack(name, structure)
        results = self._walk(self.source.graph, self.source)
        assert self.program.call_spec.out_spec is not None
        result = tree_unflatten(tree_leaves(results), self.program.call_spec.out_spec)
        self._compute(self.graph.output(self._packed(result)))
        if not self.flag.users:
            self.graph.erase_node(self.flag)
            del self.gm._modules[str(self.flag.target)]
        self.gm.graph = self.graph

    # -- inputs and outputs ---------------------------------------------------------------

    def _inputs(self, placeholders: list[fx.Node]) -> dict[str, Any]:
        """Add a placeholder per argument; argument name -> the placeholders of its leaves."""
        assert self.program.call_spec.in_spec is not None
        args, kwargs = tree_unflatten(placeholders, self.program.call_spec.in_spec)
        names = list(inspect.signature(self.source.forward).parameters)
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        if arguments.keys() != self.values.keys():
            raise InputError(
                f"the program takes {', '.join(arguments)}; the example inputs give "
                f"{', '.join(self.values) or 'nothing'}"
            )
        for name in arguments:
            node = self.graph.placeholder(name)
            node.meta["val"] = fake_inputs(self.mode, self.values[name])
            self.attributes[name] = node
        return arguments
