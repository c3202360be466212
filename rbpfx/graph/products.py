"""Products of activations and multipliers that are computed again in backward instead of kept.

A layer that reads a product keeps it for its gradient, beside the activation that the product was
made from, which its own gradient needs. Where every layer reads a product, that is a second copy
of all activations. Multiplying once more in backward costs little; the copy does not have to be.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from rbpfx.errors import RbpfxError


class _Product(NamedTuple):
    """A product as long as somebody holds it, and what it was made from."""

    result: weakref.ref[Tensor]
    value: Tensor
    multiplier: Tensor
    versions: tuple[int, int]

    def again(self) -> Tensor:
        if (self.value._version, self.multiplier._version) != self.versions:
            raise RbpfxError(
                "an activation was changed in place after it had been multiplied by the noise of "
                "its channels, so that its gradient cannot be computed; use the operator that "
                "returns a new tensor"
            )
        return self.value * self.multiplier


_known: ContextVar[dict[int, _Product] | None] = ContextVar("known", default=None)


def multiply(value: Tensor, multiplier: Tensor) -> Tensor:
    """`value * multiplier`, which `recomputing` may let backward compute again."""
    result = value * multiplier
    known = None if torch.compiler.is_compiling() else _known.get()
    if known is not None and result.requires_grad:
        # Detached, or the graph would hold itself alive. The version counters stay shared.
        factors = (value.detach(), multiplier.detach())
        versions = (value._version, multiplier._version)
        known[result.data_ptr()] = _Product(weakref.ref(result), *factors, versions)
    return result


@contextmanager
def recomputing() -> Iterator[None]:
    """Within this context layers that read what `multiply` returns do not keep it for backward.

    What they keep are its factors: most are kept by somebody anyway. Compiled graphs are left
    alone, as the compiler decides for itself what to compute twice.
    """
    known: dict[int, _Product] = {}

    def pack(saved: Tensor) -> Tensor | _Product:
        if type(saved) is not Tensor or saved.layout is not torch.strided:
            return saved
        found = known.get(saved.data_ptr())
        result = None if found is None else found.result()
        # While the product lives, and is not written to, its memory holds nothing else.
        if found is None or result is None or result._version or not _same(saved, result):
            return saved
        return found

    def unpack(packed: Tensor | _Product) -> Tensor:
        return packed.again() if isinstance(packed, _Product) else packed

    token = _known.set(known)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        _known.reset(token)
        known.clear()


def _same(saved: Tensor, result: Tensor) -> bool:
    """Whether two tensors that begin at the same place are the same in every way."""
    layout = saved.shape == result.shape and saved.stride() == result.stride()
    return layout and saved.dtype == result.dtype


__all__ = ["multiply", "recomputing"]
