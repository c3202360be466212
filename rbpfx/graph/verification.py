"""Verification: the sliced network computes what the masked one computes, measured.

Both are run in float64 on inputs drawn afresh, so that what is left is rounding.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from rbpfx.errors import VerificationError
from rbpfx.graph.capture import ExampleInputs, bind_inputs
from rbpfx.graph.copying import copy_model
from rbpfx.graph.device import device_of
from rbpfx.graph.parts import captured_parts
from rbpfx.graph.values import assume
from rbpfx.surroundings import usual_modes

TOLERANCE = 1e-9
DRAWS = 3
_METHODS = {"float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16}


@usual_modes()
def verify(
    masked: nn.Module,
    pruned: nn.Module,
    example_inputs: ExampleInputs,
    *,
    train: bool = False,
    seed: int = 0,
) -> float:
    """Largest difference between two networks that should compute the same.

    Args:
        masked: The reference, from `rbpfx.apply_mask`.
        pruned: The network from `rbpfx.rewrite`.
        example_inputs: Inputs whose shapes, dtypes and (for integers) range are imitated.
        train: Let BatchNorm use batch statistics, as in training. Everything else stays in eval
            mode, since dropout draws different masks for tensors of different sizes.
        seed: Seed of the inputs that are drawn.

    Inputs are normal numbers, or near the examples if the reference is not finite there.

    Returns:
        max |masked - pruned| over all outputs, divided by the largest output magnitude; float64.
        If the model runs code of its own over captured parts (a detector, which sorts and
        suppresses boxes), the largest figure of its parts, each on what it gets in `masked`.
        Infinite if shapes, the number of outputs, or entries that are not finite differ, or if
        an output has no finite entry at all, so that nothing could be compared.

    Raises:
        InputError: `example_inputs` do not fit the forward of `masked`.
    """
    masked, pruned = _prepared(masked, train), _prepared(pruned, train)
    with torch.no_grad(), _InDouble():
        inputs = inputs_like(masked, example_inputs, torch.float64, seed)
        return largest_difference(masked, pruned, lambda network: network(**inputs))


def inputs_like(
    network: nn.Module,
    example_inputs: ExampleInputs,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Inputs drawn afresh on which a network's outputs are finite, if there are any.

    Normal numbers; for a network that starts with a logarithm or a root, the examples pulled
    towards zero by up to a hundredth each (ours), or the examples themselves.

    Args:
        network: What the inputs are for; it is run in the mode that it is in.
        example_inputs: Inputs whose shapes, dtypes and (for integers) range are imitated.
        dtype: The type of floating-point inputs; that of the examples by default.
        seed: Seed of the draws.

    Returns:
        Arguments of the network's forward by name, on its device.

    Raises:
        InputError: `example_inputs` do not fit the forward of the network.
    """
    bound, device = bind_inputs(network, example_inputs), device_of(network)

    def candidate(draw: Callable[[Tensor, torch.Generator], Tensor]) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)

        def convert(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            drawn = draw(value.detach().cpu(), generator)
            floating = (dtype or value.dtype) if value.is_floating_point() else value.dtype
            return drawn.to(device, floating)

        return {name: tree_map(convert, value) for name, value in bound.items()}

    first = candidate(_draw_like)
    if _is_finite(network(**first)):
        return first
    for draw in (_pull_to_zero, lambda value, _: value):
        inputs = candidate(draw)
        if _is_finite(network(**inputs)):
            return inputs
    return first


def require_equal(
    masked: nn.Module,
    pruned: nn.Module,
    example_inputs: ExampleInputs,
    *,
    inexact: Sequence[str] = (),
) -> float:
    """`verify` in eval mode and with batch statistics; the larger of the two.

    Batch statistics of a few values can be so nearly constant that dividing by their spread
    magnifies rounding beyond measure. Such a draw is an accident, a wrong rule shows in all: with
    batch statistics the smallest difference of `DRAWS` draws counts, if the first is too large.

    Args:
        masked: The reference, from `rbpfx.apply_mask`.
        pruned: The network from `rbpfx.rewrite`.
        example_inputs: What `verify` imitates.
        inexact: Normalisations that were sliced without regard to exactness. If there are any,
            every finite difference passes.

    Raises:
        VerificationError: It exceeds `TOLERANCE`.
    """
    error = verify(masked, pruned, example_inputs)
    with_batch_statistics = float("inf")
    for seed in range(DRAWS):
        drawn = verify(masked, pruned, example_inputs, train=True, seed=seed)
        with_batch_statistics = min(with_batch_statistics, drawn)
        if with_batch_statistics <= TOLERANCE:
            break
    error = max(error, with_batch_statistics)
    if not error <= (sys.float_info.max if inexact else TOLERANCE):
        raise VerificationError(
            f"the sliced network differs from the masked one by {error:.2e} of its output "
            f"(allowed: {TOLERANCE:.0e}). An operator rule is wrong; the result is not used. "
            "Exclude the part of the network with leaf_modules=[...] and please report the model."
        )
    return error


def difference(reference: Any, other: Any) -> float:
    """Largest difference of two (nested) results relative to the reference's largest magnitude."""
    pairs = list(zip(_tensors(reference), _tensors(other), strict=False))
    if len(pairs) != len(_tensors(reference)) or len(pairs) != len(_tensors(other)):
        return float("inf")
    if any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    worst = 0.0
    for a, b in pairs:
        a, b = a.detach().double(), b.detach().double()
        if a.numel() == 0 or torch.equal(a, b):
            continue
        finite = torch.isfinite(a)
        if not finite.any() or not _same_elsewhere(a, b, finite):
            return float("inf")
        a, b = a[finite], b[finite]
        scale = a.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
        worst = max(worst, float((a - b).abs().max() / scale))
    return worst


def _same_elsewhere(a: Tensor, b: Tensor, finite: Tensor) -> bool:
    """Whether infinities and NaNs agree."""
    same = (a == b) | (a.isnan() & b.isnan())
    return bool((same | finite).all() and torch.equal(finite, torch.isfinite(b)))


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def largest_difference(
    masked: nn.Module, pruned: nn.Module, call: Callable[[nn.Module], Any]
) -> float:
    """Between the results of two networks; where code of users runs over parts, between parts.

    A tie that rounding breaks the other way, in a sort say, would look like an error of the
    parts before it. So every part of `pruned` gets what that of `masked` got.

    Args:
        masked: The reference.
        pruned: The other network.
        call: Runs a network.
    """
    references = captured_parts(masked)
    if "" in references or not references:
        return difference(call(masked), call(pruned))
    calls: list[tuple[str, Any, Any, Any]] = []

    def note(name: str, args: Any, kwargs: Any, result: Any) -> None:
        calls.append((name, *copy.deepcopy((args, kwargs, result))))

    hooks = [
        part.register_forward_hook(lambda _, *call, name=name: note(name, *call), with_kwargs=True)
        for name, part in references.items()
    ]
    call(masked)
    for hook in hooks:
        hook.remove()
    call(pruned)  # the whole must run, too
    parts = captured_parts(pruned)
    return max(
        (difference(result, parts[name](*args, **kwargs)) for name, args, kwargs, result in calls),
        default=float("inf"),
    )


def _prepared(network: nn.Module, train: bool) -> nn.Module:
    network = in_double(copy_model(network, {})).eval()
    for module in network.modules() if train else ():
        if isinstance(module, _BatchNorm):
            module.train()
    return network


def in_double(network: nn.Module) -> nn.Module:
    """Make a network float64, also where its graphs name a coarser type or take the default."""
    network.double()
    for part in captured_parts(network).values():
        for node in list(part.graph.nodes):
            if node.target is assume:
                part.graph.erase_node(node)  # it may hold for the coarser type only
            if not isinstance(node.meta.get("val"), Tensor):
                continue  # a question about a type
            name_finer_type(node, torch.float64)
            if node.op in ("call_function", "call_method") and _is_of_default_dtype(node):
                with part.graph.inserting_after(node):
                    double = part.graph.call_method("double", (node,))
                double.meta.update(node.meta)
                node.replace_all_uses_with(double, lambda user, double=double: user is not double)
        part.recompile()
    return network


def name_finer_type(node: fx.Node, dtype: torch.dtype) -> None:
    """Let a node that makes a tensor name a floating point type where it names a coarser one."""

    def finer(value: Any) -> Any:
        is_coarse = isinstance(value, torch.dtype) and value.is_floating_point
        return dtype if is_coarse and value.itemsize <= dtype.itemsize else value

    if not isinstance(node.meta.get("val"), Tensor):
        return  # a question about a type
    node.args = map_aggregate(node.args, finer)
    node.kwargs = map_aggregate(node.kwargs, finer)
    named = _METHODS.get(str(node.target)) if node.op == "call_method" else None
    if named is not None and finer(named) is dtype:
        node.target, node.args = "to", (*node.args, dtype)


def _is_of_default_dtype(node: fx.Node) -> bool:
    """Whether a floating-point tensor is made of none: `torch.zeros(2)`, `torch.arange(5) / 5`.

    The default dtype itself is that of all threads, and stays as it is.
    """
    inputs = (leaf for n in node.all_input_nodes for leaf in _tensors(n.meta.get("val")))
    made: Tensor = node.meta["val"]
    return made.is_floating_point() and not any(t.is_floating_point() for t in inputs)


class _InDouble(TorchFunctionMode):
    """Makes every coarser result float64: in modules kept whole, whose code cannot be changed."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        is_coarse = isinstance(result, Tensor) and result.is_floating_point()
        return result.double() if is_coarse else result


def _draw_like(value: Tensor, generator: torch.Generator) -> Tensor:
    if value.is_floating_point():
        return torch.randn(value.shape, dtype=torch.float64, generator=generator, device="cpu")
    if value.dtype == torch.bool or value.numel() == 0:
        return value
    low, high = int(value.min()), int(value.max())
    options: dict[str, Any] = {"dtype": value.dtype, "generator": generator, "device": "cpu"}
    return torch.randint(low, high + 1, value.shape, **options)


def _pull_to_zero(value: Tensor, generator: torch.Generator) -> Tensor:
    if not value.is_floating_point():
        return value
    drawn = torch.rand(value.shape, dtype=torch.float64, generator=generator, device="cpu")
    return value.double() * (1 - drawn / 100)


def _is_finite(result: Any) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in _tensors(result))


__all__ = ["TOLERANCE", "difference", "inputs_like", "require_equal", "verify"]
