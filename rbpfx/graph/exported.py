"""Exported programs: a `torch.export.ExportedProgram` becomes a graph like any captured model.

The program holds overloads of operators, and constants in place of the model's mode. Every
overload is spelled as the torch call that it came from (`rbpfx.graph.overloads`), so that the same
rules apply; a spelling counts if torch gives the same kind of value for it. Constants that stand
for the mode ask the graph's mode again.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.export import ExportedProgram
from torch.fx.node import map_aggregate, map_arg
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import (
    GetAttrKey,
    SequenceKey,
    keystr,
    tree_flatten_with_path,
    tree_leaves,
    tree_unflatten,
)

from rbpfx.errors import CaptureError, GuardError, InputError
from rbpfx.graph.calls import call_leaf
from rbpfx.graph.examples import count_examples
from rbpfx.graph.exported_modules import add_constant, holds, restore_batch_norm, share_state
from rbpfx.graph.lazy import LazyGraphModule
from rbpfx.graph.metadata import compute, fake_inputs, fake_mode
from rbpfx.graph.modes import by_mode, mode_flag
from rbpfx.graph.overloads import Call, in_schema_order, named_arguments, spellings
from rbpfx.graph.parts import note_examples
from rbpfx.graph.program_guards import Guards
from rbpfx.graph.rules.base import find_rule
from rbpfx.graph.tracer import GraphTracer

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

# Names that schemas have for "in train mode"; normalisations ask whether to use batch statistics.
_MODE_ARGUMENTS = frozenset({"train", "training", "use_input_stats"})
# Checks of the program that hold by construction, or for one data type only.
_CHECKS = frozenset({torch.ops.aten._assert_tensor_metadata})
_COPY_OF_CONSTANT = torch.ops.aten.lift_fresh_copy.default


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
    note_examples(gm, count_examples(values))
    for module in gm.modules():
        if not isinstance(module, _BatchNorm):  # has a mode of its own already
            module.training = translation.trained
    return gm


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
        self.trained = _exported_in_train_mode(source)
        self.graph = fx.Graph(tracer_cls=GraphTracer)
        self.gm = LazyGraphModule(nn.Module(), self.graph, class_name="ExportedModel")
        share_state(source, self.gm)
        self.trials = fx.Graph()
        self.mode = fake_mode()
        self._twins: dict[fx.Node, Any] = {}

    def run(self) -> None:
        """Build the graph."""
        arguments = self._arguments()
        nodes = {name: self._placeholder(name) for name in arguments}
        self.flag = mode_flag(self.graph, self.gm)
        guards = Guards(self.program, self.graph, self._valued, nodes)
        for name, structure in arguments.items():
            self._unpack(nodes[name], structure, guards)
        guards.check_conditions()
        results = self._walk(self.source.graph)
        assert self.program.call_spec.out_spec is not None
        result = tree_unflatten(list(results), self.program.call_spec.out_spec)
        self._valued(self.graph.output(self._packed(result)))
        self._drop_unused()
        self.graph.lint()
        self.gm.recompile()

    def _drop_unused(self) -> None:
        """Remove what was asked for nothing: tensors of a module, sizes, the mode."""
        for node in reversed(self.graph.nodes):
            asks = node.op == "get_attr" or node.target in (getattr, operator.getitem)
            if (asks or node is self.flag) and not node.users:
                self.graph.erase_node(node)
        if not self.flag.users:
            self.gm.delete_submodule(str(self.flag.target))

    # -- inputs and outputs ---------------------------------------------------------------

    def _arguments(self) -> dict[str, Any]:
        """Argument name -> the placeholders of the program in the structure of the argument."""
        placeholders = [n for n in self.source.graph.nodes if n.op == "placeholder"]
        assert self.program.call_spec.in_spec is not None
        args, kwargs = tree_unflatten(placeholders, self.program.call_spec.in_spec)
        names = inspect.signature(self.source.forward).parameters
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        if arguments.keys() != self.values.keys():
            raise InputError(
                f"the program takes {', '.join(arguments)}; the example inputs give "
                f"{', '.join(self.values) or 'nothing'}"
            )
        return arguments

    def _placeholder(self, name: str) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = fake_inputs(self.mode, self.values[name])
        return node

    def _unpack(self, node: fx.Node, structure: Any, guards: Guards) -> None:
        """Fetch what the program takes from an argument, and check it."""
        for path, placeholder in tree_flatten_with_path(structure)[0]:
            leaf = node
            for key in path:
                function, index = _step(key)
                leaf = self._new(Call("call_function", function, (leaf, index), {}))
            self._twins[placeholder] = leaf
            name = str(node.target) + keystr(path)
            guards.check_input(leaf, placeholder.meta["val"], repr(name))

    def _packed(self, value: Any) -> Any:
        """A result of the model as an argument of a node."""
        if is_dataclass(value) and not isinstance(value, type):
            given = {f.name: getattr(value, f.name) for f in fields(value) if f.init}
            kwargs = {name: self._packed(v) for name, v in given.items() if v is not None}
            return self._new(Call("call_function", type(value), (), kwargs))
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            args = tuple(self._packed(v) for v in value)
            return self._new(Call("call_function", type(value), args, {}))
        if type(value) in (tuple, list):
            return type(value)(self._packed(v) for v in value)
        if type(value) is dict:
            return {key: self._packed(v) for key, v in value.items()}
        if value is None or isinstance(value, (fx.Node, bool, int, float, str)):
            return value
        raise CaptureError(
            f"the program returns a {type(value).__name__}, which a graph cannot make; export a "
            "module around the model that returns tensors, tuples or dictionaries."
        )

    # -- nodes ----------------------------------------------------------------------------

    def _walk(self, graph: fx.Graph) -> Any:
        """Translate the nodes of a graph; what it returns."""
        for node in graph.nodes:
            if node.op == "call_function":
                self._twins[node] = self._call(node)
            elif node.op == "output":
                return self._mapped(node.args[0])
        raise AssertionError("a graph without output")

    def _mapped(self, args: Any) -> Any:
        return map_arg(args, self._twin)

    def _twin(self, node: fx.Node) -> Any:
        """What stands for a node of the program; its parameters are fetched where they are used."""
        if node not in self._twins:
            assert node.op == "get_attr", node.format_node()
            self._twins[node] = self._attribute(node)
        return self._twins[node]

    def _attribute(self, node: fx.Node) -> fx.Node:
        name = str(node.target)
        value = attrgetter(name)(node.graph.owning_module)
        if not isinstance(value, Tensor) or node.graph is not self.source.graph:
            raise CaptureError(f"the program holds {name!r}, a {type(value).__name__}")
        if not holds(self.gm, name):
            add_constant(self.gm, name, value)
        return self._valued(self.graph.get_attr(name))

    def _call(self, node: fx.Node) -> Any:
        if isinstance(node.target, HigherOrderOperator):
            return self._inlined(node)
        args, kwargs = self._mapped(node.args), self._mapped(node.kwargs)
        if node.target is operator.getitem and isinstance(args[0], (tuple, list)):
            return args[0][args[1]]  # of what was inlined
        if not isinstance(node.target, OpOverload):
            return self._new(Call("call_function", node.target, args, kwargs), node.name)
        if node.target.overloadpacket in _CHECKS or _only_counts(node):
            return None
        if node.target is _COPY_OF_CONSTANT and all(map(_only_indexes, node.users)):
            return args[0]
        given = named_arguments(node.target, args, kwargs)
        if node.target is torch.ops.aten.batch_norm.default:
            call = self._batch_norm(given, node.name)
            if call is not None:
                return call
        return self._spelled(node.target, self._asking_the_mode(given), node.name)

    def _inlined(self, node: fx.Node) -> Any:
        """What a region with or without gradients returns, its operators in place of the region."""
        name = node.target.name()  # type: ignore[union-attr]
        if name == "wrap_with_set_grad_enabled":
            (enabled, body), args = node.args[:2], node.args[2:]
        elif name == "wrap_with_autocast" and not node.args[2]:
            enabled, body, args = True, node.args[4], node.args[5:]
        else:
            raise CaptureError(
                f"the program holds {name!r} (node {node.name!r}), which a graph cannot hold; "
                "export the model without it, or capture the model itself."
            )
        region = getattr(node.graph.owning_module, str(body.target))  # type: ignore[union-attr]
        placeholders = [n for n in region.graph.nodes if n.op == "placeholder"]
        self._twins.update(zip(placeholders, self._mapped(args), strict=True))
        results = self._walk(region.graph)
        return results if enabled else map_aggregate(results, self._detached)

    def _detached(self, value: Any) -> Any:
        if not isinstance(value, fx.Node) or not isinstance(value.meta["val"], Tensor):
            return value
        return self._new(Call("call_method", "detach", (value,), {}))

    # -- the mode -------------------------------------------------------------------------

    def _asking_the_mode(self, given: dict[str, Any]) -> dict[str, Any]:
        """Arguments in which constants that stand for the program's mode ask for the mode."""
        asking = dict(given)
        for name, literal in _literals_of_mode(given).items():
            if bool(literal) is self.trained:
                asking[name] = self.flag
                if not isinstance(literal, bool):
                    choice = call_leaf(self.graph, by_mode, (self.flag, literal, 0.0))
                    asking[name] = self._valued(choice)
        return asking

    def _batch_norm(self, given: dict[str, Any], name: str) -> fx.Node | None:
        """The call of a module: it has a mode and a state of its own, as in any other model."""
        path = restore_batch_norm(self.gm, given)
        if path is None:
            return None
        call = Call("call_module", path, (given["input"],), {})
        return self._new(call, name)

    # -- operators ------------------------------------------------------------------------

    def _spelled(self, overload: OpOverload, given: dict[str, Any], name: str) -> fx.Node:
        """The call of torch that an overload stands for; the overload where there is none."""
        literal = in_schema_order("call_function", overload, overload, given)
        expected = self._kind_of(literal)
        ruled: list[Call] = []
        others: list[Call] = []
        for call in (literal, *spellings(overload, given)):
            (ruled if self._has_rule(call) else others).append(call)
        candidates = (call for call in (*ruled, *others[1:]) if self._kind_of(call) == expected)
        return self._new(next(candidates, literal), name)

    def _has_rule(self, call: Call) -> bool:
        with self._tried(call) as node:
            return find_rule(node, self.gm) is not None

    def _kind_of(self, call: Call) -> Any:
        """What sort of value a call gives; None if torch refuses it."""
        with self._tried(call) as node:
            try:
                value = compute(node, self.gm, self.mode)
            except Exception:
                return None
        return [_kind(leaf) for leaf in tree_leaves(value)]

    @contextmanager
    def _tried(self, call: Call) -> Iterator[fx.Node]:
        """A node outside of the graph."""
        node = self.trials.create_node(*call)
        yield node
        self.trials.erase_node(node)

    def _new(self, call: Call, name: str | None = None) -> fx.Node:
        return self._valued(self.graph.create_node(*call, name=name))

    def _valued(self, node: fx.Node) -> fx.Node:
        try:
            node.meta["val"] = compute(node, self.gm, self.mode)
        except GuardError:
            raise
        except Exception as error:
            raise InputError(
                f"the program does not run on the example inputs: node {node.name!r}: {error}"
            ) from error
        return node


def _step(key: Any) -> tuple[Callable[..., Any], Any]:
    """How to take one step into a nested value."""
    if isinstance(key, GetAttrKey):
        return getattr, key.name
    return operator.getitem, key.idx if isinstance(key, SequenceKey) else key.key


def _kind(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    # The stride of an axis of one index means nothing.
    strides = [stride for stride, size in zip(value.stride(), value.shape, strict=True) if size > 1]
    return (value.shape, value.dtype, value.device, value.layout, strides)


def _literals_of_mode(given: Mapping[str, Any]) -> dict[str, bool | float]:
    """The arguments of an operator that depend on the mode of the model that was exported."""
    if "running_mean" in given and given["running_mean"] is None:
        return {}  # batch statistics in both modes
    names = _MODE_ARGUMENTS & given.keys()
    found = {name: given[name] for name in names if isinstance(given[name], bool)}
    if given.get("dropout_p"):
        found["dropout_p"] = given["dropout_p"]
    return found


def _exported_in_train_mode(source: fx.GraphModule) -> bool:
    """Whether a program's constants are those of train mode.

    Normalisations decide: a dropout may be on in eval mode too (`F.dropout(x)`).
    """
    normalisations: list[bool] = []
    others: list[bool] = []
    for part in source.modules():
        for node in part.graph.nodes if isinstance(part, fx.GraphModule) else ():
            if isinstance(node.target, OpOverload):
                given = named_arguments(node.target, node.args, node.kwargs)
                literals = normalisations if "running_mean" in given else others
                literals.extend(map(bool, _literals_of_mode(given).values()))
    return any(normalisations) if normalisations else bool(others) and all(others)


def _only_indexes(user: fx.Node) -> bool:
    return user.target is torch.ops.aten.index.Tensor


def _only_counts(node: fx.Node) -> bool:
    """Whether an operator counts batches, which the module of a BatchNorm does itself."""
    if node.target is not torch.ops.aten.add_.Tensor or node.users:
        return False
    return str(node.all_input_nodes[0].target).endswith("num_batches_tracked")


__all__ = ["trace_program"]
