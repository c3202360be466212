"""Load: a fresh instance of the original is captured, sliced as planned, and gets the weights.

Files may come from strangers. Nothing in them is executed, and nothing is allocated that is not
bounded: by the model that the caller passes, or by the limits on plan.json, on example inputs and
on library models. The weights are read last, when it is known how large they can be.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from rbpfx.errors import LoadError, RbpfxError
from rbpfx.graph.capture import trace
from rbpfx.graph.device import device_of
from rbpfx.graph.groups import analyze
from rbpfx.graph.slicing import rewrite
from rbpfx.parsing import quoted
from rbpfx.plan import PruningPlan
from rbpfx.saving.files import read_file, read_plan
from rbpfx.saving.save import all_tensors
from rbpfx.saving.schema import PROGRAM, WEIGHTS, SavedPlan
from rbpfx.surroundings import usual_modes

_ENTRY_BYTES = 1024  # of a tensor in the header of safetensors, but for its name: ours, and ample

Model = nn.Module | ExportedProgram | Callable[[], nn.Module | ExportedProgram]


@usual_modes()
def load(
    directory: str | os.PathLike[str],
    model: Model | None = None,
    *,
    device: torch.device | str | None = None,
    trusted: bool = False,
) -> nn.Module:
    """Rebuild a pruned network that `PruningResult.save` has written.

    No pickle is read and nothing in the files is executed, so that they may come from anywhere;
    unless you say `trusted=True`.

    Args:
        directory: Where it was saved.
        model: A fresh instance of the original model, an exported program of it, or what makes
            one when called (its class, for example). It is left untouched; its weights do not
            matter. Not needed for models of torchvision and timm that `save` has recognised.
        device: Where the network shall be; by default where `model` is.
        trusted: Whether `network.pt2`, which `save(..., program=True)` writes, may be read if no
            `model` is given. `torch.export.load` evaluates expressions in that file and may
            unpickle: a malicious one can run any code.

    Returns:
        The pruned network, with the weights, dtypes and train or eval mode that it was saved
        with. Whether parameters require gradients is as in `model`.

    Raises:
        LoadError: Files are missing, damaged, of another version, or `model` cannot be captured
            or is not of the architecture that was pruned.

    Examples:
        >>> model = load("pruned", resnet18)  # doctest: +SKIP
    """
    directory = Path(directory)
    plan = read_plan(directory)
    try:
        if model is None and plan.library is None and trusted and PROGRAM in plan.files:
            content = BytesIO(read_file(directory, plan, PROGRAM))
            with torch.device("cpu"):  # whatever the default device is
                program = torch.export.load(content)
            return trace(program).eval().to("cpu" if device is None else device)
        original = _original(plan, model)
        network = _rebuilt(plan, original)
        weights = read_file(directory, plan, WEIGHTS, most=_most_bytes(network))
        _take(network, _tensors(weights), plan.tied)
        _set_modes(network, plan.training)
        where = device_of(original)
        return network.to(where if device is None else device)
    except Exception as error:
        cause = (
            str(error)
            if isinstance(error, RbpfxError)
            else f"the network cannot be rebuilt: {error!r}"
        )
        raise LoadError(f"{cause}{_versions(plan)}") from error


def _versions(plan: SavedPlan) -> str:
    """A remark on versions, if they differ."""
    import rbpfx

    then, now = (plan.rbpfx, plan.torch), (rbpfx.__version__, torch.__version__)
    if then == now:
        return ""
    return f" (saved with rbpfx {then[0]!r} and torch {then[1]!r}; here are {now[0]} and {now[1]})"


def _original(plan: SavedPlan, model: Model | None) -> nn.Module:
    """A fresh instance of the original.

    Raises:
        LoadError: There is none.
    """
    if model is None:
        if plan.library is None:
            program = " If you trust the files, trusted=True reads network.pt2 instead."
            raise LoadError(
                f"the original, a {plan.original.model!r}, is not known by name; pass an instance "
                "of it, or what makes one: rbpfx.load(directory, model)."
                + (program if PROGRAM in plan.files else "")
            )
        return plan.library.build()
    if not isinstance(model, (nn.Module, ExportedProgram)):
        if not callable(model):
            raise LoadError(f"the model must be a module or make one, not {model!r}")
        model = model()
    if isinstance(model, ExportedProgram):
        model = trace(model)
    if not isinstance(model, nn.Module):
        raise LoadError(f"the factory made a {type(model).__name__}, not a module")
    return model


def _rebuilt(plan: SavedPlan, original: nn.Module) -> nn.Module:
    """The pruned network, with the weights of the fresh instance."""
    gm = plan.original.capture(original)
    analysis = analyze(gm, **plan.original.analysis)
    found = {group.name: group.size for group in analysis.groups}
    if found != plan.groups:
        name = next(n for n in {**found, **plan.groups} if found.get(n) != plan.groups.get(n))
        raise LoadError(
            "the analysis finds other channel groups than when the network was saved: "
            f"{quoted(name)} has {found.get(name, 'no')} units here and "
            f"{plan.groups.get(name, 'none')} there. Was a rule registered then "
            "(rbpfx.register_rule), or is rbpfx of another version?"
        )
    return rewrite(gm, analysis, PruningPlan(plan.kept))


def _most_bytes(network: nn.Module) -> int:
    """Most bytes that the weights of a network take: in float64, with their names escaped."""
    return _ENTRY_BYTES + sum(
        _ENTRY_BYTES + 6 * len(name) + max(8, tensor.itemsize) * tensor.numel()
        for name, tensor in all_tensors(network)
    )


def _tensors(content: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(content)
    except Exception as error:
        raise LoadError(f"weights.safetensors is damaged: {quoted(str(error))}") from error


def _take(network: nn.Module, tensors: Mapping[str, Tensor], tied: Mapping[str, str]) -> None:
    """Put stored tensors in the place of those of a network, tied ones as one.

    Raises:
        LoadError: Names, shapes or kinds do not fit.
    """
    owners = dict(all_tensors(network))
    names = {name: tied.get(name, name) for name in owners}
    odd = (set(names.values()) ^ tensors.keys()) | (tied.keys() - owners.keys())
    if odd:
        name = min(odd)
        places = ("file", "network") if name in tensors else ("network", "file")
        raise LoadError(
            f"weights.safetensors does not fit: {quoted(name)} is in the {places[0]} but not in "
            f"the {places[1]}"
        )
    parameters: dict[str, nn.Parameter] = {}
    for name, old in owners.items():
        new = tensors[names[name]]
        _require_fits(name, old, new)
        path, _, leaf = name.rpartition(".")
        owner = network.get_submodule(path)
        if isinstance(old, nn.Parameter):
            fresh = nn.Parameter(new, requires_grad=old.requires_grad)
            owner._parameters[leaf] = parameters.setdefault(names[name], fresh)
        elif not new.is_floating_point() and leaf in owner._non_persistent_buffers_set:
            if not torch.equal(old.cpu(), new):
                raise LoadError(
                    f"weights.safetensors does not fit: the constant {name!r} is not the one that "
                    "the plan leads to"
                )
        else:
            owner._buffers[leaf] = new


def _require_fits(name: str, old: Tensor, new: Tensor) -> None:
    floats = old.is_floating_point() and new.is_floating_point()
    if old.shape != new.shape or not (floats or old.dtype == new.dtype):
        raise LoadError(
            f"weights.safetensors does not fit: {name!r} is {new.dtype} {tuple(new.shape)} there, "
            f"and {old.dtype} {tuple(old.shape)} in the network that the plan leads to"
        )


def _set_modes(network: nn.Module, training: Sequence[str]) -> None:
    modules, in_train_mode = dict(network.named_modules()), set(training)
    unknown = in_train_mode - modules.keys()
    if unknown:
        raise LoadError(
            f"plan.json: the network has no module {quoted(min(unknown))} to be in train mode"
        )
    for name, module in modules.items():
        module.training = name in in_train_mode


__all__ = ["load"]
