"""Where a network lies."""

from __future__ import annotations

import torch
from torch import nn


def device_of(network: nn.Module) -> torch.device:
    """The device of its first parameter; the CPU if it has none."""
    return next((p.device for p in network.parameters()), torch.device("cpu"))
