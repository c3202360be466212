"""Model sources: what they build, which images they want, and what is said if they fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

from rbpfx import LoadError
from rbpfx.cli.models import find_model, trained_model
from rbpfx.saving import library

from .conftest import equal


def test_torchvision() -> None:
    source = find_model("torchvision:resnet18?num_classes=3")
    model = source.build()
    assert isinstance(model, torchvision.models.ResNet)
    assert model.fc.out_features == 3
    preset = source.preset()
    assert preset is not None
    assert preset.size == (3, 224, 224)
    assert preset.transform(48)(Image.new("RGB", (80, 60))).shape == (3, 48, 48)
    assert source.example_inputs(model).shape == (1, 3, 224, 224)


@pytest.mark.parametrize("name", ["raft_small", "fasterrcnn_resnet50_fpn", "r3d_18"])
def test_models_without_a_preset_for_images(name: str) -> None:
    assert find_model(f"torchvision:{name}").preset() is None


def test_published_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    published = torchvision.models.resnet18()
    monkeypatch.setattr(
        torchvision.models._api, "load_state_dict_from_url", lambda *_, **__: published.state_dict()
    )
    for weights in ("DEFAULT", "IMAGENET1K_V1"):
        assert equal(trained_model(find_model("torchvision:resnet18"), weights), published)
    with pytest.raises(LoadError, match="expected value 1000 but got 3"):
        trained_model(find_model("torchvision:resnet18?num_classes=3"), "DEFAULT")
    with pytest.raises(LoadError, match=r"neither a file nor weights.*IMAGENET1K_V1"):
        trained_model(find_model("torchvision:resnet18"), "BEST")


def test_a_download_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", fail)
    with pytest.raises(LoadError, match="the weights DEFAULT of torchvision:resnet18: no network"):
        trained_model(find_model("torchvision:resnet18"), "DEFAULT")


def test_remedies_are_those_of_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    remedy = r"; name a function that makes the model instead: module\.path:factory$"
    with pytest.raises(LoadError, match=f"'foo'='1' is not allowed.*{remedy}"):
        find_model("torchvision:resnet18?foo=1")
    with pytest.raises(LoadError, match=f"cannot be built: .*{remedy}"):
        find_model("torchvision:resnet18?img_size=3").build()
    monkeypatch.setattr(library, "MAX_BYTES", 10)
    with pytest.raises(LoadError, match=f"bytes of weights.*{remedy}"):
        find_model("torchvision:squeezenet1_1").build()


def test_random_weights_have_to_be_asked_for() -> None:
    source = find_model("torchvision:squeezenet1_1")
    with pytest.raises(LoadError, match="--weights none"):
        trained_model(source, None)
    assert isinstance(trained_model(source, "none"), torchvision.models.SqueezeNet)


def test_timm() -> None:
    timm = pytest.importorskip("timm")
    source = find_model("timm:resnet18.a1_in1k?in_chans=1&num_classes=3")
    model = source.build()
    assert isinstance(model, timm.models.ResNet)
    assert model.conv1.in_channels == 1
    preset = source.preset()
    assert preset is not None
    assert preset.size == (1, 224, 224)
    assert preset.transform(48)(Image.new("L", (80, 60))).shape == (1, 48, 48)
    with pytest.raises(LoadError, match="have 1000 classes"):
        trained_model(source, "DEFAULT")
    with pytest.raises(LoadError, match="is no file"):
        trained_model(source, "BEST")


def test_hugging_face(tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    kept = transformers.ResNetForImageClassification(config)
    kept.save_pretrained(tmp_path)
    processor = {"do_resize": True, "size": {"height": 32, "width": 32}}
    transformers.ViTImageProcessor(**processor).save_pretrained(tmp_path)
    source = find_model(f"hf:{tmp_path}")
    assert type(source.build()) is type(kept)
    assert equal(trained_model(source, None), kept)
    preset = source.preset()
    assert preset is not None
    assert preset.size == (3, 32, 32)
    assert preset.transform(48)(Image.new("RGB", (80, 60))).shape == (3, 48, 48)
    assert source.example_inputs(kept).shape == (1, 3, 32, 32)


def test_hugging_face_models_of_texts(tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 50}
    config = transformers.BertConfig(**sizes, architectures=["BertForSequenceClassification"])
    config.save_pretrained(tmp_path)
    source = find_model(f"hf:{tmp_path}")
    model = source.build().eval()
    assert source.preset() is None
    assert model(**source.example_inputs(model)).logits.shape[1] == 2


def test_hugging_face_without_such_a_model(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(LoadError, match="cannot be read"):
        find_model(f"hf:{tmp_path}/nothing").build()


@pytest.mark.usefixtures("work")
def test_factories() -> None:
    source = find_model("nets:small")
    assert isinstance(trained_model(source, None), nn.Sequential)
    assert source.preset() is None
    assert source.example_inputs(source.build()) is None
    assert isinstance(find_model("torchvision.models:squeezenet1_1").build(), nn.Module)
    torch.save(source.build().state_dict(), "w.pt")
    assert isinstance(trained_model(source, "w.pt"), nn.Sequential)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("resnet18", "names no model; write torchvision:resnet18"),
        ("torchvision:", "names no model"),
        (":small", "names no model"),
        ("torchvision:resnet19", "no model 'resnet19'; did you mean resnet18"),
        ("torchvision:resnet18?depth=3", "argument 'depth'='3' is not allowed"),
        ("nowhere:small", "there is no module 'nowhere', neither in the current directory"),
        ("nets:large", "module 'nets' has no attribute 'large'"),
        ("nets:smal", "; did you mean small"),
        ("nets:fails", "calling nets:fails failed: ValueError: no way"),
        ("nets:number", "gives a int, not a torch.nn.Module"),
        ("broken:net", "importing broken failed: SyntaxError"),
    ],
)
def test_no_model(text: str, words: str, work: Path) -> None:
    (work / "broken.py").write_text("def")
    with pytest.raises(LoadError, match=words.replace("?", r"\?")):
        find_model(text).build()


@pytest.mark.usefixtures("work")
def test_names_of_weights_are_for_libraries() -> None:
    with pytest.raises(LoadError, match="no file 'DEFAULT'"):
        trained_model(find_model("nets:small"), "DEFAULT")
