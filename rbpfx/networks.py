"""Whether what is given as a network is one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.optim.swa_utils import AveragedModel

from rbpfx.errors import InputError

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
"""Modules around another one, which is their attribute `module`."""


def require_model(model: object) -> None:
    """A model is a module with weights and with Python code that can be traced.

    Raises:
        InputError: It is something else; says what to pass instead.
    """
    kind = type(model).__name__
    if isinstance(model, type):
        raise InputError(f"the model is the class {model.__name__}; pass a trained instance of it")
    if isinstance(model, Mapping):
        raise InputError(
            f"the model is a mapping ({kind}), perhaps a state_dict; pass the network: build it "
            "and call its load_state_dict(...)"
        )
    if isinstance(model, ExportedProgram):
        raise InputError("the model is an exported program; pass rbpfx.trace(program)")
    if isinstance(model, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        raise InputError(
            f"the model is a {kind} of TorchScript, which has no Python code that could be "
            "captured; pass the module that was scripted or traced"
        )
    if not isinstance(model, nn.Module):
        remedy = inside(model) or (
            "pass the network itself, or wrap what computes it in a module that holds its weights"
        )
        raise InputError(f"the model is of the type {kind}, not a torch.nn.Module; {remedy}")
    path = _path_inside(model)
    if path:
        raise InputError(
            f"the model is wrapped in {kind}, which is no part of the network; pass model{path}"
        )
    if any(p.is_meta for p in model.parameters()):
        raise InputError(
            "the model has parameters on the meta device, which have no values; load its weights "
            "first, for example by model.to_empty(device='cpu') and model.load_state_dict(...)"
        )


def inside(value: object) -> str:
    """How to get at the network in something that holds one, a `PruningResult` say; or nothing."""
    if isinstance(value, nn.Module) or not isinstance(getattr(value, "model", None), nn.Module):
        return ""
    deployed = ", or what its method deploy() returns" if hasattr(value, "deploy") else ""
    return f"pass its attribute `model`{deployed}"


def _path_inside(model: nn.Module) -> str:
    """The attributes that lead to the module inside wrappers; empty if there are none."""
    path = ""
    while True:
        # That of torch.compile has a class whose import takes seconds.
        if isinstance(model._modules.get("_orig_mod"), nn.Module):
            attribute = "_orig_mod"
        elif isinstance(model, WRAPPERS):
            attribute = "module"
        else:
            return path
        model = getattr(model, attribute)
        path += f".{attribute}"


__all__ = ["WRAPPERS", "inside", "require_model"]
