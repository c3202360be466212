"""Dense training: it learns, and trained networks are found again."""

from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import _train
from benchmarks._data import ImageData, TensorLoader
from benchmarks._train import Recipe, accuracy, dense_lenet, train_dense

BRIEF = Recipe(epochs=2, lr=0.05, weight_decay=0.0, batch_size=32)


@pytest.fixture
def stripes() -> ImageData:
    """Images whose class is the position of a bright stripe."""
    torch.manual_seed(0)
    labels = torch.randint(10, (512,))
    images = 0.1 * torch.randn(512, 1, 28, 28)
    images[torch.arange(512), 0, 2 * labels + 4] += 1
    return ImageData("stripes", images[:256], labels[:256], images[256:], labels[256:])


def test_training_learns_and_restores_the_memory_format(stripes: ImageData) -> None:
    torch.manual_seed(0)
    model = _train.LeNet5Caffe()
    loader = TensorLoader(stripes.train_images, stripes.train_labels, 32, shuffle=True)
    epochs: list[int] = []
    seconds = train_dense(model, loader, 6, 0.05, on_epoch=epochs.append)
    assert seconds > 0
    assert epochs == [1, 2, 3, 4, 5, 6]
    assert accuracy(model, TensorLoader(stripes.test_images, stripes.test_labels, 64)) > 0.95
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_training_that_diverges_is_reported(stripes: ImageData) -> None:
    loader = TensorLoader(stripes.train_images, stripes.train_labels, 32)
    with pytest.raises(FloatingPointError, match="diverged in epoch 1 of 2"):
        train_dense(_train.LeNet5Caffe(), loader, 2, lr=1e6)


def test_accuracy_weighs_examples_and_restores_the_mode() -> None:
    model = nn.Dropout(1.0).train()  # the identity in evaluation mode only
    scores = torch.eye(3)
    batches = [(scores[:2], torch.tensor([0, 1])), (scores[2:], torch.tensor([0]))]
    assert accuracy(model, batches) == pytest.approx(2 / 3)
    assert model.training


def test_dense_lenet_is_trained_once(
    stripes: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = dense_lenet("lenet300100", 0, stripes, tmp_path, recipe=BRIEF)
    assert not trained.training
    monkeypatch.delattr(_train, "train_dense")
    loaded = dense_lenet("lenet300100", 0, stripes, tmp_path, recipe=BRIEF)
    assert not loaded.training
    for name, value in trained.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("change", ["seed", "recipe", "data"])
def test_other_seeds_recipes_and_data_are_trained_anew(
    stripes: ImageData, tmp_path: Path, change: str
) -> None:
    before = dense_lenet("lenet300100", 0, stripes, tmp_path, recipe=BRIEF)
    after = dense_lenet(
        "lenet300100",
        int(change == "seed"),
        stripes._replace(train_labels=9 - stripes.train_labels) if change == "data" else stripes,
        tmp_path,
        recipe=Recipe(1, 0.05, 0.0) if change == "recipe" else BRIEF,
    )
    assert not torch.equal(before.fc1.weight, after.fc1.weight)


def test_an_unknown_lenet_is_named(stripes: ImageData, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'lenet6'; there are lenet5, lenet300100"):
        dense_lenet("lenet6", 0, stripes, tmp_path)
