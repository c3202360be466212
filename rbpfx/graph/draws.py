"""Random numbers that a forward draws: nodes of the graph, so that every call draws anew.

Calls without a proxy are run while torch.fx traces, and `torch.rand(20)` would be the same constant
ever after. Draws from torch's generators are recorded instead. Those from the generators of Python
and NumPy cannot be; the module that makes them stays whole.
"""

from __future__ import annotations

import operator
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from rbpfx.graph.values import Untraceable

_FUNCTIONS = frozenset(
    getattr(torch, name)
    for name in (
        "rand randn randint randperm rand_like randn_like randint_like bernoulli normal "
        "multinomial poisson binomial dropout _standard_gamma _sample_dirichlet"
    ).split()
) | {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.gumbel_softmax}
_METHODS = frozenset(
    getattr(Tensor, name)
    for name in (
        "bernoulli bernoulli_ cauchy_ exponential_ geometric_ log_normal_ multinomial normal_ "
        "random_ uniform_"
    ).split()
)
_UNIFORM = frozenset({torch.rand, torch.rand_like})
# Comparison -> where the draw stands, and the answer if the other side is 0 or below.
_COMPARISONS: dict[Any, tuple[int, bool]] = {
    operator.lt: (0, False),
    operator.gt: (1, False),
    operator.ge: (0, True),
    operator.le: (1, True),
}


class RecordedDraws(TorchFunctionMode):
    """Records every draw as a node.

    Args:
        tracer: Records it.
        is_passing: Whether a call is none of the traced model's.
    """

    def __init__(self, tracer: fx.Tracer, is_passing: Callable[[], bool]) -> None:
        super().__init__()
        self.tracer = tracer
        self.is_passing = is_passing

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.is_passing():
            if func in _FUNCTIONS:
                return self.tracer.create_proxy("call_function", func, args, kwargs)
            if func in _METHODS:
                return self.tracer.create_proxy("call_method", func.__name__, args, kwargs)
        return func(*args, **kwargs)


@contextmanager
def other_draws_refused() -> Iterator[None]:
    """Make a draw from a generator of Python or NumPy an error, once the code has run."""
    before = _states()
    yield
    for name, state in _states().items():
        if state != before.get(name, state):
            raise Untraceable(
                f"it draws random numbers from {name}, which tracing would make constants; draw "
                "them with torch"
            )


def _states() -> dict[str, Any]:
    states: dict[str, Any] = {"Python's random": random.getstate()}
    if "numpy" in sys.modules:
        _, keys, *rest = sys.modules["numpy"].random.get_state()
        states["numpy.random"] = (keys.tobytes(), *rest)
    return states


def is_draw(node: fx.Node) -> bool:
    """Whether a node draws random numbers and does nothing else."""
    return node.op == "call_function" and node.target in _FUNCTIONS


def certain(node: fx.Node) -> bool | None:
    """The truth of `torch.rand([]) < 0.0`, whatever is drawn; None if that depends on it.

    Layers that are skipped at random ask so, and most networks have a rate of 0.
    """
    if node.target not in _COMPARISONS:
        return None
    place, answer = _COMPARISONS[node.target]
    draw, limit = node.args[place], node.args[1 - place]
    if not isinstance(draw, fx.Node) or draw.target not in _UNIFORM:
        return None
    if not isinstance(limit, (int, float)) or 0 < limit < 1:
        return None
    return answer if limit <= 0 else not answer


__all__ = ["RecordedDraws", "certain", "is_draw", "other_draws_refused"]
