"""Exports: files of a network for other runtimes, with a free batch size, checked after writing.

Every file is written aside, read back and run at two batch sizes. Only then it takes its place:
an export that fails never replaces a good file.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map

from rbpfx.deployment.deploy import captured, plain_form, require_tolerance
from rbpfx.deployment.onnx_names import name_values, output_names
from rbpfx.errors import ExportError, VerificationError
from rbpfx.files import written_aside
from rbpfx.graph.capture import ExampleInputs, bind_inputs, require_that_it_runs
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

    * `.onnx`: by `torch.onnx.export(dynamo=True)`, for onnxruntime and others. Outputs have the
      names that the result gives them (keys, fields), else "output", "output_1" and so on.
    * `.aoti.pt2`: machine code for this kind of machine by AOTInductor, for
      `torch._inductor.aoti_load_package` and for C++.
    * `.pt2` otherwise: by `torch.export.save`, for `torch.export.load(path).module()`.

    Args:
        model: A network from `rbpfx.deploy`, or any other: it is captured, put into eval mode and
            folded, as `deploy` does. Packed layers are exported in their plain form.
        example_inputs: What it is called with. The first axis of every tensor that has the size
            of the batch is free. A mapping makes the arguments of the file keyword arguments.
        path: Where to write; an existing file is replaced when the new one has passed.
        tolerance: How far results of the file may be from the network's, relative to the largest.

    Returns:
        The largest relative difference between the file's results and the network's, at two
        batch sizes.

    Raises:
        ExportError: The suffix names no format, `path` is a directory, a package or a compiler is
            missing, or the network cannot be exported.
        InputError: `model` is no network, or `example_inputs` do not fit it.
        VerificationError: The file computes something else.
    """
    require_tolerance(tolerance)
    path = Path(path)
    suffix, write = next(
        ((s, w) for s, w in _FORMATS.items() if path.name.endswith(s)), (None, None)
    )
    if suffix is None or write is None:
        raise ExportError(
            f"no format is known for {path.name!r}; name the file *{', *'.join(_FORMATS)}"
        )
    if path.is_dir():
        raise ExportError(f"{path} is a directory; name a file to write")
    network = plain_form(captured(model, example_inputs))
    if "" not in captured_parts(network):
        raise ExportError(
            f"{type(model).__name__} runs Python code of its own over captured parts, which no "
            "other runtime has; export the parts that rbpfx.trace has put into it."
        )
    inputs = bind_inputs(network, example_inputs)
    require_that_it_runs(network, inputs)
    device = device_of(network)
    inputs = tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, inputs)
    source = _Source(network, inputs, isinstance(example_inputs, Mapping))
    with written_aside(path) as file, torch.no_grad():
        run = write(source, file)
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


@dataclass(frozen=True)
class _Source:
    """What is exported: a network, its inputs by name, and whether it is called by name."""

    network: nn.Module
    inputs: Inputs
    by_name: bool

    def arguments(self, inputs: Inputs) -> tuple[tuple[Any, ...], Inputs]:
        return ((), inputs) if self.by_name else (tuple(inputs.values()), {})

    def running(self, called: Callable[..., Any]) -> Run:
        def run(given: Inputs) -> Any:
            args, kwargs = self.arguments(given)
            return called(*args, **kwargs)

        return run


class _Forward(nn.Module):
    """A graph module as torch.export takes any module: its results are plain dicts then."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        for name in ("_parameters", "_buffers", "_modules"):
            self.__dict__[name] = network.__dict__[name]
        self.forward = network.forward
        self.training = False


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


def _program(source: _Source) -> ExportedProgram:
    """The network as an exported program with a free batch size.

    Raises:
        ExportError: torch.export cannot, or the batch size would not stay free.
    """
    batch = count_examples(source.inputs)
    args, kwargs = source.arguments(_with_batch(source.inputs, _TRACED_BATCH))

    def shape(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        return {0: Dim.DYNAMIC} if value.ndim and len(value) == batch else {}

    try:
        return torch.export.export(
            _Forward(source.network),
            args,
            kwargs,
            dynamic_shapes=tree_map(shape, source.inputs),
            strict=False,
        )
    except Exception as error:
        raise ExportError(f"torch.export cannot export the network: {error}") from error


def _write_program(source: _Source, file: Path) -> Run:
    program = _program(source)
    try:
        torch.export.save(program, file)
    except Exception as error:
        raise ExportError(
            f"torch.export cannot save the network: {error} Files hold networks whose inputs and "
            "results are tensors, tuples, lists and dicts: let the forward return one of these."
        ) from error
    with torch.device("cpu"):  # torch reads the file's bytes there, and makes the rest by default
        module = torch.export.load(file).module()
    return source.running(module)


def _write_onnx(source: _Source, file: Path) -> Run:
    onnxruntime = _imported("onnxruntime")
    for package in ("onnx", "onnxscript"):
        _imported(package)
    if any(t.dtype == torch.bfloat16 for t in source.network.state_dict().values()):
        raise ExportError(
            "onnxruntime has no bfloat16 kernels on CPUs, so that the file could not be checked; "
            "export the network in float32, or rbpfx.deploy(..., dtype=torch.float16)"
        )
    program = _program(source)
    names = output_names(source.network(**source.inputs))
    try:
        exported = torch.onnx.export(program, dynamo=True, verbose=False)
        assert exported is not None
        name_values(exported.model, names)
        exported.save(str(file), external_data=False)
    except Exception as error:
        raise ExportError(f"torch.onnx cannot export the network: {error}") from error
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    arguments = [entry.name for entry in session.get_inputs()]

    def run(given: Inputs) -> Any:
        tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
        arrays = [tensor.cpu().numpy() for tensor in tensors]
        results = session.run(None, dict(zip(arguments, arrays, strict=True)))
        return [torch.from_numpy(result) for result in results]

    return run


def _write_aoti(source: _Source, file: Path) -> Run:
    from torch._inductor import aoti_compile_and_package, aoti_load_package
    from torch._inductor.exc import InvalidCxxCompiler

    program = _program(source)
    try:
        aoti_compile_and_package(program, package_path=str(file))
    except InvalidCxxCompiler as error:
        raise ExportError(
            "AOTInductor needs a C++ compiler, and none works: install g++ or clang++, or name one "
            "in the environment variable CXX."
        ) from error
    except Exception as error:
        raise ExportError(f"AOTInductor cannot compile the network: {error}") from error
    return source.running(aoti_load_package(str(file)))


_FORMATS: dict[str, Callable[[_Source, Path], Run]] = {
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
