"""What is found out about model, loader and loss before any training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rbpfx
from rbpfx import CaptureError, FineTune, InputError, RbpfxError, Target
from rbpfx.training.task import Loader
from tests.toy import ShortcutNet, stripes

BATCHES = stripes()


def no_step(progress: object) -> None:
    raise AssertionError("training has begun")


def prepare(model: nn.Module, loader: Loader = BATCHES, **options: Any) -> None:
    """Prune without any training."""
    rbpfx.prune(
        model,
        loader,
        **{
            "method": "taylor",
            "target": Target(macs=0.7),
            "recovery": FineTune(epochs=0),
            "callback": no_step,
            "progress": False,
            **options,
        },
    )


def weight_normed() -> nn.Module:
    model = ShortcutNet()
    nn.utils.weight_norm(model.conv1)
    return model


def spectral_normed() -> nn.Module:
    model = ShortcutNet()
    nn.utils.spectral_norm(model.conv1)
    model(BATCHES[0][0])
    return model


def masked() -> nn.Module:
    model = ShortcutNet()
    nn.utils.prune.l1_unstructured(model.conv1, "weight", 0.5)
    return model


def caching() -> nn.Module:
    model = ShortcutNet()
    model.conv1.seen = model(BATCHES[0][0])
    return model


@pytest.mark.filterwarnings("ignore:`torch.nn.utils")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (weight_normed, r"'conv1' caches.*utils.weight_norm\. Call .*remove_weight_norm before"),
        (spectral_normed, "Call torch.nn.utils.remove_spectral_norm before pruning"),
        (masked, "Call torch.nn.utils.prune.remove before pruning"),
        (caching, r"detach tensors that the model caches in its attributes \(conv1.seen\)"),
    ],
)
def test_models_that_cannot_be_copied(make: Any, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        prepare(make())


class Remembering(ShortcutNet):
    """A state for a fixed number of examples."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.zeros(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.state


class Viewing(ShortcutNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).view(16, -1)


class Branching(ShortcutNet):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 16:
            x = x + 1
        return super().forward(x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Remembering(), r"16 examples and not on 4: .*at .*\+ self.state`: The size of tensor a"),
        (Viewing(), r"16 examples and not on 1: .* at .*\.view\(16, -1\)`: shape"),
        (
            Branching(),
            r"the captured graph runs on 16 .*`if x.shape\[0\] == 16:` is True; for this",
        ),
    ],
)
def test_models_of_one_batch_size(model: nn.Module, message: str, capfd: Any) -> None:
    with pytest.raises(InputError, match=message) as caught:
        prepare(model)
    assert "take the batch size from the input" in str(caught.value)
    assert "Capture it again" not in str(caught.value)


def test_batch_statistics_need_no_second_example() -> None:
    layers = [nn.Flatten(), nn.Linear(36, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)]
    prepare(nn.Sequential(*layers).train())


class Noisy(nn.Module):
    """Random in eval mode, in the shape of the input."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net, self.kind = ShortcutNet(), kind

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, 0.2) if self.kind == "dropout" else x + torch.randn_like(x)
        return self.net(x)


@pytest.mark.parametrize("kind", ["dropout", "sample"])
def test_draws_in_eval_mode(kind: str) -> None:
    with pytest.raises(CaptureError, match=r"draws random numbers in eval .*Draw in train mode"):
        prepare(Noisy(kind))


REGRESSION = [(x, x.mean((2, 3)).repeat(1, 3)) for x, _ in BATCHES]
SOFT = [(x, F.one_hot(y, 3).float() * 0.9 + 0.1 / 3) for x, y in BATCHES]


def smoothed(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, label_smoothing=0.1)


def first(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output, target[:, :1])


@pytest.mark.parametrize(
    ("model", "loader", "loss_fn", "message"),
    [
        (ShortcutNet(), REGRESSION, F.mse_loss, "targets are torch.float32 numbers"),
        (ShortcutNet(), REGRESSION, nn.L1Loss(), "neither classes nor probabilities"),
        (
            nn.Sequential(ShortcutNet(), nn.Linear(3, 1)),
            REGRESSION,
            first,
            r"shape \(16, 1\) has no classes",
        ),
    ],
)
def test_distillation_without_class_scores(
    model: nn.Module, loader: Loader, loss_fn: Any, message: str
) -> None:
    with pytest.raises(InputError, match=f"distill=True imitates class scores.*{message}"):
        prepare(model, loader, loss_fn=loss_fn, distill=True)
    prepare(model, loader, loss_fn=loss_fn)


@pytest.mark.parametrize("loader", [BATCHES, SOFT])
@pytest.mark.parametrize("loss_fn", [None, smoothed])
def test_distillation_with_losses_of_ones_own(loader: Loader, loss_fn: Any) -> None:
    prepare(ShortcutNet(), loader, loss_fn=loss_fn, distill=True)


def weight_normed_throughout() -> nn.Module:
    norm = nn.utils.parametrizations.weight_norm
    layers = [nn.Linear(36, 16), nn.Linear(16, 16), nn.Linear(16, 3)]
    return nn.Sequential(nn.Flatten(), *map(norm, layers))


@pytest.mark.parametrize("method", ["magnitude", "auto-balanced"])
def test_weights_that_are_computed(method: str) -> None:
    message = (
        r"weights of group 'linear.*', but .*parametrizations compute the weights of 1, 2, 3; "
        r"call .*remove_parametrizations.*Target\(exclude=\['linear.*'\]\).*'taylor'"
    )
    with pytest.raises(RbpfxError, match=message):
        prepare(weight_normed_throughout(), method=method)


def test_deployment_names_a_type() -> None:
    with pytest.raises(InputError, match=r"dtype='bf16' must be .*for example torch.bfloat16"):
        rbpfx.deploy(ShortcutNet(), BATCHES[0][0], dtype="bf16")
    with pytest.raises(InputError, match=r"dtype=torch.int8 must be a floating"):
        rbpfx.deploy(ShortcutNet(), BATCHES[0][0], dtype=torch.int8)
