"""The files of a saved network: written aside, then renamed, so that no crash leaves a mixture.

New files get the suffix `.new`. The data take their places first, plan.json last. Whenever this is
interrupted, either the old plan.json still fits the old data, or `plan.json.new` fits the new data
wherever they are: a reader takes the first plan whose files are all there.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from rbpfx.errors import LoadError, SaveError
from rbpfx.saving.schema import MAX_PLAN_BYTES, PLAN, PROGRAM, WEIGHTS, SavedPlan, Stamp

_NEW = ".new"
_CHUNK = 2**20

Write = Callable[[Path], object]


def publish(
    directory: Path, data: Mapping[str, Write], plan: Callable[[dict[str, Stamp]], SavedPlan]
) -> None:
    """Write a saved network; an older one in the directory stays until the new one is complete.

    Args:
        directory: Where to write; other files in it are left alone.
        data: File name -> what writes it to a path.
        plan: Makes the plan from the stamps of the files.

    Raises:
        SaveError: The directory cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _settle(directory)
        try:
            for name, write in data.items():
                write(_aside(directory, name))
                _flush(_aside(directory, name))
            stamps = {name: _stamp(_aside(directory, name)) for name in data}
            _aside(directory, PLAN).write_text(plan(stamps).to_json(), encoding="utf-8")
            _flush(_aside(directory, PLAN))
        except BaseException:
            _discard(directory)
            raise
        _take_places(directory, data)
    except OSError as error:
        raise SaveError(f"the network cannot be saved in {str(directory)!r}: {error}") from error


def read(directory: Path) -> tuple[SavedPlan, bytes]:
    """The plan and the weights of a saved network.

    Raises:
        LoadError: There is none, or it is damaged.
    """
    refusals = []
    for plan_file in (directory / PLAN, _aside(directory, PLAN)):
        try:
            plan = _read_plan(plan_file)
            return plan, read_file(directory, plan, WEIGHTS)
        except LoadError as error:
            refusals.append(error)
    raise refusals[0]


def read_file(directory: Path, plan: SavedPlan, name: str) -> bytes:
    """The content of a file of a saved network, as its plan knows it.

    Raises:
        LoadError: It is missing, truncated or another one.
    """
    stamp = plan.files[name]
    for path in (directory / name, _aside(directory, name)):
        try:
            if path.is_file() and path.stat().st_size == stamp.size:
                content = path.read_bytes()
                if hashlib.sha256(content).hexdigest() == stamp.sha256:
                    return content
        except (OSError, MemoryError) as error:
            raise LoadError(f"{name} cannot be read: {error}") from error
    raise LoadError(
        f"{name} in {str(directory)!r} is missing, truncated or changed: it is not the file of "
        f"{stamp.size} bytes that plan.json was written with. Save the network again"
    )


def _read_plan(path: Path) -> SavedPlan:
    try:
        if not path.is_file():
            raise LoadError(f"there is no saved network in {str(path.parent)!r}: no {path.name}")
        with path.open("rb") as file:
            return SavedPlan.from_json(file.read(MAX_PLAN_BYTES + 1))
    except (OSError, ValueError) as error:
        raise LoadError(f"{path.name} cannot be read: {error}") from error


def _settle(directory: Path) -> None:
    """Complete a save that was interrupted while files took their places, or discard it."""
    if _aside(directory, PLAN).exists() and not _is_complete(directory, directory / PLAN):
        new = _aside(directory, PLAN)
        if _is_complete(directory, new):
            _take_places(directory, _read_plan(new).files)
    _discard(directory)


def _is_complete(directory: Path, plan_file: Path) -> bool:
    """Whether all files of a plan are there."""
    try:
        plan = _read_plan(plan_file)
        for name in plan.files:
            read_file(directory, plan, name)
    except LoadError:
        return False
    return True


def _take_places(directory: Path, data: Mapping[str, object]) -> None:
    try:
        stale = _read_plan(directory / PLAN).files.keys() - data.keys()
    except LoadError:
        stale = set()
    for name in (*data, PLAN):
        if _aside(directory, name).exists():
            os.replace(_aside(directory, name), directory / name)
    for name in stale:
        (directory / name).unlink(missing_ok=True)


def _discard(directory: Path) -> None:
    for name in (WEIGHTS, PROGRAM, PLAN):
        _aside(directory, name).unlink(missing_ok=True)


def _aside(directory: Path, name: str) -> Path:
    return directory / f"{name}{_NEW}"


def _stamp(path: Path) -> Stamp:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return Stamp(digest.hexdigest(), path.stat().st_size)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


__all__ = ["publish", "read", "read_file"]
