"""Weights from files: every form of a checkpoint, and what is said of those that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rbpfx import LoadError
from rbpfx.cli.weights import load_weights

from .conftest import equal


def network(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.other.weight = self.one.weight


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "optimizer": {}},
        lambda state: {"state_dict": {f"module.{name}": t for name, t in state.items()}},
    ],
)
def test_forms_of_checkpoints(wrap: object, tmp_path: Path) -> None:
    trained, model = network(), network()
    torch.save(wrap(trained.state_dict()), tmp_path / "w.pt")  # type: ignore[operator]
    load_weights(model, tmp_path / "w.pt")
    assert equal(model, trained)


def test_safetensors(tmp_path: Path) -> None:
    trained, model = network(), network()
    save_file(trained.state_dict(), tmp_path / "w.safetensors")
    load_weights(model, tmp_path / "w.safetensors")
    assert equal(model, trained)


def test_tied_tensors_may_be_stored_once(tmp_path: Path) -> None:
    trained, model = Tied(), Tied()
    save_file({"one.weight": trained.one.weight}, tmp_path / "w.safetensors")
    load_weights(model, tmp_path / "w.safetensors")
    assert equal(model, trained)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    state = network(5).state_dict()
    state["extra"] = state.pop("1.bias")
    torch.save(state, tmp_path / "w.pt")
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(LoadError) as caught:
        load_weights(model, tmp_path / "w.pt")
    for words in (
        "1 missing in the file: 1.bias",
        "1 not in the model: extra",
        "5 of another shape: 0.weight (file 5x3, model 4x3), 0.bias (file 5, model 4), ",
    ):
        assert words in str(caught.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class Payload:
    def __reduce__(self) -> object:
        return Path.touch, (Path("ran"),)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (Payload(), "holds more than tensors"),
        ([1, 2], "holds no state_dict"),
        ({"epoch": 3}, "holds no state_dict"),
    ],
)
def test_no_weights_at_all(content: object, words: str, work: Path) -> None:
    torch.save(content, "w.pt")
    with pytest.raises(LoadError, match=words):
        load_weights(network(), Path("w.pt"))
    assert not Path("ran").exists()


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_files_that_cannot_be_read(name: str, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="cannot be read"):
        load_weights(network(), tmp_path / name)
    for damaged in (b"", b"hello", b"\x80\x02"):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(LoadError, match="no file of weights, or damaged"):
            load_weights(network(), tmp_path / name)


@pytest.mark.parametrize("name", ["missing.safetensors", "missing.pt"])
def test_a_missing_file_is_said_to_be_missing(name: str, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"cannot be read: .*[Nn]o such file"):
        load_weights(network(), tmp_path / name)
