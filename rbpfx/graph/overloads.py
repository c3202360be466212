"""Overloads: an operator of an exported program, spelled as the torch call that a model would make.

torch.export records `torch.ops.aten.conv2d.default`, our rules know `torch.conv2d`. One principle
translates nearly all: look for a function or a tensor method of the operator's name. Those that
torch generates take the arguments of the operator's schema in the same order; those written in
Python get them by name. What is spelled differently is written out at the end.
"""

from __future__ import annotations

import inspect
import operator
import re
import sys
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.nn import functional as F


class Call(NamedTuple):
    """A call as a node of a graph makes it.

    Attributes:
        op: "call_function" or "call_method".
        target: The function, or the name of the method.
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


Arguments = dict[str, Any]


def named_arguments(
    overload: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Arguments:
    """The arguments of a call by the names that the operator's schema gives them."""
    names = [argument.name for argument in overload._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def spellings(overload: OpOverload, given: Arguments) -> Iterator[Call]:
    """Calls that may stand for an overload, most specific first.

    Whether torch takes the arguments is for the caller to find out.

    Args:
        overload: The operator.
        given: Its arguments by name.
    """
    packet = overload.overloadpacket
    if overload.namespace != "aten":
        yield in_schema_order("call_function", packet, overload, given)
        return
    name = packet.__name__
    for pattern, spell in _EXCEPTIONS.items():
        if re.fullmatch(pattern, f"{name}.{overload._overloadname}"):
            yield spell(name, given)
            return
    name = _RENAMED.get(name, name)
    for op, target, function in _of_that_name(name):
        if isinstance(function, FunctionType):
            yield from _by_name(op, target, function, overload, given)
        else:
            yield in_schema_order(op, target, overload, given)
    if name.endswith("_"):
        for op, target, function in _of_that_name(name[:-1]):
            if isinstance(function, FunctionType):
                yield from _by_name(op, target, function, overload, {**given, "inplace": True})


def _of_that_name(name: str) -> Iterator[tuple[str, Any, Any]]:
    """(kind of call, target, what is called) for everything in torch that has a name."""
    family, _, short = name.partition("_")
    for home, attribute in ((torch, name), (F, name), (getattr(torch, family, None), short)):
        function = getattr(home, attribute, None)
        if callable(function) and inspect.isroutine(function):
            yield "call_function", function, function
    if callable(getattr(Tensor, name, None)):
        yield "call_method", name, getattr(Tensor, name)


def in_schema_order(op: str, target: Any, overload: OpOverload, given: Arguments) -> Call:
    """A call of what torch generates from the schema; defaults at the end are left out."""
    schema = overload._schema.arguments
    positional = [argument for argument in schema if not argument.kwarg_only]
    while positional and _is_default(positional[-1], given):
        positional.pop()
    args = [given.get(argument.name, argument.default_value) for argument in positional]
    keywords = [a for a in schema if a.kwarg_only and not _is_default(a, given)]
    return Call(op, target, tuple(args), {a.name: given[a.name] for a in keywords})


def _by_name(
    op: str, target: Any, function: FunctionType, overload: OpOverload, given: Arguments
) -> Iterator[Call]:
    """The call of a Python function, if it has a parameter for every argument that matters."""
    signature = inspect.signature(function)
    bound = {"inplace": given["inplace"]} if "inplace" in given else {}
    for argument in overload._schema.arguments:
        name = argument.name
        if name not in signature.parameters:
            name = _SYNONYMS.get(name, name)
        value = given.get(argument.name, argument.default_value)
        if name in signature.parameters:
            if not _same(value, signature.parameters[name].default):
                bound[name] = value
        elif not _is_default(argument, given):
            return
    try:
        call = signature.bind(**bound)
    except TypeError:
        return
    yield Call(op, target, call.args, call.kwargs)


def _is_default(argument: torch.Argument, given: Arguments) -> bool:
    """Whether a call leaves an argument at the schema's default."""
    if argument.name not in given:
        return True
    default = argument.default_value
    return argument.has_default_value() and _same(given[argument.name], default)


def _same(value: Any, default: Any) -> bool:
    """Whether an argument is its default; lists may be of another kind."""
    if isinstance(value, (list, tuple)) and isinstance(default, (list, tuple)):
        return list(value) == list(default)
    return isinstance(value, bool) is isinstance(default, bool) and bool(value == default)


# -- what is spelled differently -------------------------------------------------------------

_SYNONYMS = {"self": "input", "train": "training"}
_RENAMED = {
    "sym_size": "size",
    "sym_numel": "numel",
    "lift_fresh_copy": "clone",
    "detach_": "detach",
    "im2col": "unfold",
    "col2im": "fold",
    "adaptive_max_pool2d": "adaptive_max_pool2d_with_indices",
    "adaptive_max_pool3d": "adaptive_max_pool3d_with_indices",
    "__and__": "bitwise_and",
    "__or__": "bitwise_or",
    "__xor__": "bitwise_xor",
}
_TRANSPOSES = {"numpy_T": "T", "matrix_H": "H"}
_UPSAMPLING = re.compile(r"_?upsample_(nearest|nearest_exact|[a-z]*linear|bicubic)[123]d(_aa)?")


def _function(target: Callable[..., Any], *args: Any, **kwargs: Any) -> Call:
    return Call("call_function", target, args, kwargs)


def _slice(name: str, given: Arguments) -> Call:
    """`x[:, start:end:step]`."""
    start, end, step = (given.get(key) for key in ("start", "end", "step"))
    item = slice(
        None if start == 0 else start,
        None if end == sys.maxsize else end,
        None if step == 1 else step,
    )
    dim = given.get("dim", 0)
    before, after = (slice(None),) * dim, (slice(None),) * (-dim - 1)
    index = (*before, item) if dim >= 0 else (Ellipsis, item, *after)
    return _function(operator.getitem, given["self"], index)


def _index(name: str, given: Arguments) -> Call:
    """`x[:, positions]`."""
    index = tuple(slice(None) if item is None else item for item in given["indices"])
    return _function(operator.getitem, given["self"], index)


def _alias(name: str, given: Arguments) -> Call:
    """`x[...]`."""
    return _function(operator.getitem, given["self"], Ellipsis)


def _transpose(name: str, given: Arguments) -> Call:
    return _function(getattr, given["self"], _TRANSPOSES.get(name, name))


def _embedding(name: str, given: Arguments) -> Call:
    """Other order, and another way to say that no row is padding."""
    options = {
        key: given[key]
        for key, default in (("padding_idx", -1), ("scale_grad_by_freq", False), ("sparse", False))
        if given.get(key, default) != default
    }
    return _function(F.embedding, given["indices"], given["weight"], **options)


def _einsum(name: str, given: Arguments) -> Call:
    return _function(torch.einsum, given["equation"], *given["tensors"])


def _pad(name: str, given: Arguments) -> Call:
    return _function(F.pad, given["self"], given["pad"], "constant", given.get("value", 0))


def _to(name: str, given: Arguments) -> Call:
    """`Tensor.to` takes no layout."""
    options = {key: value for key, value in given.items() if key not in _NOT_OF_TO}
    return Call("call_method", "to", (given["self"],), options)


def _interpolate(name: str, given: Arguments) -> Call:
    """One function for all kinds of upsampling."""
    match = _UPSAMPLING.fullmatch(name)
    assert match is not None
    options = {"mode": match[1].replace("_", "-")}
    if match[1].endswith(("linear", "cubic")):
        options["align_corners"] = given["align_corners"]
    if match[2]:
        options["antialias"] = True
    size, scale = given["output_size"], given["scale_factors"]
    return _function(F.interpolate, given["input"], size, scale, **options)


_NOT_OF_TO = ("self", "layout", "pin_memory")
_EXCEPTIONS: dict[str, Callable[[str, Arguments], Call]] = {
    r"alias\.default": _alias,
    r"slice\.Tensor": _slice,
    r"index\.Tensor": _index,
    r"(numpy_T|matrix_H|mT|mH)\.default": _transpose,
    r"embedding\.default": _embedding,
    r"einsum\.default": _einsum,
    r"constant_pad_nd\.default": _pad,
    r"to\..*": _to,
    rf"{_UPSAMPLING.pattern}\.vec": _interpolate,
}
