"""Save: a pruned network becomes `plan.json` and `weights.safetensors`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import Dim
from torch.utils._pytree import tree_map

from rbpfx.errors import LoadError, SaveError
from rbpfx.graph.capture import bind_inputs, evaluating
from rbpfx.graph.device import device_of
from rbpfx.graph.examples import count_examples
from rbpfx.graph.slicing import rewrite
from rbpfx.saving.examples import build_inputs, require_savable
from rbpfx.saving.files import Write, publish
from rbpfx.saving.library import Library
from rbpfx.saving.origin import Origin
from rbpfx.saving.schema import PROGRAM, WEIGHTS, SavedPlan, Stamp

if TYPE_CHECKING:
    from rbpfx.result import PruningResult


def save(
    result: PruningResult,
    directory: str | os.PathLike[str],
    *,
    source: str | None = None,
    program: bool = False,
) -> None:
    """Save a pruned network; see `PruningResult.save`.

    Raises:
        SaveError: The result cannot be described, or the directory not written.
    """
    import rbpfx

    origin = result.origin
    if origin is None:
        raise SaveError("the result does not come from prune; only such results can be saved")
    require_savable(origin.inputs)
    library = origin.library if source is None else _named_library(source, origin)
    _require_emitted(result)
    stored, tied = distinct(result.model)
    tensors = {name: _plain(tensor) for name, tensor in stored.items()}

    def plan(files: dict[str, Stamp]) -> SavedPlan:
        return SavedPlan(
            rbpfx=rbpfx.__version__,
            torch=torch.__version__,
            method=result.report.method,
            library=library,
            original=origin,
            groups={name: before for name, (before, _) in result.report.widths.items()},
            kept=result.plan.kept,
            tied=tied,
            training=[name for name, m in result.model.named_modules() if m.training],
            files=files,
            report=result.report.to_dict(),
        )

    data: dict[str, Write] = {WEIGHTS: lambda path: _write_weights(tensors, path)}
    if program:
        data[PROGRAM] = lambda path: _write_program(result.model, origin, path)
    publish(Path(directory), data, plan)


def all_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every name of every parameter and buffer, constants of the graph included."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def distinct(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a model under one name each, and name -> first name for the others."""
    stored: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in all_tensors(model):
        kept = first.setdefault(id(tensor), name)
        if kept == name:
            stored[name] = tensor
        else:
            tied[name] = kept
    return stored, tied


def _require_emitted(result: PruningResult) -> None:
    """Check that the network is still the one that the plan leads to, whatever its weights.

    Raises:
        SaveError: It has other tensors; names one.
    """
    if result.analysis is None:  # the result was pickled
        return
    emitted = rewrite(result.dense, result.analysis, result.plan)
    shapes = [{n: t.shape for n, t in all_tensors(m)} for m in (emitted, result.model)]
    name = next((n for n in {**shapes[0], **shapes[1]} if shapes[0].get(n) != shapes[1].get(n)), "")
    if name:
        raise SaveError(
            f"result.model is no longer the network that was emitted: {name!r} is another tensor, "
            "or is missing. Save it before it is deployed, quantised or rebuilt"
        )


def _named_library(source: str, origin: Origin) -> Library:
    """The library model that the user names, once it is certain that it is the right one."""
    try:
        library = Library.parse(source)
        origin.capture(library.build())
    except LoadError as error:
        raise SaveError(f"source={source!r} is not what was pruned: {error}") from error
    return library


def _plain(tensor: Tensor) -> Tensor:
    """A copy in memory of its own, which safetensors asks for."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _write_weights(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except OSError:
        raise
    except Exception as error:
        raise SaveError(f"the weights cannot be written: {error}") from error


def _write_program(model: nn.Module, origin: Origin, path: Path) -> None:
    """The network in eval mode as an exported program with a free batch size."""
    device = device_of(model)
    inputs = bind_inputs(model, build_inputs(origin.inputs, device))
    batch = count_examples(inputs)

    def free(value: Any) -> Any:
        of_examples = isinstance(value, Tensor) and value.ndim and len(value) == batch
        return {0: Dim.AUTO} if of_examples else None

    try:
        with evaluating(model):
            exported = torch.export.export(
                model, (), inputs, dynamic_shapes=tree_map(free, inputs), strict=False
            )
        content = BytesIO()
        torch.export.save(exported, content)
    except Exception as error:
        raise SaveError(f"torch.export cannot export the network: {error}") from error
    path.write_bytes(content.getvalue())


__all__ = ["all_tensors", "distinct", "save"]
