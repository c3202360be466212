"""A graph module that generates its code when it is first needed.

torch.fx writes and compiles Python code whenever a graph module gets a graph. That takes as long
as half of a capture, and most graphs of a pruning pipeline are never run: they are analysed,
copied and changed, and the copy gets code of its own.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import fx


class LazyGraphModule(fx.GraphModule):
    """A `torch.fx.GraphModule` whose `forward` is compiled when it is first looked up."""

    @property
    def graph(self) -> fx.Graph:
        """The graph; assign it again after changing it."""
        return self._graph

    @graph.setter
    def graph(self, graph: fx.Graph) -> None:
        self._graph = graph
        graph.owning_module = self
        type(self).forward = _Pending(self)  # type: ignore[assignment]  # each has a class of its own

    @property
    def code(self) -> str:
        """The code of the graph."""
        self._compile()
        return super().code

    def _compile(self) -> None:
        if isinstance(vars(type(self))["forward"], _Pending):
            self.recompile()

    def __reduce__(self) -> tuple[Any, ...]:
        self._compile()
        return super().__reduce__()

    def __str__(self) -> str:
        self._compile()
        return super().__str__()


class _Pending:
    """Stands for the `forward` of a class until somebody asks for it."""

    def __init__(self, gm: LazyGraphModule) -> None:
        self._gm = weakref.ref(gm)

    def __get__(self, gm: LazyGraphModule | None, cls: type[LazyGraphModule]) -> Any:
        owner = self._gm() if gm is None else gm
        assert owner is not None
        owner.recompile()
        return cls.forward if gm is None else gm.forward
