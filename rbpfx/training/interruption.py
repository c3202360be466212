"""Ctrl-C: once to stop at the next step, twice to stop now."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)


class Interruption:
    """Whether a training was asked to stop.

    Attributes:
        requested: It was.
    """

    def __init__(self) -> None:
        self.requested = False


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Turn the first SIGINT inside into a request to stop; the second is a KeyboardInterrupt.

    Outside of the main thread, which alone may listen to signals, nothing is ever requested.
    Processes that are forked inside (workers of a loader) do not listen: their parent decides.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    owner = os.getpid()

    def listen(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            return
        if interruption.requested:
            raise KeyboardInterrupt
        interruption.requested = True
        logger.warning("stopping at the next step; Ctrl-C again to stop now")

    before = signal.signal(signal.SIGINT, listen)
    try:
        yield interruption
    finally:
        signal.signal(signal.SIGINT, before)


__all__ = ["Interruption", "interruptible"]
