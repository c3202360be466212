"""Capture: a model becomes a `torch.fx.GraphModule` that is right in train and in eval mode.

A model whose code asks for `self.training` is traced once per mode. Where the two graphs agree
(nearly everywhere) one graph serves both; where the mode led to another constant, path or result,
the merged graph asks a `TrainingMode` module at run time. What cannot be traced is kept whole: a
module, a function, or the model itself, which then runs its own forward over captured parts. Every
node has the value of the example inputs in `node.meta["val"]` (fake tensors, nothing is computed).
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_map

from rbpfx.errors import CaptureError, InputError
from rbpfx.graph.conversions import Anew, Conversions
from rbpfx.graph.copying import copy_model
from rbpfx.graph.examples import count_examples
from rbpfx.graph.exported import trace_program
from rbpfx.graph.garbage import collection_paused
from rbpfx.graph.lazy import LazyGraphModule
from rbpfx.graph.metadata import fake_inputs, fake_mode, record_metadata
from rbpfx.graph.modes import merge_modes
from rbpfx.graph.parts import capture_inside, captured_parts, note_examples
from rbpfx.graph.regions import detach_regions
from rbpfx.graph.tracer import GraphTracer, LeafModule, ValueTracer
from rbpfx.graph.usercode import failing_line
from rbpfx.graph.values import DependsOnValues
from rbpfx.surroundings import usual_modes

ExampleInputs = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


@usual_modes()
@collection_paused()
def trace(
    model: nn.Module | ExportedProgram,
    example_inputs: ExampleInputs | None = None,
    *,
    leaf_modules: Iterable[LeafModule] = (),
) -> nn.Module:
    """Capture a model as a graph with tensor metadata on every node.

    Python control flow on sizes, numbers and lengths goes the way of the example inputs; a guard
    in the graph raises `GuardError` for inputs that would go another way. Sizes that nothing
    branches on stay free. A module whose code depends on the values of tensors stays as it is,
    around captured parts.

    A model that arrives without its Python code, as an exported program (`torch.export.load`), is
    captured as well. Export it in eval mode, with the dimensions that shall stay free (at least
    the batch) as `Dim.AUTO`: the graph refuses inputs whose sizes differ from those that the
    program fixes. `train` and `eval` switch its BatchNorms and dropouts; whatever else the model
    does in one mode only is not in the program.

    Args:
        model: Any module, or an exported program that was not decomposed. Its modules are copied,
            its parameters and buffers are shared with the graph, as `torch.fx` does; no other
            pass changes them.
        example_inputs: What the model is called with: a tensor, a tuple of positional arguments,
            or a mapping of keyword arguments. Only shapes, dtypes and devices matter. An exported
            program has its own.
        leaf_modules: Module classes or qualified names to keep whole. What they touch is not
            pruned unless a rule is registered for them.

    Returns:
        A `torch.fx.GraphModule` with the submodule names (so the `state_dict` keys) of `model`,
        equal to it in train and in eval mode. `node.meta["val"]` holds the fake tensor (shape,
        dtype, device) of every value. Forward arguments for which `example_inputs` has no value
        are fixed at their default. If the model's own forward cannot be traced (a detector), a
        module of its class, with `GraphModule`s in the places of submodules.

    Raises:
        CaptureError: Nothing of the model can be traced, or its forward switches autocast on;
            names the line and the remedy.
        InputError: `example_inputs` do not fit the model's forward.

    Examples:
        >>> from torchvision.models import resnet18
        >>> gm = trace(resnet18(), torch.zeros(2, 3, 64, 64))
        >>> [n.meta["val"].shape for n in gm.graph.nodes if n.name == "layer1_0_conv1"]
        [torch.Size([2, 64, 16, 16])]
    """
    if isinstance(model, ExportedProgram):
        if tuple(leaf_modules):
            raise InputError("an exported program has no modules that leaf_modules could keep")
        return trace_program(model, None if example_inputs is None else _as_call(example_inputs))
    if example_inputs is None:
        raise InputError("example_inputs are needed to capture a module")
    supplied = bind_inputs(model, example_inputs)
    gm = _capture(model, supplied, tuple(leaf_modules))
    flags = {name: module.training for name, module in model.named_modules()}
    for name, module in gm.named_modules():
        module.training = flags.get(name, model.training)
    return gm


def bind_inputs(model: nn.Module, example_inputs: ExampleInputs) -> dict[str, Any]:
    """Name example inputs after the forward arguments they go to, in signature order.

    Raises:
        InputError: They do not fit the signature.
    """
    return _bound(model, *_as_call(example_inputs))


def note_inputs(model: nn.Module, example_inputs: ExampleInputs) -> None:
    """Write the metadata that other example inputs give a captured model.

    The parts of a model that runs code of its own keep what they have.

    Raises:
        InputError: The model does not take these inputs.
    """
    part = captured_parts(model).get("")
    if part is not None:
        bound = bind_inputs(model, example_inputs)
        places = [n for n in part.graph.nodes if n.op == "placeholder"]
        record_metadata(part, [bound[str(n.target)] for n in places])


def _bound(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        raise InputError(
            f"the example inputs do not fit {type(model).__name__}.forward{signature}: {error}"
        ) from error
    starred = [n for n in bound if signature.parameters[n].kind.name.startswith("VAR_")]
    if starred:
        raise InputError(
            f"{type(model).__name__}.forward takes {starred[0]!r} as a variable argument; "
            "wrap the model in a module whose forward names its inputs."
        )
    return dict(bound)


def call_with(model: nn.Module, example_inputs: ExampleInputs) -> Any:
    """Call a model with example inputs of any accepted form."""
    args, kwargs = _as_call(example_inputs)
    return model(*args, **kwargs)


def _as_call(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    if not isinstance(example_inputs, Tensor):
        raise InputError(
            f"the example inputs are of the type {type(example_inputs).__name__}; give a tensor, a "
            "tuple of positional arguments, or a mapping of keyword arguments, as the model is "
            "called with"
        )
    return (example_inputs,), {}


@contextmanager
def keeping_modes(*modules: nn.Module) -> Iterator[None]:
    """Give every submodule its own training flag back afterwards."""
    flags = [(m, m.training) for module in modules for m in module.modules()]
    try:
        yield
    finally:
        for m, training in flags:
            m.training = training


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Put modules in eval mode; give every submodule its own flag back afterwards."""
    with keeping_modes(*modules):
        for module in modules:
            module.eval()
        yield


def _structure_copy(model: nn.Module) -> nn.Module:
    """Copies of the modules around the same parameters and buffers."""
    tensors = (*model.parameters(), *model.buffers())
    try:
        return copy_model(model, {id(tensor): tensor for tensor in tensors})
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied ({error}). rbpfx works on copies of your "
            "modules so that they stay as they are; detach tensors that the model caches in its "
            "attributes."
        ) from error


class _Refusal(Exception):
    """Tracing failed in a module, a function, or (None) the root's own forward."""

    def __init__(self, failed_in: Any, error: CaptureError) -> None:
        super().__init__(str(error))
        self.failed_in = failed_in
        self.error = error


def _capture(
    model: nn.Module, supplied: Mapping[str, Any], leaf_modules: tuple[LeafModule, ...]
) -> nn.Module:
    """The graph of a model, with what cannot be traced kept whole and captured inside."""
    kept: dict[str, str] = {}
    functions: set[Callable[..., Any]] = set()
    conversions = Conversions()
    while True:
        try:
            with conversions:
                gm = _graph_of(model, (*leaf_modules, *kept), functions, supplied, conversions)
            break
        except Anew:
            continue
        except _Refusal as refusal:
            if conversions.suspended():
                continue
            if not kept and not functions:
                require_that_it_runs(model, supplied)
            failed_in = refusal.failed_in
            if callable(failed_in) and failed_in not in functions:
                functions.add(failed_in)
                continue
            while failed_in in kept:  # kept whole, and still no value: look further out
                failed_in = failed_in.rpartition(".")[0]
            if not isinstance(failed_in, str) or not failed_in:
                return _shell(_structure_copy(model), supplied, leaf_modules, refusal.error)
            kind = type(model.get_submodule(failed_in))
            alike = [name for name, module in model.named_modules() if type(module) is kind]
            kept |= dict.fromkeys((failed_in, *filter(None, alike)), str(refusal.error))
    called = [str(n.target) for n in gm.graph.nodes if n.op == "call_module" and n.target in kept]
    if called:
        _look_inside(gm, list(dict.fromkeys(called)), supplied, leaf_modules)
        for node in gm.graph.nodes:
            if node.op == "call_module" and node.target in kept:
                node.meta["kept_whole"] = kept[node.target]
    note_examples(gm, count_examples(supplied))
    return gm


def _shell(
    root: nn.Module,
    supplied: Mapping[str, Any],
    leaf_modules: tuple[LeafModule, ...],
    error: CaptureError,
) -> nn.Module:
    """A copy of the model that runs its own forward over captured parts."""
    _look_inside(root, [""], supplied, leaf_modules)
    parts = captured_parts(root)
    if not parts:
        raise error
    for part in parts.values():
        note_examples(part, count_examples(supplied))
    return root


def _look_inside(
    module: nn.Module,
    opaque: list[str],
    supplied: Mapping[str, Any],
    leaf_modules: tuple[LeafModule, ...],
) -> None:
    def capture(child: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]]) -> nn.Module:
        return _capture(child, _bound(child, *call), leaf_modules)

    capture_inside(module, opaque, lambda twin: twin(**supplied), capture)


def require_that_it_runs(root: nn.Module, supplied: Mapping[str, Any]) -> None:
    """Tell inputs that do not fit from code that cannot be traced.

    Raises:
        InputError: The model does not run on the inputs.
    """
    twin = copy_model(root, {}).eval()
    try:
        with torch.no_grad():
            twin(**supplied)
    except Exception as error:
        shapes = tree_map(lambda v: tuple(v.shape) if isinstance(v, Tensor) else v, dict(supplied))
        raise InputError(f"the model does not run on inputs of shape {shapes}: {error}") from error


def _graph_of(
    model: nn.Module,
    leaf_modules: tuple[LeafModule, ...],
    leaf_functions: Iterable[Callable[..., Any]],
    supplied: Mapping[str, Any],
    conversions: Conversions,
) -> fx.GraphModule:
    """Trace a model, in both modes if its code asks for the mode, and merge the traces.

    Raises:
        _Refusal: Something cannot be traced.
        Anew: Something is to be traced in another way.
        CaptureError: What is asked for has no place in a graph.
    """
    root = _structure_copy(model)
    mode = fake_mode()
    fakes = {name: fake_inputs(mode, value) for name, value in supplied.items()}
    graphs: list[fx.Graph] = []
    for training in (False, True):
        reference = graphs[0] if graphs else None
        tracer = ValueTracer(
            mode, fakes, leaf_modules, leaf_functions, reference, conversions.follow
        )
        try:
            graphs.append(tracer.trace(root.train(training)))
        except CaptureError:
            raise  # to keep a module whole would hide what it says
        except Exception as error:
            explained = _explained(error, tracer.failed_in, root)
            raise _Refusal(tracer.failed_in, explained) from error
        if not tracer.depends_on_mode:
            break
    try:
        graph = merge_modes(graphs[1], graphs[0], root) if len(graphs) > 1 else graphs[0]
    except CaptureError as error:
        raise _Refusal(None, error) from error
    detach_regions(graph, root, mode)
    for node in graph.nodes:
        if isinstance(node.type, str):
            node.type = None  # an annotation that was never evaluated: torch cannot pickle it
    graph._tracer_cls = GraphTracer
    gm = LazyGraphModule(root, graph, class_name=type(model).__name__)
    _complete(gm, root)
    if len(graphs) > 1:
        gm.graph.lint()  # what the merge has put together
    return gm


def _complete(gm: nn.Module, root: nn.Module) -> None:
    """Give the graph module the tensors that no node uses, so that it has the model's state."""
    for name, parameter in root._parameters.items():
        gm._parameters.setdefault(name, parameter)
    for name, buffer in root._buffers.items():
        gm._buffers.setdefault(name, buffer)
    # Constants that a forward makes, and buffers that are no state, are none here either.
    gm._non_persistent_buffers_set = gm._buffers.keys() - (
        root._buffers.keys() - root._non_persistent_buffers_set
    )
    for name, child in root._modules.items():
        installed = gm._modules.get(name)
        if installed is None and child is not None and has_tensors(child):
            gm._modules[name] = child
        elif installed is not None and child is not None and installed is not child:
            _complete(installed, child)


def has_tensors(module: nn.Module) -> bool:
    """Whether a module has parameters or buffers."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next(tensors, None) is not None


def _explained(error: Exception, failed_in: Any, root: nn.Module) -> CaptureError:
    place = failing_line(error)
    if failed_in is None:
        module = f"the forward of {type(root).__name__} itself"
    elif isinstance(failed_in, str):
        module = f"module {failed_in!r}"
    else:
        module = f"function {failed_in.__name__!r}"
    leaf = type(root.get_submodule(failed_in)).__name__ if isinstance(failed_in, str) else None
    rewrite = "rewrite the line"
    if isinstance(error, DependsOnValues):
        rewrite += " without control flow on tensor values"
    remedy = (
        f"Keep that module whole with leaf_modules=[{leaf}] (or [{failed_in!r}]), or {rewrite}."
        if leaf
        else f"{rewrite.capitalize()}, or move it into a submodule and keep that whole with "
        "leaf_modules=[...]."
    )
    cause = str(error).rstrip().rstrip(".") or type(error).__name__
    return CaptureError(f"cannot trace {module}{place}: {cause}. {remedy}")


__all__ = [
    "ExampleInputs",
    "LeafModule",
    "bind_inputs",
    "call_with",
    "evaluating",
    "keeping_modes",
    "trace",
]
