"""Options that several commands have, and what they mean."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import torch

from rbpfx.cli.augment import AUGMENTATIONS
from rbpfx.errors import SaveError
from rbpfx.graph.groups import ATTENTION_UNITS, NORMALIZATIONS, UNITS
from rbpfx.saving.schema import PLAN, PROGRAM, WEIGHTS

Function = TypeVar("Function", bound=Callable[..., Any])
Decorator = Callable[[Function], Function]

MODELS = """\b
MODEL is one of
  torchvision:NAME     torchvision:resnet18?num_classes=10
  timm:NAME            timm:convnext_atto
  hf:NAME              hf:microsoft/resnet-18, or a local directory
  module.path:factory  a function or class that makes the model, looked for in
                       the current directory too; naming it RUNS its module"""

DATA = """\b
DATA is one of
  imagefolder:DIR      a folder of images per class, in DIR/train and DIR/val or
                       in DIR alone, of which --val-share is then held out
  torchvision:NAME     torchvision:CIFAR10?root=DIR&download=True
  digits               scikit-learn's 1797 embedded digits of 1x8x8
  module.path:loader   a loader of (input, target) batches, a pair (train, val)
                       of loaders, or a function that returns either; naming it
                       RUNS its module
Images are prepared as the model was published with, where that is known;
otherwise they are cropped to --image-size, with values from 0 to 1."""


def find_device(context: click.Context, parameter: click.Parameter, value: str) -> torch.device:
    """The device that the user names, as the callback of an option."""
    try:
        found = torch.device(value)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise click.BadParameter(f"{value!r} cannot be used here: {reason}") from error
    return found


def find_numbers(context: click.Context, parameter: click.Parameter, value: str) -> list[int]:
    """Positive whole numbers separated by commas, as the callback of an option."""
    parts = [part.strip() for part in value.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise click.BadParameter(f"{value!r} must be whole numbers from 1, for example 1,8,64")
    return [int(part) for part in parts]


def together(*decorators: Decorator[Any]) -> Decorator[Any]:
    """Several decorators as one, in the order in which help lists them."""

    def decorate(function: Function) -> Function:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


model = click.argument("model")
directory = click.argument(
    "directory", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path)
)
weights = click.option(
    "--weights",
    metavar="FILE|NAME",
    help="Trained weights: a .safetensors file, a .pt file of a state_dict (alone or under "
    "'state_dict' or 'model'), the name of published weights (DEFAULT for the best), or 'none' "
    "for random ones.",
)
device = click.option(
    "--device",
    metavar="DEVICE",
    callback=find_device,
    default=lambda: "cuda" if torch.cuda.is_available() else "cpu",
    show_default="cuda if there is one, else cpu",
    help="Where to work.",
)
seed = click.option(
    "--seed", metavar="N", type=int, default=0, show_default=True, help="Seed of everything."
)
saved_model = click.option(
    "--model",
    metavar="MODEL",
    help="What was pruned, if DIR does not know it by name: see 'rbpfx inspect --help'.",
)
input_size = click.option(
    "--input-size",
    type=click.IntRange(1),
    nargs=3,
    metavar="C H W",
    help="Channels, height and width of the model's images; by default those it was published "
    "with.",
)
reading = together(
    click.option(
        "--batch-size",
        metavar="N",
        type=click.IntRange(1),
        default=64,
        show_default=True,
        help="Examples in a batch.",
    ),
    click.option(
        "--workers",
        metavar="N",
        type=click.IntRange(0),
        default=0,
        show_default=True,
        help="Processes that read data.",
    ),
    click.option(
        "--image-size",
        metavar="N",
        type=click.IntRange(1),
        help="Side of the images in pixels; by default that of the model's published weights.",
    ),
    click.option(
        "--val-share",
        metavar="SHARE",
        type=click.FloatRange(0, 1, max_open=True),
        default=0.1,
        show_default=True,
        help="Share of the examples held out for validation, where the data have no such part.",
    ),
    click.option(
        "--augment",
        type=click.Choice(list(AUGMENTATIONS)),
        default=next(iter(AUGMENTATIONS)),
        show_default=True,
        help="Change training images at random: 'crop' moves them by up to an eighth of their "
        "side, 'flip' mirrors half of them. 'crop-flip' is usual for photographs; mirroring is "
        "wrong for digits, text and signs.",
    ),
)
analysis = together(
    click.option(
        "--unit",
        type=click.Choice(UNITS),
        default=UNITS[0],
        show_default=True,
        help="What goes: channels, or flattened features one by one as well.",
    ),
    click.option(
        "--attention",
        type=click.Choice(ATTENTION_UNITS),
        default=ATTENTION_UNITS[0],
        show_default=True,
        help="Whole heads go, or all heads become narrower.",
    ),
    click.option(
        "--normalization",
        type=click.Choice(NORMALIZATIONS),
        default=NORMALIZATIONS[0],
        show_default=True,
        help="Channels under a LayerNorm, RMSNorm or GroupNorm: keep them, let them go exactly, "
        "or let them go and change the function.",
    ),
    click.option(
        "--leaf",
        "leaf_modules",
        multiple=True,
        metavar="MODULE",
        help="Name of a module not to look into; it stays whole. May be repeated.",
    ),
)
out = together(
    click.option(
        "--out",
        required=True,
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Where the pruned network is saved.",
    ),
    click.option("--force", is_flag=True, help="Replace a network that is saved there."),
)


def require_free(directory: Path, force: bool, names: tuple[str, ...] = ()) -> None:
    """Make sure, before any work, that files can be written to a directory.

    Args:
        directory: The directory.
        force: Whether files there may be replaced.
        names: The files; by default those of a saved network.

    Raises:
        SaveError: It cannot be written, or holds such a file already.
    """
    try:
        place = directory.absolute()
        existing = next(p for p in (place, *place.parents) if p.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise SaveError(f"{str(directory)!r} cannot be written: {reason}") from error
    taken = [n for n in names or (PLAN, WEIGHTS, PROGRAM) if os.path.lexists(directory / n)]
    if taken and not force:
        raise SaveError(
            f"there is a {taken[0]} in {str(directory)!r} already; give --force to replace it, or "
            "another directory"
        )


__all__ = [
    "DATA",
    "MODELS",
    "analysis",
    "device",
    "directory",
    "find_numbers",
    "input_size",
    "model",
    "out",
    "reading",
    "require_free",
    "saved_model",
    "seed",
    "together",
    "weights",
]
