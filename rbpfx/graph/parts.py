"""Captured parts: the graphs that a captured model consists of.

As a rule there is one, the model itself. A module whose Python code depends on the values of
tensors (the proposals of a detector) stays as it is and runs its own forward; what is traceable
inside it is captured as graphs of its own, which take the places of its submodules.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from rbpfx.errors import CaptureError, RbpfxError
from rbpfx.graph.copying import copy_model
from rbpfx.graph.examples import count_examples
from rbpfx.graph.tracer import GraphTracer

Call = tuple[tuple[Any, ...], dict[str, Any]]
Capture = Callable[[nn.Module, Call], nn.Module]
_EXAMPLES = "rbpfx_examples"


def captured_parts(model: nn.Module) -> dict[str, fx.GraphModule]:
    """The graphs of a captured model by qualified name, outermost first ("" is the model)."""
    parts = {}
    seen = set()
    waiting = [("", model)]
    while waiting:  # `named_modules` is recursive, and takes longer than some analyses
        prefix, module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        if isinstance(module, fx.GraphModule) and module.graph._tracer_cls is GraphTracer:
            parts[prefix] = module
        children = [(n, m) for n, m in module._modules.items() if m is not None]
        waiting += [(f"{prefix}.{n}" if prefix else n, m) for n, m in reversed(children)]
    return parts


def note_examples(gm: fx.GraphModule, count: int) -> None:
    """Remember with how many examples a graph was captured."""
    gm.meta[_EXAMPLES] = count


def example_batch(model: nn.Module) -> int:
    """Number of examples in the batch that a model was captured with."""
    name, part = next(iter(captured_parts(model).items()))
    if name:
        return int(part.meta.get(_EXAMPLES, 1))
    placeholders = [n for n in part.graph.nodes if n.op == "placeholder"]
    return count_examples({n.name: n.meta.get("val") for n in placeholders})


def capture_inside(
    model: nn.Module, opaque: list[str], run: Callable[[nn.Module], Any], capture: Capture
) -> dict[str, str]:
    """Capture what is traceable inside modules that stay as they are, in their place.

    Args:
        model: The model with all of its modules; its submodules are replaced.
        opaque: Qualified names of the modules to look into.
        run: Calls a copy of the model with the example inputs.
        capture: Captures a module for the inputs of a call; raises a `RbpfxError` if it cannot.

    Returns:
        Qualified name -> why it was not captured, for modules with parameters that stay.

    Raises:
        CaptureError: Nothing was captured, because of TorchScript.
    """
    calls = _record_calls(model, opaque, run)
    refused: dict[str, str] = {}
    for name in opaque:
        _capture_children(model.get_submodule(name), name, calls, capture, refused)
    scripted = [n for n, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    if scripted and not captured_parts(model):
        what = f"module {scripted[0]!r}" if scripted[0] else "the model"
        raise CaptureError(
            f"{what} is TorchScript, whose code cannot be followed. Put the module that it was "
            "scripted from in its place (load_state_dict takes its weights), and script the "
            "pruned network instead"
        )
    return refused


def _capture_children(
    module: nn.Module,
    name: str,
    calls: Mapping[str, list[tuple[Call, Any]]],
    capture: Capture,
    refused: dict[str, str],
) -> None:
    before = _children(module)
    for child_name, child in module.named_children():
        qualified = f"{name}.{child_name}" if name else child_name
        if not any(True for _ in child.children()) or not any(True for _ in child.parameters()):
            continue  # a single layer: what it reads and what it computes are both interface
        try:
            if qualified not in calls:
                raise CaptureError("it is not called itself")
            part = capture(child, calls[qualified][0][0])
            _require_same(part, calls[qualified])
        except RbpfxError as error:
            refused[qualified] = str(error)
            _capture_children(child, qualified, calls, capture, refused)
        else:
            setattr(module, child_name, part)
    if name in calls and _children(module) != before:
        failure = _failure(module, *calls[name][0][0])
        if failure is not None:
            for inner, children in before.items():
                inner._modules.update(children)
            refused[name] = f"its code asks its submodules for more than their results: {failure}"


def _children(module: nn.Module) -> dict[nn.Module, dict[str, nn.Module | None]]:
    """What is installed in a module, and in all inside it."""
    return {inner: dict(inner._modules) for inner in module.modules()}


def _failure(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Exception | None:
    """What a module that stays whole raises around captured parts; None if it runs."""
    try:
        with torch.no_grad():
            copy_model(module, {}).eval()(*args, **kwargs)
    except Exception as error:
        return error
    return None


def _require_same(part: nn.Module, calls: list[tuple[Call, Any]]) -> None:
    """A part must serve all the calls that were recorded, not only the first."""
    flags = [(m, m.training) for m in part.modules()]
    part.eval()
    try:
        for (args, kwargs), expected in calls:
            with torch.no_grad():
                result = part(*args, **kwargs)
            pairs = list(zip(_tensors(expected), _tensors(result), strict=True))
            if not all(torch.allclose(a, b, equal_nan=True) for a, b in pairs):
                raise CaptureError("its graph computes something else")
    except RbpfxError:
        raise
    except Exception as error:
        raise CaptureError(f"its graph does not serve every call: {error}") from error
    finally:
        for m, training in flags:
            m.training = training


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _record_calls(
    model: nn.Module, opaque: list[str], run: Callable[[nn.Module], Any]
) -> dict[str, list[tuple[Call, Any]]]:
    """Run a copy of the model, and note what the modules inside opaque ones get and return."""
    twin = copy_model(model, {}).eval()
    calls: dict[str, list[tuple[Call, Any]]] = defaultdict(list)
    for name, module in twin.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue  # takes no hooks of Python
        if any(f"{name}.".startswith(f"{outer}." if outer else "") for outer in opaque):

            def note(
                _: nn.Module, args: Any, kwargs: Any, result: Any, *, name: str = name
            ) -> None:
                calls[name].append(tree_map(_kept, ((args, kwargs), result)))

            module.register_forward_hook(note, with_kwargs=True)
    with torch.no_grad():
        run(twin)
    return calls


def _kept(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
