"""The value of every node of a trace, as soon as the node is recorded."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, cast

from torch import fx
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx.node import map_arg

from rbpfx.graph.metadata import compute
from rbpfx.graph.values import DependsOnValues

if TYPE_CHECKING:
    from rbpfx.graph.tracer import ValueTracer

_LOOKAHEAD = 64


class NodeValues:
    """Computes the values of nodes, or takes them from a reference trace.

    Args:
        tracer: Records the nodes.
        reference: Another trace of the same model, whose values are used again where both agree.

    Attributes:
        computing: Whether it is at work, so that calls are none of the model's.
    """

    def __init__(self, tracer: ValueTracer, reference: fx.Graph | None) -> None:
        self.tracer = tracer
        self.computing = False
        self._reference = list(reference.nodes) if reference is not None else []
        self._position = 0
        self._twins: dict[fx.Node, fx.Node] = {}

    def of(self, node: fx.Node) -> Any:
        """The example value of a new node."""
        twin = self._twin(node)
        if twin is not None:
            self._twins[node] = twin
            return twin.meta["val"]
        if node.op == "placeholder":
            return self.tracer.supplied[str(node.target)]
        self.computing = True
        try:
            return compute(node, self.tracer.root, self.tracer.mode)
        except DynamicOutputShapeException as error:
            what = f"the size of the result of {error.func} depends on data"
            raise DependsOnValues(what) from error
        except DataDependentOutputException as error:
            raise DependsOnValues(f"{error.func} takes values out of a tensor") from error
        finally:
            self.computing = False

    def _twin(self, node: fx.Node) -> fx.Node | None:
        """The node of the reference that does the same on the same values."""
        window = itertools.islice(self._reference, self._position, self._position + _LOOKAHEAD)
        for offset, other in enumerate(window):
            if (
                other.op == node.op
                and other.target == node.target
                and self._mapped(node.args) == other.args
                and self._mapped(node.kwargs) == other.kwargs
            ):
                self._position += offset + 1
                return cast(fx.Node, other)
        return None

    def _mapped(self, args: Any) -> Any:
        return map_arg(args, lambda n: self._twins.get(n, n)) if args else args
