"""Weights from a file: read without running anything that is in it, and fitted to a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from rbpfx.errors import LoadError

CONTAINERS = ("state_dict", "model")
"""Keys under which checkpoints keep the weights among other things."""

_PARALLEL = "module."
_NAMED = 3


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a file of weights into a model, in place.

    Args:
        model: The model.
        path: A `.safetensors` file, or one by `torch.save` of a `state_dict`, alone or under
            "state_dict" or "model". The prefix "module." of `DataParallel` is removed.

    Raises:
        LoadError: The file cannot be read, or its tensors are not those of the model.
    """
    state = _without_prefix(_read(path))
    own = model.state_dict(keep_vars=True)
    present = {id(own[name]) for name in state.keys() & own.keys()}
    missing = [name for name, tensor in own.items() if name not in state]
    missing = [name for name in missing if id(own[name]) not in present]  # tied ones are there
    shapes = [
        f"{name} (file {_shape(state[name])}, model {_shape(own[name])})"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    odd = {
        "missing in the file": missing,
        "not in the model": [name for name in state if name not in own],
        "of another shape": shapes,
    }
    if any(odd.values()):
        found = "; ".join(
            f"{len(names)} {what}: {_few(names)}" for what, names in odd.items() if names
        )
        raise LoadError(
            f"the weights in {str(path)!r} do not fit the {type(model).__name__}: {found}. Give "
            "the model the arguments it was trained with, for example ?num_classes=10"
        )
    model.load_state_dict(state, strict=False)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise LoadError(
            f"{str(path)!r} holds more than tensors, and loading that could run code in it; save "
            "the weights alone: torch.save(model.state_dict(), file)"
        ) from error
    except OSError as error:
        # Those of safetensors have a message and no error number.
        reason = error.strerror or error
        raise LoadError(f"the weights {str(path)!r} cannot be read: {reason}") from error
    except Exception as error:  # of a damaged file: whatever the bytes happen to mean
        raise LoadError(f"{str(path)!r} is no file of weights, or damaged: {error!r}") from error
    for name in CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not _is_state(content):
        raise LoadError(
            f"{str(path)!r} holds no state_dict, neither alone nor under {' or '.join(CONTAINERS)}"
        )
    return dict(content)


def _is_state(content: Any) -> bool:
    return isinstance(content, Mapping) and all(isinstance(v, Tensor) for v in content.values())


def _without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    if not all(name.startswith(_PARALLEL) for name in state):
        return state
    return {name.removeprefix(_PARALLEL): tensor for name, tensor in state.items()}


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")


__all__ = ["CONTAINERS", "load_weights"]
