"""A graph module that generates its code when it is first needed.

torch.fx writes and compiles Python code whenever a graph module gets a graph. That takes as long
as half of a capture, and most graphs of a pruning pipeline are never run: they are analysed,
copied and changed, and the copy gets code of its own.

torch and Python keep the text of generated code, and the functions it marks with `fx.wrap`, in
tables for good; here they forget them with the code. Garbage is collected at any moment, in any
thread, also while a tracer goes through the table of marked functions: from that one, entries are
taken at the next trace.
"""

from __future__ import annotations

import linecache
import weakref
from collections import deque
from typing import Any

from torch import fx
from torch.fx import _symbolic_trace, graph_module

_gone: deque[int] = deque()


class LazyGraphModule(fx.GraphModule):
    """A `torch.fx.GraphModule` whose `forward` is compiled when it is first looked up."""

    # `torch.jit.script` compiles the other properties of a module too.
    __jit_unused_properties__ = fx.GraphModule.__jit_unused_properties__ + ["code"]  # noqa: RUF005

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

    def recompile(self) -> Any:
        """Generate and compile the code of the graph."""
        generated = super().recompile()
        code = type(self).forward
        key = (code.__code__.co_filename, id(code.__globals__))
        weakref.finalize(code, _forget, *key).atexit = False
        return generated

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


def _forget(filename: str, scope: int) -> None:
    """Take generated code that is gone out of the tables of torch and Python.

    Args:
        filename: What its text is called there.
        scope: The id of its globals.
    """
    graph_module._loader.eval_cache.pop(filename, None)
    linecache.cache.pop(filename, None)
    if any(key[0] == scope for key in list(_symbolic_trace._wrapped_fns_to_patch)):
        _gone.append(scope)  # stays in memory, and its id in use, as long as the table names it


def forget_marked() -> None:
    """Forget functions that code marked which is gone; only while nobody traces."""
    marked = _symbolic_trace._wrapped_fns_to_patch
    scopes = {_gone.popleft() for _ in range(len(_gone))}
    for key in [key for key in marked if key[0] in scopes]:
        del marked[key]
