"""`rbpfx demo`: everything in three minutes, on embedded data."""

from __future__ import annotations

import click

from rbpfx import demo as demonstration
from rbpfx.cli import options
from rbpfx.cli.console import Answer, Console, reporting

HELP = """Train a small ResNet on handwritten digits, prune it, verify it.

The digits are scikit-learn's embedded ones; nothing is downloaded. Takes under three minutes on
two cores.

\b
Examples:
  rbpfx demo
  rbpfx demo --macs 0.2"""


@click.command(help=HELP, short_help="See it all in three minutes, on embedded data.")
@click.option(
    "--macs",
    type=click.FloatRange(0, min_open=True),
    help="Share of the multiply-accumulates to keep; by default the data decide.",
)
@options.seed
@reporting
def demo(console: Console, *, macs: float | None, seed: int) -> Answer:
    """Run the demo."""
    report = demonstration.run(macs, seed, progress=not console.quiet).report
    return Answer(str(report), report.to_dict())


__all__ = ["demo"]
