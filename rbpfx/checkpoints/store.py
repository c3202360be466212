"""A directory of checkpoints: complete or not there, checked, the last two of every stage kept.

One checkpoint is one safetensors file, whose header holds the state that is no tensor as JSON. It
is written aside, flushed and renamed; its name ends with its checksum, so that a damaged one is
known and the one before it is taken.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import IO, Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rbpfx.checkpoints.encoding import Encoded, decode
from rbpfx.errors import CheckpointError
from rbpfx.files import ASIDE, flush, sha256
from rbpfx.training.strategy import Strategy

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

STAGES = ("noise", "cut", "fine-tuning")
"""What checkpoints are of, in order: a new one makes those of later stages void."""
KEPT = 2
"""Checkpoints of a stage that are kept."""
SHARE = 0.05
"""Of the time since the store was opened: less than this goes into checkpoints that may be left out
(ours)."""
FORMAT = 1
LOCK = ".lock"
CHECKSUM = 16
"""Hexadecimal digits of the checksum in a file's name."""

_DAMAGES = (OSError, SafetensorError, ValueError, KeyError, TypeError)
_NAME = re.compile(
    rf"(?P<stage>[a-z-]+)-(?P<step>\d+)\.(?P<checksum>[0-9a-f]{{{CHECKSUM}}})\.safetensors"
)


class Store:
    """The checkpoints in a directory, of one process at a time.

    Args:
        directory: Made if it does not exist.
        identity: What the checkpoints belong to, in words; checked when one is read.

    Raises:
        CheckpointError: The directory cannot be made, or another process works with it.
    """

    def __init__(self, directory: str | os.PathLike[str], identity: dict[str, str]) -> None:
        self.directory = Path(directory)
        self.identity = identity
        self._opened, self._seconds = time.monotonic(), 0.0
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.directory)
            for leftover in self.directory.glob(f"{ASIDE}*"):
                shutil.rmtree(leftover, ignore_errors=True)
        except OSError as error:
            raise CheckpointError(
                f"checkpoints cannot be written to {str(self.directory)!r}: {error}"
            ) from error

    def close(self) -> None:
        """Let other processes work with the directory."""
        self._lock.close()

    def write(self, stage: str, step: int, state: Encoded) -> None:
        """Write a checkpoint; older ones of the stage but one go, and all of later stages.

        Args:
            stage: One of `STAGES`.
            step: How far the stage is; of two checkpoints, the one with more is the later.
            state: From `encode`.

        Raises:
            CheckpointError: It could not be written, for example as the disk is full; the earlier
                ones are still there.
        """
        started = time.monotonic()
        header = {"format": FORMAT, "identity": self.identity, "state": state.content}
        try:
            with tempfile.TemporaryDirectory(dir=self.directory, prefix=ASIDE) as folder:
                aside = Path(folder) / "checkpoint"
                save_file(state.tensors, aside, metadata={"rbpfx": json.dumps(header)})
                flush(aside)
                name = f"{stage}-{step:09d}.{sha256(aside)[:CHECKSUM]}.safetensors"
                os.replace(aside, self.directory / name)
            flush(self.directory)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"the checkpoint of step {step} of the {stage} cannot be written to "
                f"{str(self.directory)!r}: {error}"
            ) from error
        later = STAGES[STAGES.index(stage) + 1 :]
        void = [path for name in later for path in self._files(name)]
        for path in [*self._files(stage)[KEPT:], *void]:
            path.unlink(missing_ok=True)
        self._seconds += time.monotonic() - started

    @property
    def has_time(self) -> bool:
        """Whether writing has taken little of the time so far."""
        return self._seconds < SHARE * (time.monotonic() - self._opened)

    def latest(self, stage: str) -> Any:
        """The state in the last checkpoint of a stage that is not damaged; None if there is none.

        Raises:
            CheckpointError: It belongs to something else.
        """
        for path in self._files(stage):
            try:
                header, tensors = _read(path)
                self._require(header, path)
                return decode(Encoded(header["state"], tensors))
            except _DAMAGES as error:
                logger.warning("%s is damaged: %r; the one before is taken", path.name, error)
        return None

    @property
    def empty(self) -> bool:
        """Whether there is no checkpoint of any stage."""
        return not any(self._files(stage) for stage in STAGES)

    def _files(self, stage: str) -> list[Path]:
        """The files of a stage, the last one first."""
        found = []
        for path in self.directory.iterdir():
            match = _NAME.fullmatch(path.name)
            if match and match["stage"] == stage:
                found.append((int(match["step"]), path.stat().st_mtime_ns, path))
        return [path for *_, path in sorted(found, reverse=True)]

    def _require(self, header: dict[str, Any], path: Path) -> None:
        if header["format"] != FORMAT:
            raise CheckpointError(
                f"{path.name} has format {header['format']}, and this rbpfx reads {FORMAT}. Go on "
                "with the version that wrote it, or give another directory"
            )
        identity = header["identity"]
        changes = [
            f"{name} was {identity.get(name)} and is {self.identity.get(name)}"
            for name in {**self.identity, **identity}
            if self.identity.get(name) != identity.get(name)
        ]
        if changes:
            raise CheckpointError(
                f"the checkpoints in {str(path.parent)!r} are of another call: "
                f"{', '.join(changes)}. Repeat that call, give another directory, or delete this "
                "one"
            )


class Checkpoints(NamedTuple):
    """The checkpoints of one stage.

    Attributes:
        store: The directory, in the first process; None in the others.
        stage: One of `STAGES`.
        interval: Seconds between two of them, milestones aside.
        strategy: The processes of the training, which write and read at the same time.
    """

    store: Store | None
    stage: str
    interval: float
    strategy: Strategy

    def write(self, step: int, state: Encoded, optional: bool = False) -> bool:
        """Write a checkpoint; if that fails, training goes on, as there are older ones.

        Args:
            step: How far the stage is.
            state: From `encode`.
            optional: Whether to leave it out if writing has taken much of the time so far.

        Returns:
            Whether it was not left out.

        Raises:
            CheckpointError: It is the first one in the directory. Better now than after hours.
        """

        def work() -> bool:
            assert self.store is not None
            if optional and not self.store.has_time:
                return False
            try:
                self.store.write(self.stage, step, state)
            except CheckpointError as error:
                if self.store.empty:
                    raise
                logger.warning("%s; training goes on", error)
            return True

        return self.strategy.first(work)

    def latest(self) -> Any:
        """The last state that is not damaged; None if there is none.

        Raises:
            CheckpointError: It belongs to something else.
        """

        def work() -> Any:
            assert self.store is not None
            return self.store.latest(self.stage)

        return self.strategy.first(work)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors of a checkpoint."""
    match = _NAME.fullmatch(path.name)
    if match is None or sha256(path)[:CHECKSUM] != match["checksum"]:
        raise ValueError("its content is not what was written")
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return json.loads(file.metadata()["rbpfx"]), tensors


def _locked(directory: Path) -> IO[str]:
    """A lock on a directory, which ends with the process if it is not closed before."""
    file = (directory / LOCK).open("w")
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise CheckpointError(
                f"another process is working with the checkpoints in {str(directory)!r}; wait for "
                "it, or give another directory"
            ) from error
        except OSError:  # a file system without locks
            pass
    return file


__all__ = ["KEPT", "STAGES", "Checkpoints", "Store"]
