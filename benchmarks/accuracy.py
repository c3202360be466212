"""What pruning costs: every method at every budget from the same dense networks, and a page of it.

One row per network, method, mode, ratio and seed. Whatever the method, a row starts from the same
trained weights, sees the same training images in batches of 128 (CIFAR-10 shifted and mirrored,
MNIST as it is), learns half from the dense network's outputs, spends the same number of epochs in
all, has its BatchNorm statistics refreshed after the cut and is fine-tuned by the same SGD on a
cosine from the same learning rate. Methods that train before they cut spend `--noise-share` of the
epochs on that; one-shot rankings and Torch-Pruning without sparse learning have all of them left
for fine-tuning. Multiply-accumulates are counted on the network that comes out, by one counter.

    python -m benchmarks.accuracy --data-dir DIR --networks lenet5 resnet20
    python -m benchmarks.accuracy --data-dir DIR --shard 1/2 --results part1.json
    python -m benchmarks.accuracy --merge part0.json part1.json --markdown docs/accuracy.md

The mode `recursive` decides group after group with training in between; `joint` decides all
groups at one moment. The rankings (magnitude, bn-scale, taylor, random) are one-shot in the mode
`joint`. How Torch-Pruning is used is written in `_torch_pruning.py`. A dense LeNet is trained per
seed; of the other networks there is one, so that their seeds differ in the pruning only.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import _modelopt, _torch_pruning
from benchmarks._accuracy_report import page, tables
from benchmarks._accuracy_rows import (
    NOISE,
    RANKINGS,
    TRAINED,
    Budget,
    Case,
    in_brief,
    is_automatic,
    run,
)
from benchmarks._data import ImageData, add_data_argument, cifar10, mnist
from benchmarks._record import Deadline, Record, write_aside
from benchmarks._train import (
    CIFAR_NETWORKS,
    LENETS,
    RESNETS,
    adapted_resnet,
    dense_cifar,
    dense_lenet,
)

RESULTS = Path(__file__).parent / "results" / "accuracy.json"
NETWORKS = ("lenet300100", "lenet5", "resnet20", "resnet18", "resnet56", "vgg16_bn")
WITH_BLOCKS = ("resnet18", *RESNETS)
WITHOUT_BATCHNORM = ("lenet300100", "lenet5")
ADAPTATION_IMAGES = 10_000  # of the JPEG version, whatever number the rows use

# In the order in which they are run.
METHODS = ("rbp", *_torch_pruning.METHODS, _modelopt.METHOD, *TRAINED[1:], *RANKINGS)
MODES = ("recursive", "joint")
RATIOS = ("2", "4", "1.5", "2.5")


def main() -> None:
    """Run what is missing, print the tables."""
    options = _parser().parse_args()
    record, main_record = Record(options.results), Record(RESULTS)
    if options.merge:
        merge(record, options.merge)
    else:
        run_missing(record, main_record, options)
    rows = sorted(record.rows.values(), key=_place)
    print(tables(rows))
    if options.markdown:
        write_aside(options.markdown, page(rows, record.environments))


def _place(row: dict[str, Any]) -> tuple[int, int]:
    return METHODS.index(row["method"]), MODES.index(row["mode"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_data_argument(parser)
    parser.add_argument("--data", choices=["original", "jpeg"], default="jpeg", help="CIFAR-10")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument(
        "--ratios",
        nargs="+",
        default=RATIOS,
        help="times fewer MACs, or auto, or auto@STRENGTH; in this order",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=10_000, help="training images; 0 for all")
    parser.add_argument("--epochs", type=float, default=10, help="of every method, in all")
    parser.add_argument("--noise-share", type=float, default=0.5, help="of them, before the cut")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th row, from the i-th on")
    parser.add_argument("--retry", action="store_true", help="run rows again that failed")
    parser.add_argument("--seconds", type=float, help="time box")
    parser.add_argument("--merge", type=Path, nargs="+", help="add the rows of other files; no run")
    parser.add_argument("--markdown", type=Path, help="write the page")
    return parser


# -- which rows ----------------------------------------------------------------------------


def cases(
    networks: Iterable[str],
    methods: Iterable[str],
    modes: Iterable[str],
    ratios: Iterable[str],
    seeds: Iterable[int],
) -> list[Case]:
    """All rows that make sense: the first ratio and seed of everything, then ever further out."""
    ratios, seeds, networks = list(ratios), list(seeds), list(networks)
    ordered = [method for method in METHODS if method in set(methods)]
    found = [
        Case(network, method, mode, ratio, seed)
        for network in networks
        for method in ordered
        for mode in modes
        for ratio in ratios
        for seed in seeds
        if makes_sense(network, method, mode, ratio)
    ]
    distance = {
        (ratio, seed): (i + j, i) for i, ratio in enumerate(ratios) for j, seed in enumerate(seeds)
    }
    # Sorting is stable: within a distance, networks and methods keep their order.
    return sorted(found, key=lambda case: distance[case.ratio, case.seed])


def makes_sense(network: str, method: str, mode: str, ratio: str) -> bool:
    """Whether there is such a row."""
    if method in _torch_pruning.METHODS:
        inner = _torch_pruning.METHODS[method].inner_only
        targeted = not is_automatic(ratio)
        return mode == "joint" and targeted and (network in WITH_BLOCKS or not inner)
    if method == _modelopt.METHOD:
        return mode == "joint" and not is_automatic(ratio)
    if is_automatic(ratio) and method not in NOISE:
        return False
    return method != "bn-scale" or network not in WITHOUT_BATCHNORM


def key_of(case: Case, data: str, budget: Budget) -> str:
    """What identifies a row; rows of other budgets are other rows."""
    return (
        f"{case.network}/{data}/{case.method}/{case.mode}/ratio={case.ratio}/seed={case.seed}"
        f"/images={budget.images}/epochs={budget.epochs:g}/noise={budget.noise_share:g}"
    )


def shard(found: list[Case], which: str) -> list[Case]:
    """Every n-th case from the i-th on, for `i/n`."""
    first, _, count = which.partition("/")
    if not 0 <= int(first) < int(count):
        raise ValueError(f"--shard {which}: i/n with i from 0 to n - 1")
    return found[int(first) :: int(count)]


def merge(record: Record, files: Iterable[Path]) -> None:
    """Add the rows of other files, with their environments; of two with one key, the later one."""
    for path in files:
        content = json.loads(path.read_text())
        offset = len(record.environments)
        record.environments += content["environments"]
        for key, row in content["rows"].items():
            record.rows[key] = row | {"environment": row["environment"] + offset}
    content = {"environments": record.environments, "rows": record.rows}
    write_aside(record.path, json.dumps(content, indent=1) + "\n")


# -- running them --------------------------------------------------------------------------


def run_missing(record: Record, main_record: Record, options: argparse.Namespace) -> None:
    """Run the rows that neither record has, until the time is over."""
    deadline = Deadline(options.seconds)
    budget = Budget(options.epochs, options.noise_share, options.images)
    loaded = _Loaded(options)
    found = cases(options.networks, options.methods, options.modes, options.ratios, options.seeds)
    for case in shard(found, options.shard):
        key = key_of(case, loaded.data_name(case.network), budget)
        known = record.rows.get(key) or main_record.rows.get(key)
        if known and not (options.retry and "failure" in known):
            continue
        if deadline.expired:
            print("the time is over")
            return
        print(f"{deadline.elapsed:6.0f} s  {key}", flush=True)
        data = loaded.data(case.network)
        row = run(case, loaded.dense(case.network, case.seed), data, budget, options.device)
        record.add(key, row)
        print(f"          {in_brief(row)}", flush=True)


class _Loaded:
    """Data sets and dense networks, each loaded when it is first asked for."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self._data: dict[str, ImageData] = {}
        self._dense: dict[tuple[str, int], nn.Module] = {}

    def data_name(self, network: str) -> str:
        if network in LENETS:
            return "MNIST"
        return "CIFAR-10 (JPEG)" if self.options.data == "jpeg" else "CIFAR-10"

    def data(self, network: str) -> ImageData:
        name, folder = self.data_name(network), self.options.data_dir
        if name not in self._data:
            if name == "MNIST":
                self._data[name] = mnist(folder)
            else:
                jpeg = self.options.data == "jpeg"
                here = folder and (jpeg or (Path(folder) / "cifar-10-batches-py").is_dir())
                self._data[name] = cifar10(folder if here else None, jpeg=jpeg)
        return self._data[name]

    def dense(self, network: str, seed: int) -> nn.Module:
        seed = seed if network in LENETS else 0
        if (network, seed) not in self._dense:
            dense = self._trained(network, seed).to(self.options.device)
            # On CPUs convolutions train faster in this memory format.
            self._dense[network, seed] = dense.to(memory_format=torch.channels_last).eval()
        return self._dense[network, seed]

    def _trained(self, network: str, seed: int) -> nn.Module:
        data, options = self.data(network), self.options
        if network in LENETS:
            return dense_lenet(network, seed, data)
        if network in CIFAR_NETWORKS:
            return dense_cifar(network, seed, data, device=options.device)
        if options.data == "original":
            return RESNETS[network](options.data_dir)  # trained on these very images
        return adapted_resnet(
            network, data, options.data_dir, ADAPTATION_IMAGES, device=options.device
        )


if __name__ == "__main__":
    main()
