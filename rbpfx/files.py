"""Files that are complete or not there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Where to write a file; it takes the place of `path` if nothing is raised.

    Args:
        path: The file to be; its folder is made if it does not exist.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".aside-") as folder:
        aside = Path(folder) / path.name
        yield aside
        os.replace(aside, path)


__all__ = ["written_aside"]
