"""What surrounds a call: modes of torch that must not reach into it, and random numbers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_KINDS = ("cpu", "cuda", "mps", "xpu")
_TURN = threading.RLock()


def autocasts(kind: str) -> bool:
    """Whether autocast is on for devices of a kind; never for those without autocast."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def autocasting() -> bool:
    """Whether autocast is on for any kind of device."""
    return any(map(autocasts, _KINDS))


@contextmanager
def usual_modes() -> Iterator[None]:
    """Leave inference mode, `torch.no_grad` and autocast meanwhile; also serves as a decorator.

    Tensors made in inference mode can never be trained, and autocast changes the dtypes that a
    graph records.
    """
    with torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:
        for kind in filter(autocasts, _KINDS):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """Let the random generators go on afterwards as if nothing had been drawn.

    There is one for all threads, so that threads take turns: they would draw each other's numbers.

    Args:
        device: Whose generator is kept, beside the CPU's.
    """
    with _TURN, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed all draws inside; the generators go on afterwards as if nothing had been drawn.

    Args:
        seed: The seed.
        device: Whose generator is seeded, beside the CPU's.
    """
    with generators_kept(device):
        # Not torch.manual_seed, which seeds the generators of all other devices as well.
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


__all__ = ["autocasting", "autocasts", "generators_kept", "seeded", "usual_modes"]
