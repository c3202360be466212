"""The accuracy benchmark: which rows there are, rows on synthetic images, resuming, the tables."""

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import _torch_pruning, accuracy
from benchmarks._accuracy_report import page, section
from benchmarks._accuracy_rows import Budget, Case, run
from benchmarks._data import ImageData
from benchmarks._models import VGG16BN, CifarResNet, LeNet300100
from benchmarks._record import Record
from benchmarks._train import Recipe, dense_cifar
from benchmarks.accuracy import cases, key_of, merge, shard
from rbpfx import count_macs, trace
from rbpfx.training.task import Task

BRIEF = Budget(epochs=2, noise_share=0.5, images=0)
IMAGES = torch.zeros(2, 3, 32, 32)


@pytest.fixture
def stripes() -> ImageData:
    """Images whose class is the position of a bright stripe."""
    torch.manual_seed(0)
    labels = torch.randint(10, (512,))
    images = 0.1 * torch.randn(512, 1, 28, 28)
    images[torch.arange(512), 0, 2 * labels + 4] += 1
    return ImageData("MNIST", images[:384], labels[:384], images[384:], labels[384:])


@pytest.fixture
def resnet() -> nn.Module:
    """A residual network of eight layers with statistics of its own in every BatchNorm."""
    torch.manual_seed(0)
    model = CifarResNet(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()


def test_vgg_has_the_size_of_the_literature() -> None:
    model = VGG16BN().eval()
    assert model(IMAGES).shape == (2, 10)
    assert count_macs(trace(model, IMAGES)) == 313_201_664
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == 13


@pytest.mark.parametrize("name", ["vgg16_bn", "resnet18"])
def test_dense_networks_are_trained_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ImageData("CIFAR-10", *(torch.randn(8, 3, 32, 32), torch.arange(8)) * 2)
    recipe = Recipe(1, 0.01, 0.0, batch_size=8)
    trained = dense_cifar(name, 0, data, tmp_path, recipe=recipe)
    monkeypatch.setattr("benchmarks._train.train_dense", None)
    loaded = dense_cifar(name, 0, data, tmp_path, recipe=recipe)
    weights = loaded.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in trained.state_dict().items())


# -- which rows ----------------------------------------------------------------------------


def test_breadth_comes_first() -> None:
    found = cases(["lenet5", "resnet20"], accuracy.METHODS, accuracy.MODES, ["2", "4"], [0, 1])
    assert len(found) == len(set(found))
    assert found[0] == Case("lenet5", "rbp", "recursive", "2", 0)
    first = [case for case in found if (case.ratio, case.seed) == ("2", 0)]
    assert found[: len(first)] == first
    methods = [case.method for case in first if case.network == "lenet5"]
    assert methods[2:5] == ["tp-group-norm", "tp-group-norm-global", "tp-sparse"]
    assert (found[-1].ratio, found[-1].seed) == ("4", 1)


def test_rows_without_sense_are_left_out() -> None:
    found = cases(accuracy.NETWORKS, accuracy.METHODS, accuracy.MODES, ["2", "auto"], [0])
    assert not [c for c in found if c.method == "bn-scale" and c.network.startswith("lenet")]
    assert {c.method for c in found if c.ratio == "auto"} == set(accuracy.NOISE)
    assert {c.mode for c in found if c.method.startswith(("tp-", "modelopt"))} == {"joint"}
    assert {c.network for c in found if c.method == "tp-inner"} == {
        "resnet18",
        "resnet20",
        "resnet56",
    }


def test_shards_are_disjoint_and_cover_everything() -> None:
    found = cases(["lenet5"], accuracy.METHODS, accuracy.MODES, ["2"], [0])
    parts = [shard(found, f"{i}/3") for i in range(3)]
    assert sorted(case for part in parts for case in part) == sorted(found)
    assert sum(map(len, parts)) == len(found)
    with pytest.raises(ValueError, match="i from 0"):
        shard(found, "3/3")


# -- running them --------------------------------------------------------------------------


def test_a_row_of_rbpfx(stripes: ImageData) -> None:
    torch.manual_seed(0)
    row = run(Case("lenet300100", "rbp", "joint", "2", 0), LeNet300100(), stripes, BRIEF)
    assert "failure" not in row, row
    assert 0.4 < row["macs_kept"] <= 0.5
    assert row["verification_error"] < 1e-9
    assert (row["epochs"], row["noise_epochs"], row["images"]) == (2, 1, 384)
    json.dumps(row)


@pytest.mark.parametrize(("method", "noise"), [("tp-group-norm", 0), ("tp-sparse", 1)])
def test_a_row_of_torch_pruning(stripes: ImageData, method: str, noise: float) -> None:
    pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    row = run(Case("lenet300100", method, "joint", "2", 0), LeNet300100(), stripes, BRIEF)
    assert "failure" not in row, row
    assert 0.45 < row["macs_kept"] <= 0.5
    assert row["noise_epochs"] == noise
    json.dumps(row)


def test_a_row_of_modelopt(stripes: ImageData) -> None:
    pytest.importorskip("modelopt")
    torch.manual_seed(0)
    case = Case("lenet300100", "modelopt-fastnas", "joint", "2", 0)
    row = run(case, LeNet300100(), stripes, BRIEF)
    assert "failure" not in row, row
    assert 0 < row["macs_kept"] <= 0.5  # nothing is trained, so any width is as good
    assert (row["noise_epochs"], row["scope"]) == (0, "the channels that FastNAS can narrow")
    json.dumps(row)


def test_an_automatic_row_takes_its_strength_from_the_ratio(stripes: ImageData) -> None:
    kept = []
    for ratio in ("auto@0.01", "auto@30"):
        torch.manual_seed(0)
        case, budget = Case("lenet300100", "rbp", "joint", ratio, 0), BRIEF._replace(epochs=80)
        row = run(case, LeNet300100(), stripes, budget)
        assert "failure" not in row, row
        kept.append(row["macs_kept"])
    assert kept[0] > 0.7 > 0.5 > kept[1]


def test_a_budget_out_of_reach_is_told(stripes: ImageData) -> None:
    row = run(Case("lenet300100", "rbp", "joint", "10000", 0), LeNet300100(), stripes, BRIEF)
    assert row["failure"] == "unreachable"


def test_what_is_done_is_not_run_again(
    stripes: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Loaded:
        def __init__(self, _: Any) -> None: ...

        def data_name(self, _: str) -> str:
            return "MNIST"

        def data(self, _: str) -> ImageData:
            return stripes

        def dense(self, *_: Any) -> nn.Module:
            return LeNet300100()

    runs: list[Case] = []

    def one_row(case: Case, *_: Any) -> dict[str, Any]:
        runs.append(case)
        return _row(case.method, case.ratio, case.seed, 0.9)

    monkeypatch.setattr(accuracy, "_Loaded", Loaded)
    monkeypatch.setattr(accuracy, "run", one_row)
    options = argparse.Namespace(
        networks=["lenet300100"], methods=["rbp"], modes=["joint"], ratios=["2", "4"], seeds=[0, 1]
    )
    budget = {"epochs": 2.0, "noise_share": 0.5, "images": 0}
    rest = {"seconds": None, "device": "cpu", "retry": False}
    vars(options).update(budget | rest | {"shard": "0/2"})
    nothing, first = Record(tmp_path / "none.json"), tmp_path / "first.json"
    accuracy.run_missing(Record(first), nothing, options)
    assert len(runs) == 2
    accuracy.run_missing(Record(first), nothing, options)
    assert len(runs) == 2
    options.shard = "0/1"
    accuracy.run_missing(Record(tmp_path / "second.json"), Record(first), options)
    assert len(set(runs)) == len(runs) == 4


def test_records_are_merged(tmp_path: Path) -> None:
    for name in "ab":
        Record(tmp_path / f"{name}.json").add(name, _row("rbp", "2", 0, 0.9))
    merge(Record(tmp_path / "all.json"), [tmp_path / "a.json", tmp_path / "b.json"])
    merged = Record(tmp_path / "all.json")
    assert list(merged.rows) == ["a", "b"]
    assert [row["environment"] for row in merged.rows.values()] == [0, 1]
    assert len(merged.environments) == 2


def test_keys_tell_budgets_apart() -> None:
    case = Case("lenet5", "rbp", "joint", "2", 0)
    assert key_of(case, "MNIST", BRIEF) != key_of(case, "MNIST", BRIEF._replace(epochs=3))
    assert key_of(case, "MNIST", BRIEF) != key_of(case, "MNIST", BRIEF._replace(images=5))


# -- Torch-Pruning -------------------------------------------------------------------------


def test_shortcuts_survive_their_translation(resnet: nn.Module) -> None:
    images = torch.randn(2, 3, 32, 32)
    translated = _torch_pruning.understood(resnet)
    assert torch.equal(translated(images), resnet(images))
    back = _torch_pruning.emitted(copy.deepcopy(translated))
    assert torch.equal(back(images), resnet(images))
    assert count_macs(trace(back, images)) == count_macs(trace(resnet, images))


def test_zero_padding_as_it_is_breaks_torch_pruning(resnet: nn.Module) -> None:
    """What the translation is for; if this fails, it is not needed any more."""
    torch_pruning = pytest.importorskip("torch_pruning")
    importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
    torch_pruning.pruner.GroupNormPruner(
        resnet, IMAGES, importance=importance, pruning_ratio=0.5, ignored_layers=[resnet.linear]
    ).step()
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        resnet(IMAGES)


@pytest.mark.parametrize("method", _torch_pruning.METHODS)
def test_the_budget_is_met_and_not_by_far(resnet: nn.Module, method: str) -> None:
    pytest.importorskip("torch_pruning")
    share = 0.3
    settings = _torch_pruning.METHODS[method]
    model, dense = _torch_pruning.understood(resnet), count_macs(trace(resnet, IMAGES))
    cut = _torch_pruning.cut_to(model, IMAGES, share * dense, settings)
    assert cut is not None
    assert cut.macs == count_macs(trace(cut.model, IMAGES))
    assert 0.93 * share * dense < cut.macs <= share * dense
    assert cut.model(IMAGES).shape == (2, 10)
    assert cut.model.linear.in_features == (
        64 if settings.inner_only else cut.model.layer3[0].bn2.num_features
    )


def test_what_is_out_of_reach_inside_the_blocks(resnet: nn.Module) -> None:
    pytest.importorskip("torch_pruning")
    settings = _torch_pruning.METHODS["tp-inner"]
    dense = count_macs(trace(resnet, IMAGES))
    model = _torch_pruning.understood(resnet)
    assert _torch_pruning.cut_to(model, IMAGES, 0.01 * dense, settings) is None


def test_sparse_learning_shrinks_weights_and_leaves_shortcuts_alone(resnet: nn.Module) -> None:
    pytest.importorskip("torch_pruning")
    model = _torch_pruning.understood(resnet)
    batch = [(torch.randn(8, 3, 32, 32), torch.arange(8))]
    settings = _torch_pruning.METHODS["tp-sparse"]
    task = Task()
    learnt = _torch_pruning.learn_sparsity(model, batch, task, 2, 0.01, settings, resnet)
    fixed = model.layer2[0].shortcut.weight
    assert torch.equal(learnt.layer2[0].shortcut.weight, fixed)
    assert not torch.equal(learnt.conv1.weight, model.conv1.weight)


# -- tables --------------------------------------------------------------------------------


def test_the_table_has_means_spreads_the_best_and_what_is_missing() -> None:
    rows = [_row("rbp", "2", seed, 0.90 + 0.01 * seed) for seed in (0, 1, 2)]
    rows += [_row("tp-sparse", "2", 0, 0.89), _row("rbp", "auto", 0, 0.91)]
    rows += [_row("rbp", ratio, 0, 0.9) for ratio in ("auto@10", "auto@8")]
    rows.append({**_row("tp-inner", "4", 0, 0.0), "failure": "unreachable", "reason": "too small"})
    text = section(rows, "github")
    assert "**-1.00 ± 1.00**" in text
    assert "-3.00 ×1" in text
    assert "-1.00 ×1 at 2.0x" in text
    assert "unreachable (too small)" in text
    assert "92.00 %" in text
    columns = [column.strip() for column in text.split("| method")[1].split("\n")[0].split("|")]
    assert columns[2:-1] == ["2x", "4x", "auto", "auto@8", "auto@10"]


def test_published_marks_stand_beside_the_same_data_only() -> None:
    row = _row("rbp", "2", 0, 0.9) | {"network": "resnet56", "data": "CIFAR-10"}
    assert "93.53 -> 93.77 %" in section([row])
    text = page([row | {"data": "CIFAR-10 (JPEG)"}])
    assert "93.53" not in text
    assert "not comparable with published figures" in text


def _row(method: str, ratio: str, seed: int, reached: float) -> dict[str, Any]:
    return {
        "network": "lenet300100",
        "method": method,
        "mode": "joint",
        "ratio": ratio,
        "seed": seed,
        "data": "MNIST",
        "images": 100,
        "test_images": 100,
        "epochs": 2.0,
        "noise_share": 0.5,
        "scope": "all groups",
        "dense_accuracy": 0.92,
        "macs_kept": 0.5,
        "accuracy_after_cut": reached - 0.1,
        "accuracy": reached,
        "seconds": 1.0,
    }
