"""Nested states of Python as JSON and tensors: what safetensors can hold, and no pickle.

Numbers, strings, booleans and None are themselves, and lists are lists. Everything else is an
object of one entry that says what it is: `{"tensor": "3"}` is the tensor of that name.
"""

from __future__ import annotations

import base64
import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rbpfx.errors import CheckpointError


class Encoded(NamedTuple):
    """A state that can be written.

    Attributes:
        content: What `json.dumps` takes.
        tensors: Name -> tensor in the memory of the CPU.
    """

    content: Any
    tensors: dict[str, Tensor]


def encode(state: Any, writable: bool = True) -> Encoded:
    """A nested state as JSON and tensors, which are copies.

    Args:
        state: Numbers, strings, bytes, None, tensors, arrays, and lists, tuples and mappings of
            these.
        writable: Whether the state will be written; if not, it may hold anything that can be
            copied.

    Raises:
        CheckpointError: It holds something else; says where.
    """
    tensors: dict[str, Tensor] = {}

    def keep(tensor: Tensor) -> str:
        name = str(len(tensors))
        tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()
        return name

    def encoded(value: Any, place: str) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, Tensor):
            return {"tensor": keep(value)}
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, np.ndarray):  # as bytes: not every release knows every type
            flat = torch.from_numpy(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
            return {"array": [keep(flat), value.dtype.str, list(value.shape)]}
        if isinstance(value, bytes):
            return {"bytes": base64.b64encode(value).decode("ascii")}
        if isinstance(value, (list, tuple)):
            items = [encoded(item, f"{place}[{i}]") for i, item in enumerate(value)]
            return items if isinstance(value, list) else {"tuple": items}
        if isinstance(value, Mapping):
            pairs = value.items()
            return {"dict": [[encoded(k, place), encoded(v, f"{place}[{k!r}]")] for k, v in pairs]}
        if not writable:
            return {"object": copy.deepcopy(value)}
        raise CheckpointError(
            f"a checkpoint cannot hold the {type(value).__name__} at state{place}: it holds "
            "numbers, strings, tensors, arrays, and lists, tuples and dicts of them"
        )

    return Encoded(encoded(state, ""), tensors)


def decode(state: Encoded) -> Any:
    """What `encode` was given; all tensors are copies.

    Raises:
        ValueError: It is nothing that `encode` writes.
    """

    def decoded(value: Any) -> Any:
        if isinstance(value, list):
            return [decoded(item) for item in value]
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        match kind:
            case "tensor":
                return state.tensors[content].clone()
            case "array":
                name, dtype, shape = content
                return state.tensors[name].clone().numpy().view(dtype).reshape(shape)
            case "object":
                return copy.deepcopy(content)
            case "bytes":
                return base64.b64decode(content, validate=True)
            case "tuple":
                return tuple(decoded(item) for item in content)
            case "dict":
                return {decoded(key): decoded(item) for key, item in content}
        raise KeyError(kind)

    try:
        return decoded(state.content)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the state is damaged: {error!r}") from error


__all__ = ["Encoded", "decode", "encode"]
