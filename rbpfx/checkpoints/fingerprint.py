"""Checksums of tensors: whether a model or a batch is the one that it was."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def fingerprint(value: Any) -> str:
    """A checksum of the tensors, numbers and strings in a nested value, or of a model's state.

    Args:
        value: A model, or nested containers; leaves of other types do not count.

    Returns:
        Sixteen hexadecimal digits.
    """
    digest = hashlib.sha256()
    if isinstance(value, nn.Module):
        value = list(value.state_dict().items())
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            leaf = leaf.detach().cpu()
            digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            digest.update(leaf.contiguous().flatten().view(torch.uint8).numpy().data)
        elif isinstance(leaf, (bool, int, float, str, bytes)):
            digest.update(repr(leaf).encode())
    return digest.hexdigest()[:16]


__all__ = ["fingerprint"]
