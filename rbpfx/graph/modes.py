"""Train and eval mode in one graph: merge two traces of the same model.

`self.training` is read while tracing, so each trace bakes in one mode. Nodes that both traces
share appear once. A constant that differs (`F.dropout(x, training=self.training)`) and a result
that differs (auxiliary heads) are chosen at run time by the `TrainingMode` module.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Argument, map_arg
from torch.utils._pytree import tree_leaves

from rbpfx.errors import CaptureError
from rbpfx.graph.aliasing import storages
from rbpfx.graph.calls import call_leaf, modifies_in_place
from rbpfx.graph.patches import CONSTANT

T = TypeVar("T")

MODE_FLAG = "training_mode"
_BOUNDS = ("start", "stop", "step")
_OPERATORS = frozenset(f"i{name}" for name in "add sub mul truediv".split()) | {"setitem"}


class TrainingMode(nn.Module):
    """Says at run time whether the network is in train mode."""

    def forward(self) -> bool:
        """`self.training`."""
        return self.training


def by_mode(training: bool, in_train: T, in_eval: T) -> T:
    """The value for the mode the network is in."""
    return in_train if training else in_eval


def in_mode(training: bool, wanted: bool, name: str, target: Any, *args: Any, **kwargs: Any) -> Any:
    """An in-place method (or `operator` function) that only one mode calls; returns `target`."""
    if training == wanted:
        if name in _OPERATORS:
            getattr(operator, name)(target, *args, **kwargs)
        else:
            getattr(target, name)(*args, **kwargs)
    return target


def evaluated_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes on which the results of eval mode depend."""
    needed: set[fx.Node] = set()
    waiting = [node for node in graph.nodes if node.op == "output"]
    while waiting:
        node = waiting.pop()
        if node in needed:
            continue
        needed.add(node)
        read = tree_leaves(node.args[2]) if node.target is by_mode else node.all_input_nodes
        waiting.extend(leaf for leaf in read if isinstance(leaf, fx.Node))
    return needed


def merge_modes(train: fx.Graph, evaluate: fx.Graph, root: nn.Module) -> fx.Graph:
    """One graph that computes `train` in train mode and `evaluate` in eval mode.

    Args:
        train: Trace in train mode; becomes the merged graph.
        evaluate: Trace in eval mode, of the same module with the same arguments.
        root: The traced module; gets a `TrainingMode` submodule if the traces differ.

    Raises:
        CaptureError: A module with running statistics is called in eval mode only, or a value is
            modified in place in one mode only, so that no single graph can be right.
    """
    return _Merger(train, evaluate, root).merge()


class _Merger:
    def __init__(self, train: fx.Graph, evaluate: fx.Graph, root: nn.Module) -> None:
        self.graph = train
        self.evaluate = evaluate
        self.root = root
        self.twin: dict[fx.Node, fx.Node] = {}
        self.flag: fx.Node | None = None
        held = {s for graph in (train, evaluate) for n in graph.nodes for s in _held(n)}
        self.trained = held | {s for node in train.nodes for s in storages(node)}
        self.evaluated = held | {s for node in evaluate.nodes for s in storages(node)}
        self.place = {node: place for place, node in enumerate(train.nodes)}
        self.last = next(iter(train.nodes))
        self.waiting: dict[Any, list[fx.Node]] = defaultdict(list)
        for node in train.nodes:
            self.waiting[node.op, node.target].append(node)

    def merge(self) -> fx.Graph:
        for node in list(self.evaluate.nodes):
            if node.op == "output":
                self._merge_output(node)
            else:
                twin = self.twin[node] = self._find(node) or self._copy(node)
                if self.place[twin] >= self.place[self.last]:
                    self.last = twin
        for node in [n for candidates in self.waiting.values() for n in candidates]:
            if node.op != "output":
                self._confine(node, node, True, self.evaluated)
        return self.graph

    def _find(self, node: fx.Node) -> fx.Node | None:
        """The node of the train graph that does the same, its arguments made to fit both modes."""
        candidates = self.waiting[node.op, self._constant(node) or node.target]
        wanted = self._mapped((node.args, node.kwargs))
        match = next((c for c in candidates if (c.args, c.kwargs) == wanted), None)
        if match is None:
            match = next((c for c in candidates if _same_but_constants(c, wanted)), None)
            match = match or next((c for c in candidates if self._same_but_paths(c, node)), None)
            if match is None:
                return None
            match.args = self._choose(match.args, wanted[0], match)
            match.kwargs = self._choose(match.kwargs, wanted[1], match)
            # In eval mode more values share memory (a dropout returns what it gets).
            match.meta["val"] = node.meta["val"]
        candidates.remove(match)
        return match

    def _same_but_paths(self, candidate: fx.Node, node: fx.Node) -> bool:
        """Whether the modes differ in how an operator's inputs were computed, nothing else.

        A drop-path module returns its input in eval mode and a product in train mode; what
        follows is the same operator of the same module on one or the other.
        """
        if self.place[candidate] <= self.place[self.last] or not node.all_input_nodes:
            return False
        scopes = [list(n.meta.get("nn_module_stack", {"": None}))[-1] for n in (candidate, node)]
        if scopes[0] != scopes[1]:
            return False
        in_train = tree_leaves((candidate.args, candidate.kwargs))
        in_eval = tree_leaves((node.args, node.kwargs))
        pairs = list(zip(in_train, in_eval, strict=False))
        return len(in_train) == len(in_eval) and all(_interchangeable(*pair) for pair in pairs)

    def _constant(self, node: fx.Node) -> str | None:
        """The name in the train graph of a tensor that the forward made; each trace makes one."""
        if node.op != "get_attr" or not str(node.target).startswith(CONSTANT):
            return None
        value = getattr(self.root, str(node.target))
        for op, name in self.waiting:
            if op == "get_attr" and name.startswith(CONSTANT):
                other = getattr(self.root, name)
                if other.dtype == value.dtype and torch.equal(other, value):
                    return str(name)
        return None

    def _copy(self, node: fx.Node) -> fx.Node:
        """Add a node that only the eval graph has."""
        if node.op == "call_module":
            module = self.root.get_submodule(str(node.target))
            if any(b is not None for b in module.buffers()):
                raise CaptureError(
                    f"module {node.target!r} keeps running statistics and is called on different "
                    "values in train and in eval mode; keep the module around it whole with "
                    "leaf_modules=[...]."
                )
        # Where eval mode runs it: an in-place operator that comes later must still come later.
        with self.graph.inserting_after(self.last):
            copy = self.graph.node_copy(node, lambda n: self.twin[n])
        self.place[copy] = self.place[self.last]
        return self._confine(copy, node, False, self.trained)

    def _confine(
        self, node: fx.Node, original: fx.Node, training: bool, others: set[int]
    ) -> fx.Node:
        """Make an in-place operator of one mode do nothing in the other, which runs it too.

        Args:
            node: A node of the merged graph.
            original: The node of the trace it comes from.
            training: The mode it belongs to.
            others: The memory that the other mode uses, and that of parameters and buffers.

        Returns:
            The node that stands for it.
        """
        targets = original.all_input_nodes[:1]
        if not modifies_in_place(node, self.root) or not others & {
            s for target in targets for s in storages(target)
        }:
            return node
        name = str(getattr(node.target, "__name__", node.target))
        is_method = name.endswith("_") and hasattr(Tensor, name)
        if node.op == "call_module" or not (name in _OPERATORS or is_method):
            raise CaptureError(
                f"{node.name!r} modifies a value in place in one of train and eval mode only; "
                "use the operator that returns a new tensor, or keep the module around it whole "
                "with leaf_modules=[...]."
            )
        flag = self._mode_flag(node)
        with self.graph.inserting_before(node):
            args = (flag, training, name, *node.args)
            confined = call_leaf(self.graph, in_mode, args, dict(node.kwargs))
        confined.meta = {**original.meta, **confined.meta}
        self.place[confined] = self.place[node]
        node.replace_all_uses_with(confined)
        self.graph.erase_node(node)
        return confined

    def _merge_output(self, node: fx.Node) -> None:
        output = next(n for n in reversed(self.graph.nodes) if n.op == "output")
        in_eval = self._mapped(node.args)
        if output.args != in_eval:
            flag = self._mode_flag(output)
            with self.graph.inserting_before(output):
                chosen = call_leaf(self.graph, by_mode, (flag, output.args[0], in_eval[0]))
            chosen.meta["val"] = map_arg(in_eval[0], lambda n: n.meta["val"])
            output.args = (chosen,)

    def _mapped(self, args: Any) -> Any:
        return map_arg(args, lambda n: self.twin[n])

    def _choose(self, in_train: Any, in_eval: Any, user: fx.Node) -> Any:
        """`in_train` with every constant that differs replaced by a run-time choice."""
        if isinstance(in_train, dict):
            return {k: self._choose(v, in_eval[k], user) for k, v in in_train.items()}
        if isinstance(in_train, (tuple, list)):
            pairs = zip(in_train, in_eval, strict=True)
            return type(in_train)(self._choose(t, e, user) for t, e in pairs)
        if isinstance(in_train, slice):
            bounds = [(getattr(in_train, k), getattr(in_eval, k)) for k in _BOUNDS]
            return slice(*(self._choose(t, e, user) for t, e in bounds))
        if in_train == in_eval:
            return in_train
        flag = self._mode_flag(user)
        if in_train is True and in_eval is False:
            return flag
        with self.graph.inserting_before(user):
            chosen = call_leaf(self.graph, by_mode, (flag, in_train, in_eval))
        chosen.meta["val"] = in_eval.meta["val"] if isinstance(in_eval, fx.Node) else in_eval
        return chosen

    def _mode_flag(self, user: fx.Node) -> fx.Node:
        if self.flag is None:
            first = next(n for n in self.graph.nodes if n.op != "placeholder")
            with self.graph.inserting_before(first):
                self.flag = mode_flag(self.graph, self.root)
        return self.flag


def _held(node: fx.Node) -> set[int]:
    """The memory of a parameter, buffer or constant, which outlives the call."""
    return set(storages(node)) if node.op == "get_attr" else set()


def mode_flag(graph: fx.Graph, root: nn.Module) -> fx.Node:
    """Add a node that says at run time whether the network is in train mode.

    Raises:
        CaptureError: The model uses the name of the module that says it.
    """
    if hasattr(root, MODE_FLAG):
        raise CaptureError(f"the model has an attribute {MODE_FLAG!r}; rename it.")
    root.add_module(MODE_FLAG, TrainingMode())
    flag = graph.call_module(MODE_FLAG)
    flag.meta["val"] = False
    return flag


def _interchangeable(in_train: Any, in_eval: Any) -> bool:
    """Whether one can stand for the other at run time: constants, or tensors of one shape."""
    nodes = [isinstance(value, fx.Node) for value in (in_train, in_eval)]
    if not all(nodes):
        return not any(nodes)
    values = [node.meta["val"] for node in (in_train, in_eval)]
    if all(isinstance(value, Tensor) for value in values):
        return bool(values[0].shape == values[1].shape)
    if any(isinstance(leaf, Tensor) for leaf in tree_leaves(values)):
        return False  # several tensors, or a tensor and something else
    return bool(values[0] == values[1])


def _same_but_constants(node: fx.Node, wanted: Any) -> bool:
    """Whether a node reads the same values as `wanted`, apart from constants."""
    if node.target is getattr:
        return False  # another attribute is another value
    return bool(_skeleton((node.args, node.kwargs)) == _skeleton(wanted))


def _skeleton(args: Argument) -> Any:
    if isinstance(args, dict):
        return {k: _skeleton(v) for k, v in args.items()}
    if isinstance(args, (tuple, list)):
        return [_skeleton(v) for v in args]
    return args if isinstance(args, fx.Node) else "constant"
