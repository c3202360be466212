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
from rbpfx.files import flush, sha256
from rbpfx.saving.schema import MAX_PLAN_BYTES, PLAN, PROGRAM, WEIGHTS, SavedPlan, Stamp

_NEW = ".new"

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
                flush(_aside(directory, name))
            stamps = {name: _stamp(_aside(directory, name)) for name in data}
            _aside(directory, PLAN).write_text(plan(stamps).to_json(), encoding="utf-8")
            flush(_aside(directory, PLAN))
        except BaseException:
            _discard(directory)
            raise
        _take_places(directory, data)
    except OSError as error:
        raise SaveError(f"the network cannot be saved in {str(directory)!r}: {error}") from error


def read_plan(directory: Path) -> SavedPlan:
    """The plan of a saved network; its files are checked when they are read.

    Raises:
        LoadError: There is none, or it is damaged.
    """
    return _interrupted(directory) or _read_plan(directory / PLAN)


def read_file(directory: Path, plan: SavedPlan, name: str, most: int | None = None) -> bytes:
    """The content of a file of a saved network, as its plan knows it.

    Args:
        directory: Where it was saved.
        plan: Its plan.
        name: Name of the file, one of `plan.files`.
        most: Most bytes that are read, if there is a limit.

    Raises:
        LoadError: It is missing, truncated, another one or larger.
    """
    stamp = plan.files[name]
    if most is not None and stamp.size > most:
        raise LoadError(
            f"{name} in {str(directory)!r} has {stamp.size} bytes, and what the plan leads to "
            f"takes {most} at most: the two do not belong together. Save the network again"
        )
    for path in (directory / name, _aside(directory, name)):
        try:
            if _has_size(path, stamp.size):
                with path.open("rb") as file:
                    content = file.read(stamp.size)
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
        if not path.is_file():  # nor a pipe, which would never end
            raise LoadError(f"there is no saved network in {str(path.parent)!r}: no {path.name}")
        with path.open("rb") as file:
            return SavedPlan.from_json(file.read(MAX_PLAN_BYTES + 1))
    except (OSError, ValueError) as error:
        raise LoadError(f"{path.name} cannot be read: {error}") from error


def _settle(directory: Path) -> None:
    """Complete a save that was interrupted while files took their places, or discard it."""
    plan = _interrupted(directory)
    if plan is not None:
        _take_places(directory, plan.files)
    _discard(directory)


def _interrupted(directory: Path) -> SavedPlan | None:
    """The plan of a save that was interrupted while files took their places, if one was."""
    new = _aside(directory, PLAN)
    if os.path.exists(new) and _complete(directory, directory / PLAN) is None:
        return _complete(directory, new)
    return None


def _complete(directory: Path, plan_file: Path) -> SavedPlan | None:
    """A plan, if all of its files are there."""
    try:
        plan = _read_plan(plan_file)
        for name, stamp in plan.files.items():
            places = (directory / name, _aside(directory, name))
            if not any(_has_size(path, stamp.size) and _stamp(path) == stamp for path in places):
                return None
    except (LoadError, OSError):
        return None
    return plan


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


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
    return Stamp(sha256(path), path.stat().st_size)


__all__ = ["publish", "read_file", "read_plan"]
