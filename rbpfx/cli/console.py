"""What all commands have in common: their output, their errors, their log and their progress.

A command is a function that returns an `Answer`. Standard output gets that and nothing else;
whatever libraries and user code print while it works goes to standard error.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

import click
import torch
from tqdm.auto import tqdm

from rbpfx import bars
from rbpfx.errors import RbpfxError

FAILED, INTERRUPTED = 1, 130
"""Exit codes of a command that failed and of one that was interrupted; wrong usage is 2."""

T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """What a command prints.

    Attributes:
        text: For people.
        data: The same for programs, in plain JSON types.
    """

    text: str
    data: Any


@dataclass(frozen=True)
class Console:
    """How much a command says while it works.

    Attributes:
        quiet: Whether it says nothing.
    """

    quiet: bool = False

    def steps(self, items: Iterable[T], title: str, **options: Any) -> Iterator[T]:
        """Go through items with a bar, which shows itself if that takes long.

        Args:
            items: What to go through.
            title: What is going on.
            **options: Those of tqdm.
        """
        return bars.steps(items, title, visible=not self.quiet, **options)

    def stages(self, title: str, count: int) -> AbstractContextManager[Callable[[str], None]]:
        """A bar for a task in stages; call what this yields with the name of each as it begins.

        Args:
            title: What is going on.
            count: How many stages there are.
        """
        return bars.stages(title, count, visible=not self.quiet)


_COMMON = (
    click.option("--json", "as_json", is_flag=True, help="Print one JSON document."),
    click.option("-q", "--quiet", is_flag=True, help="No progress bars, no warnings."),
    click.option("-v", "--verbose", count=True, help="Say more on stderr; -vv still more."),
    click.option("--debug", is_flag=True, help="Show the Python traceback of an error."),
)


def reporting(function: Callable[..., Answer]) -> Callable[..., None]:
    """Make a function the body of a command: it is called with a `Console` and its options."""

    @wraps(function)
    def run(as_json: bool, quiet: bool, verbose: int, debug: bool, **options: Any) -> None:
        try:
            with _logging(quiet, verbose), redirect_stdout(sys.stderr):
                answer = function(Console(quiet), **options)
        except (RbpfxError, torch.OutOfMemoryError) as error:
            if debug:
                traceback.print_exc()
            tqdm.write(f"error: {_one_line(error)}", file=sys.stderr)
            raise click.exceptions.Exit(FAILED) from error
        except KeyboardInterrupt as error:
            tqdm.write("interrupted", file=sys.stderr)
            raise click.exceptions.Exit(INTERRUPTED) from error
        click.echo(json.dumps(answer.data, indent=2) if as_json else _printable(answer.text))

    command: Callable[..., None] = run
    for option in reversed(_COMMON):
        command = option(command)
    return command


def _printable(text: str) -> str:
    """The text with its control characters written out: parts of it may come from strangers."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def _one_line(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "the device is out of memory; lower --batch-size"
    return " ".join(str(error).split())


class _AboveBars(logging.Handler):
    """Writes records to stderr without tearing progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


@contextmanager
def _logging(quiet: bool, verbose: int) -> Iterator[None]:
    """Show what the loggers of rbpfx say, and with -v the warnings of all libraries."""
    level = logging.ERROR if quiet else logging.WARNING - 10 * min(verbose, 2)
    handler = _AboveBars()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    ours, others = logging.getLogger("rbpfx"), logging.getLogger("py.warnings")
    before = (ours.level, others.level, others.propagate)
    ours.setLevel(level)
    others.setLevel(logging.WARNING if verbose else logging.ERROR)
    others.propagate = False
    for logger in (ours, others):
        logger.addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for logger in (ours, others):
            logger.removeHandler(handler)
        ours.level, others.level, others.propagate = before


__all__ = ["FAILED", "INTERRUPTED", "Answer", "Console", "reporting"]
