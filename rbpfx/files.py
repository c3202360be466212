"""Files that are complete or not there."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ASIDE = ".aside-"
"""How the names of folders begin in which files are written aside."""
_CHUNK = 2**20


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Where to write a file; it takes the place of `path` if nothing is raised.

    Args:
        path: The file to be; its folder is made if it does not exist.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=ASIDE) as folder:
        aside = Path(folder) / path.name
        yield aside
        os.replace(aside, path)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, have reached the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The checksum of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


__all__ = ["ASIDE", "flush", "sha256", "written_aside"]
