"""Numerical faults: noticed, named, survived once; and loaders that do not behave."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rbpfx import DivergenceError, FineTune, InputError, Recursion, Target, Training, prune
from rbpfx.training.faults import bad_batch, locate
from rbpfx.training.finetune import finetune
from rbpfx.training.task import Task
from tests.toy import ShortcutNet, Times, stripes, trained

BATCHES = stripes()


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    torch.manual_seed(0)
    return trained(ShortcutNet(), BATCHES).eval()


def pruned(dense: nn.Module, loader: Any = BATCHES, **options: Any) -> Any:
    settings: dict[str, Any] = {
        "target": Target(macs=0.5),
        "recursion": Recursion(epochs=2),
        "recovery": FineTune(epochs=1),
        "progress": False,
        **options,
    }
    return prune(dense, loader, **settings)


def finite(model: nn.Module) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in model.state_dict().values())


class Gradient(torch.autograd.Function):
    """The identity, with a gradient that is not finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * float("inf")


class TestFaults:
    @pytest.mark.parametrize("factor", [float("nan"), float("inf"), 1e12])
    def test_one_is_survived(self, dense, factor: float, caplog) -> None:
        """An exploded loss has been stepped on when it is noticed: that is undone."""
        result = pruned(dense, loss_fn=Times({5: factor}))
        assert finite(result.model)
        assert result.report.interrupted == ""
        what = "exploded" if factor == 1e12 else "is not a finite number"
        assert f"the loss {what}" in caplog.text
        assert "at step 5, with group 'stem' at the front" in caplog.text
        assert "back at step 0, with 0.1 of the learning rates" in caplog.text

    def test_of_the_gradients_alone(self, dense, caplog) -> None:
        """It is noticed by the next loss; the state before it is not good."""
        calls = []

        def loss_fn(output: Tensor, target: Tensor) -> Tensor:
            calls.append(torch.is_grad_enabled())
            bad = sum(calls) == 8 and calls[-1]
            return F.cross_entropy(Gradient.apply(output) if bad else output, target)

        model = trained(ShortcutNet(), BATCHES)
        finetune(model, BATCHES, Task(loss_fn), FineTune(epochs=2))
        assert finite(model)
        assert "parameter 'stem.weight' holds NaN or Inf; back at step 6" in caplog.text

    def test_lower_rates_help(self, dense) -> None:
        model = trained(ShortcutNet(), BATCHES)
        finetune(model, BATCHES, Task(), FineTune(epochs=6, lr=30))
        assert finite(model)
        assert Task().accuracy(model, stripes(seed=1)) > 0.8

    def test_with_several_factors_of_the_schedule(self) -> None:
        """The lower rate is that of every later step, whatever the schedule says."""
        rates: list[float] = []

        class Recorded(torch.optim.SGD):
            def step(self, closure: Any = None) -> Any:
                rates.append(self.param_groups[0]["lr"])
                return super().step(closure)

        def scheduler(optimizer: torch.optim.Optimizer, steps: int) -> Any:
            return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

        settings = FineTune(1, optimizer=lambda w: Recorded(w, 0.1), scheduler=scheduler)
        finetune(ShortcutNet(), BATCHES, Task(Times({3: float("nan")})), settings)
        assert rates == pytest.approx([0.1, 0.05] + [0.01 / (1 + step) for step in range(6)])

    def test_a_second_one_ends_it(self, dense) -> None:
        with pytest.raises(
            DivergenceError, match=r"step 2 of the fine-tuning.*and again"
        ) as caught:
            pruned(dense, loss_fn=Times({14: float("nan"), 16: float("nan")}))
        assert (caught.value.stage, caught.value.step) == ("fine-tuning", 2)
        assert finite(caught.value.model)
        assert "NOT FINISHED: training ended by a fault" in str(caught.value.result.report)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_bad_batch_is_not_tried_again(self, dense, value: float) -> None:
        images, labels = BATCHES[3]
        images = images.clone()
        images[2, 0, 1, 1] = value
        loader = [*BATCHES[:3], (images, labels), *BATCHES[4:]]
        message = (
            r"tensor 0 of its batch, of shape \(16, 1, 6, 6\), holds NaN or Inf.*loader yields"
        )
        with pytest.raises(DivergenceError, match=message) as caught:
            pruned(dense, loader)
        assert caught.value.step == 4

    def test_float16_scales_its_gradients_down(self, dense) -> None:
        result = pruned(
            dense,
            training=Training(precision="float16"),
            loss_fn=lambda output, target: F.cross_entropy(output, target) * 100,
        )
        assert finite(result.model)


class TestWhere:
    def test_batches(self) -> None:
        good = {"pixels": torch.ones(2), "ids": torch.tensor([1]), "name": "x"}
        assert bad_batch([good, (torch.zeros(1), [3.0])]) is None
        assert bad_batch([good, {**good, "pixels": torch.tensor(float("nan"))}]) is not None

    def test_layers(self) -> None:
        class Root(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

            def forward(self, x: Tensor) -> Tensor:
                return self.second(torch.log(self.first(x) * 0 - 1))

        batch = (torch.ones(3, 2), torch.zeros(3, dtype=torch.long))
        model = Root()
        assert locate(model, batch, Task()) == "the activations of 'second' hold NaN or Inf"
        model.first.bias.data[1] = float("inf")
        assert locate(model, batch, Task()) == "parameter 'first.bias' holds NaN or Inf"
        loss = Task(lambda output, target: output.sum() / 0)
        assert "although the activations are" in str(locate(nn.Linear(2, 2), batch, loss))
        assert locate(nn.Linear(2, 2), batch, Task()) is None
        assert locate(nn.Linear(2, 2), "no batch", Task()) is None

    def test_no_random_numbers_are_drawn(self) -> None:
        batch = (torch.ones(3, 2), torch.zeros(3, dtype=torch.long))
        model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
        state = torch.get_rng_state()
        locate(model, batch, Task())
        assert torch.equal(torch.get_rng_state(), state)


class Loader:
    """Yields what a function of the epoch says."""

    def __init__(self, epochs: Any, length: int = 6) -> None:
        self.epochs, self.length, self.epoch = epochs, length, -1

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        self.epoch += 1
        yield from self.epochs(self.epoch)


class TestLoaders:
    def test_batches_of_changing_size(self, dense) -> None:
        images, labels = (torch.cat(part) for part in zip(*BATCHES, strict=True))
        loader = list(
            zip(images.split([3, 40, 2, 30, 21]), labels.split([3, 40, 2, 30, 21]), strict=True)
        )
        assert finite(pruned(dense, loader).model)

    def test_a_batch_of_one(self, dense) -> None:
        one = [(BATCHES[0][0][:1], BATCHES[0][1][:1])]
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
        with pytest.raises(InputError, match=r"batch of one example.*drop_last=True"):
            pruned(model, [*BATCHES, *one])
        assert finite(pruned(dense, [*BATCHES, *one]).model)  # images have many pixels

    def test_one_that_ends_early(self, dense) -> None:
        assert finite(pruned(dense, Loader(lambda epoch: BATCHES[: 6 - epoch % 3])).model)

    def test_one_that_raises(self, dense, tmp_path) -> None:
        def epochs(number: int) -> Iterator[Any]:
            for index, batch in enumerate(BATCHES):
                if number == 4 and index == 2:
                    raise OSError("photo.jpg is truncated")
                yield batch

        broken = Loader(epochs)
        with pytest.raises(InputError, match=r"OSError after 2 batches.*photo\.jpg"):
            pruned(dense, broken, checkpoint_dir=tmp_path)
        seen: list[Any] = []
        pruned(dense, Loader(lambda _: BATCHES), checkpoint_dir=tmp_path, callback=seen.append)
        assert len(seen) < 18  # what was done before is not done again

    def test_a_constant_label(self, dense) -> None:
        """Nothing has to be told apart: no group loses every unit."""
        loader = [(images, torch.zeros_like(labels)) for images, labels in BATCHES]
        settings = {"target": None, "recursion": Recursion(10, strength=50.0, noise_lr=0.5)}
        result = pruned(dense, loader, **settings)
        assert all(after >= 1 for _, after in result.report.widths.values())
        assert result.model(BATCHES[0][0]).argmax(1).eq(0).all()
