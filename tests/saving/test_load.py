"""What is loaded is what was saved; what does not belong together is named."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.export import Dim, export
from torchvision.models import get_model, resnet18

import rbpfx
from rbpfx import FineTune, LoadError, PruningResult, SaveError, Target, parsing
from rbpfx.saving import library
from tests.saving.results import (
    Custom,
    Doubling,
    Tied,
    edit_plan,
    edit_weights,
    halved,
    outputs,
    same,
    small_vit,
)
from tests.toy import ShortcutNet, stripes

IMAGES = stripes()[0][0]
PAIR = {"pair": [torch.rand(3, 4), torch.rand(3, 4)], "gain": 2.0}
ROOT = Path(rbpfx.__file__).parents[1]


@pytest.fixture(scope="module")
def pruned() -> PruningResult:
    torch.manual_seed(0)
    options = {"recovery": FineTune(epochs=1), "progress": False}
    return rbpfx.prune(
        ShortcutNet().eval(), stripes(), method="magnitude", target=Target(macs=0.5), **options
    )


@pytest.fixture
def saved(pruned: PruningResult, tmp_path: Path) -> Path:
    pruned.save(tmp_path / "net")
    return tmp_path / "net"


def round_trip(result: PruningResult, tmp_path: Path, model: Any, **options: Any) -> nn.Module:
    result.save(tmp_path / "net")
    return rbpfx.load(tmp_path / "net", model, **options)


class TestRoundTrip:
    def test_prune_save_load(self, pruned, saved) -> None:
        loaded = rbpfx.load(saved, ShortcutNet)
        assert same(pruned.model, loaded, IMAGES)
        assert loaded.state_dict().keys() == pruned.model.state_dict().keys()
        assert loaded.conv1.out_channels == pruned.model.conv1.out_channels < 8

    def test_units_of_features(self, tmp_path) -> None:
        options = {"recovery": FineTune(epochs=0), "progress": False, "unit": "feature"}
        target = Target(macs=0.5)
        dense = ShortcutNet().eval()
        result = rbpfx.prune(dense, stripes(), method="random", target=target, **options)
        assert same(result.model, round_trip(result, tmp_path, ShortcutNet), IMAGES)

    def test_in_another_process(self, pruned, saved) -> None:
        torch.save([IMAGES, *outputs(pruned.model, IMAGES)], saved / "expected.pt")
        code = (
            "import torch, rbpfx; from tests.toy import ShortcutNet; torch.set_num_threads(1)\n"
            "x, y = torch.load('expected.pt')\n"
            "assert torch.equal(rbpfx.load('.', ShortcutNet)(x), y)"
        )
        env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", code]
        subprocess.run(command, cwd=saved, env=env, check=True, timeout=120)

    @pytest.mark.parametrize(
        ("make", "inputs", "options"),
        [
            (Custom, PAIR, {}),
            (Custom, PAIR, {"leaf_modules": [Doubling]}),
            (Custom, PAIR, {"leaf_modules": ["doubling"]}),
            (small_vit, torch.rand(2, 3, 32, 32), {}),
            (small_vit, torch.rand(2, 3, 32, 32), {"normalization": "exact"}),
            (small_vit, torch.rand(2, 3, 32, 32), {"attention": "positions"}),
            (ShortcutNet, IMAGES, {"unit": "feature"}),
        ],
    )
    def test_all_options(self, make, inputs, options, tmp_path) -> None:
        result = halved(make().eval(), inputs, **options)
        assert same(result.model, round_trip(result, tmp_path, make), inputs)

    def test_a_detector(self, tmp_path) -> None:
        settings = {"weights": None, "weights_backbone": None, "num_classes": 5}
        name = "ssdlite320_mobilenet_v3_large"
        inputs = ([torch.rand(3, 96, 96)],)
        result = halved(get_model(name, **settings).eval(), inputs)
        loaded = round_trip(result, tmp_path, lambda: get_model(name, **settings))
        assert same(result.model, loaded, inputs)

    def test_tied_parameters_stay_tied(self, tmp_path) -> None:
        ids = torch.randint(11, (2, 5))
        result = halved(Tied().eval(), ids)
        loaded = round_trip(result, tmp_path, Tied)
        assert same(result.model, loaded, ids)
        assert loaded.head.weight is loaded.embedding.weight
        names = load_file(tmp_path / "net" / "weights.safetensors").keys()
        assert len([n for n in names if n in ("head.weight", "embedding.weight")]) == 1

    def test_training_that_untied_them_is_kept(self, tmp_path) -> None:
        ids = torch.randint(11, (2, 5))
        result = halved(Tied().eval(), ids)
        result.model.head.weight = nn.Parameter(result.model.head.weight.detach() + 1)
        loaded = round_trip(result, tmp_path, Tied)
        assert same(result.model, loaded, ids)
        assert loaded.head.weight is not loaded.embedding.weight

    def test_an_exported_program_is_a_model(self, tmp_path) -> None:
        model = ShortcutNet().eval()
        program = export(model, (IMAGES,), dynamic_shapes=({0: Dim.AUTO},))
        result = halved(rbpfx.trace(program), IMAGES)
        assert same(result.model, round_trip(result, tmp_path, program), IMAGES)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_dtypes(self, dtype, tmp_path) -> None:
        result = halved(Custom().eval(), PAIR)
        result.model.to(dtype)
        loaded = round_trip(result, tmp_path, Custom)
        inputs = {"pair": [x.to(dtype) for x in PAIR["pair"]], "gain": 2.0}
        assert {b.dtype for b in loaded.buffers()} == {dtype}  # the constant too
        assert same(result.model, loaded, inputs)

    def test_a_class_whose_instance_was_cast_before(self, tmp_path) -> None:
        images = IMAGES.double()
        result = halved(ShortcutNet().double().eval(), images)
        fresh = ShortcutNet()
        assert same(result.model, round_trip(result, tmp_path, fresh), images)
        assert fresh.head.weight.dtype == torch.float32

    def test_modes(self, tmp_path) -> None:
        result = halved(ShortcutNet().eval(), IMAGES)
        result.model.train()
        result.model.bn.eval()
        loaded = round_trip(result, tmp_path, ShortcutNet().eval())
        modes = [{n: m.training for n, m in net.named_modules()} for net in (result.model, loaded)]
        assert modes[0] == modes[1]

    def test_the_weights_of_the_moment(self, tmp_path) -> None:
        result = halved(ShortcutNet().eval(), IMAGES)
        result.save(tmp_path / "net")
        with torch.no_grad():
            result.model.head.bias.add_(1)
        result.save(tmp_path / "net")
        assert same(result.model, rbpfx.load(tmp_path / "net", ShortcutNet), IMAGES)

    def test_after_pickling(self, tmp_path) -> None:
        result = pickle.loads(pickle.dumps(halved(ShortcutNet().eval(), IMAGES)))
        assert same(result.model, round_trip(result, tmp_path, ShortcutNet), IMAGES)

    def test_the_model_is_left_untouched(self, saved) -> None:
        fresh = ShortcutNet()
        before = copy.deepcopy(fresh.state_dict())
        loaded = rbpfx.load(saved, fresh)
        with torch.no_grad():
            for parameter in loaded.parameters():
                parameter.zero_()
        assert all(torch.equal(before[name], value) for name, value in fresh.state_dict().items())
        assert fresh.training and not loaded.training

    def test_random_numbers_go_on(self, saved) -> None:
        fresh = ShortcutNet()
        state = torch.get_rng_state()
        rbpfx.load(saved, fresh)
        assert torch.equal(torch.get_rng_state(), state)

    def test_device(self, saved) -> None:
        loaded = rbpfx.load(saved, ShortcutNet, device="meta")
        assert {t.device.type for t in loaded.state_dict().values()} == {"meta"}

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_another_device(self, pruned, tmp_path) -> None:
        result = copy.deepcopy(pruned)
        result.model.to("cuda")
        loaded = round_trip(result, tmp_path, ShortcutNet)
        torch.testing.assert_close(loaded(IMAGES), result.model(IMAGES.cuda()).cpu())
        again = rbpfx.load(tmp_path / "net", ShortcutNet, device="cuda")
        assert same(result.model, again, IMAGES.cuda())

    def test_figures_are_in_the_plan(self, pruned, saved) -> None:
        plan = json.loads((saved / "plan.json").read_text())
        assert plan["report"]["pruned"]["macs"] == pruned.report.pruned.macs
        assert plan["kept"] == {name: list(units) for name, units in pruned.plan.kept.items()}
        assert plan["rbpfx"] == rbpfx.__version__ and plan["torch"] == torch.__version__
        assert {file.name for file in saved.iterdir()} == {"plan.json", "weights.safetensors"}


class TestByName:
    def test_torchvision(self, tmp_path) -> None:
        images = torch.rand(2, 3, 32, 32)
        result = halved(resnet18(num_classes=7).eval(), images)
        assert same(result.model, round_trip(result, tmp_path, None), images)

    def test_timm(self, tmp_path) -> None:
        timm = pytest.importorskip("timm")
        images = torch.rand(2, 1, 32, 32)
        model = timm.create_model("resnet10t", num_classes=7, in_chans=1).eval()
        result = halved(model, images)
        assert same(result.model, round_trip(result, tmp_path, None), images)

    def test_what_only_looks_like_it_gets_no_name(self, tmp_path) -> None:
        model = resnet18(num_classes=7).eval()
        model.maxpool.kernel_size = 5  # all tensors are those of resnet18
        result = halved(model, torch.rand(2, 3, 32, 32))
        with pytest.raises(LoadError, match="is not known by name; pass an instance"):
            round_trip(result, tmp_path, None)

    def test_what_load_would_not_build_gets_no_name(self, tmp_path, monkeypatch) -> None:
        monkeypatch.setitem(library._COUNTS, "num_classes", 5)
        images = torch.rand(2, 3, 32, 32)
        result = halved(resnet18(num_classes=7).eval(), images)
        assert same(result.model, round_trip(result, tmp_path, resnet18(num_classes=7)), images)

    def test_named_by_the_user(self, tmp_path) -> None:
        images = torch.rand(2, 3, 32, 32)
        result = halved(resnet18(num_classes=7).eval(), images)
        result.save(tmp_path, source="torchvision:resnet18?num_classes=7")
        assert same(result.model, rbpfx.load(tmp_path), images)
        with pytest.raises(SaveError, match=r"is not what was pruned: .*'fc.weight' is"):
            result.save(tmp_path, source="torchvision:resnet18")
        with pytest.raises(SaveError, match="'foo' names no model of a library"):
            result.save(tmp_path, source="foo")

    def test_programs_need_trust(self, tmp_path) -> None:
        result = halved(ShortcutNet().eval(), IMAGES)
        result.save(tmp_path, program=True)
        with pytest.raises(LoadError, match="If you trust the files, trusted=True"):
            rbpfx.load(tmp_path)
        loaded = rbpfx.load(tmp_path, trusted=True)
        expected, found = outputs(result.model, IMAGES[:5]), outputs(loaded, IMAGES[:5])
        torch.testing.assert_close(found, expected)
        (tmp_path / "network.pt2").write_bytes(b"another")
        with pytest.raises(LoadError, match=r"network.pt2 .* is missing, truncated or changed"):
            rbpfx.load(tmp_path, trusted=True)


class TestMismatch:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda net: nn.Linear(3, 3), "'stem.weight' is a parameter .* there and missing here"),
            (lambda net: ShortcutNet(9), r"\(8, 1, 3, 3\) there and .* \(9, 1, 3, 3\) here"),
            (lambda net: setattr(net.bn, "eps", 0.1), "operator .*BatchNorm2d.* there and"),
            (lambda net: setattr(net.conv1, "padding_mode", "circular"), "operator .*Conv2d.* and"),
            (lambda net: setattr(net, "bn1", nn.Identity()), "'bn1.weight' is .* missing here"),
        ],
    )
    def test_another_architecture(self, saved, change, message) -> None:
        net = ShortcutNet()
        with pytest.raises(LoadError, match=f"is not the architecture that was pruned.*{message}"):
            rbpfx.load(saved, change(net) or net)

    def test_what_is_no_model(self, saved) -> None:
        with pytest.raises(LoadError, match="must be a module or make one"):
            rbpfx.load(saved, 3)
        with pytest.raises(LoadError, match="the factory made a int, not a module"):
            rbpfx.load(saved, lambda: 3)

    def test_a_factory_that_fails(self, saved) -> None:
        with pytest.raises(LoadError, match=r"^the network cannot.*missing 1 required"):
            rbpfx.load(saved, lambda width: ShortcutNet(width))

    def test_no_model(self, saved) -> None:
        with pytest.raises(LoadError, match=r"tests.toy.ShortcutNet.* is not known by name; pass"):
            rbpfx.load(saved)

    def test_nothing_there(self, tmp_path) -> None:
        with pytest.raises(LoadError, match="there is no saved network in"):
            rbpfx.load(tmp_path / "elsewhere", ShortcutNet)

    def test_another_version_of_the_format(self, saved) -> None:
        edit_plan(saved, lambda plan: plan.update(version=2, rbpfx="9.9"))
        with pytest.raises(LoadError, match=r"format version 2 and was written by rbpfx '9\.9'"):
            rbpfx.load(saved, ShortcutNet)

    def test_other_versions_are_named_when_something_is_wrong(self, saved) -> None:
        edit_plan(saved, lambda plan: plan.update(torch="1.0"))
        rbpfx.load(saved, ShortcutNet)
        with pytest.raises(LoadError, match=r"saved with .* torch '1\.0'; here are"):
            rbpfx.load(saved, ShortcutNet(9))

    def test_other_groups(self, saved) -> None:
        edit_plan(saved, lambda plan: plan["groups"].update(extra=3))
        with pytest.raises(LoadError, match="'extra' has no units here and 3 there"):
            rbpfx.load(saved, ShortcutNet)

    def test_a_mode_of_no_module(self, saved) -> None:
        edit_plan(saved, lambda plan: plan["training"].append("tail"))
        with pytest.raises(LoadError, match="no module 'tail'"):
            rbpfx.load(saved, ShortcutNet)


class TestDamage:
    @pytest.mark.parametrize("name", ["plan.json", "weights.safetensors"])
    @pytest.mark.parametrize("share", [0, 0.5, 0.99])
    def test_truncated(self, saved, name, share) -> None:
        content = (saved / name).read_bytes()
        (saved / name).write_bytes(content[: int(share * len(content))])
        with pytest.raises(LoadError, match=f"{name}.*(truncated|says something else)"):
            rbpfx.load(saved, ShortcutNet)

    def test_a_flipped_bit_of_the_weights(self, saved) -> None:
        content = bytearray((saved / "weights.safetensors").read_bytes())
        content[-1] ^= 1
        (saved / "weights.safetensors").write_bytes(content)
        with pytest.raises(LoadError, match="truncated or changed"):
            rbpfx.load(saved, ShortcutNet)

    def test_a_unit_exchanged_in_the_plan(self, saved) -> None:
        plan = json.loads((saved / "plan.json").read_text())
        name, units = next((n, u) for n, u in plan["kept"].items() if 1 < len(u) < 8)
        new = next(i for i in range(8) if i not in units)
        plan["kept"][name] = sorted([*units[1:], new])  # the shapes are the same
        (saved / "plan.json").write_text(json.dumps(plan))
        with pytest.raises(LoadError, match="checksum differs"):
            rbpfx.load(saved, ShortcutNet)

    @pytest.mark.parametrize("name", ["plan.json", "weights.safetensors"])
    def test_a_missing_file(self, saved, name) -> None:
        (saved / name).unlink()
        with pytest.raises(LoadError, match=name):
            rbpfx.load(saved, ShortcutNet)

    @pytest.mark.parametrize("name", ["plan.json", "weights.safetensors"])
    def test_a_folder_for_a_file(self, saved, name) -> None:
        (saved / name).unlink()
        (saved / name).mkdir()
        with pytest.raises(LoadError, match=name):
            rbpfx.load(saved, ShortcutNet)


def header(content: bytes, tensors: dict[str, Any]) -> bytes:
    """The weights with other entries in their header."""
    size = int.from_bytes(content[:8], "little")
    text = json.dumps({**json.loads(content[8 : 8 + size]), **tensors}).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


class TestStrangersWeights:
    """Weights whose stamp in plan.json fits, made by somebody who knows the format."""

    def refused(self, saved: Path, content: bytes, message: str) -> None:
        edit_weights(saved, content)
        with pytest.raises(LoadError, match=message):
            rbpfx.load(saved, ShortcutNet)

    def tensors(self, saved: Path) -> dict[str, Tensor]:
        return load_file(saved / "weights.safetensors")

    @pytest.mark.parametrize(
        "entry",
        [
            {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]},
            {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]},
            {"dtype": "X", "shape": [1], "data_offsets": [0, 4]},
            7,
        ],
    )
    def test_headers_that_claim_too_much(self, saved, entry) -> None:
        content = (saved / "weights.safetensors").read_bytes()
        self.refused(saved, header(content, {"stem.weight": entry}), "is damaged")

    @pytest.mark.parametrize("length", [0, 1, 2**32, 2**63, 2**64 - 1])
    def test_headers_of_any_length(self, saved, length) -> None:
        content = (saved / "weights.safetensors").read_bytes()
        self.refused(saved, length.to_bytes(8, "little") + content[8:], "weights.safetensors")

    @pytest.mark.parametrize("content", [b"", b"{}", pickle.dumps({"stem.weight": 1})])
    def test_other_formats(self, saved, content) -> None:
        self.refused(saved, content, "is damaged")

    def test_missing_and_surplus_names(self, saved) -> None:
        tensors = self.tensors(saved)
        self.refused(saved, save({**tensors, "z": torch.ones(1)}), "'z' is in the file but not")
        tensors.pop("head.bias")
        self.refused(saved, save(tensors), "'head.bias' is in the network but not in the file")

    def test_other_shapes_and_kinds(self, saved) -> None:
        tensors = self.tensors(saved)
        self.refused(
            saved, save({**tensors, "head.bias": torch.ones(4)}), r"'head.bias' is .*\(4,\)"
        )
        ints = torch.ones(3, dtype=torch.int64)
        self.refused(saved, save({**tensors, "head.bias": ints}), "'head.bias' is torch.int64")

    def test_indices_are_what_the_plan_says(self, tmp_path) -> None:
        halved(ShortcutNet().eval(), IMAGES, unit="feature").save(tmp_path)
        tensors = self.tensors(tmp_path)
        name = next(n for n in tensors if n.startswith("kept_positions"))
        edit_weights(tmp_path, save({**tensors, name: tensors[name] + 10**6}))
        with pytest.raises(LoadError, match=f"the constant '{name}' is not the one"):
            rbpfx.load(tmp_path, ShortcutNet)

    def test_ties_that_do_not_fit(self, saved) -> None:
        edit_plan(saved, lambda plan: plan["tied"].update({"bn.weight": "head.weight"}))
        with pytest.raises(LoadError, match=r"'bn\.weight' is in the file but not"):
            rbpfx.load(saved, ShortcutNet)


class TestSaveErrors:
    def test_inputs_that_are_no_json(self, tmp_path) -> None:
        result = halved(ShortcutNet().eval(), IMAGES)
        origin = type(result.origin)
        inputs = rbpfx.saving.examples.describe_inputs([torch.zeros(1), {"x": object()}])
        result.origin = origin("", inputs, (), {}, result.origin.architecture)
        with pytest.raises(SaveError, match=r"hold a object, which plan\.json cannot"):
            result.save(tmp_path)

    @pytest.mark.parametrize("pickled", [False, True])
    def test_a_network_that_is_another(self, pickled, tmp_path) -> None:
        result = halved(ShortcutNet().eval(), IMAGES)
        result.model.bn1 = nn.Identity()
        if not pickled:
            with pytest.raises(SaveError, match=r"'bn1\.weight' is another tensor, or is missing"):
                result.save(tmp_path)
        else:
            pickle.loads(pickle.dumps(result)).save(tmp_path)
            with pytest.raises(LoadError, match=r"'bn1\.bias' is in the network but not in the"):
                rbpfx.load(tmp_path, ShortcutNet)

    def test_a_plan_that_could_not_be_read_back(self, tmp_path) -> None:
        result = halved(ShortcutNet().eval(), IMAGES)
        result.report = replace(result.report, method="two\nlines")
        with pytest.raises(SaveError, match=r"could not be loaded again: .*field 'method'"):
            result.save(tmp_path)

    def test_an_unwritable_place(self, tmp_path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(SaveError, match="cannot be saved in"):
            halved(ShortcutNet().eval(), IMAGES).save(tmp_path / "file")

    def test_a_result_of_another_origin(self, tmp_path) -> None:
        result = halved(ShortcutNet().eval(), IMAGES)
        result.origin = None
        with pytest.raises(SaveError, match="does not come from prune"):
            result.save(tmp_path)

    def test_a_plan_too_large_to_be_read(self, tmp_path, monkeypatch) -> None:
        monkeypatch.setattr(parsing, "MAX_PLAN_BYTES", 100)
        with pytest.raises(SaveError, match="larger than 100 bytes"):
            halved(ShortcutNet().eval(), IMAGES).save(tmp_path)
        assert not list(tmp_path.iterdir())
