"""Why a few channels less may cost time: that of a convolution against its number of channels.

    python -m benchmarks.staircase

One row per kind of convolution; all widths take turns. The best time of every width counts: what
another process takes of the core is no step of the convolution. `python -m benchmarks.plots` draws
the curves.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks._record import Deadline, Record
from rbpfx import measure_latency

RESULTS = Path(__file__).parent / "results" / "staircase.json"


class Convolution(NamedTuple):
    """A convolution with as many outputs as inputs, the number that is varied.

    Attributes:
        kernel: Its size on a side.
        pixels: Size of its image on a side.
        depthwise: Whether every channel is convolved by itself.
        channels_last: Memory layout.
    """

    kernel: int
    pixels: int
    depthwise: bool = False
    channels_last: bool = False

    def layer(self, width: int) -> nn.Conv2d:
        """The convolution with a number of channels."""
        groups = width if self.depthwise else 1
        return nn.Conv2d(width, width, self.kernel, padding=self.kernel // 2, groups=groups)


CONVOLUTIONS = {
    "3x3": Convolution(3, 28),
    "3x3, channels last": Convolution(3, 28, channels_last=True),
    "1x1": Convolution(1, 28),
    "1x1, channels last": Convolution(1, 28, channels_last=True),
    "3x3 depthwise": Convolution(3, 28, depthwise=True),
}


class Channels(nn.Module):
    """A layer and the images that it is called with: every width has images of its own.

    Args:
        layer: The layer.
        images: Its images.
    """

    def __init__(self, layer: nn.Module, images: torch.Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.images = images

    def forward(self) -> torch.Tensor:
        return self.layer(self.images)


def main() -> None:
    """Measure what is missing, print the lowest and the highest time."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--widths", type=int, nargs=3, default=[8, 200, 2], metavar="N")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--row-seconds", type=float, default=20)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, help="time box")
    options = parser.parse_args()
    record, deadline = Record(options.results), Deadline(options.seconds)
    widths = list(range(*options.widths))
    for name, convolution in CONVOLUTIONS.items():
        key = f"{name}/batch={options.batch}/{options.device}/threads={options.threads}"
        if record.done(key) or deadline.expired:
            continue
        times = measure(convolution, widths, options)
        setting = {"batch": options.batch, "device": options.device, "threads": options.threads}
        record.add(
            key,
            {
                "convolution": name,
                **convolution._asdict(),
                **setting,
                "widths": widths,
                "microseconds": times,
            },
        )
        print(f"{key}: {min(times)} to {max(times)} us", flush=True)


def measure(
    convolution: Convolution, widths: list[int], options: argparse.Namespace
) -> list[float]:
    """Best microseconds at every width."""
    size = convolution.pixels
    layout = torch.channels_last if convolution.channels_last else torch.contiguous_format
    placed: dict[str, Any] = {"device": options.device, "memory_format": layout}
    layers = [
        Channels(
            convolution.layer(width).to(**placed),
            torch.randn(options.batch, width, size, size).to(**placed),
        )
        for width in widths
    ]
    latencies = measure_latency(
        layers, (), seconds=options.row_seconds, max_repeats=200, threads=options.threads
    )
    return [round(1e6 * min(latency.times), 1) for latency in latencies]


if __name__ == "__main__":
    main()
