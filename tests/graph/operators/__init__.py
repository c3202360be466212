"""The operators of random networks, one file per family: importing this registers all of them."""

from tests.graph.generator import OPERATORS
from tests.graph.operators import (
    attention,
    combine,
    convolution,
    elementwise,
    gathering,
    indexing,
    layers,
    movement,
    normalization,
    rearrangement,
    spatial,
    unknown,
)

__all__ = [
    "OPERATORS",
    "attention",
    "combine",
    "convolution",
    "elementwise",
    "gathering",
    "indexing",
    "layers",
    "movement",
    "normalization",
    "rearrangement",
    "spatial",
    "unknown",
]
