"""What noise costs: a training step with gates against one without, in time and in memory.

    python -m benchmarks.overhead --seconds 1200

One row per network, with and without `torch.compile` of the network. A step with noise is one of
`RecursiveTraining` as `prune` runs it at a budget (sampling, the divergence, two optimisers, the
projection onto the budget); a step without is the same engine with the same SGD on the weights
only. Both take turns: the loader of the noise training runs a step without noise before it hands
out each batch, so that every ratio is that of two neighbours in time. Memory is the most that is
allocated at any moment of a few steps from scratch, optimisers and safety copies included, on top
of the images; to that the weights are added. It is measured without `torch.compile` only, which
allocates while it compiles.

Images are random and smaller on the CPU than the 224 pixels that are usual (`--image-size`).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import rbpfx
from benchmarks._record import Deadline, Record
from benchmarks._zoo import torchvision_model
from rbpfx import Recursion, Target, Training
from rbpfx.errors import InputError
from rbpfx.graph.copying import copy_model
from rbpfx.latency.memory import parameter_bytes, peak_allocated
from rbpfx.methods import find_method
from rbpfx.training.engine import Stepper
from rbpfx.training.recursion import RecursiveTraining
from rbpfx.training.task import LEARNING_RATE, Loader, Task

RESULTS = Path(__file__).parent / "results" / "overhead.json"
NETWORKS = ("resnet18", "mobilenet_v2", "resnet50", "vgg16_bn", "densenet121", "vit_b_16")
TIME_GOAL, MEMORY_GOAL = 1.05, 1.10
WARM_UP = 3
MEMORY_STEPS = 2

Batch = tuple[Tensor, Tensor]


class Case(NamedTuple):
    """A row to be."""

    network: str
    compiled: bool
    device: str
    batch: int
    image_size: int
    method: str


def main() -> None:
    """Run what is missing, print the table."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--compile", nargs="+", choices=["no", "yes"], default=["no", "yes"])
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=224 if cuda else 96)
    parser.add_argument("--method", default="rbp")
    parser.add_argument("--steps", type=int, default=10, help="of each kind that are timed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, help="time box")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    record, deadline = Record(options.results), Deadline(options.seconds)
    for compiled in options.compile:
        for network in options.networks:
            case = Case(
                network,
                compiled == "yes",
                options.device,
                options.batch,
                options.image_size,
                options.method,
            )
            key = "/".join(map(str, case))
            if record.done(key):
                continue
            if deadline.expired:
                break
            print(f"{deadline.elapsed:6.0f} s  {key}", flush=True)
            record.add(key, run(case, options.steps))
    columns = ["network", "compiled", "image_size", "milliseconds", "time_ratio", "time_reached"]
    print(record.table([*columns, "memory_ratio", "memory_reached"]))


def run(case: Case, steps: int) -> dict[str, Any]:
    """One row: times in turns, then the memory of each side alone."""
    torch.manual_seed(0)
    pair = Pair(torchvision_model(case.network), case)
    plain, noisy = times(pair, steps)
    ratios = [after / before for before, after in zip(plain, noisy, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    time_ratio = round(middle, 3)
    row = {
        **case._asdict(),
        "steps": steps,
        "milliseconds": [round(1e3 * statistics.median(t), 1) for t in (plain, noisy)],
        "time_ratio": time_ratio,
        "time_quartiles": [round(low, 3), round(high, 3)],
        "time_reached": time_ratio <= TIME_GOAL,
    }
    return row if case.compiled else row | memory(pair)


def memory(pair: Pair) -> dict[str, Any]:
    """Peak bytes without and with noise, those of the weights alone, and the ratio."""
    weights = parameter_bytes(pair.model)
    peaks = [weights + pair.peak(train) for train in (pair.train_plain, pair.train_noisy)]
    ratio = round(peaks[1] / peaks[0], 3)
    return {
        "bytes": peaks,
        "weight_bytes": weights,
        "memory_ratio": ratio,
        "memory_reached": ratio <= MEMORY_GOAL,
    }


class Pair:
    """Training of one network with noise and without.

    Args:
        model: The network.
        case: How it is trained.
    """

    def __init__(self, model: nn.Module, case: Case) -> None:
        self.images = torch.randn(case.batch, 3, case.image_size, case.image_size).to(case.device)
        self.labels = torch.randint(1000, (case.batch,), device=case.device)
        self.model = rbpfx.trace(model.to(case.device), self.images)
        self.analysis = rbpfx.analyze(self.model)
        self.method = find_method(case.method)
        self.settings = Training(compile=case.compiled)
        self.task = Task(device=case.device)
        self.device = torch.device(case.device)

    @property
    def batch(self) -> Batch:
        """The batch of every step."""
        return self.images, self.labels

    def plain_step(self) -> Callable[[], Any]:
        """A training step without noise, of a fresh copy and a fresh optimiser."""
        model, schedule = copy_model(self.model, {}), Recursion()
        weights = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(
            weights,
            LEARNING_RATE,
            momentum=0.9,
            nesterov=True,
            weight_decay=schedule.weight_decay,
        )
        stepper = Stepper(model, self.task, self.settings, [optimizer])
        return lambda: stepper.step([self.batch])

    def train_plain(self, loader: Loader) -> None:
        """Steps without noise from scratch."""
        step = self.plain_step()
        for _ in loader:
            step()

    def train_noisy(self, loader: Loader) -> None:
        """Steps with noise from scratch, at a budget of half the cost that falls at once."""
        noisy = rbpfx.insert_noise(self.model, self.analysis, self.method)
        selection = rbpfx.Selection(self.analysis, Target(macs=0.5))
        schedule = Recursion(epochs=100, front=0, budget_ramp=1e-6)  # nothing is decided before
        training = RecursiveTraining(
            noisy, selection, self.method, self.task, schedule, None, self.settings
        )
        training.run(loader)

    def peak(self, train: Callable[[Loader], None]) -> int:
        """The most bytes allocated in a few steps."""
        return peak_allocated(lambda: until_enough(train, Steps(self, MEMORY_STEPS)), self.device)


class Enough(Exception):
    """Ends a training from within its loader."""


class Steps:
    """A loader that hands out a batch a number of times, and then ends the training.

    Args:
        pair: Whose batch.
        count: How often.
        turn: Called before every batch.

    Attributes:
        turns: Seconds of every call of `turn`.
        steps: Seconds that passed between a batch and the wish for the next one.
    """

    def __init__(self, pair: Pair, count: int, turn: Callable[[], Any] = lambda: None) -> None:
        self.pair = pair
        self.count = count
        self.turn = turn
        self.dataset = range(count * len(pair.images))  # else the examples would be counted
        self.turns: list[float] = []
        self.steps: list[float] = []

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self.count):
            start = self._now()
            self.turn()
            middle = self._now()
            yield self.pair.batch
            self.turns.append(middle - start)
            self.steps.append(self._now() - middle)
        raise Enough

    def _now(self) -> float:
        if self.pair.device.type == "cuda":
            torch.cuda.synchronize(self.pair.device)
        return time.perf_counter()


def times(pair: Pair, count: int) -> tuple[list[float], list[float]]:
    """Seconds of steps without and with noise, in turns; the first ones are not counted."""
    loader = Steps(pair, WARM_UP + count, pair.plain_step())
    until_enough(pair.train_noisy, loader)
    return loader.turns[WARM_UP:], loader.steps[WARM_UP:]


def until_enough(train: Callable[[Loader], None], loader: Loader) -> None:
    try:
        train(loader)
    except (Enough, InputError) as error:  # what a loader raises comes wrapped from a training
        if not isinstance(error.__cause__ or error, Enough):
            raise


if __name__ == "__main__":
    main()
