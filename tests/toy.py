"""A toy task that is learnt in tenths of a second: which third of a small image is bright."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rbpfx.training.task import Loader


class ShortcutNet(nn.Module):
    """A stem, one residual block and a classifier on 2x2 features: two channel groups."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.head = nn.Linear(4 * width, 3)

    def features(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        inner = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.bn2(self.conv2(inner)))
        return F.adaptive_avg_pool2d(x, 2).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def stripes(examples: int = 96, batch: int = 16, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Batches of 6x6 images of noise, one third of which is bright, and which one it is."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (examples,), generator=generator)
    images = torch.randn(examples, 1, 6, 6, generator=generator) / 2
    for label in range(3):
        images[labels == label, :, 2 * label : 2 * label + 2] += 1.5
    return list(zip(images.split(batch), labels.split(batch), strict=True))


def trained(model: nn.Module, batches: Loader, epochs: int = 6) -> nn.Module:
    """The model after a short training with cross-entropy, in train mode."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(epochs):
        for images, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model


class Times:
    """Cross-entropy, multiplied at some training steps."""

    def __init__(self, factors: dict[int, float]) -> None:
        self.factors, self.step = factors, 0

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        self.step += torch.is_grad_enabled()
        return F.cross_entropy(output, target) * self.factors.get(self.step, 1.0)


def nan_after(steps: int) -> Times:
    """Cross-entropy that is NaN once so many training steps are done."""
    return Times(dict.fromkeys(range(steps + 1, 1000), float("nan")))
