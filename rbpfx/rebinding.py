"""Rebinding: an optimiser that was training a network goes on with the pruned one."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map_only

from rbpfx.errors import InputError
from rbpfx.graph.slicing import kept_indices
from rbpfx.surroundings import usual_modes

if TYPE_CHECKING:
    from rbpfx.result import PruningResult


@usual_modes()
def rebind(optimizer: Optimizer, result: PruningResult) -> Optimizer:
    """Let an optimiser train the pruned network in place of the one it was training.

    The optimiser is changed in place, so that learning rate schedulers and gradient scalers that
    hold it go on as they are. Groups of parameters keep their settings. State that has the shape
    of its parameter (momentum, moments), or is 1 along some axes of it, is sliced as the parameter
    was; steps and other scalars are kept. Whatever else there is for a parameter, its state starts
    anew, with a warning.

    The state is that of the moment: it does not know of the training inside `prune`, nor of the
    constants that were multiplied into weights. For pruning in the middle of a training, leave
    the fine-tuning to the loop that goes on.

    Args:
        optimizer: Trains the model that was given to `prune`, or a part of its parameters. Call
            this once for each of several optimisers.
        result: What `prune` returned; the model given to it must still exist.

    Returns:
        `optimizer`. Gradients are gone, since the parameters are new.

    Raises:
        InputError: These are no optimiser and no result, the optimiser trains something else, or
            it keeps lists of parameters besides `param_groups` (LBFGS); it is unchanged then.

    Examples:
        >>> result = prune(model, loader, recovery=FineTune(epochs=0))  # doctest: +SKIP
        >>> model = result.model  # doctest: +SKIP
        >>> rebind(optimizer, result)  # doctest: +SKIP
    """
    _require_kinds(optimizer, result)
    _require_plain(optimizer)
    successors = _successors(result)
    unknown = [p for p in _parameters(optimizer) if p not in successors]
    if unknown:
        shapes = ", ".join(str(tuple(p.shape)) for p in unknown[:3])
        raise InputError(
            f"the optimiser trains {len(unknown)} parameters (of shape {shapes}) that do not "
            "belong to the model that was pruned. Pass the optimiser of the very model given to "
            "prune, and rebind it only once."
        )
    state: dict[Tensor, Any] = {}
    for old in _parameters(optimizer):
        if old in optimizer.state:
            new = successors[old]
            state[new.parameter] = _sliced_state(optimizer.state[old], old, new)
    for group in optimizer.param_groups:
        group["params"] = [successors[old].parameter for old in group["params"]]
    optimizer.state.clear()
    optimizer.state.update(state)
    return optimizer


class _Successor(NamedTuple):
    """What a parameter has become: its name, the new parameter, axis -> the indices that stay."""

    name: str
    parameter: nn.Parameter
    kept: dict[int, Tensor]


def _successors(result: PruningResult) -> dict[Tensor, _Successor]:
    """Parameter of the model that was given to `prune` -> what it has become.

    Raises:
        InputError: The model is gone, or is not the one that was pruned.
    """
    source = None if result.source is None else result.source()
    if source is None:
        raise InputError(
            "the model that was pruned does not exist any more, so that its parameters cannot be "
            "told apart; keep it until the optimiser is rebound"
        )
    dense = dict(result.dense.named_parameters(remove_duplicate=False))
    pruned = dict(result.model.named_parameters(remove_duplicate=False))
    analysis = result.analysis
    # Names of tied parameters differ; the tensor is the same.
    kept = {
        id(dense[name]): {dim: torch.from_numpy(indices) for dim, indices in axes.items()}
        for name, axes in kept_indices(analysis, analysis.keep(result.plan)).items()
        if name in dense
    }
    found: dict[Tensor, _Successor] = {}
    for name, old in source.named_parameters():
        before, new = dense.get(name), pruned.get(name)
        indices = kept.get(id(before), {})
        wanted = tuple(len(indices.get(d, range(size))) for d, size in enumerate(old.shape))
        if before is None or before.shape != old.shape or new is None or new.shape != wanted:
            raise InputError(
                f"the result does not fit the model it was made from: parameter {name!r} is "
                f"{tuple(old.shape)} in the model, {_shape(before)} in its captured graph and "
                f"{_shape(new)} in the result. Was one of them changed after the pruning?"
            )
        found[old] = _Successor(name, new, indices)
    return found


def _shape(tensor: Tensor | None) -> tuple[int, ...] | str:
    return "missing" if tensor is None else tuple(tensor.shape)


def _sliced_state(state: dict[str, Any], old: Tensor, new: _Successor) -> dict[str, Any]:
    """The state of a parameter, sliced like it; nothing if some of it has another shape."""
    for key, value in state.items():
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor) and not _is_like(tensor, old):
                warnings.warn(
                    f"the optimiser's state {key!r} of parameter {new.name!r} has shape "
                    f"{tuple(tensor.shape)}, that of the parameter was {tuple(old.shape)}: it "
                    "cannot be sliced, so that the state of this parameter starts anew",
                    stacklevel=3,
                )
                return {}

    def sliced(tensor: Tensor) -> Tensor:
        if tensor.ndim != old.ndim or tensor.ndim == 0:
            return tensor
        tensor = tensor.detach().to(new.parameter.device)
        for dim, indices in sorted(new.kept.items()):
            if tensor.shape[dim] == old.shape[dim]:
                tensor = tensor.index_select(dim, indices.to(tensor.device))
        return tensor

    return {key: tree_map_only(Tensor, sliced, value) for key, value in state.items()}


def _is_like(tensor: Tensor, old: Tensor) -> bool:
    """Whether a state is a scalar, or has the axes of its parameter (or 1 in their place)."""
    if tensor.numel() == 1:
        return True
    pairs = zip(tensor.shape, old.shape, strict=False)
    return tensor.ndim == old.ndim and all(size in (1, whole) for size, whole in pairs)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _require_kinds(optimizer: object, result: object) -> None:
    """Refuse what is no optimiser, or no result."""
    inner = getattr(optimizer, "optimizer", None)
    if isinstance(result, Optimizer):
        raise InputError("the optimiser comes first: rebind(optimizer, result)")
    if not isinstance(optimizer, Optimizer):
        remedy = "pass the torch.optim.Optimizer that trains the model given to prune"
        if isinstance(inner, Optimizer):
            remedy = "pass its attribute `optimizer`, which it goes on to hold"
        raise InputError(f"{type(optimizer).__name__} is no optimiser; {remedy}")
    if not hasattr(result, "source") or not hasattr(result, "plan"):
        raise InputError(f"{type(result).__name__} is no result; pass what prune returned")


def _require_plain(optimizer: Optimizer) -> None:
    """Refuse optimisers that would go on updating the old parameters behind our back."""
    own = {id(p) for p in _parameters(optimizer)}
    for name, value in vars(optimizer).items():
        if name in ("param_groups", "state", "defaults"):
            continue
        leaves = tree_leaves(value)
        if any(isinstance(leaf, Optimizer) or id(leaf) in own for leaf in leaves):
            raise InputError(
                f"{type(optimizer).__name__} keeps parameters in its attribute {name!r}, which "
                "cannot be put in the place of others; make a new one for result.model.parameters()"
            )
