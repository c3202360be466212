"""Long trainings on paper: what steps, memory and hours become with more processes, and a check.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --markdown docs/long-trainings.md

`_scaling.py` is the model. Measured are, on this machine: a training step with noise and without,
in turns; the bytes that a step holds per example; a checkpoint; and, with two processes that talk
over gloo, in turns, an all-reduce, a step that stays alone, one that averages its gradients, and
one with noise. From the first two the model predicts the others: the check. What it says about
GPUs rests on figures that others published, which the page calls assumptions.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

import rbpfx
from benchmarks import _scaling_report
from benchmarks._record import Record, write_aside
from benchmarks._scaling import BUCKET, Link, Network, all_reduce, waiting
from benchmarks._zoo import torchvision_model
from benchmarks.overhead import WARM_UP, Case, Enough, Pair, Steps, times, until_enough
from rbpfx import Distributed, Strategy, Training, noise_gates
from rbpfx.checkpoints import Store
from rbpfx.checkpoints.encoding import Encoded
from rbpfx.latency.memory import peak_allocated
from rbpfx.methods import Phase, insert_noise

RESULTS = Path(__file__).parent / "results" / "scaling.json"
MARKS = re.compile(r"(<!-- scaling: generated -->\n).*?(<!-- scaling: end -->)", re.DOTALL)
PROCESSES = 2
MESSAGES = 20
"""Empty all-reduces that are timed together."""
WRITES = 5
"""Checkpoints that are timed."""


def main() -> None:
    """Measure what is missing, print the page's section or write it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--network", default="resnet18", help="whose steps are timed")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--paper", default="resnet50", help="the network of the plan")
    parser.add_argument("--paper-size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=12, help="of each kind that are timed")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--markdown", type=Path, help="write the section into this page")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = Record(options.results)

    def row(key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if not record.done(key):
            print(key, flush=True)
            record.add(key, measure())
        return record.rows[key]

    for batch in options.batch_sizes:
        case = Case(options.network, False, "cpu", batch, options.image_size, "rbp")
        name = f"{case.network}/{batch}/{case.image_size}"
        step = row(f"step/{name}", lambda: step_row(case, options.steps))  # noqa: B023
        noise = step["time_ratio"]
        row(f"two/{name}", lambda: two_row(case, options.steps, noise))  # noqa: B023
    row(f"checkpoint/{name}", lambda: checkpoint_row(case))
    paper = Case(options.paper, False, "cpu", 4, options.paper_size, "rbp")
    row(f"network/{paper.network}/{paper.image_size}", lambda: network_row(paper))
    section = _scaling_report.section(record.rows, record.environments)
    if options.markdown:
        write_aside(options.markdown, within_marks(options.markdown.read_text(), section))
    else:
        print(section)


def within_marks(page: str, section: str) -> str:
    """A page with another section between its marks.

    Raises:
        ValueError: It has no marks.
    """
    text, found = MARKS.subn(lambda marks: f"{marks[1]}\n{section}\n\n{marks[2]}", page)
    if found != 1:
        raise ValueError("the page has no place for the section, or several")
    return text


def step_row(case: Case, steps: int) -> dict[str, Any]:
    """Steps of one process, without noise and with, in turns."""
    plain, noisy = times(pair_of(case), steps)
    return {
        "batch": case.batch,
        "milliseconds": [_milliseconds(plain), _milliseconds(noisy)],
        "images_per_second": round(case.batch / statistics.median(plain), 1),
        **_ratio("time", noisy, plain),
    }


def two_row(case: Case, steps: int, noise: float) -> dict[str, Any]:
    """Steps of two processes, and what the model makes of one of them.

    Args:
        case: What is trained, per process.
        steps: Rounds.
        noise: Seconds of a step with noise over one without.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_one_of_two, (folder, case, steps), PROCESSES)
        seconds: dict[str, list[float]] = json.loads((Path(folder) / "seconds").read_text())
    latency = statistics.median(seconds["empty"]) / (2 * (PROCESSES - 1))
    content = statistics.median(seconds["bucket"]) - statistics.median(seconds["empty"])
    link = Link(all_reduce(BUCKET, PROCESSES, Link(1, 0)) / content, latency)
    network = network_of(pair_of(case), activations=0)
    row = {
        "batch": case.batch,
        "gradient_bytes": network.gradients,
        "bandwidth": link.bandwidth,
        "latency": link.latency,
        "milliseconds": {name: _milliseconds(found) for name, found in seconds.items()},
    }
    for kind, factor in (("spread", 1.0), ("noisy", noise)):
        compute = [factor * alone for alone in seconds["alone"]]
        predicted, hidden = (
            [step + waiting(network, step, PROCESSES, link, overlap) for step in compute]
            for overlap in (0.0, 1.0)
        )
        row |= _ratio(kind, predicted, seconds[kind])
        row |= _ratio(f"{kind}_overlapped", hidden, seconds[kind])
    return row


def _one_of_two(rank: int, folder: str, case: Case, steps: int) -> None:
    """One of the processes: a round after the other, all kinds of work in each."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES)
    pair = pair_of(case)
    pair.settings = Training(strategy=Strategy())
    alone = pair.plain_step()
    pair.settings = Training(strategy=Distributed())
    content, nothing = torch.ones(BUCKET // 4), torch.zeros(2)
    works = {
        "empty": lambda: [dist.all_reduce(nothing) for _ in range(MESSAGES)],
        "bucket": lambda: dist.all_reduce(content),
        "alone": alone,
        "spread": pair.plain_step(),
    }
    seconds: dict[str, list[float]] = {name: [] for name in works}

    def turn() -> None:
        for name, work in works.items():
            dist.barrier()
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
        dist.barrier()

    loader = Steps(pair, WARM_UP + steps, turn)
    until_enough(pair.train_noisy, loader)
    seconds["noisy"] = loader.steps
    seconds["empty"] = [taken / MESSAGES for taken in seconds["empty"]]
    everyone: list[dict[str, list[float]]] = [{}] * PROCESSES
    dist.all_gather_object(everyone, seconds)
    slowest = {
        name: [max(turns) for turns in zip(*(own[name] for own in everyone), strict=True)][WARM_UP:]
        for name in seconds
    }
    if rank == 0:
        (Path(folder) / "seconds").write_text(json.dumps(slowest))
    dist.destroy_process_group()


def checkpoint_row(case: Case) -> dict[str, Any]:
    """The size of a checkpoint of the noise training, predicted and measured, and its time."""
    pair = pair_of(case)
    with tempfile.TemporaryDirectory() as folder, closing(Store(f"{folder}/again", {})) as store:
        with suppress(Enough):
            rbpfx.prune(
                pair.model,
                [pair.batch] * 3,
                target=rbpfx.Target(macs=0.5),
                checkpoint_dir=folder,
                checkpoint_interval=0,
                callback=_end_after_three_steps,
                progress=False,
            )
        (*_, last) = sorted(Path(folder).glob("noise-*.safetensors"))
        size, state = last.stat().st_size, Encoded(None, load_file(last))
        seconds = []
        for step in range(WRITES):
            start = time.perf_counter()
            store.write("noise", step, state)
            seconds.append(time.perf_counter() - start)
    predicted = network_of(pair, activations=0).checkpoint
    return {
        "bytes": size,
        "milliseconds": _milliseconds(seconds),
        "megabytes_per_second": round(size / statistics.median(seconds) / 1e6),
        "predicted_bytes": predicted,
        "size_ratio": round(predicted / size, 4),
    }


def _end_after_three_steps(progress: rbpfx.Progress) -> None:
    if progress.step == 3:
        raise Enough


def network_row(case: Case) -> dict[str, Any]:
    """The figures of a network that the model needs."""
    pair = pair_of(case)
    noisy = insert_noise(pair.model, pair.analysis, pair.method).train()
    for gate in noise_gates(noisy):
        gate.phase = Phase.NOISY
    half = case.batch // 2
    more, less = (
        peak_allocated(lambda: noisy(pair.images[:examples]), pair.device)  # noqa: B023
        for examples in (case.batch, half)
    )
    network = network_of(pair, activations=(more - less) / (case.batch - half))
    return {"network": case.network, "image_size": case.image_size, **vars(network)}


def pair_of(case: Case) -> Pair:
    """The trainings of a case, the same in every process."""
    torch.manual_seed(0)
    return Pair(torchvision_model(case.network), case)


def network_of(pair: Pair, activations: float) -> Network:
    """What the model needs to know of a network."""
    gates = noise_gates(insert_noise(pair.model, pair.analysis, pair.method))
    return Network(
        parameters=sum(p.numel() for p in pair.model.parameters()),
        buffers=sum(b.numel() for b in pair.model.buffers()),
        units=sum(gate.size for gate in gates),
        activations=activations,
    )


def _milliseconds(seconds: list[float]) -> float:
    return round(1e3 * statistics.median(seconds), 3)


def _ratio(name: str, above: list[float], below: list[float]) -> dict[str, Any]:
    """The median and the quartiles of the ratios of neighbours in time."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        f"{name}_ratio": round(middle, 3),
        f"{name}_quartiles": [round(low, 3), round(high, 3)],
    }


if __name__ == "__main__":
    main()
