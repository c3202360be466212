"""The states of all random number generators that a training draws from."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from rbpfx.training.task import Loader

_HOLDERS = ("", "sampler", "batch_sampler", "batch_sampler.sampler", "dataset")
"""Where a `DataLoader` may hold a generator of its own."""


def random_state(loader: Loader, device: torch.device) -> dict[str, Any]:
    """The states of the generators of torch, of a device, of Python, of numpy and of a loader."""
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "loader": [generator.get_state() for generator in _generators(loader)],
    }
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], loader: Loader, device: torch.device) -> None:
    """Put all generators where they were at `random_state`.

    Generators that the loader has got since then are left alone.
    """
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    for generator, its_state in zip(_generators(loader), state["loader"], strict=False):
        generator.set_state(its_state)
    if device.type != "cpu" and "device" in state:
        torch.get_device_module(device).set_rng_state(state["device"], device)


def _generators(loader: Loader) -> list[torch.Generator]:
    """The generators that a loader draws from besides the global ones, each once."""
    found: dict[int, torch.Generator] = {}
    for path in _HOLDERS:
        holder: Any = loader
        for name in filter(None, path.split(".")):
            holder = getattr(holder, name, None)
        generator = getattr(holder, "generator", None)
        if isinstance(generator, torch.Generator):
            found[id(generator)] = generator
    return list(found.values())


__all__ = ["random_state", "set_random_state"]
