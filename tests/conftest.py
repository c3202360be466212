"""Settings for all tests: one thread, Ctrl-C is heard, and random numbers are a test's own."""

from __future__ import annotations

import signal

import pytest
import torch

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a script


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
