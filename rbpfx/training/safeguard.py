"""The safeguard of a training: crashes, interruptions and numerical faults.

The state of a training is saved at milestones and at intervals, in memory, and on disk where
there are checkpoints. It is *good* once the next step has had a finite loss; only good states are
written, and a numerical fault sets the training back to the last one.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from rbpfx.checkpoints import Checkpoints, random_state, set_random_state
from rbpfx.checkpoints.encoding import Encoded, decode, encode
from rbpfx.errors import CheckpointError, DivergenceError, InputError
from rbpfx.training.engine import Losses, NumericalFault, Stepper
from rbpfx.training.faults import bad_batch, locate
from rbpfx.training.interruption import Interruption
from rbpfx.training.loop import still_finite
from rbpfx.training.stream import Stream
from rbpfx.training.task import Loader

logger = logging.getLogger(__name__)

EXPLOSION = 1000.0
"""An exploded loss, in units of the first one, or of 1 if that is smaller (ours): a cross-entropy
of 1000 nats takes weights that have left all bounds, while a network that loses everything to a
budget has that of guessing."""

SLOWER = 0.1
"""What learning rates are multiplied by after a fault (ours)."""


class _Saved(NamedTuple):
    step: int
    state: Encoded
    optional: bool = False
    """Whether it may be kept in memory alone."""


class Trained(Protocol):
    """A training whose whole state, but for optimisers and batches, can be taken and returned to.

    Attributes:
        step: Steps done.
    """

    step: int

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""

    def state_dict(self) -> dict[str, Any]:
        """The state: nested numbers, strings and tensors."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Return to a state."""


class Safeguard:
    """Carries out the steps of a training so that nothing of it is lost.

    Args:
        training: What is trained.
        stepper: Carries out its steps.
        loader: Its batches.
        place: The stage of an error now, and where that is, in words that follow a step.
        advice: What to do about a fault.
        checkpoints: Where to save; None for nowhere.
        interruption: Asks the training to stop.

    Attributes:
        stopped: Whether it was asked to stop, and has been saved.
    """

    def __init__(
        self,
        training: Trained,
        stepper: Stepper,
        loader: Loader,
        *,
        place: Callable[[], tuple[str, str]],
        advice: str,
        checkpoints: Checkpoints | None = None,
        interruption: Interruption | None = None,
    ) -> None:
        self.training = training
        self.stepper = stepper
        self.strategy = stepper.strategy
        self.stream = Stream(
            loader, stepper.settings.accumulate, stepper.task.device, checkpoints is not None
        )
        self.place = place
        self.advice = advice
        self.checkpoints = checkpoints
        self.interruption = interruption or Interruption()
        self.stopped = False
        self._setbacks = 0
        self._first_loss: float | None = None
        self._pending: _Saved | None = None
        self._group: list[Any] = []
        self._resume()
        self._saved = time.monotonic()
        self._good = self._taken()
        if training.step == 0:
            self._write(self._good)

    def step(self) -> Losses | None:
        """Carry out one step.

        Returns:
            Its loss; None if there was none to speak of: the training is back at its last good
            state, with lower learning rates, or was asked to stop.

        Raises:
            DivergenceError: A fault that a good state and lower learning rates do not help.
            InputError: What the stream and the stepper raise.
        """
        try:
            self._group = self.stream.take()
        except InputError:
            alone = self.strategy.processes == 1  # the others are carrying out the step
            if alone and self.interruption.requested:  # the loader's workers got the signal too
                self._stop()
                return None
            if alone:
                self._write(self._taken())
            raise
        try:
            losses = self.stepper.step(self._group)
            self._require_bounded(float(losses.data))
        except NumericalFault as fault:
            self._set_back(str(fault))
            return None
        if self._pending is not None:
            self._good, self._pending = self._pending, None
            self._write(self._good)
        return losses

    def passed(self, milestone: bool, minor: bool = False) -> None:
        """Hear that all that belongs to a step is done.

        A training that has finished with a network that has no finite loss is set back instead.

        Args:
            milestone: Whether to save the state in any case.
            minor: Whether to save it in memory in any case, and on disk if writing has taken
                little of the time so far.

        Raises:
            DivergenceError: A fault that a good state and lower learning rates do not help.
        """
        if self.training.finished:
            if self._still_finite():
                self._write(self._taken())
            else:
                self._set_back("the last step left a network whose loss is not a finite number")
            return
        stop, due = self._wishes()
        if stop:
            self._stop()
        elif milestone or due or minor:
            self._pending = self._taken()._replace(optional=not (milestone or due))

    def _still_finite(self) -> bool:
        finite = still_finite(self.stepper.model, self._group[-1], self.stepper.task)
        return all(self.strategy.gather(finite))

    def _wishes(self) -> tuple[bool, bool]:
        """Whether any process was asked to stop, and whether an interval has passed in one."""
        if self.checkpoints is None:
            return False, False
        due = time.monotonic() - self._saved >= self.checkpoints.interval
        wishes = torch.tensor([float(self.interruption.requested), float(due)], device="cpu")
        stop, due = (self.strategy.mean(wishes) > 0).tolist()
        return stop, due

    def _stop(self) -> None:
        self.stopped = True
        self._write(self._taken())
        if self.interruption.terminated:
            raise SystemExit(128 + signal.SIGTERM)

    def _taken(self) -> _Saved:
        """The state as it is now; in memory, what a fault is set back to will do."""
        state: dict[str, Any] = {
            "training": self.training.state_dict(),
            "stepper": self.stepper.state_dict(),
        }
        if self.checkpoints is None:
            return _Saved(self.training.step, encode(state, writable=False))
        place = {
            "stream": self.stream.state_dict(),
            "random": random_state(self.stream.loader, self.stream.device),
        }
        state["processes"] = self.strategy.gather(place)
        state["setbacks"], state["first loss"] = self._setbacks, self._first_loss
        return _Saved(self.training.step, encode(state))

    def _resume(self) -> None:
        """Go on from the last checkpoint, if there is one."""
        if self.checkpoints is None:
            return
        state = self.checkpoints.latest()
        if state is None:
            return
        try:
            self._return_to(state)
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"the checkpoint of step {state['training']['step']} of the "
                f"{self.checkpoints.stage} does not fit: {error}. The code of the model, an "
                "optimiser or a method has changed since, or the version of rbpfx or torch. Go on "
                "with those that wrote it, give another directory, or delete this one"
            ) from error
        self._setbacks, self._first_loss = state["setbacks"], state["first loss"]
        own = state["processes"][self.strategy.rank]
        if not self.training.finished:
            self.stream.load_state_dict(own["stream"])
        set_random_state(own["random"], self.stream.loader, self.stream.device)
        logger.info("resumed the %s at step %d", self.checkpoints.stage, self.training.step)

    def _return_to(self, state: dict[str, Any]) -> None:
        self.training.load_state_dict(state["training"])
        self.stepper.load_state_dict(state["stepper"])

    def _write(self, saved: _Saved) -> None:
        if self.checkpoints is not None and self.checkpoints.write(*saved):
            self._saved = time.monotonic()

    def _require_bounded(self, loss: float) -> None:
        if self._first_loss is None:
            self._first_loss = loss
        bound = EXPLOSION * max(1.0, abs(self._first_loss))
        if loss > bound:
            raise NumericalFault(f"the loss exploded: {loss:.3g} after {self._first_loss:.3g}")

    def _set_back(self, reason: str) -> None:
        """Return to the last good state and lower the learning rates; the second time, give up."""
        step = self.training.step + 1
        stage, place = self.place()
        bad = _first(self.strategy.gather(bad_batch(self._group)))
        found = locate(self.stepper.model, self._group[-1], self.stepper.task)
        cause = bad or _first(self.strategy.gather(found))
        self._return_to(decode(self._good.state))
        self._pending = None
        reason = f"{reason} at step {step}{place}" + (f": {cause}" if cause else "")
        if bad is None and self._setbacks == 0:
            back = f"back at step {self.training.step}, with {SLOWER:g} of the learning rates"
            logger.warning("%s; %s", reason, back)
            self._setbacks = 1
            self.stepper.slow_down(SLOWER)
            return
        again = f", and again with {SLOWER:g} of the learning rates" if self._setbacks else ""
        raise DivergenceError(
            f"{reason}{again}. The network is back at its last good state (error.model). "
            + ("Check what the loader yields." if bad else self.advice),
            stage=stage,
            step=step,
            model=self.stepper.model,
        )


def _first(found: list[str | None]) -> str | None:
    return next(filter(None, found), None)


__all__ = ["Safeguard", "Trained"]
