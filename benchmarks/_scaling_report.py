"""The section of a page that plans a long training: tables of what was measured and assumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

from benchmarks._scaling import (
    Link,
    Network,
    Work,
    all_reduce,
    device_memory,
    host_memory,
    sharded_memory,
    training_hours,
    waiting,
)
from rbpfx.training.loop import EPOCHS

Rows = Mapping[str, Mapping[str, Any]]

IMAGES_PER_SECOND = 2470.0
PUBLISHED_SPEEDUP = 6.72
"""ResNet-50 in mixed precision on one A100 of 80 GB, and what eight of them gave, as NVIDIA
publishes it: github.com/NVIDIA/DeepLearningExamples, PyTorch/Classification/ConvNets/resnet50v1.5.
"""
REACHED = 0.7
"""Share of a link's nominal bandwidth that an all-reduce reaches (ours)."""
LINKS = {
    "NVLink 3, 300 GB/s": Link(REACHED * 300e9, 10e-6),
    "PCIe 4 x16, 32 GB/s": Link(REACHED * 32e9, 10e-6),
    "10 Gbit/s Ethernet": Link(REACHED * 1.25e9, 50e-6),
}
"""Nominal bandwidths in one direction; the latencies are ours."""
PROCESSES = (1, 2, 4, 8)
BATCH = 256
DISK = 500e6
"""Bytes per second that a disk takes (ours)."""
ILSVRC2012 = Work(1_281_167, 50_000, EPOCHS, EPOCHS)


def section(rows: Rows, environments: Sequence[Mapping[str, Any]]) -> str:
    """The tables, in Markdown.

    Args:
        rows: Of the record.
        environments: Of the record.
    """
    steps = _of(rows, "step/")
    noise = max(row["time_ratio"] for row in steps)
    (found,) = _of(rows, "network/")
    network = Network(**{name: found[name] for name in Network.__dataclass_fields__})
    machine = environments[steps[0]["environment"]]
    parts = [
        f"Measured on: {machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, "
        f"{machine['date'][:10]}.",
        _check(rows),
        _checkpoint(rows, network),
        _memory(network, found["network"]),
        _hours(network, found["network"], noise),
    ]
    return "\n\n".join(parts)


def _check(rows: Rows) -> str:
    """What the model says of two processes, beside what was measured."""
    lines = []
    for step, two in zip(_of(rows, "step/"), _of(rows, "two/"), strict=True):
        alone = two["milliseconds"]["alone"]
        lines += [
            [
                two["batch"],
                kind,
                f"{time:.0f} ms",
                f"{two['milliseconds'][name]:.0f} ms",
                _spread(two, name),
                _spread(two, f"{name}_overlapped"),
            ]
            for kind, name, time in (
                ("without noise", "spread", alone),
                ("with noise", "noisy", alone * step["time_ratio"]),
            )
        ]
    two = _of(rows, "two/")[-1]
    ratios = ", ".join(f"{_spread(s, 'time')} at batch {s['batch']}" for s in _of(rows, "step/"))
    networks = {key.split("/")[1] for key in rows if key.startswith("two/")}
    return (
        "### The check: two processes\n\n"
        f"{', '.join(networks)}, one thread per process, over gloo: "
        f"{two['bandwidth'] / 1e9:.2f} GB/s and {two['latency'] * 1e6:.0f} µs per message, "
        f"{two['gradient_bytes'] / 1e6:.1f} MB of gradients. A step with noise takes {ratios} of "
        "the time of one without, in one process. Ratios are medians over the rounds, in brackets "
        "the quartiles; the machine was at other work as well. *Alone* is a step of both processes "
        "at the same time without averaging, times that ratio if it has noise. *Hidden* supposes "
        "that averaging costs nothing during the backward pass, *not hidden* that it does not "
        "overlap at all, as where both cores compute.\n\n"
        + _table(
            lines,
            [
                "batch per process",
                "step",
                "alone",
                "two processes",
                "predicted/measured, not hidden",
                "predicted/measured, hidden",
            ],
        )
    )


def _checkpoint(rows: Rows, network: Network) -> str:
    (row,) = _of(rows, "checkpoint/")
    return (
        "### Checkpoints\n\n"
        f"Measured: {row['bytes'] / 1e6:.1f} MB, predicted/measured {row['size_ratio']:.3f}; "
        f"written, flushed and checked in {row['milliseconds']:.0f} ms. Of the network below: "
        f"{network.checkpoint / 1e6:.0f} MB, {network.checkpoint / DISK:.1f} s at "
        f"{DISK / 1e6:.0f} MB/s (assumed), during which all processes wait; and "
        f"{host_memory(network) / 1e6:.0f} MB of host memory in every process for the states it "
        "can be set back to, with or without a directory."
    )


def _memory(network: Network, name: str) -> str:
    lines = []
    for processes in PROCESSES:
        parts = device_memory(network, BATCH, processes)
        sizes = [*parts.values(), sum(parts.values()), sharded_memory(network, processes)]
        lines.append([processes, *(f"{size / 1e9:.2f}" for size in sizes)])
    headers = ["GPUs", *device_memory(network, BATCH, 1), "all", "in parts (Sharded)"]
    return (
        f"### Memory of a process: {name}, batch {BATCH}, GB\n\n"
        f"Activations are measured here, in float32: {network.activations / 1e6:.0f} MB per "
        "example; in mixed precision they are about half. *In parts*: weights, gradients and "
        "momentum while fine-tuning with `Sharded`.\n\n" + _table(lines, headers)
    )


def _hours(network: Network, name: str, noise: float) -> str:
    compute = BATCH / IMAGES_PER_SECOND
    lines = []
    for label, link in LINKS.items():
        for processes in PROCESSES:
            wait = waiting(network, compute, processes, link)
            hours = training_hours(ILSVRC2012, BATCH, processes, compute, wait, noise)
            lines.append(
                [
                    label,
                    processes,
                    f"{1e3 * compute:.0f} ms",
                    f"{1e3 * all_reduce(network.gradients, processes, link):.1f} ms",
                    f"{1e3 * wait:.1f} ms",
                    f"{processes * compute / (compute + wait):.2f}x",
                    f"{hours:.2f}",
                ]
            )
    epochs = f"{ILSVRC2012.noise_epochs:g} + {ILSVRC2012.tuning_epochs:g}"
    return (
        f"### Hours: {name} on ILSVRC2012, default schedule\n\n"
        f"All of this is predicted, nothing measured. Assumed: {IMAGES_PER_SECOND:.0f} images per "
        f"second and GPU without noise and {BATCH} images per GPU (A100, mixed precision, "
        "published by [NVIDIA](https://github.com/NVIDIA/DeepLearningExamples)); nominal "
        f"bandwidths per direction, of which {REACHED:.0%} are reached; 10 µs per message, 50 µs "
        f"over Ethernet; a step with noise {noise:.2f} times as long, as measured above on a CPU; "
        f"{epochs} epochs, the smaller network as slow as the large one, three passes over the "
        "validation data; data that are there in time.\n\n"
        + _table(
            lines,
            ["link", "GPUs", "step alone", "all-reduce", "waiting", "speed-up", "hours"],
        )
        + f"\n\nNVIDIA's own training reaches {PUBLISHED_SPEEDUP}x on eight GPUs with NVLink: the "
        "model leaves out the loading of data, stragglers and the launch of kernels, and its hours "
        "are optimistic by as much."
    )


def _of(rows: Rows, prefix: str) -> list[Mapping[str, Any]]:
    return [row for key, row in rows.items() if key.startswith(prefix)]


def _spread(row: Mapping[str, Any], name: str) -> str:
    low, high = row[f"{name}_quartiles"]
    return f"{row[f'{name}_ratio']:.2f} ({low:.2f}-{high:.2f})"


def _table(lines: list[list[Any]], headers: list[str]) -> str:
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)
