"""`rbpfx report`: the figures of a saved network."""

from __future__ import annotations

from pathlib import Path

import click

from rbpfx.cli import options
from rbpfx.cli.console import Answer, Console, reporting
from rbpfx.errors import SaveError
from rbpfx.report import Report
from rbpfx.saving.files import read_plan

HELP = """Show what pruning did to the network that is saved in DIR.

\b
Examples:
  rbpfx report pruned
  rbpfx report pruned --json
  rbpfx report pruned --write report.html"""


@click.command(help=HELP, short_help="What pruning did to a saved network.")
@options.directory
@click.option(
    "--write",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write it too: a page (.html), or a picture (.png, .svg, .pdf; needs matplotlib).",
)
@reporting
def report(console: Console, *, directory: Path, write: Path | None) -> Answer:
    """Show the report."""
    plan = read_plan(directory)
    origin = f"{directory}: {plan.library or plan.original.model}, pruned by rbpfx {plan.rbpfx}"
    found = Report.from_dict(dict(plan.report))
    if write is not None:
        try:
            found.write(write)
        except OSError as error:
            raise SaveError(f"{str(write)!r} cannot be written: {error.strerror}") from error
    return Answer(f"{origin}\n\n{found}", dict(plan.report))


__all__ = ["report"]
