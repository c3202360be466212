"""The command line: `rbpfx demo`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from rbpfx import __version__, demo
from rbpfx.errors import RbpfxError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="rbpfx", description="Make trained PyTorch networks smaller and faster."
    )
    parser.add_argument("--version", action="version", version=f"rbpfx {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "demo",
        help="train a small ResNet on embedded handwritten digits, prune it, verify it",
        description="Trains a small residual network on scikit-learn's embedded handwritten "
        "digits, prunes it, proves that slicing changed nothing and measures the speed-up.",
    )
    command.add_argument(
        "--macs", type=float, help="share of the multiply-accumulates to keep (default: automatic)"
    )
    command.add_argument("--seed", type=int, default=0, help="seed of everything (default: 0)")
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    command.add_argument("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args(arguments)
    try:
        result = demo.run(options.macs, options.seed, progress=not options.quiet)
    except RbpfxError as error:
        print(f"rbpfx: error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result.report.to_dict(), indent=2) if options.json else result.report)
    return 0
