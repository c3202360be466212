"""The demo: train, prune and verify a small residual network on real handwritten digits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

from rbpfx.errors import RbpfxError
from rbpfx.prune import PruningResult, prune
from rbpfx.target import Target
from rbpfx.training.finetune import FineTune
from rbpfx.training.schedule import Recursion


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where sizes change."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """`(N, channels_in, H, W)` to `(N, channels, H / stride, W / stride)`."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class DigitsResNet(nn.Module):
    """A residual network for 8x8 digits: three stages of 32, 64 and 128 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(32)
        self.stage1 = nn.Sequential(ResidualBlock(32, 32, 1), ResidualBlock(32, 32, 1))
        self.stage2 = nn.Sequential(ResidualBlock(32, 64, 2), ResidualBlock(64, 64, 1))
        self.stage3 = nn.Sequential(ResidualBlock(64, 128, 2), ResidualBlock(128, 128, 1))
        self.head = nn.Linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        """`(N, 1, 8, 8)` to class scores `(N, 10)`."""
        x = F.relu(self.bn(self.stem(images)))
        x = self.stage3(self.stage2(self.stage1(x)))
        scores: Tensor = self.head(x.mean(dim=(2, 3)))
        return scores


def digits_loaders(batch_size: int = 64, seed: int = 0) -> tuple[DataLoader, DataLoader]:  # type: ignore[type-arg]
    """Training and test batches of scikit-learn's embedded digits (1797 images of 8x8).

    Raises:
        RbpfxError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise RbpfxError("the demo needs scikit-learn: pip install 'rbpfx[demo]'") from error
    digits = load_digits()
    parts = train_test_split(
        digits.images, digits.target, test_size=0.3, random_state=seed, stratify=digits.target
    )
    train_x, test_x = (torch.as_tensor(x, dtype=torch.float32)[:, None] / 8 - 1 for x in parts[:2])
    train_y, test_y = (torch.as_tensor(y) for y in parts[2:])
    return (
        DataLoader(TensorDataset(train_x, train_y), batch_size, shuffle=True, drop_last=True),
        DataLoader(TensorDataset(test_x, test_y), 256),
    )


def train_digits(loader: DataLoader, epochs: int, progress: bool = True) -> DigitsResNet:  # type: ignore[type-arg]
    """A trained dense network."""
    model = DigitsResNet()
    steps = epochs * len(loader)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    with tqdm(total=steps, desc="dense training", disable=not progress, unit="step") as bar:
        for _ in range(epochs):
            for images, labels in loader:
                loss = F.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    return model.eval()


def run(target: float | None = None, seed: int = 0, progress: bool = True) -> PruningResult:
    """Train, prune, fine-tune and verify; the report holds all figures.

    Args:
        target: Share of the multiply-accumulates to keep; None lets the method decide.
        seed: Seed of everything.
        progress: Whether to show progress bars.

    Raises:
        TargetError: The target is not positive or cannot be reached.
        RbpfxError: scikit-learn is not installed.
    """
    budget = None if target is None else Target(macs=target)
    torch.manual_seed(seed)
    loader, test_loader = digits_loaders(seed=seed)
    model = train_digits(loader, epochs=10, progress=progress)
    return prune(
        model,
        loader,
        val_loader=test_loader,
        target=budget,
        recursion=Recursion(epochs=12),
        recovery=FineTune(epochs=8),
        seed=seed,
        progress=progress,
    )
