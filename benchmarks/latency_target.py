"""Whether a latency target is met: what was asked for, and what another measurement says.

    python -m benchmarks.latency_target --seconds 1800

One row per network, batch size and form. The plan for half of the dense network's latency comes
from `Selection` with a `PlanMeter`, as in `prune`, by magnitude scores and without training. The
network is then measured afresh, beside the dense one, pair by pair. The operators' times are
measured anew for every network unless `--keep-table` is given.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

import rbpfx
from benchmarks._latency_networks import dense, magnitudes
from benchmarks._record import Deadline, Record
from benchmarks.latency import NETWORKS
from rbpfx.latency.operators import OperatorTimes

RESULTS = Path(__file__).parent / "results" / "latency_target.json"
FORMS = ("emitted", "deployed")
GOAL = 0.05
COLUMNS = ["network", "batch", "form", "asked", "reached", "quartiles", "macs_kept", "met"]


class Case(NamedTuple):
    """A row to be."""

    network: str
    batch: int
    form: str
    asked: float


def main() -> None:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--latencies", type=float, nargs="+", default=[0.5])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--keep-table", action="store_true", help="use the user's table on disk")
    parser.add_argument("--measure", type=float, default=10.0, help="seconds of the fresh one")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, help="time box")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    record, deadline = Record(options.results), Deadline(options.seconds)
    found = [
        Case(network, batch, form, asked)
        for form in options.forms
        for network in options.networks
        for batch in options.batch_sizes
        for asked in options.latencies
    ]
    for case in found:
        key = "/".join(map(str, (*case, options.device, options.threads, options.image_size)))
        if record.done(key):
            continue
        if deadline.expired:
            print("the time is over")
            break
        print(f"{deadline.elapsed:6.0f} s  {key}", flush=True)
        record.add(key, run(case, options))
    print(record.table(COLUMNS))


def run(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Find the widths, then measure the network again."""
    started = time.perf_counter()
    model = dense(case.network, options.image_size).to(options.device)
    images = torch.randn(case.batch, 3, options.image_size, options.image_size).to(options.device)
    gm = rbpfx.trace(model, images)
    analysis = rbpfx.analyze(gm)
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "operators.json"
        times = None if options.keep_table else OperatorTimes(images.device, table)
        meter = rbpfx.PlanMeter(gm, analysis, images, deployed=case.form == "deployed", times=times)
        target = rbpfx.Target(latency=case.asked, deployed=case.form == "deployed")
        selection = rbpfx.Selection(analysis, target, meter)
        plan = selection.plan(magnitudes(gm, analysis, selection))
    search_seconds = time.perf_counter() - started
    pruned = rbpfx.rewrite(gm, analysis, plan)
    networks = [gm, pruned]
    if case.form == "deployed":
        networks = [rbpfx.deploy(network, images) for network in networks]
    pair = rbpfx.compare_latency(*networks, images, seconds=options.measure, max_repeats=200)
    low, high = pair.quartiles
    reached = 1 / pair.speedup
    return {
        **case._asdict(),
        "reached": round(reached, 4),
        "quartiles": [round(1 / high, 4), round(1 / low, 4)],
        "by_the_search": round(meter(plan), 4),
        "macs_kept": round(rbpfx.count_macs(pruned) / rbpfx.count_macs(gm), 4),
        "dense_milliseconds": round(1e3 * pair.baseline.median, 3),
        "met": abs(reached / case.asked - 1) <= GOAL,
        "search_seconds": round(search_seconds, 1),
        "networks_measured": len(meter.measured),
    }


if __name__ == "__main__":
    main()
