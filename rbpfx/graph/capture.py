"""Capture: a model becomes a `torch.fx.GraphModule` that is right in train and in eval mode.

The model is traced twice, once per mode. Where the two graphs agree (nearly everywhere) one graph
serves both; where `self.training` led to another constant or another result, the merged graph
asks a `TrainingMode` module at run time. Every node then gets the tensor metadata of the example
inputs in `node.meta["val"]` (fake tensors, nothing is computed).
"""

from __future__ import annotations

import copy
import inspect
import operator
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx.node import map_aggregate
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from rbpfx.errors import CaptureError, InputError
from rbpfx.graph.modes import TrainingMode, merge_modes

ExampleInputs = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
LeafModule = type[nn.Module] | str


class _Proxy(fx.Proxy):
    """A proxy that records `x += y` as what it is: torch.fx would record `x + y`."""


def _augmented(name: str) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    function = getattr(operator, name)

    def record(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "imod"):
    setattr(_Proxy, f"__{_name}__", _augmented(_name))


class GraphTracer(fx.Tracer):
    """`torch.fx.Tracer` that keeps in-place operators and operators on buffers as they are.

    Graphs name it as their tracer, because unpickling a `GraphModule` traces its code again.
    """

    # Else operators on buffers would run once, while tracing, and leave a constant behind.
    proxy_buffer_attributes = True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """A proxy that knows in-place operators."""
        return _Proxy(node, self)


class Tracer(GraphTracer):
    """The tracer of models: extra leaf modules, fixed arguments, errors that name the place.

    Args:
        leaf_modules: Classes or qualified names of modules that are not traced into.
        supplied: Names of the forward arguments that the example inputs give, with their values.
            All others are fixed at their default and leave the signature.
    """

    def __init__(self, leaf_modules: Iterable[LeafModule], supplied: Mapping[str, Any]) -> None:
        super().__init__()
        leaf_modules = tuple(leaf_modules)
        self.leaf_names = {leaf for leaf in leaf_modules if isinstance(leaf, str)}
        self.leaf_types = tuple(leaf for leaf in leaf_modules if isinstance(leaf, type))
        self.supplied = supplied
        self.failed_in: str | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a call of `m` stays one `call_module` node."""
        return (
            module_qualified_name in self.leaf_names
            or isinstance(m, self.leaf_types)
            or super().is_leaf_module(m, module_qualified_name)
        )

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Trace into `m`, remembering the innermost module in which tracing fails."""
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed_in is None:
                self.failed_in = self.path_of_module(m)
            raise

    def _proxy_placeholder(
        self,
        name: str,
        concrete_args: dict[str, Any] | None,
        sig: inspect.Signature,
        fn_for_analysis: Callable[..., Any],
    ) -> Any:
        bare = name.lstrip("*")
        if bare not in self.supplied:
            return {"*": (), "**": {}}.get(name[: -len(bare)], sig.parameters[bare].default)
        proxy = super()._proxy_placeholder(name, None, sig, fn_for_analysis)
        value = self.supplied[bare]
        return value if value is None or isinstance(value, (bool, int, float, str)) else proxy


def trace(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    leaf_modules: Iterable[LeafModule] = (),
) -> fx.GraphModule:
    """Capture a model as a graph with tensor metadata on every node.

    Args:
        model: Any traceable module. It is copied, never modified.
        example_inputs: What the model is called with: a tensor, a tuple of positional arguments,
            or a mapping of keyword arguments. Only shapes, dtypes and devices matter.
        leaf_modules: Module classes or qualified names to keep whole, for modules that cannot be
            traced. What they touch is not pruned unless a rule is registered for them.

    Returns:
        A `torch.fx.GraphModule` over copies of the parameters, with the submodule names (so the
        `state_dict` keys) of `model`, equal to it in train and in eval mode. `node.meta["val"]`
        holds the fake tensor (shape, dtype, device) of every value. Forward arguments for which
        `example_inputs` has no value are fixed at their default.

    Raises:
        CaptureError: The model's Python code cannot be traced; names the line and the remedy.
        InputError: `example_inputs` do not fit the model's forward.

    Example:
        >>> from torchvision.models import resnet18
        >>> gm = trace(resnet18(), torch.zeros(2, 3, 64, 64))
        >>> [n.meta["val"].shape for n in gm.graph.nodes if n.name == "layer1_0_conv1"]
        [torch.Size([2, 64, 16, 16])]
    """
    supplied = bind_inputs(model, example_inputs)
    leaf_modules = tuple(leaf_modules)
    training = {name: module.training for name, module in model.named_modules()}
    try:
        root = copy.deepcopy(model)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied ({error}). rbpfx works on a copy so that "
            "your model stays as it is; detach tensors that the model caches in its attributes."
        ) from error
    in_train = _symbolic_graph(root.train(), leaf_modules, supplied)
    in_eval = _symbolic_graph(root.eval(), leaf_modules, supplied)
    graph = merge_modes(in_train, in_eval, root)
    for node in graph.nodes:
        if isinstance(node.type, str):
            node.type = None  # an annotation that was never evaluated: torch cannot pickle it
    graph._tracer_cls = GraphTracer
    gm = fx.GraphModule(root, graph, class_name=type(model).__name__)
    for name, module in gm.named_modules():
        module.training = training.get(name, model.training)
    gm.graph.lint()
    record_metadata(gm, list(supplied.values()))
    return gm


def bind_inputs(model: nn.Module, example_inputs: ExampleInputs) -> dict[str, Any]:
    """Name example inputs after the forward arguments they go to, in signature order.

    Raises:
        InputError: They do not fit the signature.
    """
    args, kwargs = _as_call(example_inputs)
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
    return (example_inputs,), {}


def record_metadata(gm: fx.GraphModule, values: list[Any] | None = None) -> None:
    """Write `node.meta["val"]` on every node by propagating fake tensors.

    Args:
        gm: The graph to annotate.
        values: Values for the placeholders in order. By default the shapes, dtypes and devices
            that the placeholders' metadata holds already.

    Raises:
        InputError: An operator rejects the shapes; names the node.
    """
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    if values is None:
        values = [n.meta["val"] for n in placeholders]
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        with mode:
            return torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device=value.device
            )

    propagation = _MetadataProp(gm, mode)
    with evaluating(gm), torch.no_grad():
        try:
            propagation.propagate_dont_convert_inputs(*(map_aggregate(v, fake) for v in values))
        except Exception as error:
            shapes = [tuple(v.shape) if isinstance(v, Tensor) else v for v in values]
            raise InputError(
                f"the model does not run on inputs of shape {shapes}: {error}"
            ) from error
    for node in placeholders:
        node.meta.setdefault("val", None)


class _MetadataProp(FakeTensorProp):
    """Fake tensors everywhere but in leaf modules whose Python code depends on values."""

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a module with fake tensors; if it refuses them, a copy of it with real ones."""
        try:
            return super().call_module(target, args, kwargs)
        except Exception as refusal:
            try:
                with unset_fake_temporarily():
                    module = copy.deepcopy(self.fetch_attr(target))
                    result = module(*map_aggregate(args, _ones), **map_aggregate(kwargs, _ones))
            except Exception:
                raise refusal from None
            return map_aggregate(result, self._faked)

    def run_node(self, n: fx.Node) -> Any:
        """Record plain numbers and sizes too, which torch before 2.9 leaves out."""
        result = super().run_node(n)
        if isinstance(result, (bool, int, float, torch.Size)):
            n.meta["val"] = result
        return result

    def _faked(self, value: Any) -> Any:
        return self._mode.from_tensor(value) if isinstance(value, Tensor) else value


def _ones(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.ones(value.shape, dtype=value.dtype, device=value.device)


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


def _symbolic_graph(
    root: nn.Module, leaf_modules: Iterable[LeafModule], supplied: Mapping[str, Any]
) -> fx.Graph:
    tracer = Tracer(leaf_modules, supplied)
    try:
        return tracer.trace(root)
    except Exception as error:
        place = _user_line(error)
        inside = tracer.failed_in
        module = f"module {inside!r}" if inside else f"the forward of {type(root).__name__} itself"
        leaf = type(root.get_submodule(inside)).__name__ if inside else None
        remedy = (
            f"Keep that module whole with leaf_modules=[{leaf}] (or [{inside!r}]), or "
            "rewrite the line without control flow on tensor values."
            if inside
            else "Rewrite the line without control flow on tensor values, or move it into a "
            "submodule and keep that whole with leaf_modules=[...]."
        )
        raise CaptureError(f"cannot trace {module}{place}: {error} {remedy}") from error


def _user_line(error: BaseException) -> str:
    """' at file:line `code`' of the deepest frame outside torch, or ''."""
    torch_dir = torch.__path__[0]
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(torch_dir) and frame.filename != __file__
    ]
    if not frames:
        return ""
    frame = frames[-1]
    return f" at {frame.filename}:{frame.lineno} `{frame.line}`"


__all__ = [
    "ExampleInputs",
    "LeafModule",
    "Tracer",
    "TrainingMode",
    "bind_inputs",
    "call_with",
    "evaluating",
    "keeping_modes",
    "record_metadata",
    "trace",
]
