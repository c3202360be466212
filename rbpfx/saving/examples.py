"""Example inputs as JSON: shapes and dtypes of tensors, and the plain values around them.

A tensor is `{"tensor": [dtype, shape]}`, a container `{"tuple": [...]}`, `{"list": [...]}` or
`{"dict": {...}}`; numbers, strings, booleans and None stand for themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite, prod
from typing import Any

import torch
from torch import Tensor

from rbpfx.errors import LoadError, SaveError
from rbpfx.parsing import quoted

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.uint8, torch.bool, torch.complex64, torch.complex128),
    )
}
MAX_BYTES = 2**30
"""Most bytes that the example inputs of a file may take (ours)."""
_MAX_DEPTH = 32
_PLAIN = (type(None), bool, int, float, str)


def describe_inputs(value: Any) -> Any:
    """Nested example inputs as JSON; what JSON cannot hold is `{"unknown": class name}`."""
    if isinstance(value, Tensor):
        return {"tensor": [str(value.dtype).removeprefix("torch."), list(value.shape)]}
    if type(value) in (tuple, list):
        return {type(value).__name__: [describe_inputs(entry) for entry in value]}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: describe_inputs(entry) for key, entry in value.items()}}
    if type(value) in _PLAIN and not (isinstance(value, float) and not isfinite(value)):
        return value
    return {"unknown": type(value).__name__}


def require_savable(spec: Any) -> None:
    """Refuse example inputs that `check_inputs` would refuse.

    Raises:
        SaveError: Something is no JSON, which it names, or they are too large.
    """
    _require_known(spec)
    try:
        check_inputs(spec)
    except LoadError as error:
        raise SaveError(f"the example inputs cannot be saved: {error}") from error


def _require_known(spec: Any) -> None:
    if isinstance(spec, Mapping):
        if "unknown" in spec:
            raise SaveError(
                f"the model's example inputs hold a {spec['unknown']}, which plan.json cannot; "
                "only tensors, finite numbers, strings, None, tuples, lists and mappings can be "
                "saved"
            )
        spec = next(iter(spec.values()))
        for entry in spec.values() if isinstance(spec, Mapping) else spec:
            _require_known(entry)


def check_inputs(spec: Any) -> None:
    """Check that JSON from a file describes example inputs of a sensible size.

    Raises:
        LoadError: It does not.
    """
    if _bytes(spec, 0) > MAX_BYTES:
        raise LoadError(f"plan.json: the example inputs take more than {MAX_BYTES} bytes")


def _bytes(spec: Any, depth: int) -> int:
    if type(spec) in _PLAIN:
        return 0
    if isinstance(spec, dict) and len(spec) == 1 and depth < _MAX_DEPTH:
        ((kind, content),) = spec.items()
        if kind == "tensor" and is_tensor(content):
            # Of an empty tensor too, no axis may be longer than the limit.
            return DTYPES[content[0]].itemsize * int(prod(max(size, 1) for size in content[1]))
        if kind in ("tuple", "list") and isinstance(content, list):
            return sum(_bytes(entry, depth + 1) for entry in content)
        if kind == "dict" and isinstance(content, dict):
            return sum(_bytes(entry, depth + 1) for entry in content.values())
    raise LoadError(f"plan.json: {quoted(spec)} does not describe an input")


def is_tensor(content: Any) -> bool:
    """Whether JSON is a dtype and a shape."""
    if not (isinstance(content, list) and len(content) == 2 and isinstance(content[0], str)):
        return False
    dtype, shape = content
    sizes = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
    return dtype in DTYPES and sizes and len(shape) <= _MAX_DEPTH


def build_inputs(spec: Any, device: torch.device) -> Any:
    """Inputs of a checked description: floats drawn from [0, 1), everything else zero.

    Zeros alone would lead a model that looks at values, a detector, along unlikely paths.
    """
    if not isinstance(spec, dict):
        return spec
    ((kind, content),) = spec.items()
    if kind == "tensor":
        dtype = DTYPES[content[0]]
        make = torch.rand if dtype.is_floating_point else torch.zeros
        return make(content[1], dtype=dtype, device="cpu").to(device)
    if kind == "dict":
        return {key: build_inputs(entry, device) for key, entry in content.items()}
    built = [build_inputs(entry, device) for entry in content]
    return tuple(built) if kind == "tuple" else built


__all__ = [
    "DTYPES",
    "build_inputs",
    "check_inputs",
    "describe_inputs",
    "is_tensor",
    "require_savable",
]
