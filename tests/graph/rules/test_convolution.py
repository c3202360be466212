"""Convolutions of all kinds, recurrent layers and samplers: law and groups, one by one."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import ops

from rbpfx.methods import insert_noise
from tests.graph.laws import check_law, compile_random
from tests.graph.rules.micro import check_operator


class Deformed(nn.Module):
    """A deformable convolution with its offsets and masks."""

    def __init__(self, groups: int, offset_groups: int) -> None:
        super().__init__()
        self.offsets = nn.Conv2d(8, 18 * offset_groups, 1)
        self.masks = nn.Conv2d(8, 9 * offset_groups, 1)
        self.conv = ops.DeformConv2d(8, 8, 3, padding=1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x, self.offsets(x), self.masks(x).sigmoid())
        return y


class First(nn.Module):
    """The first result of a module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.module(x)[0]
        return y


class Sampled(nn.Module):
    """Reads channels at places of its own."""

    def __init__(self, boxes: bool) -> None:
        super().__init__()
        self.boxes = boxes
        self.register_buffer("grid", torch.rand(2, 3, 3, 2) * 2 - 1)
        self.register_buffer("rois", torch.tensor([[0, 0, 0, 2, 2.0], [1, 1, 0, 3, 3]]))

    def forward(self, x: Tensor) -> Tensor:
        if self.boxes:
            y: Tensor = torch.ops.torchvision.roi_align(x, self.rois, 1.0, 2, 2, 1, False)
            return y
        return F.grid_sample(x, self.grid, align_corners=False)


class UnbatchedConvolution(nn.Module):
    """A convolution of something that has no batch axis."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.conv(example) for example in x.unbind()])


CONVOLUTIONS: dict[str, tuple[nn.Module, int]] = {
    "circular padding": (nn.Conv2d(8, 6, 3, padding=1, padding_mode="circular"), 14),
    "padding as a string": (nn.Conv2d(8, 6, 3, padding="same", dilation=2), 14),
    "depthwise with a multiplier": (nn.Conv2d(8, 24, 3, groups=8), 8),
    "depthwise, reflected": (nn.Conv2d(8, 8, 3, padding=1, groups=8, padding_mode="reflect"), 8),
    "grouped": (nn.Conv2d(8, 12, 1, groups=2), 10),
    "transposed, grouped": (nn.ConvTranspose2d(8, 12, 2, groups=2), 10),
    "without batch axis": (UnbatchedConvolution(), 16),
    "deformable": (Deformed(1, 1), 16),
    "deformable, grouped": (Deformed(2, 1), 8),
    "deformable with groups of offsets": (Deformed(1, 2), 12),
    "deformable, depthwise": (Deformed(8, 1), 8),
    "grid_sample": (Sampled(False), 8),
    "roi_align": (Sampled(True), 8),
    "squeeze and excitation": (ops.SqueezeExcitation(8, 4), 12),
}
RECURRENT: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "LSTM": (nn.LSTM, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    "GRU": (nn.GRU, {"batch_first": True, "bias": False}),
    "RNN": (nn.RNN, {"nonlinearity": "relu"}),
    "projected LSTM": (nn.LSTM, {"proj_size": 3}),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_law_of_convolutions(name: str) -> None:
    torch.manual_seed(0)
    module, units = CONVOLUTIONS[name]
    check_operator(module.double(), units)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers_read_their_input(name: str) -> None:
    torch.manual_seed(0)
    cls, options = RECURRENT[name]
    layer = First(cls(8, 5, **options)).double()
    analysis = check_operator(layer, 8, shape=(4, 3))
    (group,) = analysis.groups
    assert group.foldable
    assert group.macs_per_unit > 0


FOLDS: dict[str, Callable[[Tensor], Tensor]] = {
    "sizes": lambda x: x.reshape(1, x.shape[0] * x.shape[1], *x.shape[2:]),
    "sizes by keyword": lambda x: torch.reshape(x, shape=(1, x.size(0) * 8, 4, 4)),
    "the rest": lambda x: x.reshape(1, -1, 4, 4),
    "flatten": lambda x: x.flatten(0, 1).unsqueeze(0),
    "unbatched": lambda x: x.view(-1, *x.shape[2:]),
}


class PerExample(nn.Module):
    """A convolution whose weight every example modulates, in one call, as in StyleGAN2."""

    def __init__(self, fold: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.style = nn.Conv2d(3, 8, 1), nn.Linear(3, 8)
        self.weight = nn.Parameter(torch.randn(1, 6, 8, 3, 3))
        self.head = nn.Conv2d(6, 2, 1)
        self.fold = fold

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        weight = self.weight * self.style(x.mean((2, 3))).view(n, 1, 8, 1, 1)
        y = self.fold(self.stem(x).cos())
        y = F.conv2d(y, weight.view(n * 6, 8, 3, 3), padding=1, groups=n)
        z: Tensor = self.head(y.view(n, 6, *x.shape[2:]).sin())
        return z


@pytest.mark.parametrize("examples", [1, 4])
@pytest.mark.parametrize("name", FOLDS)
def test_channels_that_are_merged_with_examples_stay(name: str, examples: int) -> None:
    """Else a multiplier on them would fit the example batch alone."""
    torch.manual_seed(0)
    model = PerExample(FOLDS[name]).double()
    x = torch.randn(examples, 3, 4, 4, dtype=torch.float64)
    compiled = compile_random(model, (x,), 0)
    assert [(g.name, g.size) for g in compiled.analysis.groups] == [("weight", 6)]
    reasons = {axis.name: axis.reason for axis in compiled.analysis.frozen}
    assert re.search("with the examples|for every example", reasons["stem"])
    noisy = insert_noise(compiled.gm, compiled.analysis)
    for count in (1, 3, 4):
        inputs = (torch.randn(count, 3, 4, 4, dtype=torch.float64),)
        for mode in (True, False):
            assert noisy.train(mode)(*inputs).shape == model(*inputs).shape
        check_law(compiled, inputs, train=False)


def test_heads_that_become_examples_still_go() -> None:
    def heads(x: Tensor) -> Tensor:
        n, t, _ = x.shape
        x = x.view(n, t, 2, 4).transpose(1, 2).reshape(n * 2, t, 4)
        return torch.bmm(x.softmax(-1), x.mT @ x).view(n, 2, t, 4).transpose(1, 2).flatten(2)

    assert sum(g.size for g in check_operator(heads, 2, shape=(4, 3)).groups) == 2
