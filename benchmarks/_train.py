"""Dense networks to prune: training with SGD, accuracy, and a cache of what was trained."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from torchvision.models import resnet18

from benchmarks._data import ImageData, TensorLoader, random_crop_flip
from benchmarks._models import (
    VGG16BN,
    LeNet5Caffe,
    LeNet300100,
    LeNet500300,
    resnet20,
    resnet56,
)
from rbpfx.files import written_aside
from rbpfx.latency.operators import cache_directory

EVALUATION_BATCH = 1000


def train_dense(
    model: nn.Module,
    loader: TensorLoader,
    epochs: int,
    lr: float,
    *,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    warm_up: float = 0.2,
    loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    on_epoch: Callable[[int], None] | None = None,
) -> float:
    """Trains a network in place by SGD with Nesterov momentum and one cycle of the rate.

    Args:
        model: Maps images `(N, C, H, W)` to scores `(N, classes)`.
        loader: The training batches, augmented or not.
        epochs: Passes over the loader.
        lr: The largest learning rate: it rises for the first part of the steps, then falls to
            almost zero along a cosine.
        momentum: Of SGD.
        weight_decay: Of SGD, on all parameters.
        warm_up: The share of the steps in which the rate rises.
        loss_fn: Scores and labels to a scalar.
        on_epoch: Called with the number of epochs done after each.

    Returns:
        Seconds per epoch, `on_epoch` left out.

    Raises:
        FloatingPointError: If the loss is not finite at the end of an epoch.
    """
    # On one CPU thread, convolutions train 1.4 times as fast in this format.
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), lr, momentum=momentum, weight_decay=weight_decay, nesterov=True
    )
    schedule = OneCycleLR(
        optimizer, lr, epochs * len(loader), pct_start=warm_up, cycle_momentum=False
    )
    device = next(model.parameters()).device
    seconds = 0.0
    for epoch in range(1, epochs + 1):
        start = time.perf_counter()
        model.train()
        for images, labels in loader:
            optimizer.zero_grad()
            loss = loss_fn(model(images.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            schedule.step()
        seconds += time.perf_counter() - start
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"training diverged in epoch {epoch} of {epochs}: the loss is {loss.item()}; "
                f"a learning rate below {lr} may help"
            )
        if on_epoch is not None:
            on_epoch(epoch)
    model.to(memory_format=torch.contiguous_format)
    return seconds / max(epochs, 1)


@torch.no_grad()
def accuracy(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The share of examples classified correctly, in evaluation mode; the mode is restored.

    Args:
        model: Maps images to scores `(N, classes)`.
        loader: Batches of images and labels.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    was_training = model.training
    model.eval()
    correct = count = 0
    for images, labels in loader:
        correct += int((model(images.to(device)).argmax(1).cpu() == labels).sum())
        count += len(labels)
    model.train(was_training)
    return correct / count


def evaluation_loader(data: ImageData) -> TensorLoader:
    """The test images in their order, in batches large enough for evaluation."""
    return TensorLoader(data.test_images, data.test_labels, EVALUATION_BATCH)


def training_loader(data: ImageData, images: int, seed: int, batch_size: int = 128) -> TensorLoader:
    """The first training images in an order of the seed's own; those of CIFAR-10 are augmented.

    Args:
        data: MNIST, which is given as it is, or CIFAR-10, which is shifted and mirrored.
        images: How many of the images; 0 for all.
        seed: Of the order and the augmentation.
        batch_size: The number of examples in a batch.
    """
    return TensorLoader(
        data.train_images[: images or None],
        data.train_labels[: images or None],
        batch_size,
        shuffle=True,
        augment=random_crop_flip if data.train_images.shape[1] == 3 else None,
        generator=Generator().manual_seed(seed),
    )


@dataclass(frozen=True)
class Recipe:
    """How a dense network is trained: on the first images of the set, or all of them for 0."""

    epochs: int
    lr: float
    weight_decay: float
    batch_size: int = 128
    images: int = 0


LENETS: dict[str, tuple[type[nn.Module], Recipe]] = {
    "lenet5": (LeNet5Caffe, Recipe(8, 0.05, 5e-4)),
    "lenet300100": (LeNet300100, Recipe(10, 0.1, 5e-4)),
    "lenet500300": (LeNet500300, Recipe(10, 0.1, 5e-4)),
}


# VGG-16 takes days of a CPU core, so train it where a GPU is at hand; ResNet-18, whose stem leaves
# 8x8 positions of 32 pixels, a quarter of an hour.
CIFAR_NETWORKS: dict[str, tuple[Callable[[], nn.Module], Recipe]] = {
    "vgg16_bn": (VGG16BN, Recipe(100, 0.1, 5e-4)),
    "resnet18": (partial(resnet18, num_classes=10), Recipe(12, 0.05, 5e-4, images=20_000)),
}


def dense_lenet(
    name: str,
    seed: int,
    data: ImageData,
    cache: str | Path | None = None,
    *,
    recipe: Recipe | None = None,
) -> nn.Module:
    """A trained dense LeNet in evaluation mode: from the cache if it is there, else trained.

    Without augmentation, for figures to compare.

    Args:
        name: A key of `LENETS`.
        seed: Of the weights at the start and of the order of the examples.
        data: MNIST.
        cache: The folder of the cache; the user's by default.
        recipe: How to train it; the network's own by default. Weights in the cache that were
            trained by another recipe or on other data are not used.
    """
    if name not in LENETS:
        raise ValueError(f"no LeNet is named {name!r}; there are {', '.join(LENETS)}")
    network, own_recipe = LENETS[name]
    path = Path(cache or cache_directory()) / f"{name}-seed{seed}.safetensors"
    return _trained_once(network, seed, data, path, recipe or own_recipe, "cpu")


def dense_cifar(
    name: str,
    seed: int,
    data: ImageData,
    cache: str | Path | None = None,
    *,
    recipe: Recipe | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """A dense network on the CPU, in evaluation mode, from the cache or trained.

    The images are shifted and mirrored.

    Args:
        name: A key of `CIFAR_NETWORKS`.
        seed: Of the weights at the start and of the order of the examples.
        data: CIFAR-10.
        cache: The folder of the cache; the user's by default.
        recipe: How to train it; the network's own by default. Weights in the cache that were
            trained by another recipe or on other data are not used.
        device: Where to train it.
    """
    network, own_recipe = CIFAR_NETWORKS[name]
    file = f"{name}-{data.name}-seed{seed}.safetensors".replace(" ", "")
    path = Path(cache or cache_directory()) / file
    return _trained_once(network, seed, data, path, recipe or own_recipe, device)


def _trained_once(
    network: Callable[[], nn.Module],
    seed: int,
    data: ImageData,
    path: Path,
    recipe: Recipe,
    device: torch.device | str,
) -> nn.Module:
    """From the file, if its weights were trained in the same way on the same data; else trained."""
    provenance = {
        "recipe": json.dumps(asdict(recipe)),
        "data": f"{data.name} {zlib.crc32(data.train_labels.numpy().tobytes()):08x}",
    }
    torch.manual_seed(seed)
    model = network()
    if path.exists() and provenance.items() <= _metadata(path).items():
        model.load_state_dict(load_file(path))
        return model.eval()

    loader = training_loader(data, recipe.images, seed, recipe.batch_size)
    model.to(device)
    seconds = train_dense(model, loader, recipe.epochs, recipe.lr, weight_decay=recipe.weight_decay)
    measured = {
        "test_error": f"{1 - accuracy(model, evaluation_loader(data)):.4f}",
        "seconds_per_epoch": f"{seconds:.1f}",
    }
    model.cpu()
    with written_aside(path) as aside:
        save_file(model.state_dict(), aside, provenance | measured)
    return model.eval()


RESNETS: dict[str, Callable[..., nn.Module]] = {"resnet20": resnet20, "resnet56": resnet56}
ADAPTATION_EPOCHS, ADAPTATION_LR = 4, 0.02


def adapted_resnet(
    name: str,
    data: ImageData,
    weights_dir: str | Path | None,
    images: int,
    *,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """The published weights, adapted to the images at hand by a few epochs; cached.

    Args:
        name: A key of `RESNETS`.
        data: Images that the weights were not trained on: CIFAR-10's, JPEG-compressed.
        weights_dir: The folder that holds the published weights.
        images: How many of the training images to use.
        device: Where to train; the result is on the CPU.
    """
    path = cache_directory() / f"{name}-{data.name}-{images}.pt".replace(" ", "")
    model = RESNETS[name](weights_dir)
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        torch.manual_seed(0)
        model.to(device)
        train_dense(model, training_loader(data, images, 0), ADAPTATION_EPOCHS, ADAPTATION_LR)
        model.cpu()
        with written_aside(path) as aside:
            torch.save(model.state_dict(), aside)
    return model.eval()


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}
