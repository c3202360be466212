"""Two traces as one: values of both modes that cannot stand for each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rbpfx.graph.capture import trace
from rbpfx.graph.groups import analyze


class Detector(nn.Module):
    """A head in the manner of YOLOv5: feature maps while it learns, decoded boxes otherwise.

    Shapes are asked for in both modes, tensors are split in one of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.heads = nn.ModuleList([nn.Conv2d(8, 16, 1), nn.Conv2d(8, 16, 1)])

    def forward(self, x: Tensor) -> Any:
        features = F.relu(self.stem(x))
        maps, boxes = [features, F.max_pool2d(features, 2)], []
        for level, head in enumerate(self.heads):
            y = head(maps[level])
            n, _, h, w = y.shape
            y = maps[level] = y.view(n, 2, 8, h, w).permute(0, 1, 3, 4, 2).contiguous()
            if not self.training:
                place, size, score = y.sigmoid().split((2, 2, 4), 4)
                boxes.append(torch.cat((place * w, size * h, score), 4).view(n, -1, 8))
        return maps if self.training else (torch.cat(boxes, 1), maps)


def test_tensors_in_one_mode_and_sizes_in_the_other() -> None:
    model = Detector()
    gm = trace(model, torch.randn(2, 3, 8, 8))
    for mode in (True, False, True):
        x = torch.randn(3, 3, 12, 8)
        expected, actual = model.train(mode)(x), gm.train(mode)(x)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert [group.name for group in analyze(gm).groups] == ["stem"]
