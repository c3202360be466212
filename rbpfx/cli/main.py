"""The group of commands, and the entry point with its exit codes."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

import rbpfx
from rbpfx.cli.apply import apply
from rbpfx.cli.bench import bench
from rbpfx.cli.completion import completion
from rbpfx.cli.console import INTERRUPTED
from rbpfx.cli.demo import demo
from rbpfx.cli.export import export
from rbpfx.cli.inspect import inspect
from rbpfx.cli.prune import prune
from rbpfx.cli.report import report

HELP = """Make trained PyTorch networks smaller and faster.

\b
Try it:
  rbpfx demo
  rbpfx inspect torchvision:resnet18
  rbpfx prune torchvision:resnet18 --weights DEFAULT --data imagefolder:photos \\
      --macs 0.5 --out pruned
  rbpfx report pruned
  rbpfx bench pruned
  rbpfx export pruned --onnx

'rbpfx COMMAND --help' explains a command. All but the last take --json, --quiet, -v and --debug.
'rbpfx completion --help' says how to let your shell complete all this.

\b
Exit codes:
  0    success
  1    an error, explained in one line on stderr
  2    wrong usage
  130  interrupted"""


class _InOrder(click.Group):
    """Lists commands in the order in which one needs them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of the commands."""
        return list(self.commands)


@click.group(cls=_InOrder, help=HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(rbpfx.__version__, message="rbpfx %(version)s")
def cli() -> None:
    """All commands."""


for command in (demo, inspect, prune, report, bench, export, apply, completion):
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What follows `rbpfx`; by default what the shell passed.

    Returns:
        The exit code: 0, 1 for an error, 2 for wrong usage, 130 if interrupted.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        return cli.main(given, prog_name="rbpfx", standalone_mode=False) or 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        return INTERRUPTED


__all__ = ["cli", "main"]
