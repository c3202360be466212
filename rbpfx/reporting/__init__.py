"""Reports to look at: one page for a browser, charts on matplotlib axes, TensorBoard."""

from rbpfx.reporting.page import render_html, render_summary
from rbpfx.reporting.plots import (
    plot_coupling,
    plot_gates,
    plot_history,
    plot_widths,
    render_picture,
)
from rbpfx.reporting.tensorboard import TensorBoardLogger

__all__ = [
    "TensorBoardLogger",
    "plot_coupling",
    "plot_gates",
    "plot_history",
    "plot_widths",
    "render_html",
    "render_picture",
    "render_summary",
]
