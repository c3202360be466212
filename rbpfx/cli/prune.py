"""`rbpfx prune`: a trained model and its data become a smaller network in a directory."""

from __future__ import annotations

import logging
from dataclasses import replace
from operator import length_hint
from pathlib import Path
from typing import Any

import click
import torch

from rbpfx.cli import options
from rbpfx.cli.console import Answer, Console, reporting
from rbpfx.cli.data import DataOptions, check_fit, open_data
from rbpfx.cli.models import find_model, trained_model
from rbpfx.cli.saved import saved_answer
from rbpfx.methods import METHODS
from rbpfx.prune import prune as prune_network
from rbpfx.target import AUTO, Target
from rbpfx.training.finetune import FineTune
from rbpfx.training.schedule import Recursion
from rbpfx.training.settings import PRECISIONS, Training

logger = logging.getLogger(__name__)

_POSITIVE = click.FloatRange(0, min_open=True)
_RANKINGS = tuple(name for name, method in METHODS.items() if not method.decides)

HELP = f"""Make a trained MODEL smaller and faster, and save it.

How small is decided by the data, unless --macs, --params or --latency says it. The saved
directory holds plan.json and weights.safetensors, for rbpfx.load in Python and for the other
commands.

\b
Examples:
  rbpfx prune torchvision:resnet18 --weights DEFAULT --data imagefolder:photos \\
      --macs 0.5 --out pruned
  rbpfx prune 'timm:resnet18?num_classes=10' --weights resnet18.pt \\
      --data 'torchvision:CIFAR10?root=data' --image-size 32 --out pruned
  rbpfx prune nets:make_model --weights trained.safetensors \\
      --data nets:make_loaders --latency '4.5 ms' --out pruned

{options.MODELS}

{options.DATA}"""


def _round_to(context: click.Context, parameter: click.Parameter, value: str) -> int | str:
    return AUTO if value == AUTO else int(click.IntRange(1)(value, parameter, context))


def _latency(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> float | str | None:
    """A share as a number; a time with its unit stays as it is, `Target` reads it."""
    try:
        return None if value is None else float(value)
    except ValueError:
        return value


@click.command(help=HELP, short_help="Make a trained model smaller and faster.")
@options.model
@options.weights
@click.option("--data", required=True, metavar="DATA", help="Data to train with; see above.")
@options.out
@click.option(
    "--program",
    is_flag=True,
    help="Save network.pt2 too, which needs no model code (see rbpfx.load).",
)
@click.option(
    "--method",
    type=click.Choice(list(METHODS)),
    default="rbp",
    show_default=True,
    help=f"What decides; {', '.join(_RANKINGS)} need a target.",
)
@click.option(
    "--macs",
    metavar="SHARE|N",
    type=_POSITIVE,
    help="Share of the multiply-accumulates to keep, or their number.",
)
@click.option(
    "--params",
    metavar="SHARE|N",
    type=_POSITIVE,
    help="Share of the parameters to keep, or their number.",
)
@click.option(
    "--latency",
    metavar="SHARE|TIME",
    callback=_latency,
    help="Share of the time to keep, or a time such as '4.5 ms'.",
)
@click.option("--deployed", is_flag=True, help="--latency means the deployed form.")
@click.option(
    "--round-to",
    metavar="N|auto",
    default="1",
    show_default=True,
    callback=_round_to,
    help="Make widths multiples of this; 'auto' measures which multiple is worth it here.",
)
@click.option(
    "--min-width",
    metavar="N",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Least units in a group.",
)
@click.option(
    "--include",
    multiple=True,
    metavar="PATTERN",
    help="Prune only such layers, for example 'layer4.*'. May be repeated.",
)
@click.option(
    "--exclude", multiple=True, metavar="PATTERN", help="Leave such layers whole. May be repeated."
)
@click.option(
    "--epochs",
    metavar="N",
    type=_POSITIVE,
    help="Passes over the data that decide; by default as the method wants, 3 for rbp.",
)
@click.option(
    "--strength",
    metavar="X",
    type=_POSITIVE,
    help="How hard to prune without a target. For rbp 0.5 is cautious, 2 the default, 8 bold.",
)
@click.option(
    "--recovery-epochs",
    metavar="N",
    type=click.FloatRange(0),
    help="Passes over the data after the cut; 0 for none. By default 3, of 100 steps or more.",
)
@click.option(
    "--recovery-lr",
    metavar="X",
    type=_POSITIVE,
    help="Learning rate after the cut. By default 0.01, less for batches below 32.",
)
@click.option("--distill", is_flag=True, help="Learn half from the dense network's outputs.")
@click.option(
    "--precision",
    type=click.Choice(list(PRECISIONS)),
    default=Training.precision,
    show_default=True,
    help="What training computes in.",
)
@click.option(
    "--checkpoint-dir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Save the training here: the same command goes on from there, and Ctrl-C stops it with "
    "the result so far.",
)
@options.reading
@options.analysis
@options.device
@options.seed
@reporting
def prune(
    console: Console,
    *,
    model: str,
    weights: str | None,
    data: str,
    out: Path,
    force: bool,
    program: bool,
    method: str,
    macs: float | None,
    params: float | None,
    latency: float | str | None,
    deployed: bool,
    round_to: int | str,
    min_width: int,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    epochs: float | None,
    strength: float | None,
    recovery_epochs: float | None,
    recovery_lr: float | None,
    distill: bool,
    precision: str,
    checkpoint_dir: Path | None,
    batch_size: int,
    workers: int,
    image_size: int | None,
    val_share: float,
    augment: str,
    device: torch.device,
    seed: int,
    **analysis: Any,
) -> Answer:
    """Check everything, prune, save."""
    target = Target(
        macs=macs,
        params=params,
        latency=latency,
        deployed=deployed,
        round_to=round_to,
        min_width=min_width,
        include=include,
        exclude=exclude,
    )
    if target.cost is None and method in _RANKINGS:
        raise click.UsageError(f"--method {method} needs a target, for example --macs 0.5")
    recursion = _recursion(method, epochs, strength)
    recovery = FineTune(epochs=recovery_epochs, lr=recovery_lr)
    options.require_free(out, force)
    source = find_model(model)
    reading = DataOptions(batch_size, workers, image_size, val_share, seed, augment)
    with console.stages(model, 3) as begin:
        begin("building")
        network = trained_model(source, weights, progress=not console.quiet)
        begin("opening the data")
        batches = open_data(data, reading, source.preset(), console)
        begin("trying the first batch")
        check_fit(network, batches)
    logger.info("%s: everything fits; %d batches to train with", model, length_hint(batches.train))
    result = prune_network(
        network,
        batches.train,
        val_loader=batches.val,
        method=method,
        target=None if target == Target() else target,
        recursion=recursion,
        recovery=recovery,
        distill=distill,
        training=Training(precision=precision),
        checkpoint_dir=checkpoint_dir,
        device=device,
        seed=seed,
        progress=not console.quiet,
        **analysis,
    )
    with console.stages(str(out), 1) as begin:
        begin("saving")
        result.save(out, program=program)
    return saved_answer(out, result)


def _recursion(method: str, epochs: float | None, strength: float | None) -> Recursion | None:
    """Settings of the training that decides, or None for the method's own."""
    given = {n: v for n, v in (("epochs", epochs), ("strength", strength)) if v is not None}
    changes: dict[str, Any] = given
    return replace(METHODS[method]().recursion(), **changes) if given else None


__all__ = ["prune"]
