"""Bars that show themselves only where something takes long, even if its first step does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import Timer
from typing import Any, TypeVar

from tqdm.auto import tqdm

PATIENCE = 2.0
"""Seconds after which a bar appears (ours)."""

T = TypeVar("T")


def steps(items: Iterable[T], title: str, *, visible: bool = True, **options: Any) -> Iterator[T]:
    """Go through items with a bar.

    Args:
        items: What to go through.
        title: What is going on.
        visible: Whether to show anything.
        **options: Those of tqdm.
    """
    with _bar(items, visible, desc=title, **options) as bar:
        yield from bar


@contextmanager
def stages(title: str, count: int, *, visible: bool = True) -> Iterator[Callable[[str], None]]:
    """A bar for a task in stages; call what this yields with the name of each as it begins.

    Args:
        title: What is going on.
        count: How many stages there are.
        visible: Whether to show anything.
    """
    with _bar(None, visible, total=count, desc=title, bar_format="{desc} ({n}/{total})") as bar:

        def begin(stage: str) -> None:
            bar.set_description_str(f"{title}: {stage}", refresh=False)
            bar.update()

        yield begin


@contextmanager
def _bar(items: Any, visible: bool, **options: Any) -> Iterator[Any]:
    bar = tqdm(items, disable=not visible, leave=False, delay=PATIENCE, **options)
    timer = Timer(PATIENCE, bar.refresh)  # a first item that takes long must not hide the bar
    timer.daemon = True
    try:
        timer.start()
        with bar:
            yield bar
    finally:
        timer.cancel()


__all__ = ["PATIENCE", "stages", "steps"]
