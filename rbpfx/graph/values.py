"""Proxies that know values: what tracing puts in the place of the model's tensors and numbers.

Every node carries the value that the example inputs give it (a fake tensor, a shape, a number). An
operator on a proxy becomes a node; where Python itself needs a value (`if`, `range`, `len`,
unpacking), the example's value answers, and a guard in the graph says so: an input for which the
answer would be another one raises `GuardError` instead of running the wrong branch.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import numpy
import torch
from torch import Tensor, fx

from rbpfx.errors import GuardError, RbpfxError


class Untraceable(RbpfxError):
    """What a graph cannot hold."""


class DependsOnValues(Untraceable):
    """Python code that asks for the values of a tensor."""


@fx.has_side_effect
def assume(value: Any, expected: Any, where: str) -> None:
    """Check an assumption that the capture rests on.

    Raises:
        GuardError: The value is another one.
    """
    if value != expected:
        raise GuardError(
            f"the network was captured with inputs for which a value at {where} is {expected!r}; "
            f"for this input it is {value!r}. Capture it again with example inputs of this kind."
        )


def length(value: Any) -> int:
    """`len`, as a function that graphs can call."""
    return len(value)


def truth(value: Any) -> bool:
    """`bool`, as a function that graphs can call."""
    return bool(value)


def rounded(value: Any, digits: int | None = None) -> Any:
    """`round`, as a function that graphs can call."""
    return round(value, digits)


def truncated(value: Any) -> int:
    """`int`, as a function that graphs can call."""
    return int(value)


def of_numpy(name: str, *numbers: Any) -> Any:
    """`numpy.sqrt` and its like, as a function that graphs can call."""
    return getattr(numpy, name)(*numbers).item()


class GraphProxy(fx.Proxy):
    """A proxy that records `x += y` and `x[i] = y` as what they are.

    torch.fx would record `x + y`, and nothing.
    """

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


def _augmented(name: str) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    function = getattr(operator, name)

    def record(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "imod"):
    setattr(GraphProxy, f"__{_name}__", _augmented(_name))


# Questions about a tensor whose answers pruning and other inputs of the kind do not change.
_CONSTANT_ATTRIBUTES = frozenset({"ndim", "requires_grad", "is_cuda", "is_meta", "is_sparse"})
_CONSTANT_METHODS = frozenset(
    "dim ndimension is_floating_point is_complex is_contiguous element_size".split()
)
_DATA = frozenset({"item", "tolist", "numpy", "data_ptr", "storage", "untyped_storage"})
# What numpy calls the operators of Python.
_OF_NUMPY = {"add": "add", "subtract": "sub", "multiply": "mul", "divide": "truediv"}
# Proxies of these pass `isinstance`. Tensor is not among them: the argument parser of torch takes
# whatever passes for a tensor as one, and crashes.
_IMITATED = (int, float, torch.Size, tuple, list, dict, torch.dtype, torch.device)


class ValueProxy(GraphProxy):
    """A proxy that answers Python's questions with the example's value."""

    tracer: Any

    def __getitem__(self, index: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.getitem, (self, index), {})

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        kind = type(value_behind(self))
        return kind if issubclass(kind, _IMITATED) and kind is not bool else ValueProxy

    def __bool__(self) -> bool:
        certain = self.tracer.certainty(self.node)
        if certain is not None:
            return bool(certain)
        value = self._known("the truth of")
        if isinstance(value, bool):
            return bool(self.tracer.guard(self, value))
        if isinstance(value, (int, float)):
            return bool(self.tracer.guard(self.tracer.create_leaf(truth, (self,)), bool(value)))
        return len(self) > 0 if hasattr(value, "__len__") else bool(value)

    def __index__(self) -> int:
        value = self._known("the number")
        return int(self.tracer.guard(self, operator.index(value)))

    def __int__(self) -> int:
        value = self._known("the number")
        self.tracer.convert(sys._getframe(1))
        self.tracer.guard(self, value)
        return int(value)

    def __float__(self) -> float:
        value = self._known("the number")
        self.tracer.guard(self, value)
        return float(value)

    def __round__(self, digits: int | None = None) -> Any:
        return self.tracer.create_leaf(rounded, (self, digits))

    def __array_ufunc__(self, function: Any, method: str, *inputs: Any, **options: Any) -> Any:
        """`numpy.sqrt(x.shape[-1])`, and `numpy.float64(2) * x`."""
        values = [value_behind(i) if type(i) is ValueProxy else i for i in inputs]
        name = function.__name__
        if method == "__call__" and all(isinstance(v, (int, float)) for v in values):
            return self.tracer.create_leaf(of_numpy, (name, *inputs))
        if method == "__call__" and name in _OF_NUMPY:
            numbers = [i.item() if isinstance(i, numpy.generic) else i for i in inputs]
            return getattr(operator, _OF_NUMPY[name])(*numbers)
        arrays = [numpy.array([*i]) if type(i) is ValueProxy else i for i in inputs]
        return getattr(function, method)(*arrays, **options)

    def __len__(self) -> int:
        value = value_behind(self)
        if isinstance(value, Tensor):
            self.tracer.convert(sys._getframe(1))
            return operator.index(self.shape[0])
        size = len(value)
        # How many axes a tensor has, or results a module, is no assumption on the input's size.
        if not isinstance(value, torch.Size) and self.node.op != "call_module":
            self.tracer.guard(self.tracer.create_leaf(length, (self,)), size)
        return size

    def __hash__(self) -> int:
        if _is_converted(self.node):  # a set or dictionary would not find the number in it
            raise Untraceable("a number that was made of a size is looked up")
        return super().__hash__()

    def __iter__(self) -> Iterator[Any]:
        if isinstance(value_behind(self), dict):
            return iter(value_behind(self))
        return iter([self[index] for index in range(len(self))])

    def __contains__(self, item: Any) -> bool:
        if isinstance(value_behind(self), dict):
            return item in value_behind(self)
        return any(bool(element == item) for element in self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("data", "grad"):
            raise Untraceable(f"it assigns to .{name} of a tensor; write into it: .copy_(...)")
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        value = value_behind(self)
        if name.startswith("__") or not hasattr(value, name):
            raise AttributeError(f"{type(value).__name__!r} object has no attribute {name!r}")
        if isinstance(value, Tensor) and name in _CONSTANT_ATTRIBUTES:
            return getattr(value, name)
        if isinstance(value, dict) and name in ("keys", "values", "items", "get"):
            return getattr({key: self[key] for key in value}, name)
        if callable(getattr(value, name)):
            return _Method(self, name)
        return self._attribute(name, getattr(value, name))

    def _attribute(self, name: str, attribute: Any) -> Any:
        if self.node.op == "get_attr" and name == "shape":
            return attribute  # of a parameter: no input changes it
        if isinstance(attribute, (str, bool, type(None))):
            proxy = self.tracer.create_proxy("call_function", getattr, (self, name), {})
            return self.tracer.guard(proxy, attribute)
        value = value_behind(self)
        if isinstance(value, tuple):
            for index, field in enumerate(value):
                if field is attribute:
                    return self[index]
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def _known(self, what: str) -> Any:
        value = value_behind(self)
        if isinstance(value, Tensor):
            raise DependsOnValues(f"control flow on {what} a tensor's values")
        return value


def _is_converted(node: fx.Node) -> bool:
    """Whether a number was computed from one that `int` or `len` returned."""
    sources = (n for n in node.all_input_nodes if isinstance(n.meta["val"], (int, float)))
    return node.target is truncated or any(map(_is_converted, sources))


class _Method:
    """A method of a proxied value, not yet called."""

    def __init__(self, proxy: ValueProxy, name: str) -> None:
        self.proxy = proxy
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        value = value_behind(self.proxy)
        if isinstance(value, Tensor) and self.name in _CONSTANT_METHODS:
            return getattr(value, self.name)()
        if isinstance(value, Tensor) and self.name in _DATA:
            raise DependsOnValues(f"Tensor.{self.name}() takes values out of a tensor")
        tracer = self.proxy.tracer
        return tracer.create_proxy("call_method", self.name, (self.proxy, *args), kwargs)


# Methods for whose sizes torch wants numbers, which fixes them, even of a constant: recorded.
_SIZED = (
    "expand repeat tile view reshape broadcast_to narrow roll new_zeros new_ones new_empty new_full"
).split()


@contextmanager
def sizes_of_constants_kept() -> Iterator[None]:
    """Record calls of methods of real tensors whose sizes are proxies, `constant.expand(n, -1)`.

    The constant then becomes a node, as a buffer would.
    """
    before = {name: vars(Tensor).get(name) for name in (*_SIZED, "__getitem__")}
    for name in before:
        setattr(Tensor, name, _recording(name, getattr(Tensor, name)))
    try:
        yield
    finally:
        for name, method in before.items():
            if method is None:  # it was inherited
                delattr(Tensor, name)
            else:
                setattr(Tensor, name, method)


def _recording(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        proxy = _proxy_among((args, tuple(kwargs.values())))
        if proxy is None or type(tensor) is ValueProxy:
            return method(tensor, *args, **kwargs)
        target: Any = operator.getitem if name == "__getitem__" else name
        kind = "call_method" if target is name else "call_function"
        return proxy.tracer.create_proxy(kind, target, (tensor, *args), kwargs)

    return call


def _proxy_among(value: Any) -> ValueProxy | None:
    """A proxy in (nested) arguments; the type is asked because proxies pass for tuples."""
    if type(value) is ValueProxy:
        return value
    if type(value) is slice:
        value = (value.start, value.stop, value.step)
    if type(value) not in (tuple, list):
        return None
    return next((found for v in value if (found := _proxy_among(v)) is not None), None)


def value_behind(proxy: fx.Proxy) -> Any:
    """The value that the example inputs give a proxy."""
    return proxy.node.meta["val"]
