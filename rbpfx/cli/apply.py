"""`rbpfx apply`: cut a model as a plan says, without training."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from rbpfx.arguments import known_leaves
from rbpfx.circumstances import environment
from rbpfx.cli import options
from rbpfx.cli.console import Answer, Console, reporting
from rbpfx.cli.inspect import example_inputs
from rbpfx.cli.models import find_model, trained_model
from rbpfx.cli.saved import saved_answer
from rbpfx.emission import VERIFIED_EXAMPLES
from rbpfx.errors import PlanError
from rbpfx.graph.capture import trace
from rbpfx.graph.copying import copy_model
from rbpfx.graph.cost import count_macs, count_parameters
from rbpfx.graph.examples import first_examples
from rbpfx.graph.gates import apply_mask
from rbpfx.graph.groups import Analysis, analyze
from rbpfx.graph.slicing import rewrite
from rbpfx.graph.verification import require_equal
from rbpfx.latency import measure_latency
from rbpfx.parsing import MAX_PLAN_BYTES, parse_json
from rbpfx.plan import PruningPlan
from rbpfx.report import Figures, Report
from rbpfx.result import PruningResult
from rbpfx.saving.examples import build_inputs, describe_inputs, require_savable
from rbpfx.saving.origin import Origin
from rbpfx.saving.schema import SavedPlan

HELP = f"""Cut MODEL as PLAN says, verify it, and save it.

PLAN is the plan.json of a saved network, or a plan of your own:
{{"kept": {{"conv1": [0, 2, 5]}}}}, by the groups that 'rbpfx inspect' lists; groups that it does
not name stay whole. Nothing is trained. A saved network's plan.json also says what the inputs
are and how to analyse; --input-size, --unit and so on are for plans of your own.

\b
Examples:
  rbpfx apply pruned/plan.json torchvision:resnet18 --weights retrained.pt --out again
  rbpfx apply plan.json nets:make_model --input-size 1 28 28 --out pruned

{options.MODELS}"""


@click.command(help=HELP, short_help="Cut a model as a plan says, without training.")
@click.argument("plan", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@options.model
@options.weights
@options.input_size
@options.out
@options.analysis
@reporting
def apply(
    console: Console,
    *,
    plan: Path,
    model: str,
    weights: str | None,
    input_size: tuple[int, int, int] | None,
    out: Path,
    force: bool,
    leaf_modules: tuple[str, ...],
    **analysis: Any,
) -> Answer:
    """Apply the plan."""
    started = time.perf_counter()
    options.require_free(out, force)
    chosen, saved = _read(plan)
    with console.stages(model, 6) as begin:
        begin("building")
        source = find_model(model)
        network = trained_model(source, weights, progress=not console.quiet).eval()
        begin("capturing")
        if saved is None:
            inputs = example_inputs(source, network, input_size, None, console)
            require_savable(describe_inputs(inputs))
            leaves = known_leaves(network, leaf_modules)
            gm = trace(copy_model(network, {}), inputs, leaf_modules=leaves)
        else:
            leaf_modules, analysis = tuple(saved.leaf_modules), dict(saved.analysis)
            inputs = build_inputs(saved.inputs, torch.device("cpu"))
            gm = saved.capture(copy_model(network, {}))
        begin("cutting")
        found = analyze(gm, **analysis)
        result = _cut(gm, found, chosen, inputs, started, begin)
        begin("saving")
        result = replace(result, origin=Origin.of(network, gm, inputs, leaf_modules, **analysis))
        result.save(out)
    return saved_answer(out, result)


def _cut(
    gm: nn.Module,
    analysis: Analysis,
    plan: PruningPlan,
    inputs: Any,
    started: float,
    begin: Callable[[str], None],
) -> PruningResult:
    """Slice a captured network, verify and measure.

    Raises:
        PlanError: The plan does not fit.
        VerificationError: Slicing changed the function.
    """
    pruned, masked = rewrite(gm, analysis, plan), apply_mask(gm, analysis, plan)
    begin("verifying")
    inexact = analysis.inexact(plan)
    examples = first_examples(inputs, VERIFIED_EXAMPLES)
    error = require_equal(masked, pruned, examples, inexact=inexact)
    begin("measuring")
    dense_figures, pruned_figures = _figures([gm, pruned], inputs)
    groups = analysis.groups
    report = Report(
        method="plan",
        dense=dense_figures,
        pruned=pruned_figures,
        widths={g.name: (g.size, len(plan.kept.get(g.name, range(g.size)))) for g in groups},
        verification_error=error,
        target=None,
        frozen={axis.name: axis.reason for axis in analysis.frozen},
        accuracy_after_cut=None,
        device=f"cpu ({torch.get_num_threads()} threads)",
        seconds=time.perf_counter() - started,
        inexact=inexact,
        coupling={name: tuple(targets) for name, targets in analysis.graph.adj.items()},
        environment=environment(),
    )
    return PruningResult(pruned, plan, report, gm, analysis)


def _read(path: Path) -> tuple[PruningPlan, Origin | None]:
    """A plan, and what it was made for if it is that of a saved network.

    Raises:
        PlanError: The file is no plan, or cannot be read.
        LoadError: It is that of a saved network, and damaged.
    """
    try:
        if not path.is_file():
            raise OSError("it is no file")
        with path.open("rb") as file:
            text = file.read(MAX_PLAN_BYTES + 1)
        is_saved = "format" in parse_json(text)
    except (OSError, ValueError, TypeError) as error:
        raise PlanError(f"{str(path)!r} is no pruning plan: {error}") from error
    if not is_saved:
        return PruningPlan.from_json(text), None
    saved = SavedPlan.from_json(text)
    return PruningPlan(saved.kept), saved.original


def _figures(networks: list[nn.Module], inputs: Any) -> list[Figures]:
    """What captured networks cost, for one example."""
    times = measure_latency(networks, first_examples(inputs, 1))
    return [
        Figures(count_parameters(network), count_macs(network), {1: latency.median})
        for network, latency in zip(networks, times, strict=True)
    ]


__all__ = ["apply"]
