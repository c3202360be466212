"""A short prune of a toy network, what makes two of them the same, and what a process holds."""

from __future__ import annotations

import atexit
import functools
import gc
import linecache
import os
import sys
import weakref
from collections.abc import Sized
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace, graph_module

import rbpfx
from rbpfx import FineTune, PruningResult, Recursion
from rbpfx.graph.lazy import forget_marked
from tests.toy import ShortcutNet, stripes

BATCHES = stripes()
X = BATCHES[0][0][:4]


def toy(seed: int = 0) -> ShortcutNet:
    torch.manual_seed(seed)
    return ShortcutNet()


def prune(model: nn.Module | None = None, **options: Any) -> PruningResult:
    """A short prune, of the toy by default."""
    options = {
        "loader": BATCHES,
        "val_loader": BATCHES,
        "recursion": Recursion(epochs=2),
        "recovery": FineTune(epochs=1),
        "progress": False,
        **options,
    }
    return rbpfx.prune(model or toy(), **options)


def require_same(result: PruningResult, other: PruningResult) -> None:
    """Two prunes have come to the same network, to the last bit."""
    assert result.plan == other.plan
    wanted = other.model.state_dict()
    found = result.model.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tensor.dtype == wanted[name].dtype, name
        assert tensor.device == wanted[name].device, name
        assert torch.equal(tensor, wanted[name]), name
    assert result.report.pruned.accuracy == other.report.pruned.accuracy


def size(tensor: Tensor) -> int:
    """In bytes; 0 for what torch keeps without numbers for sizes, or without a type."""
    try:
        return int(tensor.nbytes)
    except (RuntimeError, TypeError):
        return 0


def held() -> dict[str, int]:
    """What this process holds in tensors, networks and tables, and how many files are open."""
    gc.collect()
    forget_marked()  # as the next trace does
    objects = gc.get_objects()
    kinds = [type(o) for o in objects]  # by `type`: some objects pass for others
    tensors = [o for o, kind in zip(objects, kinds, strict=True) if issubclass(kind, Tensor)]
    caches = [o for o in objects if type(o) is functools._lru_cache_wrapper]
    ours = [m for name, m in list(sys.modules.items()) if name.partition(".")[0] == "rbpfx"]
    hooks = [v for name, v in vars(nn.modules.module).items() if name.endswith("hooks")]
    return {
        "tensors": len(tensors),
        "bytes": sum(map(size, tensors)),
        "modules": sum(issubclass(kind, nn.Module) for kind in kinds),
        "graphs": sum(issubclass(kind, fx.Graph) for kind in kinds),
        "nodes": sum(issubclass(kind, fx.Node) for kind in kinds),
        "classes": sum(issubclass(kind, type) for kind in kinds),
        "entries in caches of rbpfx": sum(
            cache.cache_info().currsize for cache in caches if "rbpfx" in str(cache.__module__)
        ),
        "entries in tables of rbpfx": sum(
            len(value)
            for module in ours
            for value in vars(module).values()
            if isinstance(value, Sized) and not isinstance(value, (str, type, nn.Module))
        ),
        "texts of generated code": len(graph_module._loader.eval_cache),
        "texts of files": len(linecache.cache),
        "functions that fx marks": len(_symbolic_trace._wrapped_fns_to_patch),
        "hooks of all modules": sum(map(len, hooks)),
        "finalizers": len(weakref.finalize._registry),  # type: ignore[attr-defined]
        "functions at exit": atexit._ncallbacks(),
        "open files": open_files(),
    }


def open_files() -> int:
    """How many files this process has open; 0 where the system does not tell."""
    folder = Path("/proc/self/fd")
    return len(os.listdir(folder)) if folder.is_dir() else 0
