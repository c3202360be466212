"""The benchmarks' networks: their sizes, that they can be traced, and the public weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks._data import TensorLoader, cifar10
from benchmarks._models import LeNet5Caffe, LeNet300100, LeNet500300, resnet20, resnet56
from benchmarks._train import accuracy

MNIST_SHAPE, CIFAR_SHAPE = (1, 28, 28), (3, 32, 32)

# Network, shape of an image, multiply-accumulates, parameters.
NETWORKS = [
    (LeNet300100, MNIST_SHAPE, 784 * 300 + 300 * 100 + 100 * 10, 266_610),
    (LeNet500300, MNIST_SHAPE, 784 * 500 + 500 * 300 + 300 * 10, 545_810),
    (LeNet5Caffe, MNIST_SHAPE, 2_293_000, 431_080),
    (resnet20, CIFAR_SHAPE, 40_551_040, 269_722),
    (resnet56, CIFAR_SHAPE, 125_485_696, 853_018),
]


@pytest.mark.parametrize(("network", "shape", "macs", "parameters"), NETWORKS)
def test_size(
    network: Callable[[], nn.Module], shape: tuple[int, ...], macs: int, parameters: int
) -> None:
    model = network().eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        scores = model(torch.zeros(1, *shape))
    assert scores.shape == (1, 10)
    assert counter.get_total_flops() == 2 * macs
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize(("network", "shape"), [network[:2] for network in NETWORKS])
def test_symbolic_trace(network: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = network().eval()
    images = torch.randn(3, *shape)
    with torch.no_grad():
        assert torch.equal(torch.fx.symbolic_trace(model)(images), model(images))


@pytest.mark.parametrize("network", [resnet20, resnet56])
@pytest.mark.parametrize("data_file", ["resnet56-cifar10.safetensors"], indirect=True)
def test_public_weights_load(network: Callable[..., nn.Module], data_file: Path) -> None:
    torch.manual_seed(0)
    loaded, fresh = network(data_file).state_dict(), network().state_dict()
    assert loaded.keys() == fresh.keys()
    assert not torch.equal(loaded["conv1.weight"], fresh["conv1.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("data_file", ["cifar10-jpeg.npz"], indirect=True)
def test_public_weights_classify_jpeg_images(data_file: Path) -> None:
    """Measured by others on 2 500 JPEG images: 81.4 % (91.78 % on the original images)."""
    data = cifar10(data_file)
    loader = TensorLoader(data.test_images[:2000], data.test_labels[:2000], 500)
    assert accuracy(resnet20(data_file), loader) == pytest.approx(0.814, abs=0.03)
