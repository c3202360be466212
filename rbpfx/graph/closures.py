"""Functions among the attributes of a copied module refer to the copy, not to the original.

`copy.deepcopy` takes functions as they are. A lambda whose closure holds modules,

    m = self.mlp
    self.mlpf = lambda x: m.c_proj(m.act(m.c_fc(x)))

would make the copy run, and train, the modules of the original. Such a function is made anew: the
same code, around the copies. One that refers to no module stays the object that it is.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Iterator
from types import (
    BuiltinFunctionType,
    CellType,
    FunctionType,
    MethodType,
    ModuleType,
    NoneType,
)
from typing import Any

import torch
from torch import Tensor, fx, nn

from rbpfx.errors import CaptureError

Memo = dict[int, Any]
Named = Iterable[tuple[str, nn.Module]]

# What every module has; of that, only hooks are functions of users.
_OF_TORCH = frozenset(vars(nn.Module())) | {"_graph", "meta", "_code"}
_HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith("_hooks"))
# Copies hold the very same.
_TAKEN_AS_THEY_ARE = (FunctionType, BuiltinFunctionType, functools._lru_cache_wrapper)
_CALLABLE = (*_TAKEN_AS_THEY_ARE, functools.partial, MethodType)
# They hold nothing, or nothing that is looked for.
_ATOMS = (NoneType, bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_PLAIN = frozenset(_ATOMS)
_CLOSED = (*_ATOMS, type, ModuleType, Tensor, nn.Module, fx.Graph, fx.Node)


def rebind_functions(originals: Named, memo: Memo) -> None:
    """Let the functions in copied modules refer to copies.

    Args:
        originals: The modules that were copied, with their names.
        memo: What stands for an object in the copy, by its id.

    Raises:
        CaptureError: A function refers to modules and cannot be made anew; names it.
    """
    _Rebinding(memo).attributes_of(originals)


class _Rebinding:
    """The functions of one copy."""

    def __init__(self, memo: Memo) -> None:
        self.memo = memo
        self._place = ""
        self._looks_into_objects = True
        self._made: Memo = {}  # functions and variables by the id of what they stand for
        self._walked: set[int] = set()
        self._copies: set[int] | None = None  # ids of what was copied
        self._alive: list[Any] = []  # so that ids stay taken

    def attributes_of(self, originals: Named) -> None:
        """Go through the attributes of copied modules."""
        for path, module in originals:
            if id(module) not in self.memo:
                continue  # within TorchScript, which copies itself
            attributes: dict[str, Any] = self.memo[id(module)].__dict__
            own = [n for n, v in attributes.items() if n not in _OF_TORCH and type(v) not in _PLAIN]
            for name in (*own, *filter(attributes.get, _HOOKS)):
                self._place = f"{path}.{name}" if path else name
                # What a hook reports to, a whole training maybe, is not copied with the module.
                self._looks_into_objects = name in own
                bound = self._inside(attributes[name])
                if bound is not attributes[name]:
                    attributes[name] = bound

    # -- what was copied --------------------------------------------------------------------

    def _inside(self, value: Any) -> Any:
        """A copied value whose functions refer to copies; containers are changed in place."""
        if isinstance(value, _CLOSED):
            return value
        if isinstance(value, _TAKEN_AS_THEY_ARE):
            return self._bound(value)
        if isinstance(value, (functools.partial, MethodType)) or type(value) is tuple:
            held = list(_held(value))
            inside = list(map(self._inside, held))
            same = all(a is b for a, b in zip(held, inside, strict=True))
            return value if same else _around(value, inside)
        entries: Any = value if isinstance(value, (dict, list)) else getattr(value, "__dict__", {})
        if entries and id(value) not in self._walked and self._is_copy(value):
            self._walked.add(id(value))
            for key, entry in list(
                enumerate(entries) if isinstance(value, list) else entries.items()
            ):
                inside = self._inside(entry)
                if inside is not entry:
                    entries[key] = inside
        return value

    def _is_copy(self, value: Any) -> bool:
        """Whether an object is the copy's own, and may be changed."""
        if self._copies is None:
            self._copies = set(map(id, self.memo.values()))
        return id(value) in self._copies

    # -- what was not -----------------------------------------------------------------------

    def _bound(self, value: Any) -> Any:
        """What stands in the copy for something that a function of the original refers to."""
        if id(value) in self.memo:
            return self.memo[id(value)]
        if id(value) in self._made:
            return self._made[id(value)]
        if not self._refers(value, set()):
            return value
        self._alive.append(value)
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, (functools.partial, MethodType)):
            return _around(value, list(map(self._bound, _held(value))))
        if isinstance(value, BuiltinFunctionType):  # a method of a tensor
            return getattr(self._bound(value.__self__), value.__name__)
        if isinstance(value, functools._lru_cache_wrapper):
            raise self._refusal("a cached function around modules")
        return self._copied(value)

    def _copied(self, value: Any) -> Any:
        """A copy of a container, an object, or a module that is none of the model's."""
        modules = value.named_modules() if isinstance(value, nn.Module) else ()
        added = [(f"{self._place}.{n}", m) for n, m in modules if id(m) not in self.memo]
        try:
            twin = copy.deepcopy(value, self.memo)
        except Exception as error:
            kind = type(value).__name__
            raise self._refusal(f"a function around a {kind} ({error})") from error
        self._copies = None
        self.attributes_of(added)
        return self._inside(twin)

    def _function(self, function: FunctionType) -> FunctionType:
        cells = function.__closure__ or ()
        twins = tuple(self._made.setdefault(id(cell), CellType()) for cell in cells)
        self._alive += cells
        name, code = function.__name__, function.__code__
        twin = FunctionType(code, function.__globals__, name, closure=twins or None)
        self._made[id(function)] = twin  # before what it holds, which may be itself
        for cell, made in zip(cells, twins, strict=True):
            if not _is_empty(cell) and _is_empty(made):
                made.cell_contents = self._bound(cell.cell_contents)
        twin.__defaults__ = function.__defaults__ and tuple(map(self._bound, function.__defaults__))
        keywords = function.__kwdefaults__
        twin.__kwdefaults__ = keywords and {n: self._bound(v) for n, v in keywords.items()}
        for name in functools.WRAPPER_ASSIGNMENTS:
            setattr(twin, name, getattr(function, name))
        vars(twin).update({n: self._bound(v) for n, v in vars(function).items()})
        return twin

    def _refers(self, value: Any, seen: set[int]) -> bool:
        """Whether a value leads to a module, or to a tensor that is another one in the copy."""
        if isinstance(value, Tensor):
            return self.memo.get(id(value), value) is not value
        if isinstance(value, nn.Module):
            return True
        if isinstance(value, _CLOSED) or id(value) in seen:
            return False
        seen.add(id(value))
        known = isinstance(value, (*_CALLABLE, dict, list, tuple, set))
        return (known or self._looks_into_objects) and any(
            self._refers(held, seen) for held in _held(value)
        )

    def _refusal(self, what: str) -> CaptureError:
        return CaptureError(
            f"attribute {self._place!r} is {what}, which cannot be made to refer to the modules of "
            "a copy: write it as a method of the module, which finds them through self"
        )


def _held(value: Any) -> Iterator[Any]:
    """What a function, a container or an object refers to."""
    if isinstance(value, FunctionType):
        yield from (c.cell_contents for c in value.__closure__ or () if not _is_empty(c))
        yield from value.__defaults__ or ()
        yield from (value.__kwdefaults__ or {}).values()
        yield from vars(value).values()
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, BuiltinFunctionType):
        yield value.__self__
    elif isinstance(value, functools._lru_cache_wrapper):
        yield value.__wrapped__
    elif isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, (list, tuple, set)):
        yield from value
    elif not hasattr(type(value), "__deepcopy__"):
        yield from getattr(value, "__dict__", {}).values()


def _around(value: Any, held: list[Any]) -> Any:
    """Such a value around other ones, in the order of `_held`."""
    if isinstance(value, functools.partial):
        count = 1 + len(value.args)
        keywords = dict(zip(value.keywords, held[count:], strict=True))
        return type(value)(held[0], *held[1:count], **keywords)
    return MethodType(*held) if isinstance(value, MethodType) else tuple(held)


def _is_empty(cell: CellType) -> bool:
    """Whether a variable has no value yet, or no longer."""
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False


__all__ = ["rebind_functions"]
