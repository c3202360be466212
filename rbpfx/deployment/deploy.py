"""The deployable form of a network: the same function in eval mode, in fewer and cheaper operators.

Every step is a pass over the graph of its own: `specialize`, `fold_constants`, `make_layers`,
`fold_affine`, `pack`, `work_in_place`. The steps that change the mathematics are checked in
float64, the result once more in its own type.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from rbpfx.deployment.constants import fold_constants, make_layers
from rbpfx.deployment.folding import fold_affine
from rbpfx.deployment.inplace import work_in_place
from rbpfx.deployment.nodes import copied, module_calls
from rbpfx.deployment.packing import PackedLayer, pack, unpack
from rbpfx.deployment.specialize import specialize
from rbpfx.errors import InputError, VerificationError
from rbpfx.graph.calls import module_of
from rbpfx.graph.capture import (
    ExampleInputs,
    bind_inputs,
    evaluating,
    note_inputs,
    require_that_it_runs,
    trace,
)
from rbpfx.graph.copying import copy_model
from rbpfx.graph.lazy import LazyGraphModule
from rbpfx.graph.metadata import record_metadata
from rbpfx.graph.parts import captured_parts
from rbpfx.graph.verification import (
    TOLERANCE,
    in_double,
    inputs_like,
    largest_difference,
    name_finer_type,
    verify,
)
from rbpfx.networks import require_model
from rbpfx.surroundings import usual_modes

# Ours: what rounding may do to a deep network in a type, of its largest output.
TOLERANCES: Mapping[torch.dtype, float] = {
    torch.float64: TOLERANCE,
    torch.float32: 1e-3,
    torch.float16: 0.05,
    torch.bfloat16: 0.2,
}


class CompiledNetwork(nn.Module):
    """A deployed network that `torch.compile` runs; no gradients are recorded.

    Args:
        network: The deployed network.

    Attributes:
        network: The deployed network.
    """

    _compiled: Callable[..., Any]

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.training = False
        self._compile()

    def _compile(self) -> None:
        # Freezing lays the weights out for the kernels. It needs gradients to be off.
        # No submodule: the state would hold all weights twice.
        self.__dict__["_compiled"] = torch.compile(self.network, options={"freezing": True})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's result."""
        with torch.no_grad():
            return self._compiled(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_compiled"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._compile()


@usual_modes()
def deploy(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    dtype: torch.dtype | None = None,
    channels_last: bool = True,
    packed: bool = True,
    compile: bool = False,
    tolerance: float | None = None,
) -> nn.Module:
    """The form of a network to run: equal to it in eval mode, and faster.

    BatchNorm and constant scales are folded into the layers before them, what is computed from
    parameters alone is a constant, dropout and auxiliary heads are gone, activations and additions
    work in place. On CPUs convolutions and linear maps are run by oneDNN with prepacked weights and
    fused activations. The batch size stays free, and every other size that was free.

    Args:
        model: A pruned or captured network, a deployed one, or any module, which is captured
            first. Left untouched.
        example_inputs: What it is called with, as for `rbpfx.trace`.
        dtype: Floating point type to compute in. Inputs are converted from, and results to, the
            types that they have in `model`. By default the model's own.
        channels_last: Lay out the weights of 2-d convolutions with the channels last.
        packed: Pack weights where that is possible (float32 and bfloat16 on CPUs) and faster on
            this machine for batches like the examples, which is timed layer by layer; the times
            are kept on disk (`rbpfx.latency.operators`). A packed network stays on CPUs and in its
            type, and refuses inputs that require gradients. Its `state_dict`, pickles and copies
            have plain weights, and exports are made from its plain form.
        compile: Return a `CompiledNetwork`, which is compiled by inductor when it is first
            called. Nothing is packed then; inductor packs.
        tolerance: How far the result may be from `model`, each in the type it computes in,
            relative to the largest output. By default that of `TOLERANCES` for the coarser type.

    Returns:
        A network without gradients, in eval mode; keep it there. A `torch.fx.GraphModule`, or a
        module of the model's class around some, as `rbpfx.trace`.

    Raises:
        VerificationError: In float64 the plain form differs from the model by more than 1e-9, or
            the result by more than `tolerance`; it is not used.
        CaptureError: The model cannot be captured.
        InputError: `model` is no network, `example_inputs` do not fit, `tolerance` is no number, or
            `dtype` is none that the network runs in.

    Examples:
        >>> from torchvision.models import resnet18
        >>> network = deploy(resnet18(), torch.zeros(1, 3, 64, 64))
        >>> any(isinstance(m, torch.nn.BatchNorm2d) for m in network.modules())
        False
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InputError(
            f"dtype={dtype!r} must be a floating point torch.dtype, for example torch.bfloat16"
        )
    require_tolerance(tolerance)
    model = captured(model, example_inputs)
    reference = in_double(copy_model(model, {})).eval()
    try:
        error = verify(reference, plain_form(reference), example_inputs)
    except Exception:
        require_that_it_runs(model, bind_inputs(model, example_inputs))
        raise
    _require(error, TOLERANCE, torch.float64)

    network = lowered(model, example_inputs, dtype, channels_last, packed and not compile, compile)
    error = _difference_on_random_inputs(model, network, example_inputs)
    own = _coarsest_type(model)
    coarser = max(own, dtype or own, key=_rounding)  # both round, the model and the result
    _require(error, _rounding(coarser) if tolerance is None else tolerance, coarser)
    return CompiledNetwork(network) if compile else network


def lowered(
    model: nn.Module,
    example_inputs: ExampleInputs,
    dtype: torch.dtype | None = None,
    channels_last: bool = True,
    packed: bool = True,
    compile: bool = False,
) -> nn.Module:
    """What `deploy` returns, neither verified nor compiled.

    Args:
        model: A captured network without packed layers.
        example_inputs: See `deploy`, also for the others.
        dtype: The type to compute in; by default the types that the weights have.
        channels_last: Whether weights lie with the channels last.
        packed: Whether layers are packed that gain from it.
        compile: Whether a compiler comes next, which does the rest.
    """
    network = plain_form(model)
    note_inputs(network, example_inputs)
    converts = dtype is not None and types_of(network) != {dtype}
    for part in captured_parts(network).values():
        if dtype is not None and converts:
            _convert(part, dtype)
        if channels_last:
            _lay_out(part)
        if packed and channels_last:
            pack(part)
        if not compile:
            work_in_place(part, (PackedLayer,))
        part.recompile()
    return network


def captured(model: nn.Module, example_inputs: ExampleInputs) -> nn.Module:
    """A model as a captured network without packed layers; the model itself if it is one.

    Raises:
        InputError: It is no network, or `example_inputs` do not fit it.
        CaptureError: It cannot be captured.
    """
    if isinstance(model, CompiledNetwork):
        model = model.network
    require_model(model)
    if not captured_parts(model):
        return trace(model, example_inputs)
    if any(isinstance(module, PackedLayer) for module in model.modules()):
        model = copy_model(model, {})
        for part in captured_parts(model).values():
            unpack(part)
            part.recompile()
    return model


def plain_form(model: nn.Module) -> nn.Module:
    """A copy of a captured network for eval mode, with constants and affine maps folded."""
    network = copy_model(model, {}).eval()
    for name, part in reversed(captured_parts(network).items()):
        for step in (specialize, fold_constants, make_layers, fold_affine):
            step(part)
        plain = _without_unused(part)
        if not name:
            return plain
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, plain)
    return network.requires_grad_(False)


def _without_unused(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph module that holds what the graph reads and nothing else, without gradients."""
    for node in list(gm.graph.nodes):
        if node.op == "get_attr" and not node.users:  # became part of a layer
            gm.graph.erase_node(node)
    result = LazyGraphModule(gm, gm.graph, class_name=type(gm).__name__)
    result.meta.update(gm.meta)
    return result.eval().requires_grad_(False)


def types_of(network: nn.Module) -> set[torch.dtype]:
    """The floating point types of the weights."""
    tensors = itertools.chain(network.parameters(), network.buffers())
    return {t.dtype for t in tensors if t.is_floating_point()} or {torch.float32}


def _coarsest_type(network: nn.Module) -> torch.dtype:
    """The type of some weights that bounds how exact results are."""
    return max(types_of(network), key=_rounding)


def _rounding(dtype: torch.dtype) -> float:
    return TOLERANCES.get(dtype, TOLERANCE)


def _convert(gm: fx.GraphModule, dtype: torch.dtype) -> None:
    """Compute in a type; inputs and results keep theirs.

    Raises:
        InputError: An operator does not take the type.
    """
    gm.to(dtype)
    entries = _entries(gm)
    for node in list(gm.graph.nodes):
        name_finer_type(node, dtype)
        if node in entries:
            computed = [user for user in node.users if not _is_result(user)]
            if not computed:
                continue
            with gm.graph.inserting_after(node):
                cast = gm.graph.call_method("to", (node, dtype))
            for user in computed:
                user.replace_input_with(node, cast)
        elif node.op == "output":
            with gm.graph.inserting_before(node):
                node.args = map_arg(node.args, lambda n: _cast_back(n, n.meta.get("val")))
    for node in reversed(list(gm.graph.nodes)):
        if isinstance(node.target, type) and not node.users:
            gm.graph.erase_node(node)  # made anew, of what was cast
    try:
        record_metadata(gm)
    except InputError as error:
        raise InputError(
            f"the deployed network does not run in {dtype}: {error}. Deploy it with dtype=None, or "
            "let its code name no types."
        ) from error


def _entries(gm: fx.GraphModule) -> set[fx.Node]:
    """Floating point inputs, and what is taken out of lists and mappings that are inputs."""
    containers: set[fx.Node] = set()
    found: set[fx.Node] = set()
    for node in gm.graph.nodes:
        is_taken = node.all_input_nodes and containers.issuperset(node.all_input_nodes)
        if node.op == "output" or not (node.op == "placeholder" or is_taken):
            continue
        value = node.meta.get("val")
        if _is_floating(node):
            found.add(node)
        elif not isinstance(value, Tensor):
            if any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
                containers.add(node)
    return found


def _cast_back(node: fx.Node, value: Any) -> Any:
    """What a node computes, as an argument, with the types of the value that it had."""
    graph = node.graph
    if node.op == "placeholder":
        return node
    if isinstance(value, Tensor) and value.is_floating_point():
        return graph.call_method("to", (node, value.dtype))
    if type(value) in (tuple, list):
        parts = enumerate(value)
        return type(value)(
            _cast_back(graph.call_function(operator.getitem, (node, i)), v) for i, v in parts
        )
    if isinstance(node.target, type):
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: _cast_back(n, n.meta.get("val")))
        return copied(graph.call_function(node.target, tuple(args), dict(kwargs)), node)
    return node


def _is_result(node: fx.Node) -> bool:
    """Whether a node is the output, or makes a named tuple, a dataclass, a ModelOutput."""
    return node.op == "output" or isinstance(node.target, type)


def _is_floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _lay_out(gm: fx.GraphModule) -> None:
    """Weights with the channels last; what is computed with them follows."""
    for node in module_calls(gm, nn.Conv2d, nn.ConvTranspose2d):
        module = module_of(node, gm)
        assert module is not None
        module.to(memory_format=torch.channels_last)


def _difference_on_random_inputs(
    model: nn.Module, network: nn.Module, example_inputs: ExampleInputs
) -> float:
    """Relative difference of the results on inputs like the examples.

    Raises:
        InputError: The deployed network does not run.
    """
    with evaluating(model), torch.no_grad():
        inputs = inputs_like(model, example_inputs)
        try:
            return largest_difference(model, network, lambda m: m(**inputs))
        except (RuntimeError, TypeError) as error:
            raise InputError(
                f"the deployed network does not run: {error}. If its code names types or memory "
                "layouts, deploy it with dtype=None, channels_last=False and packed=False."
            ) from error


def require_tolerance(tolerance: object) -> None:
    """Complain of a tolerance that is no number from 0 up; None stands for the usual one."""
    is_number = isinstance(tolerance, Real) and not isinstance(tolerance, bool)
    if tolerance is not None and not (is_number and tolerance >= 0):  # type: ignore[operator]
        raise InputError(f"tolerance={tolerance!r} must be a number from 0 up, for example 1e-3")


def _require(error: float, limit: float, dtype: torch.dtype) -> None:
    if not error <= limit:
        raise VerificationError(
            f"the deployed network differs from the model in eval mode by {error:.2e} of its "
            f"output, computed in {dtype} (allowed: {limit:.0e}). It is not used. In float64 that "
            "is an error of ours, please report the model; in another type it is rounding, and "
            "tolerance=... allows more of it."
        )


__all__ = ["TOLERANCES", "CompiledNetwork", "captured", "deploy", "plain_form"]
