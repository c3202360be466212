"""`int(x.shape[0] / 4)` and `len(x)`: calls that Python insists on answering with a number.

A number would fix a size that could stay free. So where a function of the model hands a proxy to
`int` or `len`, the trace begins anew, with the calls of both in that function leading to functions
that record them. `isinstance(n, int)`, `dtype=int` and `map(len, xs)` mean what they meant: only
names that the function does nothing with but to call them are led elsewhere.
"""

from __future__ import annotations

import builtins
import dis
import gc
import operator
import sys
from types import CodeType, FrameType, FunctionType
from typing import Any

from torch import Tensor

from rbpfx.graph.values import ValueProxy, truncated, value_behind


class Anew(BaseException):
    """The trace has to begin anew. No `except Exception` of a model stops it."""


class Conversions:
    """Leads calls of `int` and `len` elsewhere while it is entered, in functions that need it."""

    def __init__(self) -> None:
        self._led: dict[FunctionType, CodeType] = {}
        self._original: dict[FunctionType, CodeType] = {}
        self._suspended = False

    def __enter__(self) -> None:
        if self._suspended:
            return
        for function, code in self._led.items():
            self._original[function] = function.__code__
            function.__code__ = code

    def __exit__(self, *_: object) -> None:
        for function, code in self._original.items():
            function.__code__ = code
        self._original.clear()

    def follow(self, frame: FrameType) -> None:
        """Record what the function in a frame converts, if it can be led elsewhere.

        Raises:
            Anew: It can, from the next trace on.
        """
        codes = [frame.f_code]
        outer = frame.f_back
        while outer is not None:  # functions made by functions are made anew by every call
            if codes[-1] in outer.f_code.co_consts:
                codes.append(outer.f_code)
            outer = outer.f_back
        led = {id(code): _led_elsewhere(code) for code in codes}
        if self._suspended or led[id(codes[0])] is codes[0]:
            return
        holders = {
            function: led[id(function.__code__)]
            for function in gc.get_referrers(*codes)
            if isinstance(function, FunctionType)
            and id(function.__code__) in led
            and _NAMES.keys().isdisjoint(function.__globals__)
        }
        if holders.keys() - self._led.keys():
            self._led |= holders
            raise Anew

    def suspended(self) -> bool:
        """After a failure: whether the next trace should leave all conversions alone.

        A failure that comes without them too is none of theirs; then they are recorded again.
        """
        self._suspended = bool(self._led) and not self._suspended
        return self._suspended


def _led_elsewhere(code: CodeType) -> CodeType:
    """The code with its calls, and those of functions in it, under other names."""
    if sys.version_info < (3, 11):
        return code  # does not tell a name that is called from one that is read
    constants = tuple(_led_elsewhere(c) if isinstance(c, CodeType) else c for c in code.co_consts)
    uses = [i for i in dis.get_instructions(code) if i.opcode in dis.hasname and i.argval in _NAMES]
    read = {i.argval for i in uses if i.opname != "LOAD_GLOBAL" or not (i.arg or 0) & 1}
    names = tuple(n if n in read else _NAMES.get(n, n) for n in code.co_names)
    if names == code.co_names and all(map(operator.is_, constants, code.co_consts)):
        return code
    return code.replace(co_names=names, co_consts=constants)


def _int(*args: Any, **kwargs: Any) -> Any:
    """`int` that records what it does to sizes."""
    value = value_behind(args[0]) if len(args) == 1 and type(args[0]) is ValueProxy else None
    if isinstance(value, (int, float)):
        return args[0].tracer.create_leaf(truncated, args)
    return int(*args, **kwargs)


def _len(value: Any) -> Any:
    """`len` that records what it asks of tensors."""
    is_tensor = type(value) is ValueProxy and isinstance(value_behind(value), Tensor)
    return _int(value.shape[0]) if is_tensor else len(value)


# No code can spell these names. They stay among the builtins because other threads may be in the
# middle of a function when its code is taken back.
_NAMES = {"int": "int of rbpfx", "len": "len of rbpfx"}
vars(builtins).update({_NAMES["int"]: _int, _NAMES["len"]: _len})
