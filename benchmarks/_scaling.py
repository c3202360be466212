"""What a training costs that is spread over processes: a model on paper, in bytes and seconds.

Weights are in float32. Gradients are averaged by a ring all-reduce, in buckets, while the backward
pass goes on; what it does not hide is waited for.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

FLOAT = 4
BUCKET = 25 * 2**20
"""Bytes that `DistributedDataParallel` averages at a time, by default."""
BACKWARD = 2 / 3
"""Share of a training step that is its backward pass: twice the work of the forward pass."""
SMALL_MESSAGES = 3
"""All-reduces of a few bytes in a step: the losses, whether to stop or save, the gradients used."""
SNAPSHOTS = 2
"""States of the training that are held for set-backs and checkpoints: one good, one on trial."""
NETWORKS_HELD = 3
"""Networks on the device while noise is trained: the dense one, its graph, the one with noise."""
EVALUATIONS = 3
"""Passes over the validation data: the dense network, after the cut, at the end."""
REFRESH = 64
"""Batches from which the statistics of BatchNorm are estimated anew, at most."""


@dataclass(frozen=True)
class Link:
    """What connects two neighbours of a ring.

    Attributes:
        bandwidth: Bytes per second in one direction.
        latency: Seconds of a message without content.
    """

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Network:
    """A network that is trained.

    Attributes:
        parameters: Number of weights.
        buffers: Number of other values in its state.
        units: Number of gates.
        activations: Bytes that a training step with noise holds per example.
    """

    parameters: int
    buffers: int
    units: int
    activations: float

    @property
    def gradients(self) -> int:
        """Bytes of all gradients."""
        return FLOAT * self.parameters

    @property
    def state(self) -> int:
        """Bytes of weights and buffers."""
        return FLOAT * (self.parameters + self.buffers)

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint: weights and momentum; gates, constants and moments of Adam."""
        return self.state + self.gradients + (4 * FLOAT + 1) * self.units


@dataclass(frozen=True)
class Work:
    """What is trained on.

    Attributes:
        examples: In the training data.
        validation: In the validation data.
        noise_epochs: Passes with noise.
        tuning_epochs: Passes of fine-tuning.
    """

    examples: int
    validation: int
    noise_epochs: float
    tuning_epochs: float


def all_reduce(size: float, processes: int, link: Link) -> float:
    """Seconds until all have the sum: `2 (n - 1)` messages of an n-th of the bytes, on a ring."""
    messages = 2 * (processes - 1)
    return messages * (size / processes / link.bandwidth + link.latency)


def waiting(
    network: Network, compute: float, processes: int, link: Link, overlap: float = 1.0
) -> float:
    """Seconds of a step in which a process waits for the others.

    The last bucket is full when the backward pass is over, so at least that is waited for.

    Args:
        network: Whose gradients are averaged.
        compute: Seconds of the step in one process.
        processes: How many there are.
        link: What connects them.
        overlap: Share of the backward pass in which communication costs nothing: 1 where it has
            engines of its own, 0 where it takes the cores that compute.
    """
    averaging = all_reduce(network.gradients, processes, link)
    last = all_reduce(min(network.gradients, BUCKET), processes, link)
    messages = SMALL_MESSAGES * all_reduce(0, processes, link)
    return max(averaging - overlap * BACKWARD * compute, last) + messages


def device_memory(network: Network, batch: int, processes: int) -> dict[str, float]:
    """Bytes of a process while noise is trained, by what they are for.

    Args:
        network: What is trained.
        batch: Examples per process.
        processes: How many there are.
    """
    spread = processes > 1
    return {
        "weights": NETWORKS_HELD * network.state,
        "gradients": network.gradients * (2 if spread else 1),  # and the buckets
        "momentum": network.gradients,
        "gates and Adam": 4 * FLOAT * network.units,
        "activations": batch * network.activations,
        "noise of the others": FLOAT * batch * (processes - 1) * network.units,
    }


def host_memory(network: Network) -> int:
    """Bytes of a process for the states that it can be set back to."""
    return SNAPSHOTS * network.checkpoint


def sharded_memory(network: Network, processes: int) -> float:
    """Bytes of weights, gradients and momentum of a process that fine-tunes in parts (FSDP2)."""
    return (network.state + 2 * network.gradients) / processes


def training_hours(
    work: Work, batch: int, processes: int, compute: float, wait: float, noise: float
) -> float:
    """Hours of `prune`, without loading data and measuring latencies.

    Args:
        work: What is trained on.
        batch: Examples per process and step.
        processes: How many there are.
        compute: Seconds of a step without noise in one process; fine-tuning counts as if nothing
            had been cut.
        wait: Seconds of a step in which a process waits.
        noise: Seconds of a step with noise over one without.
    """
    steps = ceil(work.examples / (batch * processes))
    forward = (1 - BACKWARD) * compute
    forwards = EVALUATIONS * ceil(work.validation / (batch * processes)) + min(steps, REFRESH)
    trained = work.noise_epochs * (compute * noise + wait) + work.tuning_epochs * (compute + wait)
    return (steps * trained + forwards * forward) / 3600
