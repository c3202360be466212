"""The networks of the benchmarks: LeNets for MNIST, ResNets and a VGG for CIFAR-10.

All are plain modules that `torch.fx.symbolic_trace` can trace.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F


class _Perceptron(nn.Module):
    """Two hidden layers with ReLU between images `(N, 1, 28, 28)` and scores `(N, 10)`."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(28 * 28, first)
        self.fc2 = nn.Linear(first, second)
        self.fc3 = nn.Linear(second, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.relu(self.fc1(images.flatten(1)))
        return self.fc3(F.relu(self.fc2(hidden)))


class LeNet300100(_Perceptron):
    """784-300-100-10."""

    def __init__(self) -> None:
        super().__init__(300, 100)


class LeNet500300(_Perceptron):
    """784-500-300-10, the larger perceptron of the structured pruning literature."""

    def __init__(self) -> None:
        super().__init__(500, 300)


class LeNet5Caffe(nn.Module):
    """LeNet-5 as Caffe defines it, 20-50-800-500: 2.293 million multiply-accumulates.

    The convolutions have no non-linearity but max pooling; the one ReLU follows `fc1`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = F.max_pool2d(self.conv1(images), 2)
        features = F.max_pool2d(self.conv2(features), 2)
        return self.fc2(F.relu(self.fc1(features.flatten(1))))


class ZeroPaddedShortcut(nn.Module):
    """Takes every second pixel and pads the channels with zeros ("option A" of He et al.)."""

    def __init__(self, planes_in: int, planes: int, stride: int) -> None:
        super().__init__()
        self.planes_in = planes_in
        self.planes = planes
        self.stride = stride
        self.padding = (planes - planes_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0) + (self.padding,) * 2)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut without parameters."""

    def __init__(self, planes_in: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(planes_in, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut: nn.Module = (
            nn.Identity() if stride == 1 else ZeroPaddedShortcut(planes_in, planes, stride)
        )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """The CIFAR-10 ResNet of He et al. with 6n + 2 layers, n blocks in each of three stages."""

    def __init__(self, blocks_per_stage: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, 1, blocks_per_stage)
        self.layer2 = _stage(16, 32, 2, blocks_per_stage)
        self.layer3 = _stage(32, 64, 2, blocks_per_stage)
        self.linear = nn.Linear(64, 10)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def _stage(planes_in: int, planes: int, stride: int, blocks: int) -> nn.Sequential:
    first = BasicBlock(planes_in, planes, stride)
    return nn.Sequential(first, *(BasicBlock(planes, planes, 1) for _ in range(blocks - 1)))


VGG16_PLANES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16BN(nn.Module):
    """VGG-16 for CIFAR-10, as in the pruning literature (Li et al., ICLR 2017).

    Thirteen 3×3 convolutions with BatchNorm, max pooling after each of the five stages, which
    leaves one pixel, and one linear layer, 512 to 10: 313 million multiply-accumulates.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        planes_in = 3
        for stage in VGG16_PLANES:
            for planes in stage:
                convolution = nn.Conv2d(planes_in, planes, 3, padding=1, bias=False)
                layers += [convolution, nn.BatchNorm2d(planes), nn.ReLU()]
                planes_in = planes
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.linear = nn.Linear(planes_in, 10)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.features(images).flatten(1))


def resnet20(weights_dir: str | Path | None = None) -> CifarResNet:
    """ResNet-20 for CIFAR-10.

    Args:
        weights_dir: The folder that holds `resnet20-cifar10.safetensors`; random weights if None.
    """
    return _with_weights(CifarResNet(3), weights_dir, "resnet20-cifar10.safetensors")


def resnet56(weights_dir: str | Path | None = None) -> CifarResNet:
    """ResNet-56 for CIFAR-10.

    Args:
        weights_dir: The folder that holds `resnet56-cifar10.safetensors`; random weights if None.
    """
    return _with_weights(CifarResNet(9), weights_dir, "resnet56-cifar10.safetensors")


def _with_weights(
    model: CifarResNet, weights_dir: str | Path | None, file_name: str
) -> CifarResNet:
    if weights_dir is not None:
        weights = load_file(Path(weights_dir) / file_name)
        # The published files leave out BatchNorm's step counters; all else has to match.
        counters = {
            name: torch.tensor(0) for name in model.state_dict() if name.endswith("batches_tracked")
        }
        model.load_state_dict(counters | weights)
    return model
