"""What a benchmark leaves behind: rows in a JSON file, and the machine they were measured on.

A benchmark may be stopped at any time and started again: rows that are done are not run again.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torchvision
from tabulate import tabulate

import rbpfx
from rbpfx.circumstances import processor
from rbpfx.files import written_aside


def environment() -> dict[str, Any]:
    """The machine, the versions and the date: what a figure is worth little without."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "rbpfx": rbpfx.__version__,
    }


class Record:
    """Rows of results by key, in a JSON file that is complete at every moment.

    The file holds `environments`, a list, and `rows`, each with the index of the environment it
    was measured in. One process writes a file at a time.

    Example:
        >>> record = Record(Path("results/lenet.json"))  # doctest: +SKIP
        >>> for seed in range(3):  # doctest: +SKIP
        ...     if not record.done(f"lenet5/{seed}"):
        ...         record.add(f"lenet5/{seed}", {"seed": seed, "error": measure(seed)})
        >>> print(record.table())  # doctest: +SKIP
    """

    def __init__(self, path: str | Path) -> None:
        """Opens the record, with the rows that the file already has.

        Args:
            path: The JSON file; written by the first `add`.
        """
        self.path = Path(path)
        content = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.environments: list[dict[str, Any]] = content.get("environments", [])
        self.rows: dict[str, dict[str, Any]] = content.get("rows", {})
        self._environment: int | None = None

    def done(self, key: str) -> bool:
        """Whether the row is there."""
        return key in self.rows

    def add(self, key: str, row: Mapping[str, Any]) -> None:
        """Adds a row, or replaces the one of that key, and writes the file.

        Args:
            key: What identifies the row when the benchmark is started again.
            row: Values that JSON can hold, or tensors and arrays.
        """
        if self._environment is None:
            self._environment = len(self.environments)
            self.environments.append(environment())
        rows = self.rows | {key: {**row, "environment": self._environment}}
        content = {"environments": self.environments, "rows": rows}
        write_aside(self.path, json.dumps(content, indent=1, default=_as_list) + "\n")
        self.rows = rows

    def table(self, columns: Sequence[str] | None = None) -> str:
        """The rows as a table in GitHub's format.

        Args:
            columns: Names of the values to show; all of the first row by default.
        """
        if columns is None:
            first = next(iter(self.rows.values()), {})
            columns = [name for name in first if name != "environment"]
        cells = [[row.get(name) for name in columns] for row in self.rows.values()]
        return tabulate(cells, headers=columns, tablefmt="github")


def write_aside(path: Path, text: str) -> None:
    """Writes a text so that a reader meets the old file or the new, never a part of it."""
    with written_aside(path) as aside:
        aside.write_text(text)


def _as_list(value: Any) -> Any:
    """What `json` asks about values it does not know: tensors and NumPy's arrays and scalars."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a row of a record cannot hold a {type(value).__name__}: {value!r}")


class Deadline:
    """A box of time: a benchmark looks at it between two pieces of work.

    Attributes:
        seconds: The size of the box; infinite if no limit was given.
    """

    def __init__(self, seconds: float | None = None) -> None:
        """Starts the clock.

        Args:
            seconds: The size of the box; None for no limit.
        """
        self.seconds = float("inf") if seconds is None else seconds
        self._start = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    @property
    def remaining(self) -> float:
        """Seconds left, 0 at least."""
        return max(0.0, self.seconds - self.elapsed)

    @property
    def expired(self) -> bool:
        """Whether the time is over."""
        return self.remaining == 0.0
