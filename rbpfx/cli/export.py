"""`rbpfx export`: files of a saved network for other runtimes."""

from __future__ import annotations

from pathlib import Path

import click
import torch

from rbpfx.cli import options
from rbpfx.cli.console import Answer, Console, reporting
from rbpfx.cli.saved import Saved
from rbpfx.deployment.export import export as write_export

HELP = f"""Write the saved network in DIR for other runtimes, checked after writing.

The batch size stays free. The files are named deployed.onnx, deployed.pt2 and deployed.aoti.pt2.

\b
Examples:
  rbpfx export pruned --onnx
  rbpfx export pruned --pt2 --aoti --out site/models
  rbpfx export pruned --onnx --model nets:make_model

{options.MODELS}"""


@click.command(help=HELP, short_help="Write a saved network for other runtimes.")
@options.directory
@click.option("--onnx", is_flag=True, help="For onnxruntime and others; needs rbpfx[export].")
@click.option("--pt2", is_flag=True, help="An exported program, for torch.export.load.")
@click.option("--aoti", is_flag=True, help="Machine code for this machine; needs a C++ compiler.")
@options.saved_model
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="Where to write; DIR by default."
)
@click.option("--force", is_flag=True, help="Replace files that are there.")
@reporting
def export(
    console: Console,
    *,
    directory: Path,
    onnx: bool,
    pt2: bool,
    aoti: bool,
    model: str | None,
    out: Path | None,
    force: bool,
) -> Answer:
    """Write the files."""
    wanted = {"deployed.onnx": onnx, "deployed.pt2": pt2, "deployed.aoti.pt2": aoti}
    names = tuple(name for name, is_wanted in wanted.items() if is_wanted)
    if not names:
        raise click.UsageError("name at least one format: --onnx, --pt2 or --aoti")
    place = out or directory
    options.require_free(place, force, names)
    errors = {}
    with console.stages(str(directory), 1 + len(names)) as begin:
        begin("opening")
        saved = Saved.open(directory, model, torch.device("cpu"))
        inputs = saved.example_inputs()
        for name in names:
            begin(f"writing {name}")
            errors[str(place / name)] = write_export(saved.network, inputs, place / name)
    lines = [f"{file}: equals the network to {error:.1e}" for file, error in errors.items()]
    files = [{"file": file, "error": error} for file, error in errors.items()]
    return Answer("\n".join(lines), {"files": files})


__all__ = ["export"]
