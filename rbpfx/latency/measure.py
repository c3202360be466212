"""Networks timed side by side, round by round, so that a noisy machine slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, overload

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from rbpfx.errors import InputError
from rbpfx.graph.capture import ExampleInputs, call_with, evaluating
from rbpfx.graph.copying import copy_model
from rbpfx.graph.examples import count_examples, resize_batch
from rbpfx.graph.garbage import collection_paused
from rbpfx.latency.memory import Memory, parameter_bytes, peak_allocated
from rbpfx.latency.results import Comparison, Latency
from rbpfx.networks import inside
from rbpfx.training.layout import to_channels_last

if TYPE_CHECKING:
    from typing_extensions import Unpack

LEAST_ROUNDS = 3
"""Rounds that are measured whatever time they take."""

Networks: TypeAlias = nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module]


class Options(TypedDict, total=False):
    """What `measure_latency` and `compare_latency` take by name; explained there."""

    seconds: float
    max_repeats: int
    warmup: int
    threads: int | None
    channels_last: bool
    dtype: torch.dtype | None
    compile: bool
    memory: bool


@overload
def measure_latency(
    models: nn.Module, example_inputs: ExampleInputs, **options: Unpack[Options]
) -> Latency: ...
@overload
def measure_latency(
    models: nn.Module,
    example_inputs: ExampleInputs,
    *,
    batch_sizes: Sequence[int],
    **options: Unpack[Options],
) -> dict[int, Latency]: ...
@overload
def measure_latency(
    models: Sequence[nn.Module], example_inputs: ExampleInputs, **options: Unpack[Options]
) -> list[Latency]: ...
@overload
def measure_latency(
    models: Sequence[nn.Module],
    example_inputs: ExampleInputs,
    *,
    batch_sizes: Sequence[int],
    **options: Unpack[Options],
) -> dict[int, list[Latency]]: ...
@overload
def measure_latency(
    models: Mapping[str, nn.Module], example_inputs: ExampleInputs, **options: Unpack[Options]
) -> dict[str, Latency]: ...
@overload
def measure_latency(
    models: Mapping[str, nn.Module],
    example_inputs: ExampleInputs,
    *,
    batch_sizes: Sequence[int],
    **options: Unpack[Options],
) -> dict[int, dict[str, Latency]]: ...
def measure_latency(
    models: Networks,
    example_inputs: ExampleInputs,
    *,
    batch_sizes: Sequence[int] | None = None,
    seconds: float = 2.0,
    max_repeats: int = 50,
    warmup: int = 2,
    threads: int | None = None,
    channels_last: bool = False,
    dtype: torch.dtype | None = None,
    compile: bool = False,
    memory: bool = False,
) -> Any:
    """Time forward passes of one or several networks, interleaved round by round.

    In every other round the networks take their turns in reversed order. On CUDA devices the time
    is that between two events of the device, elsewhere that of the clock on the wall.

    Args:
        models: A network, or a sequence or mapping of networks that take the same inputs and lie
            on the same device. They are left as they are.
        example_inputs: What they are called with.
        batch_sizes: Numbers of examples to measure with, to which the example inputs are cut or
            repeated; as many as the example inputs have if None.
        seconds: Stop after about this time for all networks together, warm-up apart, per batch
            size (but after three rounds at least).
        max_repeats: Stop after this many rounds.
        warmup: Rounds before those that count, 1 at least.
        threads: CPU threads for operators; as torch is set if None, and set back afterwards.
        channels_last: Lay out images and 4-d weights with the channels last.
        dtype: Convert floating-point weights and inputs to this dtype.
        compile: Compile the networks with `torch.compile`; compilation is not counted.
        memory: Also measure the memory of a pass.

    Returns:
        A `Latency` for a network, a list of them for a sequence, a dictionary for a mapping; with
        `batch_sizes` a dictionary from every size to these.

    Raises:
        InputError: There is no network, the networks lie on different devices, or one of them
            does not run on the inputs.

    Examples:
        >>> latency = measure_latency(nn.Linear(8, 8), torch.zeros(4, 8), max_repeats=3)
        >>> latency.repeats, latency.batch_size
        (3, 4)
    """
    named = _named(models)
    device = _common_device(named)
    _require_positive(warmup=[warmup], max_repeats=[max_repeats], batch_sizes=batch_sizes or ())
    _require_positive(threads=[] if threads is None else [threads])
    inputs: Any = dict(example_inputs) if isinstance(example_inputs, Mapping) else example_inputs
    if dtype is not None:
        inputs = tree_map_only(
            Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, inputs
        )
    ready = [_prepared(n, network, channels_last, dtype, compile) for n, network in named.items()]
    found: dict[int, Any] = {}
    with _threads(threads), evaluating(*ready), torch.no_grad():
        for size in [count_examples(inputs, 0)] if batch_sizes is None else batch_sizes:
            batch = inputs if batch_sizes is None else resize_batch(inputs, size)
            if channels_last:
                batch = to_channels_last(batch)
            _warm_up(dict(zip(named, ready, strict=True)), batch, warmup)
            times = _rounds(ready, batch, device, seconds, max_repeats)
            latencies = [
                _latency(network, batch, device, measured, memory)
                for network, measured in zip(ready, times, strict=True)
            ]
            found[size] = _formed(models, latencies)
    return found if batch_sizes is not None else next(iter(found.values()))


@overload
def compare_latency(
    baseline: nn.Module,
    model: nn.Module,
    example_inputs: ExampleInputs,
    **options: Unpack[Options],
) -> Comparison: ...
@overload
def compare_latency(
    baseline: nn.Module,
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    batch_sizes: Sequence[int],
    **options: Unpack[Options],
) -> dict[int, Comparison]: ...
def compare_latency(
    baseline: nn.Module,
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    batch_sizes: Sequence[int] | None = None,
    **options: Unpack[Options],
) -> Any:
    """Measure in turns how many times faster a network is than another one.

    Args:
        baseline: The network to compare with, the dense one for example.
        model: The network that is meant to be faster.
        example_inputs: What both are called with.
        batch_sizes: See `measure_latency`.
        options: As for `measure_latency`.

    Returns:
        The comparison; with `batch_sizes` a dictionary from every size to one.

    Raises:
        InputError: As for `measure_latency`.

    Examples:
        >>> compare_latency(nn.Linear(99, 99), nn.Linear(99, 9), torch.zeros(4, 99)).speedup
        ... # doctest: +SKIP
        1.3
    """
    pair = [baseline, model]
    if batch_sizes is None:
        return Comparison(*measure_latency(pair, example_inputs, **options))
    measured = measure_latency(pair, example_inputs, batch_sizes=batch_sizes, **options)
    return {size: Comparison(*both) for size, both in measured.items()}


# -- networks ------------------------------------------------------------------------------


def _named(models: Networks) -> dict[str, nn.Module]:
    """The networks by what errors call them."""
    if isinstance(models, nn.Module):
        named = {type(models).__name__: models}
    elif isinstance(models, Mapping):
        named = {str(name): network for name, network in models.items()}
    elif not isinstance(models, Iterable):
        named = {"the model": models}
    else:
        named = {f"network {place}": network for place, network in enumerate(models)}
    if not named:
        raise InputError("there is no network to measure; pass one, or a list or dict of them")
    for name, network in named.items():
        if not isinstance(network, nn.Module):
            remedy = inside(network) or "wrap it in a module whose forward calls it"
            raise InputError(
                f"{name} is a {type(network).__name__}, not a torch.nn.Module; {remedy}"
            )
    return named


def _formed(models: Networks, latencies: list[Latency]) -> Any:
    """Results in the form in which the networks came."""
    if isinstance(models, nn.Module):
        return latencies[0]
    return dict(zip(models, latencies, strict=True)) if isinstance(models, Mapping) else latencies


def _common_device(named: Mapping[str, nn.Module]) -> torch.device:
    devices = {
        name: {tensor.device for tensor in (*network.parameters(), *network.buffers())}
        for name, network in named.items()
    }
    found = set[torch.device]().union(*devices.values())
    if len(found) > 1 or any(device.type == "meta" for device in found):
        places = (f"{n} on {', '.join(sorted(map(str, d)))}" for n, d in devices.items() if d)
        raise InputError(
            f"networks are timed side by side on one device, but there is {'; '.join(places)}; "
            "move all of them to one with .to(device)"
        )
    return next(iter(found), torch.device("cpu"))


def _prepared(
    name: str, network: nn.Module, channels_last: bool, dtype: torch.dtype | None, compile: bool
) -> nn.Module:
    """The network as it is measured: itself, or a converted copy."""
    if channels_last or dtype is not None:
        try:
            network = copy_model(network, {})
        except Exception as error:
            raise InputError(
                f"{name} cannot be copied ({error}), so channels_last=True and dtype=... cannot be "
                "tried on it; convert the network yourself and leave them out"
            ) from error
        network = network.to(dtype=dtype)
        if channels_last:
            to_channels_last(network)
    return torch.compile(network, dynamic=False) if compile else network  # type: ignore[return-value]


def _require_positive(**values: Sequence[int]) -> None:
    """Raise an `InputError` that names the first value that is no positive whole number."""
    for name, numbers in values.items():
        for number in numbers:
            if not isinstance(number, int) or number < 1:
                raise InputError(f"{name}={number!r} must be a whole number, 1 at least")


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


# -- measuring -----------------------------------------------------------------------------


def _warm_up(named: Mapping[str, nn.Module], inputs: Any, rounds: int) -> None:
    for _ in range(rounds):
        for name, network in named.items():
            try:
                call_with(network, inputs)
            except Exception as error:
                tensors = [v for v in tree_leaves(inputs) if isinstance(v, Tensor)]
                described = (f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in tensors)
                raise InputError(
                    f"{name} does not run on the example inputs ({'; '.join(described)}); pass "
                    f"what its forward takes, on its own device: {error}"
                ) from error


@collection_paused()
def _rounds(
    networks: Sequence[nn.Module],
    inputs: Any,
    device: torch.device,
    seconds: float,
    max_repeats: int,
) -> list[list[float]]:
    """Seconds of every network in every round."""
    times: list[list[float]] = [[] for _ in networks]
    turns = list(zip(networks, times, strict=True))
    start = time.perf_counter()
    for done in range(1, max(max_repeats, LEAST_ROUNDS) + 1):
        for network, measured in turns:
            measured.append(_timed(network, inputs, device))
        turns.reverse()
        if done >= LEAST_ROUNDS and time.perf_counter() - start > seconds:
            break
    return times


def _timed(network: nn.Module, inputs: Any, device: torch.device) -> float:
    if device.type == "cuda":
        with torch.cuda.device(device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            call_with(network, inputs)
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1e3
    _wait(device)
    start = time.perf_counter()
    call_with(network, inputs)
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _latency(
    network: nn.Module, inputs: Any, device: torch.device, times: Sequence[float], memory: bool
) -> Latency:
    low, median, high = statistics.quantiles(times, n=4)
    needed = None
    if memory:
        activations = peak_allocated(lambda: call_with(network, inputs), device)
        needed = Memory(parameter_bytes(network), activations)
    return Latency(
        median=median,
        spread=high - low,
        repeats=len(times),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        threads=torch.get_num_threads(),
        batch_size=count_examples(inputs, 0) or None,
        memory=needed,
        times=tuple(times),
    )
