"""Deep copies of models, quick where modules are plain.

Half of the time of `copy.deepcopy` on a network goes into the bookkeeping around numbers, names
and empty dictionaries of hooks. Modules without pickling code of their own need none of it.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from types import BuiltinFunctionType, FunctionType, NoneType
from typing import Any, TypeVar

import torch
from torch import fx, nn

from rbpfx.graph.closures import rebind_functions

M = TypeVar("M", bound=nn.Module)
Memo = dict[int, Any]

_ATOMS = (NoneType, bool, int, float, str, type, FunctionType, BuiltinFunctionType)
_ATOMIC = frozenset((*_ATOMS, torch.dtype, torch.device, torch.Size))
# What `compile()` leaves runs the very module that it was called on.
_BOUND = "_compiled_call_impl"
_PROTOCOL = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__slots__")


def copy_model(model: M, memo: Memo) -> M:
    """`copy.deepcopy(model, memo)`; graph modules keep their class name and all their hooks.

    Functions that refer to modules of the model refer to their copies. A module on which
    `compile()` was called is copied as it was before.

    Args:
        model: Any module.
        memo: What stands for an object in the copy, by its id.

    Raises:
        CaptureError: A function among the attributes cannot be made to refer to the copy.
    """
    named = [(name, m) for name, m in model.named_modules() if id(m) not in memo]
    modules = [module for _, module in named]
    plain = {cls for cls in set(map(type, modules)) if _is_plain(cls)}
    # Children first, so that a module finds the copies of its children in the memo.
    for module in reversed(modules):
        if id(module) in memo:
            continue
        if isinstance(module, torch.jit.ScriptModule):
            _copy_script(module, memo)
        elif getattr(type(module), "__deepcopy__", None) is fx.GraphModule.__deepcopy__:
            _copy_graph_module(module, memo)
        elif type(module) in plain:
            _copy_module(module, memo)
    twin = copy.deepcopy(model, memo)
    rebind_functions(named, memo)
    return twin


def _is_plain(cls: type[nn.Module]) -> bool:
    """Whether the state of instances is their `__dict__`."""
    own = cls.__mro__[: cls.__mro__.index(nn.Module)]
    return not any(name in base.__dict__ for base in own for name in _PROTOCOL)


def _copy_module(module: nn.Module, memo: Memo) -> None:
    twin = memo[id(module)] = module.__new__(type(module))
    twin.__setstate__(_copied_values(module.__dict__, memo))


def _copy_graph_module(gm: Any, memo: Memo) -> None:
    twin = memo[id(gm)] = gm.__new__(type(gm))
    type(twin).__name__ = type(gm).__name__
    state = {name: value for name, value in gm.__dict__.items() if name != "_graph"}
    twin.__dict__.update(_copied_values(state, memo))
    twin.graph = copy.deepcopy(gm.graph, memo)


def _copy_script(module: torch.jit.ScriptModule, memo: Memo) -> None:
    """TorchScript copies tensors by operators that autograd would record."""
    with torch.no_grad():
        twin = memo[id(module)] = copy.deepcopy(module, memo)
    for parameter, copied in zip(module.parameters(), twin.parameters(), strict=True):
        copied.requires_grad_(parameter.requires_grad)


def _copied_values(values: dict[str, Any], memo: Memo) -> dict[str, Any]:
    return {
        n: v if type(v) in _ATOMIC else _copied(v, memo) for n, v in values.items() if n != _BOUND
    }


def _copied(value: Any, memo: Memo) -> Any:
    if id(value) in memo:
        return memo[id(value)]
    if type(value) is dict:
        memo[id(value)] = twin = {}
        twin.update(_copied_values(value, memo))
        return twin
    if type(value) is tuple and _ATOMIC.issuperset(map(type, value)):
        return value
    if type(value) in (OrderedDict, set, list) and not value:
        memo[id(value)] = twin = type(value)()
        return twin
    return copy.deepcopy(value, memo)
