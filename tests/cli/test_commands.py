"""Every command, end to end on tiny things."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import rbpfx
from rbpfx.cli import models
from rbpfx.cli import prune as pruning
from rbpfx.training.engine import Stepper

from .conftest import SMALL, Run, equal, make_photos

# -- prune --------------------------------------------------------------------------------------


def test_prune_a_factory_on_digits(run: Run, work: Path) -> None:
    arguments = ("nets:small", "--data", "digits", "--macs", "0.5", "--epochs", "0.5")
    ran = run("prune", *arguments, "--recovery-epochs", "0.5", "--json", "--out", "pruned")
    assert ran.code == 0
    assert "nets is imported" in ran.err
    assert "noise" in ran.err  # a bar
    report = ran.data["report"]
    assert report["method"] == "rbp"
    assert report["pruned"]["macs"] <= 0.5 * report["dense"]["macs"]
    assert 0 <= report["pruned"]["accuracy"] <= 1
    assert (ran.data["directory"], ran.data["source"]) == ("pruned", None)
    network = rbpfx.load("pruned", models.find_model("nets:small").build())
    assert rbpfx.count_parameters(network) == report["pruned"]["parameters"]


def test_prune_torchvision_on_an_image_folder(run: Run, work: Path) -> None:
    make_photos(work / "photos")
    name = "torchvision:squeezenet1_1?num_classes=2"
    torch.save(models.find_model(name).build().state_dict(), "w.pt")
    arguments = ("prune", name, "--weights", "w.pt", "--data", "imagefolder:photos")
    arguments = (*arguments, "--method", "magnitude", "--macs", "0.5", "--image-size", "64")
    ran = run(*arguments, "--recovery-epochs", "0", "--batch-size", "4", "--out", "a/b", "-q")
    assert (ran.code, ran.err) == (0, "")
    assert "saved in a/b; in Python: rbpfx.load('a/b')" in ran.out
    network = rbpfx.load("a/b")
    bench = run("bench", "a/b", "--batch-sizes", "1", "--seconds", "0.1", "--json")
    assert [entry["form"] for entry in bench.data["results"]] == ["as emitted", "deployed"]
    report = json.loads(Path("a/b/plan.json").read_text())["report"]
    assert rbpfx.count_macs(network) == report["pruned"]["macs"]


def test_prune_goes_on_from_checkpoints(
    run: Run, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(models.find_model("nets:small").build().state_dict(), "w.pt")
    arguments = ("prune", "nets:small", "--weights", "w.pt", "--data", "digits", "--macs", "0.5")
    arguments = (*arguments, "--epochs", "0.5", "--recovery-epochs", "0.5", "--force", "--quiet")
    arguments = (*arguments, "--checkpoint-dir", "checkpoints")
    assert run(*arguments, "--out", "first").code == 0
    assert list(Path("checkpoints").glob("fine-tuning-*.safetensors"))
    monkeypatch.setattr(Stepper, "step", lambda *_: pytest.fail("it trains again"))
    assert run(*arguments, "--out", "second").code == 0
    networks = [rbpfx.load(d, models.find_model("nets:small").build()) for d in ("first", "second")]
    assert equal(*networks)
    assert (
        "recovery was FineTune" in run(*arguments, "--recovery-lr", "0.1", "--out", "third").error
    )


def test_an_earlier_network_is_not_lost(run: Run, saved: Path) -> None:
    before = (saved / "plan.json").read_bytes()
    assert "there is a plan.json in 'pruned' already; give --force" in run(*SMALL).error
    assert (saved / "plan.json").read_bytes() == before
    assert run(*SMALL, "--force").code == 0
    assert (saved / "plan.json").read_bytes() != before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (("--out", "nets.py"), "'nets.py' cannot be written"),
        (("--out", "nets.py/there"), "cannot be written"),
        (("--weights", "w.pt"), "the weights 'w.pt' cannot be read"),
        (("--data", "imagefolder:nowhere"), "there is no folder"),
        (("--augment", "flip"), "--augment flip goes with imagefolder:"),
        (("--data", "torchvision:FakeData?image_size=(3,8,8)"), "does not run on the data's first"),
    ],
)
def test_faults_are_found_before_training(
    changes: tuple[str, str], words: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "prune_network", lambda *_, **__: pytest.fail("it was trained"))
    assert words in run(*SMALL, *changes).error
    assert not Path("pruned").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        ("--method", "guess"),
        ("--device", "abacus"),
        ("--round-to", "0"),
        ("--val-share", "1"),
        ("--batch-size", "0"),
        ("--macs", "0"),
        ("--recovery-lr", "-1"),
        ("--augment", "mixup"),
    ],
)
def test_wrong_options(wrong: tuple[str, str], run: Run) -> None:
    ran = run(*SMALL, *wrong)
    assert ran.code == 2
    assert f"Invalid value for '{wrong[0]}'" in ran.err


def test_rankings_need_a_target(run: Run) -> None:
    arguments = ("nets:small", "--data", "digits", "--out", "pruned", "--method", "taylor")
    ran = run("prune", *arguments)
    assert ran.code == 2
    assert "--method taylor needs a target, for example --macs 0.5" in ran.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--epochs", "inf"), "Recursion(epochs=inf) must be finite"),
        (("--recovery-epochs", "inf"), "finite"),
        (("--macs", "0.5", "--deployed"), "deployed=True"),
    ],
)
def test_settings_without_sense(options: tuple[str, ...], message: str, run: Run) -> None:
    assert message in run("prune", "nets:small", "--data", "digits", "--out", "new", *options).error


# -- inspect ------------------------------------------------------------------------------------


def test_inspect(run: Run) -> None:
    text = run("inspect", "torchvision:resnet18", "--input-size", "3", "64", "64").out
    assert "inputs 1x3x64x64" in text
    assert "  conv1:\n    layer1.0.conv2, layer1.1.conv2\n" in text
    assert "  output of the model:\n    fc (1000)\n" in text


def test_inspect_as_json_agrees_with_the_library(run: Run) -> None:
    data = run("inspect", "nets:small", "--data", "digits", "--unit", "feature", "--json").data
    gm = rbpfx.trace(models.find_model("nets:small").build(), torch.zeros(64, 1, 8, 8))
    analysis = rbpfx.analyze(gm, unit="feature")
    assert [g["name"] for g in data["groups"]] == [g.name for g in analysis.groups]
    assert data["macs"] == rbpfx.count_macs(gm)
    assert data["frozen"][0]["reason"] == analysis.frozen[0].reason
    assert {(e["reads"], e["group"]) for e in data["computed_from"]} == set(analysis.graph.edges)
    assert all(0 < group["share_of_macs"] <= 1 for group in data["groups"])


def test_inspect_needs_inputs(run: Run) -> None:
    assert "give --input-size" in run("inspect", "nets:small").error


def test_inspect_refuses_leaves_that_are_not_there(run: Run) -> None:
    ran = run("inspect", "nets:small", "--data", "digits", "--leaf", "nope")
    assert "no module of the model is called 'nope'" in ran.error


def test_inspect_names_what_is_frozen_if_nothing_can_go(run: Run, work: Path) -> None:
    (work / "one.py").write_text("from torch import nn\nnet = nn.Linear(4, 3)\n")
    text = run("inspect", "one:net", "--input-size", "1", "2", "4").out
    assert "No channel can be removed." in text
    assert "output of the model" in text


# -- apply --------------------------------------------------------------------------------------


def test_apply_the_plan_of_a_saved_network(run: Run, saved: Path) -> None:
    ran = run("apply", saved / "plan.json", "nets:small", "--out", "again", "--json")
    plans = [json.loads((Path(p) / "plan.json").read_text()) for p in (saved, "again")]
    assert plans[0]["kept"] == plans[1]["kept"]
    assert ran.data["report"]["verification_error"] < 1e-9
    model = models.find_model("nets:small").build
    cut = [rbpfx.load(place, model()) for place in (saved, "again")]
    shapes = [[tuple(t.shape) for t in network.state_dict().values()] for network in cut]
    assert shapes[0] == shapes[1]
    # Nothing was trained: the rows that stay are those of the model.
    assert torch.equal(cut[1].state_dict()["0.weight"], model()[0].weight[plans[0]["kept"]["0"]])


def test_apply_a_plan_of_ones_own(run: Run, work: Path) -> None:
    (work / "plan.json").write_text('{"kept": {"0": [0, 3]}}')
    arguments = ("apply", "plan.json", "nets:small", "--input-size", "1", "8", "8")
    text = run(*arguments, "--out", "cut").out
    assert "sliced equals masked" in text
    assert (
        rbpfx.load("cut", models.find_model("nets:small").build())
        .get_submodule("0")
        .weight.shape[0]
        == 2
    )
    assert "already; give --force" in run(*arguments, "--out", "cut").error


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is no pruning plan"),
        ("3", "is no pruning plan"),
        ('{"keep": {}}', "not a pruning plan"),
        ('{"kept": {"conv9": [0]}}', "no channel group is called 'conv9'"),
        ('{"kept": {"0": [99]}}', "keeps unit 99"),
        ('{"format": "rbpfx pruned network", "version": 1}', "checksum differs"),
    ],
)
def test_plans_that_do_not_fit(text: str, words: str, run: Run, work: Path) -> None:
    (work / "plan.json").write_text(text)
    arguments = ("plan.json", "nets:small", "--input-size", "1", "8", "8", "--out", "cut")
    assert words in run("apply", *arguments).error
    assert not Path("cut").exists()


def test_apply_to_another_model(run: Run, saved: Path) -> None:
    ran = run("apply", saved / "plan.json", "nets:colours", "--out", "cut")
    assert "not the architecture that was pruned" in ran.error


# -- report, bench, export -----------------------------------------------------------------------


def test_report(run: Run, saved: Path) -> None:
    text = run("report", "pruned").out
    assert text.startswith("pruned: torch.nn.modules.container.Sequential, pruned by rbpfx")
    plan = json.loads((saved / "plan.json").read_text())
    assert f"{plan['report']['pruned']['macs']:,}" in text
    assert run("report", "pruned", "--json").data == plan["report"]


def test_report_as_a_page(run: Run, saved: Path, work: Path) -> None:
    assert "pruned by rbpfx" in run("report", "pruned", "--write", "report.html").out
    assert (work / "report.html").read_text().lower().startswith("<!doctype html>")
    assert ".html" in run("report", "pruned", "--write", "report.doc").error
    assert "cannot be written" in run("report", "pruned", "--write", "nets.py/report.html").error


def test_report_of_nothing(run: Run, work: Path) -> None:
    assert "there is no saved network in '.'" in run("report", ".").error


def test_bench(run: Run, saved: Path) -> None:
    arguments = ("pruned", "--model", "nets:small", "--batch-sizes", "1,3", "--seconds", "0.05")
    text = run("bench", *arguments).out
    assert [line.split()[0] for line in text.splitlines()[2:6]] == ["1", "1", "3", "3"]
    results = run("bench", *arguments, "--json").data["results"]
    assert [entry["batch_size"] for entry in results] == [1, 1, 3, 3]
    assert all(e["dense_seconds"] > 0 and e["pruned_seconds"] > 0 for e in results)


@pytest.mark.parametrize("command", [("bench",), ("export", "--pt2")])
def test_the_original_has_to_be_known(command: tuple[str, ...], run: Run, saved: Path) -> None:
    assert "--model module.path:factory" in run(*command, "pruned").error
    ran = run(*command, "pruned", "--model", "nets:colours")
    assert "not the architecture that was pruned" in ran.error


def test_numbers_have_to_be_numbers(run: Run, saved: Path) -> None:
    assert "must be whole numbers" in run("bench", "pruned", "--batch-sizes", "1,x").err


def test_export(run: Run, saved: Path) -> None:
    ran = run("export", "pruned", "--pt2", "--model", "nets:small", "--json")
    (entry,) = ran.data["files"]
    assert entry["file"] == "pruned/deployed.pt2"
    assert entry["error"] < 1e-3
    x = torch.randn(5, 1, 8, 8)
    network = rbpfx.load("pruned", models.find_model("nets:small").build()).eval()
    torch.testing.assert_close(torch.export.load(entry["file"]).module()(x), network(x))
    assert "give --force" in run("export", "pruned", "--pt2", "--model", "nets:small").error
    assert "name at least one format" in run("export", "pruned").err


def test_export_to_onnx(run: Run, saved: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    ran = run("export", "pruned", "--onnx", "--model", "nets:small", "--out", "there")
    assert ran.out.startswith("there/deployed.onnx: equals the network to ")
