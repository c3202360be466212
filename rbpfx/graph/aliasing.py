"""Aliasing: which values share memory, and what in-place operators do to them.

The fake tensors in `node.meta["val"]` share storage exactly where the real ones do, so aliasing
is looked up there instead of being guessed from operator names.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from rbpfx.graph.calls import modifies_in_place


class Memory:
    """Who shares memory with whom in a graph with metadata."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._holders: dict[int, list[fx.Node]] = defaultdict(list)
        for node in gm.graph.nodes:
            for storage in storages(node):
                self._holders[storage].append(node)
        self._written: dict[int, list[fx.Node]] = defaultdict(list)
        for node in gm.graph.nodes:
            if node.all_input_nodes and modifies_in_place(node, gm):
                for storage in storages(node.all_input_nodes[0]):
                    self._written[storage].append(node)
        self._place = {node: place for place, node in enumerate(gm.graph.nodes)}

    def writes(self, node: fx.Node) -> list[fx.Node]:
        """The in-place operators that change the memory of a value."""
        return [w for storage in storages(node) for w in self._written.get(storage, ())]

    def entangled(self) -> list[tuple[fx.Node, list[fx.Node]]]:
        """In-place operators whose effect is seen through a view of another geometry later on.

        Slicing may turn a view into a copy (or the other way round), which would change what
        such a later use sees.

        Returns:
            Pairs of an in-place operator and the values that share its memory.
        """
        found = []
        for storage, writes in self._written.items():
            holders = self._holders[storage]
            # Grouped, since a residual stream that is added to in place has many holders alike.
            alike = defaultdict(list)
            for holder in holders:
                alike[_geometry(holder)].append(holder)
            for write in writes:
                geometry = _geometry(write.all_input_nodes[0])
                others = (h for other, same in alike.items() if other != geometry for h in same)
                if any(self._sees_change(holder, write) for holder in others):
                    found.append((write, holders))
        return found

    def _sees_change(self, holder: fx.Node, write: fx.Node) -> bool:
        if self._place[holder] > self._place[write]:
            return False
        if _is_range_of(write.all_input_nodes[0], holder):
            return False
        return any(self._place[user] > self._place[write] for user in holder.users)


def _is_range_of(view: fx.Node, whole: fx.Node) -> bool:
    """Whether a value is `whole[a:b, ...]`, which stays such a view when channels go."""
    while view is not whole:
        index = view.args[1] if view.target is operator.getitem else None
        items = index if isinstance(index, tuple) else (index,)
        if not all(item is Ellipsis or _is_range(item) for item in items):
            return False
        (view,) = view.all_input_nodes[:1]
    return True


def _is_range(item: object) -> bool:
    return isinstance(item, slice) and item.step in (None, 1)


def storages(node: fx.Node) -> list[int]:
    """The memory that a node's value lives in."""
    value = node.meta.get("val")
    values = [value] if isinstance(value, Tensor) else tree_leaves(value)
    tensors = (v for v in values if isinstance(v, Tensor))
    return list(dict.fromkeys(t.untyped_storage()._cdata for t in tensors))


def _geometry(node: fx.Node) -> Any:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    return (value.shape, value.stride(), value.storage_offset())
