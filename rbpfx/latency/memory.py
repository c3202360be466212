"""Memory: what a forward pass holds at its peak, as the allocator sees it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Memory:
    """Bytes that a forward pass needs at its peak; its inputs are not counted.

    Attributes:
        parameters: Parameters and buffers, tied ones counted once.
        activations: The most that was allocated on top of them at any moment: intermediate values,
            the output, and the scratch space of the kernels.
    """

    parameters: int
    activations: int

    @property
    def peak(self) -> int:
        """Bytes in all."""
        return self.parameters + self.activations

    def __str__(self) -> str:
        return (
            f"{self.peak / 1e6:.1f} MB at the peak ({self.parameters / 1e6:.1f} MB parameters, "
            f"{self.activations / 1e6:.1f} MB activations)"
        )


def parameter_bytes(network: nn.Module) -> int:
    """Bytes of all parameters and buffers, tied ones counted once.

    Tensors that modules keep as plain attributes count as well: weights packed for a kernel.
    """
    kept = (value for module in network.modules() for value in vars(module).values())
    attributes = (value for value in kept if isinstance(value, Tensor))
    tensors = itertools.chain(network.parameters(), network.buffers(), attributes)
    unique = {id(tensor): tensor for tensor in tensors}
    return sum(tensor.numel() * tensor.element_size() for tensor in unique.values())


def peak_allocated(run: Callable[[], Any], device: torch.device) -> int:
    """The most bytes that were allocated at any moment of a call, on top of those before it.

    On CUDA the caching allocator keeps count; elsewhere every allocation is read from a trace of
    `torch.profiler`, which takes about a second when it is first used. Libraries that allocate by
    themselves are not seen.

    Args:
        run: What is called, once.
        device: Where it works.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        _ = run()  # held to the end, so that a freed output does not hide what came after it
    with TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    changes = [e for e in events if e.get("name") == "[memory]"]
    changes.sort(key=lambda event: float(event["ts"]))
    levels = itertools.accumulate(int(event["args"]["Bytes"]) for event in changes)
    return max(levels, default=0)
