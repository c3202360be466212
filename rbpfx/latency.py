"""Latency: networks timed side by side, so that a noisy machine slows both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from rbpfx.graph.capture import ExampleInputs, call_with, evaluating


@dataclass(frozen=True)
class Latency:
    """Time of one forward pass in eval mode.

    Attributes:
        median: Seconds.
        spread: Interquartile range in seconds.
        repeats: How often it was measured.
    """

    median: float
    spread: float
    repeats: int


def measure_latency(
    models: Sequence[nn.Module],
    example_inputs: ExampleInputs,
    *,
    seconds: float = 2.0,
    max_repeats: int = 50,
) -> list[Latency]:
    """Time forward passes of several networks, interleaved call by call.

    Args:
        models: Networks that take the same inputs.
        example_inputs: What they are called with.
        seconds: Stop after about this time for all networks together (after three rounds at
            least).
        max_repeats: Stop after this many rounds.

    Returns:
        One entry per network.
    """
    device = next((p.device for p in models[0].parameters()), torch.device("cpu"))
    times: list[list[float]] = [[] for _ in models]
    with evaluating(*models), torch.no_grad():
        for model in models:
            call_with(model, example_inputs)
        start = time.perf_counter()
        while len(times[0]) < max_repeats:
            for model, measured in zip(models, times, strict=True):
                measured.append(_timed(model, example_inputs, device))
            if len(times[0]) >= 3 and time.perf_counter() - start > seconds:
                break
    return [_summary(measured) for measured in times]


def first_examples(value: Any, count: int) -> Any:
    """Nested example inputs cut to their first examples.

    Args:
        value: Nested inputs. The first tensor tells the number of examples; tensors of another
            length, a mask for example, stay whole.
        count: How many examples to keep at most.
    """
    tensors = (v for v in tree_leaves(value) if isinstance(v, Tensor) and v.ndim)
    examples = next((len(tensor) for tensor in tensors), 0)

    def cut(leaf: Any) -> Any:
        of_examples = isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == examples
        return leaf[:count] if of_examples else leaf

    return tree_map(cut, value)


def _timed(model: nn.Module, example_inputs: ExampleInputs, device: torch.device) -> float:
    start = time.perf_counter()
    call_with(model, example_inputs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _summary(times: list[float]) -> Latency:
    quartiles = statistics.quantiles(times, n=4)
    return Latency(statistics.median(times), quartiles[2] - quartiles[0], len(times))
