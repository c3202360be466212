"""Products that backward computes again: the same gradients, less memory, no stale values."""

import gc
import weakref
from typing import Any

import pytest
import torch
import torchvision.models
from torch import Tensor, nn
from torch.nn import functional as F

import rbpfx
from rbpfx import RbpfxError
from rbpfx.graph.copying import copy_model
from rbpfx.graph.products import multiply, recomputing
from rbpfx.latency.memory import peak_allocated


def factors(requires: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    m = torch.rand(2, 4, 1, 1, requires_grad=requires)
    w = torch.randn(3, 4, 3, 3, requires_grad=True)
    return x, m, w


@pytest.mark.parametrize("requires", [True, False])
def test_gradients(requires: bool) -> None:
    x, m, w = factors(requires)
    inputs = [x, w, *([m] if requires else [])]
    with recomputing():
        found = torch.autograd.grad(F.conv2d(multiply(x, m), w).square().sum(), inputs)
    wanted = torch.autograd.grad(F.conv2d(x * m, w).square().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_second_derivatives() -> None:
    x, m, w = (t.detach().double().requires_grad_() for t in factors())

    def loss(x: Tensor, m: Tensor, w: Tensor) -> Tensor:
        with recomputing():
            return F.conv2d(multiply(x, m), w).tanh().sum()

    assert torch.autograd.gradcheck(loss, (x, m, w))


def test_the_product_is_not_kept() -> None:
    x, m, w = factors()
    with recomputing():
        y = multiply(x, m)
        gone = weakref.ref(y.untyped_storage())
        result = F.conv2d(y, w).sum()
        del y
        gc.collect()
        assert gone() is None or gone().nbytes() == 0
    result.backward()


def test_a_product_that_is_written_to_is_kept() -> None:
    x, m, w = factors()

    def loss(multiply, context) -> Tensor:
        with context:
            y = multiply(x, m)
            y.relu_()
            return F.conv2d(y, w).square().sum()

    found = torch.autograd.grad(loss(multiply, recomputing()), [x, m, w])
    wanted = torch.autograd.grad(loss(torch.mul, torch.enable_grad()), [x, m, w])
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("requires", [True, False])
def test_a_factor_that_changes_is_an_error(requires: bool) -> None:
    x, m, w = factors(requires)
    with recomputing():
        value = x * 1
        result = F.conv2d(multiply(value, m), w).sum()
    value.add_(1)
    with pytest.raises((RbpfxError, RuntimeError), match=r"in ?place"):
        result.backward()


def test_memory_that_is_used_again_is_not_taken_for_the_product() -> None:
    """The product goes out of use, and the next tensor may get its memory."""
    torch.manual_seed(0)
    x, m, w = factors()

    def loss(multiply, context) -> Tensor:
        total = torch.zeros(())
        with context:
            for _ in range(5):
                multiply(x, m)  # nobody reads it
                other = torch.rand(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)) * x
                total = total + F.conv2d(other, w).square().sum()
        return total

    found = torch.autograd.grad(loss(multiply, recomputing()), [x, w])
    wanted = torch.autograd.grad(loss(torch.mul, torch.enable_grad()), [x, w])
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_graph_that_is_given_up_is_freed() -> None:
    x, m, w = factors()
    with recomputing():
        value = x * 1
        result = F.conv2d(multiply(value, m), w).sum()
    gone = weakref.ref(value)
    del value, result
    gc.collect()
    assert gone() is None


def test_a_network_keeps_hardly_more_than_without_noise() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(8, 3, 64, 64)
    gm = rbpfx.trace(torchvision.models.resnet18(), inputs)
    noisy = rbpfx.insert_noise(gm, rbpfx.analyze(gm), "rbp")
    peaks, gradients = [], []
    for network, context in (
        (gm, torch.enable_grad),
        (noisy, torch.enable_grad),
        (noisy, recomputing),
    ):
        network = copy_model(network, {}).train()

        def forward(network: nn.Module = network, context: Any = context) -> Tensor:
            torch.manual_seed(1)
            with context():
                return network(inputs).square().mean()

        peaks.append(peak_allocated(forward, torch.device("cpu")))
        forward().backward()
        gradients.append(network.get_parameter("conv1.weight").grad)
    assert torch.equal(gradients[1], gradients[2])
    assert peaks[1] > 1.2 * peaks[0]
    assert peaks[2] < 1.05 * peaks[0]


def test_eval_mode_and_no_grad() -> None:
    x, m, _ = factors()
    with torch.no_grad(), recomputing():
        assert torch.equal(multiply(x, m), x * m)


def test_autocast() -> None:
    x, m, w = factors()

    def loss(multiply, context) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16), context:
            return F.conv2d(multiply(x, m), w).float().square().sum()

    found = torch.autograd.grad(loss(multiply, recomputing()), [x, m, w])
    wanted = torch.autograd.grad(loss(torch.mul, torch.enable_grad()), [x, m, w])
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_compiled() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor, m: Tensor, w: Tensor) -> Tensor:
            return F.conv2d(multiply(x, m), w).square().sum()

    x, m, w = factors()
    with recomputing():
        found = torch.autograd.grad(torch.compile(Net(), backend="aot_eager")(x, m, w), [x, m, w])
    wanted = torch.autograd.grad(Net()(x, m, w), [x, m, w])
    assert all(torch.allclose(a, b) for a, b in zip(found, wanted, strict=True))
