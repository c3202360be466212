"""`rbpfx completion`: what makes a shell complete commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_RBPFX_COMPLETE"

HELP = """Print the script that makes SHELL complete commands, options and their values.

\b
Switch it on for all new shells:
  bash  rbpfx completion bash > ~/.rbpfx-complete.bash
        echo '. ~/.rbpfx-complete.bash' >> ~/.bashrc
  zsh   rbpfx completion zsh > ~/.rbpfx-complete.zsh
        echo '. ~/.rbpfx-complete.zsh' >> ~/.zshrc
  fish  rbpfx completion fish > ~/.config/fish/completions/rbpfx.fish"""


@click.command(help=HELP, short_help="Let your shell complete all this.")
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script."""
    kind = get_completion_class(shell)
    assert kind is not None
    root = context.find_root()
    click.echo(kind(root.command, {}, "rbpfx", VARIABLE).source())


__all__ = ["completion"]
