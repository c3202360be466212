"""Convolutions with options, deformable and recurrent layers, samplers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torchvision import ops

from tests.graph.generator import Builder, Function, conv, divisors, operator


@operator(1)
def convolution_options(b: Builder, x: int) -> int | None:
    shape = b.shape(x)
    n, channels = len(shape) - 2, shape[1]
    if n < 1 or min(shape[2:]) < 3:
        return None
    groups = b.rng.choice([1, 1, channels, *divisors(channels)])
    mode = b.rng.choice(["zeros", "circular", "replicate", "reflect" if n < 3 else "zeros"])
    padding = b.rng.choice(["same", "valid", 1])
    dilation = b.rng.choice([1, 1, 2]) if padding == "same" and mode == "zeros" else 1
    layer = conv(n)(
        channels,
        groups * 2,
        3,
        padding=padding,
        padding_mode=mode,
        groups=groups,
        dilation=dilation,
    )
    if b.rng.random() < 0.6:
        return b.call(layer, x, fresh=True)
    weight = b.parameter(torch.randn(channels, 1, *[3] * n) * 0.4)
    function = getattr(F, f"conv{n}d")
    functions: list[Function] = [
        lambda m, v: function(v, getattr(m, weight), None, 1, 1, 1, v.shape[1]),
        lambda m, v: function(v, getattr(m, weight), padding="same", groups=v.size(1)),
    ]
    return b.add(b.rng.choice(functions), x)


@operator(1)
def deformable(b: Builder, x: int) -> int | None:
    shape = b.shape(x)
    if len(shape) != 4 or min(shape[2:]) < 3:
        return None
    channels = shape[1]
    parts = b.rng.choice([1, *divisors(channels)])
    groups = b.rng.choice([1, 1, channels, *divisors(channels)])
    masked = b.rng.random() < 0.5
    layer = b.module(ops.DeformConv2d(channels, 2 * groups, 3, padding=1, groups=groups))
    offsets = b.module(nn.Conv2d(channels, 18 * parts, 1))
    masks = b.module(nn.Conv2d(channels, 9 * parts, 1)) if masked else ""

    def apply(m: Any, v: Any) -> Any:
        mask = m.get_submodule(masks)(v).sigmoid() if masked else None
        return m.get_submodule(layer)(v, m.get_submodule(offsets)(v), mask)

    return b.add(apply, x)


@operator(1)
def recurrent(b: Builder, x: int) -> int | None:
    shape = b.shape(x)
    cls = b.rng.choice([nn.LSTM, nn.GRU, nn.RNN])
    options = {"batch_first": b.rng.random() < 0.7, "bidirectional": b.rng.random() < 0.4}
    width = shape[-1] if len(shape) < 4 else shape[1]
    name = b.module(cls(width, 3, num_layers=b.rng.choice([1, 2]), **options))

    def apply(m: Any, v: Any) -> Any:
        steps = v if len(shape) < 4 else v.flatten(2).transpose(1, 2)
        return m.get_submodule(name)(steps)[0]

    return b.add(apply, x)


@operator(1)
def sampling(b: Builder, x: int) -> int | None:
    shape = b.shape(x)
    if len(shape) != 4:
        return None
    grid = f"grid{len(b.program.steps)}"
    boxes = f"boxes{len(b.program.steps)}"

    def sampled(m: Any, v: Any) -> Any:
        return F.grid_sample(v, getattr(m, grid)[: v.shape[0]], align_corners=False)

    def aligned(m: Any, v: Any) -> Any:
        rows = torch.ops.torchvision.roi_align(
            v, getattr(m, boxes)[: v.shape[0]], 1.0, 2, 2, 1, False
        )
        return rows * v.mean((2, 3), keepdim=True)[:1]

    if b.rng.random() < 0.5:
        b.program.register_buffer(grid, torch.rand(3, 3, 2, 2) * 2 - 1)
        return b.add(sampled, x)
    b.program.register_buffer(boxes, torch.tensor([[0, 0, 0, 2, 2.0], [0, 1, 0, 3, 3], [0] * 5]))
    return b.add(aligned, x)
