"""The batches of a training, epoch after epoch, from a place that can be returned to."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch

from rbpfx.checkpoints import fingerprint, random_state, set_random_state
from rbpfx.errors import InputError
from rbpfx.training.task import Loader

logger = logging.getLogger(__name__)


class Stream:
    """Groups of batches of a loader, which is gone through as often as needed.

    Its state says where in the epoch it is. A loader that has `state_dict` and `load_state_dict`
    (as torchdata's `StatefulDataLoader`) is asked to go there itself. Of any other, the random
    numbers of the epoch's start are restored and the batches up to there passed over: the same
    batches come again if the loader draws from torch, Python or numpy only, or does not draw.

    Args:
        loader: Training batches.
        size: Batches per group; an epoch may end with a group of fewer.
        device: Of the training, whose random numbers count too.
        resumable: Whether its state will be asked for: random numbers are noted for it.

    Attributes:
        epoch: The number of the epoch, from 0. Samplers with a `set_epoch` hear of it.
        taken: Batches taken from this epoch.
    """

    def __init__(
        self,
        loader: Loader,
        size: int = 1,
        device: torch.device | str = "cpu",
        resumable: bool = True,
    ) -> None:
        self.loader = loader
        self.resumable = resumable
        self.size = size
        self.device = torch.device(device)
        self.epoch = -1
        self.taken = 0
        self._batches: Iterator[Any] | None = None
        self._group: list[Any] = []
        # Random numbers before the epoch and before the last group.
        self._start: dict[str, Any] = {}
        self._before: dict[str, Any] = {}

    def take(self) -> list[Any]:
        """The next group.

        Raises:
            InputError: The loader yields nothing, cannot be gone through twice, or raises.
        """
        for _ in range(2):
            if self._batches is None:
                self._begin(self.epoch + 1)
            assert self._batches is not None
            self._before = self._random_state()
            try:
                group = list(islice(self._batches, self.size))
            except Exception as error:
                raise InputError(
                    f"the loader raised {type(error).__name__} after {self.taken} batches of epoch "
                    f"{self.epoch}: {error}"
                ) from error
            if group:
                self.taken += len(group)
                self._group = group
                return group
            if not self.taken:
                break
            self._batches = None
        raise InputError(
            "the loader yields no batch"
            if self.epoch == 0
            else "the loader can be gone through only once; pass a DataLoader or a list"
        )

    def state_dict(self) -> dict[str, Any]:
        """The place; of a stateful loader its state."""
        return {
            "epoch": self.epoch,
            "taken": self.taken,
            "start": self._start,
            "before": self._before,
            "group": (len(self._group), fingerprint(self._group)),
            "loader": self._loader_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a place; the generators are left as the loader leaves them on its way there.

        If the loader does not yield the same batches again, the epoch starts anew, with a warning.
        """
        if state["epoch"] < 0:
            return
        if state["loader"] is not None:
            self.loader.load_state_dict(state["loader"])  # type: ignore[attr-defined]
            self._begin(state["epoch"])
            self.taken = state["taken"]
            return
        set_random_state(state["start"], self.loader, self.device)
        self._begin(state["epoch"])
        assert self._batches is not None
        size, last = state["group"]
        for _ in islice(self._batches, state["taken"] - size):
            self.taken += 1
        set_random_state(state["before"], self.loader, self.device)
        self._group = list(islice(self._batches, size))
        self.taken += len(self._group)
        if self.taken < state["taken"] or fingerprint(self._group) != last:
            logger.warning(
                "the loader does not yield the batches again that it yielded before the "
                "interruption: epoch %d begins anew, and the result will differ from that of an "
                "uninterrupted run. A loader whose order and augmentation follow the seeds of "
                "torch, numpy and Python goes on where it was.",
                self.epoch,
            )
            self.epoch, self.taken, self._batches = state["epoch"] - 1, 0, None

    def _random_state(self) -> dict[str, Any]:
        return random_state(self.loader, self.device) if self.resumable else {}

    def _loader_state(self) -> Any:
        """What a stateful loader says of its place; None if it is none."""
        if self._batches is None or not hasattr(self.loader, "load_state_dict"):
            return None
        try:
            return self.loader.state_dict()  # type: ignore[attr-defined]
        except (AttributeError, NotImplementedError):
            return None  # a wrapper that has the methods for loaders that have them

    def _begin(self, epoch: int) -> None:
        self._start = self._random_state()
        self.epoch, self.taken, self._group = epoch, 0, []
        for name in ("sampler", "batch_sampler"):
            set_epoch = getattr(getattr(self.loader, name, None), "set_epoch", None)
            if callable(set_epoch):
                set_epoch(epoch)
        self._batches = iter(self.loader)


__all__ = ["Stream"]
