"""`rbpfx bench`: how much faster a saved network is than the one it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
from tabulate import tabulate
from torch import nn

from rbpfx.cli import options
from rbpfx.cli.console import Answer, Console, reporting
from rbpfx.cli.saved import Saved
from rbpfx.deployment.deploy import deploy
from rbpfx.graph.examples import resize_batch
from rbpfx.latency import Comparison, Latency, measure_latency

HELP = f"""Measure the saved network in DIR beside the dense one.

The dense network is rebuilt from its source; time does not depend on its weights. Both are timed
in turns, as they are and in the form that rbpfx.deploy gives them.

\b
Examples:
  rbpfx bench pruned
  rbpfx bench pruned --batch-sizes 1,8,64 --threads 1
  rbpfx bench pruned --model nets:make_model --json

{options.MODELS}"""

FORMS = ("as emitted", "deployed")


@click.command(help=HELP, short_help="Measure a saved network beside the dense one.")
@options.directory
@options.saved_model
@click.option(
    "--batch-sizes",
    metavar="N,N,...",
    callback=options.find_numbers,
    default="1,64",
    show_default=True,
    help="Numbers of examples in a forward pass.",
)
@click.option(
    "--threads", metavar="N", type=click.IntRange(1), help="CPU threads; by default torch's choice."
)
@click.option(
    "--seconds",
    metavar="SECONDS",
    type=click.FloatRange(0, min_open=True),
    default=2.0,
    show_default=True,
    help="Time to spend on a batch size and form.",
)
@options.device
@reporting
def bench(
    console: Console,
    *,
    directory: Path,
    model: str | None,
    batch_sizes: list[int],
    threads: int | None,
    seconds: float,
    device: torch.device,
) -> Answer:
    """Measure."""
    found: list[tuple[int, str, Comparison]] = []
    with console.stages(str(directory), 1 + 2 * len(batch_sizes)) as begin:
        begin("opening")
        saved = Saved.open(directory, model, device)
        dense, inputs = saved.dense(), saved.example_inputs()
        for size in batch_sizes:
            begin(f"deploying for batches of {size}")
            batch = resize_batch(inputs, size)
            networks: list[nn.Module] = [saved.original, saved.network]
            networks += [deploy(network, batch) for network in (dense, saved.network)]
            begin(f"measuring batches of {size}")
            times = measure_latency(networks, batch, seconds=2 * seconds, threads=threads)
            found += [
                (size, form, Comparison(*pair))
                for form, pair in zip(FORMS, (times[:2], times[2:]), strict=True)
            ]
    rows = [
        (
            size,
            form,
            _milliseconds(c.baseline),
            _milliseconds(c.model),
            f"{c.speedup:.2f}x",
            _half(c),
        )
        for size, form, c in found
    ]
    last = found[-1][-1].model
    where = f"{last.device}, threads: {last.threads}" if last.device == "cpu" else last.device
    headers = ["batch", "form", "dense", "pruned", "faster", "half of the rounds"]
    table = tabulate(
        rows, headers, disable_numparse=True, colalign=("right", "left", *["right"] * 4)
    )
    return Answer(
        f"{table}\n\nmedians on {where}; dense and pruned timed in turns",
        {
            "device": last.device,
            "threads": last.threads,
            "results": [_plain(size, form, comparison) for size, form, comparison in found],
        },
    )


def _milliseconds(latency: Latency) -> str:
    return f"{1e3 * latency.median:.2f} ms"


def _half(comparison: Comparison) -> str:
    low, high = comparison.quartiles
    return f"{low:.2f}x to {high:.2f}x"


def _plain(size: int, form: str, comparison: Comparison) -> dict[str, Any]:
    return {
        "batch_size": size,
        "form": form,
        "dense_seconds": comparison.baseline.median,
        "pruned_seconds": comparison.model.median,
        "speedup": comparison.speedup,
        "quartiles": list(comparison.quartiles),
        "rounds": comparison.model.repeats,
    }


__all__ = ["bench"]
