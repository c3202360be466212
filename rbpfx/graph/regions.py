"""Regions of a forward in which torch is in another mode: without gradients, or under autocast.

A graph runs its operators in whatever mode it is called in. `with torch.no_grad()` stays meant as
it was all the same: what such a region computes is detached where operators outside read it. There
is no node for autocast, which is refused.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import Argument, map_arg
from torch.utils._pytree import tree_leaves

from rbpfx.errors import CaptureError
from rbpfx.graph.aliasing import storages
from rbpfx.graph.calls import modifies_in_place, submodule
from rbpfx.graph.modes import in_mode
from rbpfx.graph.usercode import running_line
from rbpfx.surroundings import autocasting

_WITHOUT_GRADIENTS = "without_gradients"
_PLAIN = (int, float, str, type(None), torch.Size, torch.dtype, torch.device)
_CALLS = frozenset({"call_function", "call_method", "call_module"})


class Surroundings:
    """The modes in which a trace began, to tell what the forward itself has switched."""

    def __init__(self) -> None:
        self._gradients = torch.is_grad_enabled()
        self._autocast = autocasting()

    def note(self, node: fx.Node) -> None:
        """Mark a node that is being recorded if the forward has switched gradients off.

        Raises:
            CaptureError: The forward has switched autocast on.
        """
        if node.op not in _CALLS:
            return
        if not self._autocast and autocasting():
            raise CaptureError(
                f"the forward switches torch.autocast on (at {running_line()}), which a graph "
                "cannot hold. Take it out of the model and train in mixed precision with "
                "Training(precision='bfloat16'), or keep the module whose forward does so whole "
                "with leaf_modules=[...]."
            )
        if self._gradients and not torch.is_grad_enabled():
            node.meta[_WITHOUT_GRADIENTS] = True


def detach_regions(graph: fx.Graph, root: nn.Module, mode: FakeTensorMode) -> None:
    """Detach what regions without gradients compute, where it leaves them.

    Values that need no gradient in the first place are left alone.

    Args:
        graph: A trace, or two merged ones, whose nodes `Surroundings.note` has marked.
        root: The traced module.
        mode: The mode of the fake tensors on the nodes.
    """
    inside = {node for node in graph.nodes if node.meta.pop(_WITHOUT_GRADIENTS, False)}
    if inside:
        _Regions(graph, root, mode, inside).detach()


class _Regions:
    def __init__(
        self, graph: fx.Graph, root: nn.Module, mode: FakeTensorMode, inside: set[fx.Node]
    ) -> None:
        self.graph = graph
        self.root = root
        self.mode = mode
        self.inside = inside
        self.outer_memory = {s for n in graph.nodes if n not in inside for s in storages(n)}
        self.needy: set[fx.Node] = set()
        self.closed: set[fx.Node] = set()
        self._detached: dict[fx.Node, fx.Node] = {}
        self._start = next(n for n in graph.nodes if n.op != "placeholder")

    def detach(self) -> None:
        for node in list(self.graph.nodes):
            if self._needs_gradient(node):
                self.needy.add(node)
            if node not in self.inside:
                self._visit_outside(node)
            elif not self._confine_write(node) and not self._hands_on(node):
                self.closed.add(node)

    def _needs_gradient(self, node: fx.Node) -> bool:
        """Whether a value would have a gradient if there were no regions."""
        if not any(map(_may_depend, tree_leaves(node.meta.get("val")))):
            return False
        if node.op == "placeholder":
            return True
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            return name in self.root.get_submodule(owner)._parameters
        if node.op == "call_module":
            if any(True for _ in submodule(self.root, str(node.target)).parameters()):
                return True
        return not self.needy.isdisjoint(node.all_input_nodes)

    def _visit_outside(self, node: fx.Node) -> None:
        source = node.args[0] if node.args else None
        if node.target in (operator.getitem, getattr) and source in self.closed:
            assert isinstance(source, fx.Node)
            if not isinstance(source.meta["val"], Tensor):
                self.closed.add(node)  # one of several results
                return
        if not self.closed.isdisjoint(node.all_input_nodes):
            node.args = map_arg(node.args, self._leaving)
            node.kwargs = map_arg(node.kwargs, self._leaving)

    def _leaving(self, value: fx.Node) -> Argument:
        """What stands for a value outside of the region that computed it."""
        return self._cut(value) if value in self.closed else value

    def _confine_write(self, node: fx.Node) -> bool:
        """Let an in-place operator of a region change memory from outside without a history.

        Such as the running statistics that a forward keeps itself. What it returns is the target,
        which has the history it had before.
        """
        place = 3 if node.target is in_mode else 0
        target = node.args[place] if len(node.args) > place else None
        if not isinstance(target, fx.Node):
            return False
        if node.target is not in_mode and not modifies_in_place(node, self.root):
            return False
        if self.outer_memory.isdisjoint(storages(target)):
            return False
        node.args = map_arg(node.args, self._cut)
        node.kwargs = map_arg(node.kwargs, self._cut)
        node.replace_all_uses_with(target)
        return True

    def _hands_on(self, node: fx.Node) -> bool:
        """Whether a method returns a tensor from outside itself, as `contiguous` and `to` do."""
        value = node.meta["val"]
        same = [n for n in node.all_input_nodes[:1] if n.meta.get("val") is value]
        return node.op == "call_method" and bool(same) and same[0] not in self.closed

    def _cut(self, value: fx.Node) -> Argument:
        """The value, detached; every tensor of it if there are several."""
        held = value.meta.get("val")
        if value not in self.needy or not any(map(_is_float, tree_leaves(held))):
            return value
        if isinstance(held, (tuple, list)):
            items = [self._cut(self._item(value, index)) for index in range(len(held))]
            return items if isinstance(held, list) else tuple(items)
        if value not in self._detached and isinstance(held, Tensor):
            self._detached[value] = self._add("call_method", "detach", value)
        return self._detached.get(value, value)

    def _item(self, value: fx.Node, index: int) -> fx.Node:
        item = self._add("call_function", operator.getitem, value, index)
        self.needy.add(item)
        return item

    def _add(self, op: str, target: object, value: fx.Node, *rest: int) -> fx.Node:
        """Add an operator right behind a value, behind all placeholders at least."""
        if value.op == "placeholder":
            place = self.graph.inserting_before(self._start)
        else:
            place = self.graph.inserting_after(value)
        with place:
            node = self.graph.create_node(op, target, (value, *rest))  # type: ignore[arg-type]
        held = value.meta["val"]
        with self.mode, torch.no_grad():
            result = held[rest[0]] if rest else held.detach()
        node.meta = {**value.meta, "val": result}
        return node


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _may_depend(value: object) -> bool:
    """Whether a value may have a gradient, or hold one that does; sizes and the like do not."""
    return _is_float(value) or not isinstance(value, (Tensor, *_PLAIN))
