"""Operator rules: importing this package registers all of them."""

from rbpfx.graph.rules import (
    combine,
    convolution,
    elementwise,
    indexing,
    linear,
    movement,
    normalization,
    reduction,
    spatial,
)

__all__ = [
    "combine",
    "convolution",
    "elementwise",
    "indexing",
    "linear",
    "movement",
    "normalization",
    "reduction",
    "spatial",
]
