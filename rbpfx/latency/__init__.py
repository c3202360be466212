"""Latency: networks timed side by side, so that a noisy machine slows both."""

from rbpfx.latency.measure import compare_latency, measure_latency
from rbpfx.latency.memory import Memory
from rbpfx.latency.results import Comparison, Latency

__all__ = [
    "Comparison",
    "Latency",
    "Memory",
    "compare_latency",
    "measure_latency",
]
