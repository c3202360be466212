"""Checkpoints: the state of a training on disk, so that nothing is lost when a process dies."""

from rbpfx.checkpoints.fingerprint import fingerprint
from rbpfx.checkpoints.randomness import random_state, set_random_state
from rbpfx.checkpoints.store import Checkpoints, Store

__all__ = ["Checkpoints", "Store", "fingerprint", "random_state", "set_random_state"]
