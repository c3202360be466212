"""Ctrl-C: once to stop at the next step, twice to stop now; and SIGTERM, to save and exit."""

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
        terminated: By SIGTERM, as schedulers of clusters send it before they kill.
    """

    def __init__(self) -> None:
        self.requested = False
        self.terminated = False


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Turn SIGTERM and the first SIGINT inside into requests to stop; the second is as usual.

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
        if number == signal.SIGTERM:
            interruption.terminated = True
        elif interruption.requested:
            raise KeyboardInterrupt
        else:
            logger.warning("stopping at the next step; Ctrl-C again to stop now")
        interruption.requested = True

    before = {number: signal.signal(number, listen) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


__all__ = ["Interruption", "interruptible"]
