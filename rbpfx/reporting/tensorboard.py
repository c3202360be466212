"""Training and its result for TensorBoard."""

from __future__ import annotations

import os

import numpy as np

from rbpfx.errors import RbpfxError
from rbpfx.report import Report
from rbpfx.training.record import BINS
from rbpfx.training.recursion import Progress


class TensorBoardLogger:
    """Writes what happens in `prune` for TensorBoard, step by step.

    Args:
        log_dir: Where `tensorboard --logdir` will look.

    Raises:
        RbpfxError: tensorboard is not installed.

    Examples:
        >>> with TensorBoardLogger("runs/resnet18") as logger:  # doctest: +SKIP
        ...     result = rbpfx.prune(model, loader, callback=logger)
        ...     logger.report(result.report)
    """

    def __init__(self, log_dir: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise RbpfxError(
                "TensorBoardLogger needs tensorboard: pip install tensorboard"
            ) from error
        self.writer = SummaryWriter(os.fspath(log_dir))

    def __enter__(self) -> TensorBoardLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, progress: Progress) -> None:
        """Write a step; what `prune(callback=...)` calls."""
        shown = {"loss": progress.loss}
        if progress.phase == "noise":
            shown |= {
                "bound": progress.bound,
                "strength": progress.strength,
                "cost": progress.cost,
                "open_gates": progress.open_gates,
                "hardened": progress.hardened,
            }
        for name, value in shown.items():
            self.writer.add_scalar(f"{progress.phase}/{name}", value, progress.step)

    def report(self, report: Report) -> None:
        """Write a report: accuracies, widths and the histograms of the gates over time."""
        for phase, series in report.curves.items():
            for step, accuracy in series.get("accuracy", []):
                self.writer.add_scalar(f"{phase}/{report.metric}", accuracy, step)
        for name, moments in report.gates.counts.items():
            for step, counts in zip(report.gates.steps, moments, strict=True):
                self._histogram(f"gates/{name}", counts, step)
        for name, (before, after) in report.widths.items():
            self.writer.add_scalar(f"width/{name}", after / before)
        self.writer.add_text("report/table", "".join(f"    {x}\n" for x in str(report).split("\n")))
        self.writer.flush()

    def close(self) -> None:
        """Write what is left and close the file."""
        self.writer.close()

    def _histogram(self, tag: str, counts: list[int], step: int) -> None:
        """A histogram of openness from counts; its sums are those of the middles of the bins."""
        limits = (np.arange(BINS) + 1) / BINS
        middles = limits - 0.5 / BINS
        self.writer.add_histogram_raw(
            tag,
            min=0.0,
            max=1.0,
            num=sum(counts),
            sum=float(middles @ counts),
            sum_squares=float(middles**2 @ counts),
            bucket_limits=limits.tolist(),
            bucket_counts=counts,
            global_step=step,
        )


__all__ = ["TensorBoardLogger"]
