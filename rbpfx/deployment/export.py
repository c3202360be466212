"""Exports: files of a network for other runtimes, with a free batch size, checked after writing.

Every file is written aside, read back and run at two batch sizes. Only then it takes its place:
an export that fails never replaces a good file.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map

from rbpfx.deployment.deploy import captured, plain_form
from rbpfx.errors import ExportError, VerificationError
from rbpfx.files import written_aside
from rbpfx.graph.capture import ExampleInputs, bind_inputs
from rbpfx.graph.device import device_of
from rbpfx.graph.examples import count_examples
from rbpfx.graph.parts import captured_parts
from rbpfx.graph.verification import difference
from rbpfx.surroundings import usual_modes

Inputs = dict[str, Any]
Run = Callable[[Inputs], Any]

# Ours: other runtimes add up in another order, and onnxruntime has its own approximations.
TOLERANCE = 1e-3
_TRACED_BATCH = 2  # torch.export takes a size of 1 for a constant
_OTHER_BATCH = 3


@usual_modes()
def export(
    model: nn.Module,
    example_inputs: ExampleInputs,
    path: str | os.PathLike[str],
    *,
    tolerance: float = TOLERANCE,
) -> float:
    """Write a network to a file for another runtime, which the suffix names.

    * `.onnx`: by `torch.onnx.export(dynamo=True)`, for onnxruntime and others.
    * `.aoti.pt2`: machine code for this kind of machine by AOTInductor, for
      `torch._inductor.aoti_load_package` and for C++.
    * `.pt2` otherwise: by `torch.export.save`, for `torch.export.load(path).module()`.

    Args:
        model: A network from `rbpfx.deploy`, or any other: it is captured, put into eval mode and
            folded, as `deploy` does. Packed layers are exported in their plain form.
        example_inputs: What it is called with. The first axis of every tensor that has the size
            of the batch is free.
        path: Where to write; an existing file is replaced when the new one has passed.
        tolerance: How far results of the file may be from the network's, relative to the largest.

    Returns:
        The largest relative difference between the file's results and the network's, at two
        batch sizes.

    Raises:
        ExportError: The suffix names no format, a package or a compiler is missing, or the network
            cannot be exported.
        VerificationError: The file computes something else.
    """
    path = Path(path)
    suffix, write = next(
        ((s, w) for s, w in _FORMATS.items() if path.name.endswith(s)), (None, None)
    )
    if suffix is None or write is None:
        raise ExportError(
            f"no format is known for {path.name!r}; name the file *{', *'.join(_FORMATS)}"
        )
    network = plain_form(captured(model, example_inputs))
    if "" not in captured_parts(network):
        raise ExportError(
            f"{type(model).__name__} runs Python code of its own over captured parts, which no "
            "other runtime has; export the parts that rbpfx.trace has put into it."
        )
    inputs = bind_inputs(network, example_inputs)
    device = device_of(network)
    inputs = tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, inputs)
    with written_aside(path) as file, torch.no_grad():
        run = write(network, inputs, file)
        error = max(
            _difference(network, run, _with_batch(inputs, size))
            for size in (_TRACED_BATCH, _OTHER_BATCH)
        )
        if not error <= tolerance:
            raise VerificationError(
                f"{path.name} differs from the network by {error:.2e} of its output (allowed: "
                f"{tolerance:.0e}); it was not written."
            )
    return error


def _difference(network: nn.Module, run: Run, inputs: Inputs) -> float:
    expected = [leaf for leaf in tree_leaves(network(**inputs)) if isinstance(leaf, Tensor)]
    result = [leaf for leaf in tree_leaves(run(inputs)) if isinstance(leaf, Tensor)]
    return difference([t.cpu() for t in expected], [t.cpu() for t in result])


def _with_batch(inputs: Inputs, size: int) -> Inputs:
    """Random inputs like the examples, of another batch size; integers are repeated."""
    batch = count_examples(inputs)
    generator = torch.Generator().manual_seed(size)

    def resized(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.ndim and len(value) == batch:
            value = value[torch.arange(size, device=value.device) % batch]
        if value.is_floating_point():
            drawn = torch.randn(value.shape, generator=generator, device="cpu")
            value = drawn.to(value.device, value.dtype)
        return value

    resized_inputs: Inputs = tree_map(resized, inputs)
    return resized_inputs


def _program(network: nn.Module, inputs: Inputs) -> ExportedProgram:
    """The network as an exported program with a free batch size.

    Raises:
        ExportError: torch.export cannot, or the batch size would not stay free.
    """
    batch = count_examples(inputs)
    traced = tuple(_with_batch(inputs, _TRACED_BATCH).values())

    def shape(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        return {0: Dim.DYNAMIC} if value.ndim and len(value) == batch else {}

    try:
        return torch.export.export(
            network, traced, dynamic_shapes=tree_map(shape, tuple(inputs.values())), strict=False
        )
    except Exception as error:
        raise ExportError(f"torch.export cannot export the network: {error}") from error


def _write_program(network: nn.Module, inputs: Inputs, file: Path) -> Run:
    torch.export.save(_program(network, inputs), file)
    with torch.device("cpu"):  # torch reads the file's bytes there, and makes the rest by default
        module = torch.export.load(file).module()
    return lambda given: module(*given.values())


def _write_onnx(network: nn.Module, inputs: Inputs, file: Path) -> Run:
    onnxruntime = _imported("onnxruntime")
    for package in ("onnx", "onnxscript"):
        _imported(package)
    program = _program(network, inputs)
    try:
        torch.onnx.export(program, f=str(file), dynamo=True, external_data=False, verbose=False)
    except Exception as error:
        raise ExportError(f"torch.onnx cannot export the network: {error}") from error
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(given: Inputs) -> Any:
        tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
        arrays = [tensor.cpu().numpy() for tensor in tensors]
        results = session.run(None, dict(zip(names, arrays, strict=True)))
        return [torch.from_numpy(result) for result in results]

    return run


def _write_aoti(network: nn.Module, inputs: Inputs, file: Path) -> Run:
    from torch._inductor import aoti_compile_and_package, aoti_load_package
    from torch._inductor.exc import InvalidCxxCompiler

    program = _program(network, inputs)
    try:
        aoti_compile_and_package(program, package_path=str(file))
    except InvalidCxxCompiler as error:
        raise ExportError(
            "AOTInductor needs a C++ compiler, and none works: install g++ or clang++, or name one "
            "in the environment variable CXX."
        ) from error
    except Exception as error:
        raise ExportError(f"AOTInductor cannot compile the network: {error}") from error
    compiled = aoti_load_package(str(file))
    return lambda given: compiled(*given.values())


_FORMATS: dict[str, Callable[[nn.Module, Inputs, Path], Run]] = {
    ".onnx": _write_onnx,
    ".aoti.pt2": _write_aoti,
    ".pt2": _write_program,
}


def _imported(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ExportError(
            f'the package {package} is needed for this format: pip install "rbpfx[export]"'
        ) from error


__all__ = ["TOLERANCE", "export"]
