"""What is patched while a model is traced; every function here takes its patch back."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import _symbolic_trace
from torch.nn import functional as F
from torch.nn.modules import transformer

from rbpfx.graph.aliasing import storages
from rbpfx.graph.values import Untraceable, ValueProxy

if TYPE_CHECKING:
    from rbpfx.graph.tracer import ValueTracer

CONSTANT = "_tensor_constant"  # what torch.fx calls tensors that a forward makes


@contextmanager
def marked_functions_opened(tracer: ValueTracer) -> Iterator[None]:
    """Trace into functions marked with `fx.wrap`, which torch.fx would record as one call."""
    table = _symbolic_trace._wrapped_fns_to_patch
    marked: list[Any] = [(key, frame, frame.get(key[1])) for key, frame in list(table.items())]
    opened = [entry for entry in marked if tracer.opens(entry[2])]
    for key, frame, function in opened:
        del table[key]
        frame[key[1]] = _blamed(function, tracer)
    try:
        yield
    finally:
        for key, frame, function in opened:
            table[key] = frame
            frame[key[1]] = function


def _blamed(function: Callable[..., Any], tracer: ValueTracer) -> Callable[..., Any]:
    """The function, which notes that it was the one that could not be traced."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception:
            if tracer.failed_in is None:
                tracer.failed_in = function
            raise

    return call


@contextmanager
def attributes_kept(root: nn.Module) -> Iterator[None]:
    """Take back what forwards store in their modules: here proxies, useless after the trace."""
    copied = (dict, list, set)
    before = {
        module: {k: v.copy() if isinstance(v, copied) else v for k, v in vars(module).items()}
        for module in root.modules()
    }
    try:
        yield
    finally:
        for module, attributes in before.items():
            state = vars(module)
            constants = {k: v for k, v in state.items() if k.startswith(CONSTANT)}
            state.clear()
            state.update(attributes, **constants)


@contextmanager
def replaced_state_refused(mode: FakeTensorMode, *modules: nn.Module) -> Iterator[None]:
    """Make `self.mean = 0.9 * self.mean + ...` of a buffer an error: a graph cannot replace it.

    A buffer that is moved to where it is already stays what it is, and one that holds what follows
    from sizes alone (a table of positions) is a cache, which the graph does without.

    Args:
        mode: The mode of the fake tensors.
        modules: Whose parameters and buffers are watched.
    """
    before = [{**module._parameters, **module._buffers} for module in modules]
    yield
    for module, state in zip(modules, before, strict=True):
        after = {**module._parameters, **module._buffers}
        for name, tensor in state.items():
            new: Any = after.get(name)
            if tensor is None or type(new) is not ValueProxy:
                continue
            same = storages(new.node) == [mode.from_tensor(tensor).untyped_storage()._cdata]
            if not same and _depends_on_data(new.node):
                raise Untraceable(
                    f"it replaces its buffer {name!r}, which a graph cannot do; write into it: "
                    f"self.{name}.copy_(...)"
                )


def _depends_on_data(node: fx.Node) -> bool:
    """Whether a value follows from an input, a parameter or a buffer, and not only from sizes."""
    seen: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node in seen or not storages(node):
            continue  # a size holds no memory
        seen.add(node)
        is_constant = str(node.target).startswith(CONSTANT)
        if node.op == "placeholder" or (node.op == "get_attr" and not is_constant):
            return True
        written = (user for user in node.users if user.target is operator.setitem)
        waiting.extend(n for source in (node, *written) for n in source.all_input_nodes)
    return False


@contextmanager
def training_flags_watched(note: Callable[[], None]) -> Iterator[None]:
    """Tell whenever the `training` flag of a module is read."""

    def read(module: nn.Module) -> Any:
        note()
        try:
            return module.__dict__["training"]
        except KeyError:
            raise AttributeError("training") from None

    def write(module: nn.Module, flag: Any) -> None:
        module.__dict__["training"] = flag

    nn.Module.training = property(read, write)  # type: ignore[assignment]
    try:
        yield
    finally:
        delattr(nn.Module, "training")


@contextmanager
def custom_autograd_functions_refused() -> Iterator[None]:
    """Make `Function.apply` on a proxy an error: tracing into it would lose its own backward."""
    original = torch.autograd.Function.__dict__["apply"]

    @classmethod  # type: ignore[misc]
    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if any(type(a) is ValueProxy for a in (*args, *kwargs.values())):
            raise Untraceable(f"the autograd function {cls.__name__} has a backward of its own")
        return original.__get__(None, cls)(*args, **kwargs)

    torch.autograd.Function.apply = apply
    try:
        yield
    finally:
        torch.autograd.Function.apply = original


@contextmanager
def masks_taken_as_given() -> Iterator[None]:
    """Keep torch's transformers from asking whether a mask happens to be causal.

    The answer is in the mask's values, and only chooses a quicker kernel: a mask that is applied
    as it stands gives the same, for every input.
    """
    detect, type_of = transformer._detect_is_causal_mask, F._none_or_dtype

    def said_to_be_causal(mask: Any, is_causal: Any = None, size: Any = None) -> bool:
        if is_causal is None and ValueProxy in (type(mask), type(size)):
            return False
        return detect(mask, is_causal, size)

    def dtype_of(input: Any) -> Any:
        return input.dtype if type(input) is ValueProxy else type_of(input)

    transformer._detect_is_causal_mask, F._none_or_dtype = said_to_be_causal, dtype_of
    try:
        yield
    finally:
        transformer._detect_is_causal_mask, F._none_or_dtype = detect, type_of
