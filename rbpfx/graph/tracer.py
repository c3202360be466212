"""The tracer: records a model's forward as a graph whose nodes know their example values.

It is `torch.fx.Tracer` with the proxies of `rbpfx.graph.values`. Modules of `torch.nn` without
children, and all whose class has a rule, stay `call_module` nodes; everything else is traced
through. While it runs, `torch.fx` patches module calls for the whole process: calls of other
threads pass through untouched, and traces wait for each other.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from types import FrameType, FunctionType
from typing import Any

import numpy
import torch
import torchvision.ops
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import (
    FakeTensorMode,
)
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from rbpfx.graph.calls import call_leaf
from rbpfx.graph.decompositions import DECOMPOSITIONS
from rbpfx.graph.draws import RecordedDraws, certain, is_draw, other_draws_refused
from rbpfx.graph.lazy import forget_marked
from rbpfx.graph.nodevalues import NodeValues
from rbpfx.graph.patches import (
    attributes_kept,
    custom_autograd_functions_refused,
    marked_functions_opened,
    masks_taken_as_given,
    replaced_state_refused,
    training_flags_watched,
)
from rbpfx.graph.regions import Surroundings
from rbpfx.graph.rules.base import python_functions, rule_of_function, rule_of_module
from rbpfx.graph.usercode import is_user_code, running_line
from rbpfx.graph.values import (
    GraphProxy,
    ValueProxy,
    assume,
    sizes_of_constants_kept,
    value_behind,
)

LeafModule = type[nn.Module] | str
_LOCK = threading.RLock()
_MODE = frozenset({"train", "eval"})

# Functions that take sizes but no tensor: torch asks a proxy among their arguments for its number,
# which would fix it. Wrapped, they become nodes instead.
FACTORIES = frozenset(
    getattr(torch, name)
    for name in (
        "arange zeros ones full empty eye linspace tensor as_tensor rand randn randint randperm "
        "meshgrid zeros_like ones_like full_like empty_like stack cat concat finfo iinfo "
        "hann_window scalar_tensor tril_indices triu_indices broadcast_shapes"
    ).split()
)
# Functions for which torch, 2.8 at least, wants numbers, flags and sizes that are no proxies.
_STRICT: frozenset[Callable[..., Any]] = frozenset(
    getattr(torch, name)
    for name in (
        "addbmm addmm baddbmm batch_norm broadcast_to conv1d conv2d conv3d conv_transpose1d "
        "conv_transpose2d conv_transpose3d dropout narrow reshape roll split tile"
    ).split()
) | {F.scaled_dot_product_attention, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d}


class GraphTracer(fx.Tracer):
    """Traces the code of a captured graph again, without values.

    Graphs name it as their tracer, because unpickling a `GraphModule` traces its code again.
    """

    # Else operators on buffers would run once, while tracing, and leave a constant behind.
    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__(autowrap_functions=(*FACTORIES, *_STRICT, *python_functions()))
        self._autowrap_search += [torch, torch._C._nn, F, torchvision.ops]

    def trace(
        self, root: nn.Module | Callable[..., Any], concrete_args: dict[str, Any] | None = None
    ) -> fx.Graph:
        """Trace a module; nothing stays patched, whether it succeeds or fails."""
        with _LOCK, RecordedDraws(self, self.is_passing):
            forget_marked()
            graph = super().trace(root, concrete_args)
        for node in graph.nodes:
            if node.target in FACTORIES or node.target in _STRICT:
                # torch.fx marks it for generated code to wrap again, which works for plain names
                # only; this tracer wraps it in any case.
                node.meta.pop("is_wrapped", None)
        return graph

    def is_passing(self) -> bool:
        """Whether a call is none of the traced code's."""
        return False

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """A proxy that knows in-place operators."""
        return GraphProxy(node, self)


class ValueTracer(GraphTracer):
    """The tracer of models.

    Args:
        mode: The mode of the fake tensors.
        supplied: Names and (fake) values of the forward arguments that the example inputs give.
        leaf_modules: Classes or qualified names of modules that are not traced into.
        leaf_functions: Functions that are not traced into.
        reference: Another trace of the same model, whose values are used again where both agree.
        convert: Called with the frame of a function of the model that makes a number of a size.

    Attributes:
        failed_in: After a failure, the qualified name of the innermost module that was traced
            into, or the function; None if the root's own forward failed.
        depends_on_mode: Whether the model may compute something else in the other mode.
    """

    def __init__(
        self,
        mode: FakeTensorMode,
        supplied: Mapping[str, Any],
        leaf_modules: Iterable[LeafModule] = (),
        leaf_functions: Iterable[Callable[..., Any]] = (),
        reference: fx.Graph | None = None,
        convert: Callable[[FrameType], None] = lambda frame: None,
    ) -> None:
        super().__init__()
        leaf_modules = tuple(leaf_modules)
        self.mode = mode
        self.supplied = supplied
        self.leaf_names = {leaf for leaf in leaf_modules if isinstance(leaf, str)}
        self.leaf_types = tuple(leaf for leaf in leaf_modules if isinstance(leaf, type))
        self.leaf_functions = set(leaf_functions)
        self.failed_in: str | Callable[..., Any] | None = None
        self.depends_on_mode = False
        self._convert = convert
        self._surroundings = Surroundings()
        self._values = NodeValues(self, reference)
        self._guarded: set[tuple[fx.Node, str]] = set()
        self._thread = threading.get_ident()

    # -- tracing --------------------------------------------------------------------------

    def trace(
        self, root: nn.Module | Callable[..., Any], concrete_args: dict[str, Any] | None = None
    ) -> fx.Graph:
        """Trace the model."""
        assert isinstance(root, nn.Module)
        self.depends_on_mode = any(_has_own_mode(module) for module in root.modules())
        watched = training_flags_watched(self._note_mode)
        with (
            _LOCK,
            custom_autograd_functions_refused(),
            marked_functions_opened(self),
            attributes_kept(root),
            sizes_of_constants_kept(),
            masks_taken_as_given(),
            watched,
        ):
            graph = super().trace(root, concrete_args)
        _drop_unused_numbers(graph)
        return graph

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """One placeholder for every supplied argument; the others take their defaults."""
        placeholders = [self._placeholder(name, value) for name, value in self.supplied.items()]
        positional = _positional(inspect.signature(root_fn), list(self.supplied))

        def call(root: nn.Module, *values: Any) -> Any:
            given = dict(zip(self.supplied, values, strict=True))
            first = [given.pop(name) for name in positional]
            with other_draws_refused(), replaced_state_refused(self.mode, *root.modules()):
                return root_fn(root, *first, **given)

        return call, [self.root, *placeholders]

    def _placeholder(self, name: str, value: Any) -> Any:
        proxy = self.create_proxy("placeholder", name, (), {})
        if value is None or isinstance(value, (bool, int, float, str)):
            # Python code branches on such an argument, so it is a constant of the capture.
            self._guard_node(proxy.node, value, f"argument {name!r}")
            return value
        return proxy

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a call of `m` stays one `call_module` node."""
        if module_qualified_name in self.leaf_names or isinstance(m, self.leaf_types):
            return True
        if is_parametrized(m):
            return False  # what computes its weights is part of the network
        if isinstance(m, torch.jit.ScriptModule) or rule_of_module(m) is not None:
            return True
        of_torch = type(m).__module__.startswith(("torch.nn", "torch.ao.nn"))
        is_container = isinstance(m, nn.Sequential) or any(m.children())
        return of_torch and not is_container

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Trace into `m`, remembering the innermost module in which tracing fails."""
        if self.is_passing():
            return forward(*args, **kwargs)
        installed = m in (self.submodule_paths or {})
        if not installed and next(m.parameters(recurse=False), None) is None:
            return forward(*args, **kwargs)  # made by the forward that calls it, as in self.f[:2]
        name = self.path_of_module(m)
        decomposition = DECOMPOSITIONS.get(type(m))
        if decomposition is not None:
            forward = partial(decomposition, m)
        try:
            with other_draws_refused(), replaced_state_refused(self.mode, m):
                return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed_in is None:
                self.failed_in = name
            raise

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Parameters and buffers become nodes."""
        if self.is_passing() or not isinstance(attr_val, Tensor):
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def _note_mode(self) -> None:
        if not self.is_passing():
            self.depends_on_mode = True

    def is_passing(self) -> bool:
        """Whether a call is none of the traced model's: ours for a value, or another thread's."""
        return self._values.computing or threading.get_ident() != self._thread

    # -- nodes ----------------------------------------------------------------------------

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """A proxy that knows the node's value."""
        return ValueProxy(node, self)

    def create_arg(self, a: Any) -> Any:
        """Proxies may pass for numbers and tuples, and data classes for dictionaries."""
        if type(a) is ValueProxy:
            return a.node
        if isinstance(a, numpy.generic):
            return a.item()
        if is_dataclass(a) and not isinstance(a, type):
            given = {f.name: getattr(a, f.name) for f in fields(a) if f.init}
            values = {name: self.create_arg(v) for name, v in given.items() if v is not None}
            return self.create_node("call_function", type(a), (), values)
        return super().create_arg(a)

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *rest: Any,
        **options: Any,
    ) -> Any:
        """Record a call, or the operators that it stands for."""
        if kind == "call_function" and target in DECOMPOSITIONS:
            return DECOMPOSITIONS[target](*args, **kwargs)
        return super().create_proxy(kind, target, args, kwargs, *rest, **options)

    def opens(self, function: Any) -> bool:
        """Whether a function that was marked with `fx.wrap` is traced into."""
        if not isinstance(function, FunctionType) or function in self.leaf_functions:
            return False
        ours = (function.__module__ or "").split(".")[0] in ("torch", "rbpfx")
        return not ours and rule_of_function(function) is None

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Record a node and its value."""
        node = super().create_node(kind, target, *args, **kwargs)
        self._surroundings.note(node)
        node.meta["val"] = self._values.of(node)
        return node

    def create_leaf(self, function: Callable[..., Any], args: tuple[Any, ...]) -> fx.Proxy:
        """Record a call of a function of ours that re-tracing must not look into."""
        proxy: fx.Proxy = self.create_proxy("call_function", function, args, {})
        proxy.node.meta["is_wrapped"] = True
        return proxy

    def guard(self, proxy: fx.Proxy, value: Any) -> Any:
        """Note that the trace depends on a value; returns it."""
        self._guard_node(proxy.node, value, running_line())
        return value

    def _guard_node(self, node: fx.Node, value: Any, where: str) -> None:
        if (node, repr(value)) not in self._guarded:
            self._guarded.add((node, repr(value)))
            call_leaf(self.graph, assume, (node, value, where)).meta["val"] = None

    # -- what Python asks of a proxy ------------------------------------------------------

    def convert(self, frame: FrameType) -> None:
        """A frame makes a number of a size, which would fix it; may raise to trace anew."""
        if is_user_code(frame.f_code.co_filename):
            self._convert(frame)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """The example's truth."""
        return ValueProxy.__bool__(obj)  # type: ignore[arg-type]

    def certainty(self, node: fx.Node) -> bool | None:
        """The truth of a comparison that every draw answers alike."""
        return certain(node)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """The example's elements."""
        return ValueProxy.__iter__(obj)  # type: ignore[arg-type]

    def keys(self, obj: fx.Proxy) -> Any:
        """The example's keys."""
        return value_behind(obj).keys()


def _positional(signature: inspect.Signature, names: list[str]) -> list[str]:
    """The arguments that have to be passed by position."""
    kinds = {name: p.kind for name, p in signature.parameters.items()}
    return [n for n in names if kinds.get(n) is inspect.Parameter.POSITIONAL_ONLY]


def _drop_unused_numbers(graph: fx.Graph) -> None:
    """Remove what only Python asked for: sizes, other numbers and draws that no node uses."""
    numbers = (int, float, str, torch.Size, torch.dtype, torch.device)
    for node in reversed(list(graph.nodes)):
        is_call = node.op in ("call_function", "call_method")
        is_asked = isinstance(node.meta["val"], numbers) or is_draw(node)
        if is_call and not node.users and (is_asked or certain(node) is not None):
            graph.erase_node(node)


def _has_own_mode(module: nn.Module) -> bool:
    """Whether a module does more in `train()` and `eval()` than to set its `training` flag."""
    kind = type(module)
    inherits = kind.train is nn.Module.train and kind.eval is nn.Module.eval
    return not inherits or hasattr(kind, "training") or not vars(module).keys().isdisjoint(_MODE)
