"""The progress bar: where training is, what is open, how accurate the network is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm

from rbpfx.bars import PATIENCE
from rbpfx.training.record import Curves
from rbpfx.training.recursion import Progress
from rbpfx.training.task import Loader

EVALUATIONS = 4
"""How often the accuracy shown is measured anew in one training phase."""


def patient(loader: Loader, title: str, visible: bool) -> Loader:
    """The loader, with a bar if a pass over it takes longer than `PATIENCE`.

    Args:
        loader: Batches.
        title: What they are gone through for.
        visible: Whether to show anything; if not, this is the loader itself.
    """
    if not visible:
        return loader
    bar: tqdm[Any] = tqdm(loader, title, leave=False, delay=PATIENCE, dynamic_ncols=True)
    return bar


class Bar:
    """A progress bar for one training phase; as a context manager it closes itself.

    Args:
        title: What is going on.
        visible: Whether to show anything; if not, nothing is evaluated either.
        evaluate: Accuracy of the network in training, or None if it is not known; None to show
            none.
        curves: Where accuracies are written down.
    """

    def __init__(
        self,
        title: str,
        visible: bool,
        evaluate: Callable[[], float | None] | None = None,
        curves: Curves | None = None,
    ) -> None:
        self.title = title
        self.visible = visible
        self.evaluate = evaluate
        self.curves = curves or Curves()
        self.evaluations = 0
        self.accuracy: float | None = None
        self._bar: tqdm[Any] | None = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def noise(self, progress: Progress) -> None:
        """Show a step of noise training: the group at the front, gates open, expected cost."""
        self._show(
            progress.step,
            progress.steps,
            group=progress.group,
            open=progress.open_gates,
            cost=f"{progress.cost:.0%}",
            loss=f"{progress.loss:.3f}",
        )

    def steps(self, step: int, steps: int, loss: float) -> None:
        """Show a step of any other training."""
        self._show(step, steps, loss=f"{loss:.3f}")

    def _show(self, step: int, steps: int, **shown: Any) -> None:
        if not self.visible:
            return
        if self.evaluate is not None and step * EVALUATIONS >= (self.evaluations + 1) * steps:
            self.evaluations += 1
            self.accuracy = self.evaluate()
            if self.accuracy is not None:
                self.curves.point(step, accuracy=self.accuracy)
        if self.accuracy is not None:
            shown["accuracy"] = f"{self.accuracy:.2%}"
        if self._bar is None:  # the first step is a later one if the training was resumed
            self._bar = tqdm(
                desc=self.title, total=steps, initial=step - 1, unit="step", dynamic_ncols=True
            )
        self._bar.total = steps
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(step - self._bar.n)
