"""Operator rules: importing this package registers all of them."""

from rbpfx.graph.rules import (
    attention,
    combine,
    contraction,
    convolution,
    elementwise,
    embedding,
    factories,
    gathering,
    indexing,
    linear,
    movement,
    normalization,
    rearrangement,
    reduction,
    softmax,
    spatial,
)

__all__ = [
    "attention",
    "combine",
    "contraction",
    "convolution",
    "elementwise",
    "embedding",
    "factories",
    "gathering",
    "indexing",
    "linear",
    "movement",
    "normalization",
    "rearrangement",
    "reduction",
    "softmax",
    "spatial",
]
