"""Times of single operators on this machine, measured once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rbpfx.bars import steps
from rbpfx.circumstances import processor
from rbpfx.files import written_aside

SECONDS = 0.02
REPEATS = 30
"""An operator is called for so long, or so often, but twice at least. The first call, which picks
kernels, does not count; of the others the fastest does, as whatever disturbs a measurement makes it
longer. These values are ours."""

MEASURE = 1
"""The version of this way of measuring: raised if it changes, so that kept times do not count."""

SWITCHES = {
    "cpu": ("mkldnn.enabled", "mkldnn.matmul.fp32_precision", "mkldnn.conv.fp32_precision"),
    "cuda": (
        *(f"cudnn.{name}" for name in ("enabled", "benchmark", "deterministic", "allow_tf32")),
        *("cudnn.conv.fp32_precision", "cuda.matmul.allow_tf32", "cuda.matmul.fp32_precision"),
    ),
}
"""What is set in `torch.backends` for the whole process and picks kernels, by kind of device."""

Call = Callable[[], object]
First = Callable[[Callable[[], Any]], Any]


def alone(work: Callable[[], Any]) -> Any:
    """Do some work in the only process that there is."""
    return work()


@dataclass(frozen=True)
class Operator:
    """One operator on tensors of given shapes.

    Attributes:
        key: Describes it: operators of one key take the same time.
        prepare: Allocates its operands and returns a call of it.
    """

    key: str
    prepare: Callable[[], Call]


class OperatorTimes:
    """Seconds of operators, by key.

    The times are kept in a file of the user's cache folder (`RBPFX_CACHE`, else `XDG_CACHE_HOME`,
    else `~/.cache`), one for every device, version of torch, number of threads and
    switch of torch that picks kernels.

    Args:
        device: Where the operators run.
        path: Another file; None for the one in the cache.
        first: Does work in the first process of several and gives its outcome to all.
    """

    def __init__(
        self, device: torch.device, path: Path | None = None, first: First = alone
    ) -> None:
        self.device = device
        self.first = first
        self.machine = describe_machine(device)
        self.path = path or cache_directory() / f"operators-{_digest(self.machine)}.json"
        self.seconds: dict[str, float] = self._load()

    def __getitem__(self, key: str) -> float:
        """Seconds of an operator that was measured."""
        return self.seconds[key]

    def measure(self, operators: Iterable[Operator], progress: bool = False) -> None:
        """Time the operators that the table does not have yet, and save it.

        Args:
            operators: The operators.
            progress: Whether to show a progress bar.
        """
        self.seconds = self.first(lambda: self._completed(operators, progress))

    def _completed(self, operators: Iterable[Operator], progress: bool) -> dict[str, float]:
        missing = {o.key: o for o in operators if o.key not in self.seconds}
        if missing:
            with torch.no_grad():
                for operator in steps(missing.values(), "timing operators", visible=progress):
                    self.seconds[operator.key] = fastest(operator.prepare(), self.device)
            self._save()
        return self.seconds

    def _load(self) -> dict[str, float]:
        """The times in the file; none if there is no file, or it is damaged or of another kind."""
        try:
            content = json.loads(self.path.read_text())
            if content["machine"] == self.machine:
                return {str(key): float(value) for key, value in content["seconds"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass
        return {}

    def _save(self) -> None:
        """Write the file aside and rename it; a cache that cannot be written is done without."""
        self.seconds = {**self._load(), **self.seconds}  # another process may have added some
        content = json.dumps({"machine": self.machine, "seconds": self.seconds}, indent=0)
        try:
            with written_aside(self.path) as file:
                file.write_text(content)
        except OSError:
            pass


def fastest(call: Call, device: torch.device) -> float:
    """The shortest of repeated times of a call in seconds, after one call that does not count."""
    first = _elapsed(call, device)
    times = [_elapsed(call, device)]
    while len(times) < REPEATS and first + sum(times) < SECONDS:
        times.append(_elapsed(call, device))
    return min(times)


def filled(like: Tensor, shape: Iterable[int], channels_last: bool = False) -> Tensor:
    """A tensor of another shape, filled with a number that is quick to compute with.

    Zeros would not do: untouched memory is a single page in the cache of the processor.

    Args:
        like: Tells dtype and device; may be a fake tensor.
        shape: The shape.
        channels_last: Whether to lay out a 4-d tensor with the channels last.
    """
    value = 0.5 if like.is_floating_point() else 1 if like.dtype == torch.bool else 0
    tensor = torch.full(tuple(shape), value, dtype=like.dtype, device=like.device)
    if channels_last and tensor.ndim == 4:
        tensor = tensor.to(memory_format=torch.channels_last)
    return tensor


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What times depend on, beside the operator."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{processor()} {torch.backends.cpu.get_cpu_capability()}"
    threads = torch.get_num_threads() if device.type == "cpu" else None
    switches = {name: _switch(name) for name in SWITCHES.get(device.type, ())}
    switches["float32"] = _told(torch.get_float32_matmul_precision)
    described = {"device": name, "threads": threads, "torch": torch.__version__}
    return {**described, "measure": MEASURE, "switches": switches}


def _switch(name: str) -> str:
    return _told(lambda: attrgetter(name)(torch.backends))


def _told(read: Callable[[], object]) -> str:
    """What a switch is at; empty where torch does not tell.

    Torch 2.9 has other switches for the precision than 2.8, and raises where both were used.
    """
    try:
        return str(read())
    except (AttributeError, RuntimeError):
        return ""


def cache_directory() -> Path:
    """The folder for what can be measured or made again."""
    chosen = os.environ.get("RBPFX_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rbpfx"


def _elapsed(call: Call, device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _digest(machine: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()[:12]
