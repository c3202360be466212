"""`rbpfx inspect`: what could be pruned of a model, what not and why, before any training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from textwrap import wrap
from typing import Any

import click
import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rbpfx.arguments import known_leaves
from rbpfx.cli import options
from rbpfx.cli.console import Answer, Console, reporting
from rbpfx.cli.data import DataOptions, first_inputs, open_data
from rbpfx.cli.models import ModelSource, find_model
from rbpfx.errors import InputError
from rbpfx.graph.capture import trace
from rbpfx.graph.cost import count_macs, count_parameters
from rbpfx.graph.groups import Analysis, ChannelGroup, analyze

WIDTH = 100
"""Columns of lists in the text."""

_TIE = "\N{NO-BREAK SPACE}"

HELP = f"""Show what of MODEL can be pruned, what goes together, what stays and why.

Nothing is trained or downloaded, but for the configuration of an hf: model.

\b
Examples:
  rbpfx inspect torchvision:resnet18
  rbpfx inspect timm:convnext_atto --normalization exact
  rbpfx inspect nets:make_model --input-size 1 28 28 --json

{options.MODELS}"""


@click.command(help=HELP, short_help="What can be pruned, what cannot, and why.")
@options.model
@options.input_size
@click.option(
    "--data",
    metavar="DATA",
    help="Take the inputs from the first batch of these data instead; see 'rbpfx prune --help'.",
)
@options.analysis
@reporting
def inspect(
    console: Console,
    *,
    model: str,
    input_size: tuple[int, int, int] | None,
    data: str | None,
    leaf_modules: tuple[str, ...],
    **analysis: Any,
) -> Answer:
    """Analyse and describe."""
    with console.stages(model, 3) as begin:
        begin("building")
        source = find_model(model)
        network = source.build().eval()
        inputs = example_inputs(source, network, input_size, data, console)
        begin("capturing")
        gm = trace(network, inputs, leaf_modules=known_leaves(network, leaf_modules))
        begin("analysing")
        found = analyze(gm, **analysis)
        return Answer(_text(model, gm, found, inputs), _plain(model, gm, found, inputs))


def example_inputs(
    source: ModelSource,
    model: nn.Module,
    input_size: tuple[int, int, int] | None,
    data: str | None,
    console: Console,
) -> Any:
    """What to capture a model with.

    Args:
        source: Where it comes from.
        model: The model.
        input_size: Channels, height and width of its images, if the user says so.
        data: Data whose first batch to take, if the user says so.
        console: Where bars go.

    Raises:
        InputError: Nothing is said, and nothing known.
    """
    if input_size is not None:
        return torch.zeros(1, *input_size)
    if data is not None:
        return first_inputs(open_data(data, DataOptions(), source.preset(), console))
    inputs = source.example_inputs(model)
    if inputs is None:
        raise InputError(
            f"{source.text} does not say what its inputs look like; give --input-size, for "
            "example --input-size 3 224 224"
        )
    return inputs


def _share(analysis: Analysis, group: ChannelGroup) -> float:
    """Share of the multiply-accumulates in which a group's channels take part."""
    without = analysis.macs(analysis.gather({group.name: 0.0}))
    return 1 - without / analysis.dense_macs if analysis.dense_macs else 0.0


def _shapes(inputs: Any) -> list[list[int]]:
    return [list(leaf.shape) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]


def _text(model: str, gm: nn.Module, analysis: Analysis, inputs: Any) -> str:
    shapes = " and ".join("x".join(map(str, shape)) for shape in _shapes(inputs))
    heading = (
        f"{model}: {count_parameters(gm):,} parameters, {count_macs(gm):,} MACs per example "
        f"(inputs {shapes})"
    )
    return "\n\n".join([heading, *_chapters(analysis)])


def _chapters(analysis: Analysis) -> Iterator[str]:
    rows = [
        (
            group.name,
            group.size,
            f"{group.macs_per_unit:,.0f}",
            f"{_share(analysis, group):.1%}",
            len(group.producers),
        )
        for group in analysis.groups
    ]
    if rows:
        headers = ["channel group", "units", "MACs per unit", "share of MACs", "producers"]
        table = tabulate(rows, headers, disable_numparse=True, colalign=("left", *["right"] * 4))
        yield (
            f"{table}\n(Shares overlap: a layer counts for the channels that it makes and for "
            "those that it reads.)"
        )
    else:
        yield "No channel can be removed."
    coupled = [g for g in analysis.groups if len(g.producers) > 1]
    if coupled:
        yield _listed("Coupled, going together:", {g.name: list(g.producers[1:]) for g in coupled})
    frozen: dict[str, list[str]] = {}
    for axis in analysis.frozen:
        some = f" of {axis.size}" if axis.channels < axis.size else ""
        frozen.setdefault(axis.reason, []).append(f"{axis.name}{_TIE}({axis.channels}{some})")
    if frozen:
        yield _listed("Frozen (so many channels), and why:", frozen)
    if analysis.unknown:
        lines = (f"  {node}: {operator}" for node, operator in analysis.unknown.items())
        yield "\n".join(["Operators without a rule, which pin what they touch:", *lines])


def _listed(title: str, entries: Mapping[str, list[str]]) -> str:
    """Lists under headings, wrapped."""
    lines = [title]
    for heading, names in entries.items():
        lines.append(f"  {heading}:")
        lines += wrap(
            ", ".join(names),
            WIDTH,
            initial_indent="    ",
            subsequent_indent="    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines).replace(_TIE, " ")


def _plain(model: str, gm: nn.Module, analysis: Analysis, inputs: Any) -> dict[str, Any]:
    return {
        "model": model,
        "inputs": _shapes(inputs),
        "parameters": count_parameters(gm),
        "macs": count_macs(gm),
        "groups": [
            {
                "name": group.name,
                "units": group.size,
                "macs_per_unit": group.macs_per_unit,
                "share_of_macs": _share(analysis, group),
                "producers": list(group.producers),
            }
            for group in analysis.groups
        ],
        "computed_from": [
            {"group": target, "reads": source, "node": edge["node"]}
            for source, target, edge in analysis.graph.edges(data=True)
        ],
        "frozen": [
            {"name": a.name, "channels": a.channels, "of": a.size, "reason": a.reason}
            for a in analysis.frozen
        ],
        "unknown": dict(analysis.unknown),
    }


__all__ = ["example_inputs", "inspect"]
