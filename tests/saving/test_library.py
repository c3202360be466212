"""Models by name: only registered ones, with bounded arguments, and without downloads."""

from __future__ import annotations

import urllib.request

import pytest
import torch
from torchvision.models import get_model, resnet18

from rbpfx import LoadError
from rbpfx.saving.library import Library, candidates


@pytest.mark.parametrize(
    "text",
    [
        "torchvision:resnet18",
        "timm:resnet10t?num_classes=3&in_chans=1",
        "torchvision:googlenet?aux_logits=False",
    ],
)
def test_text_and_back(text) -> None:
    assert str(Library.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "resnet18",
        "torchvision:",
        "os:system?command=1",
        "torchvision:resnet18?weights=DEFAULT",
        "torchvision:resnet18?num_classes",
        "torchvision:resnet18?num_classes=0",
        "torchvision:resnet18?num_classes=-1",
        "torchvision:resnet18?num_classes=²",
        "torchvision:resnet18?num_classes=65537",
        "torchvision:resnet18?num_classes=1000000000000000000000",
        "torchvision:resnet18?aux_logits=1",
        "timm:vit_tiny_patch16_224?img_size=100000",
        "timm:resnet18?pretrained=True",
        "timm:resnet18?checkpoint_path=/etc/passwd",
        "torchvision:resnet18?" + "&".join(["num_classes=1"] * 20),
    ],
)
def test_what_is_not_allowed(text) -> None:
    with pytest.raises(LoadError):
        Library.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("torchvision:system", "torchvision has no model 'system'"),
        ("torchvision:../resnet18", "torchvision has no model"),
        ("timm:hf-hub:somebody/model", "timm has no model 'hf-hub:somebody/model'"),
        ("timm:local-dir:/etc", "timm has no model"),
        ("torchvision:resnet18?image_size=8", "cannot be built: .*image_size"),
    ],
)
def test_what_is_not_there(text, message) -> None:
    if text.startswith("timm"):
        pytest.importorskip("timm")
    with pytest.raises(LoadError, match=message):
        Library.parse(text).build()


@pytest.mark.parametrize(
    "text",
    ["torchvision:fcn_resnet50?num_classes=2", "torchvision:ssdlite320_mobilenet_v3_large"],
)
def test_nothing_is_downloaded(text, monkeypatch) -> None:
    def download(*_: object, **__: object) -> None:
        raise AssertionError("a download was tried")

    monkeypatch.setattr(urllib.request, "urlopen", download)
    state = torch.get_rng_state()
    Library.parse(text).build()
    assert torch.equal(torch.get_rng_state(), state)


def test_the_size_is_known_before_anything_is_allocated(monkeypatch) -> None:
    library = Library.parse("torchvision:regnet_y_128gf")  # 2.6 GB
    monkeypatch.setattr("rbpfx.saving.library.MAX_BYTES", 2**31)
    skeleton = library.skeleton()
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}
    with pytest.raises(LoadError, match="bytes of weights, and models by name may have 2147483648"):
        library.build()


def test_candidates() -> None:
    images = torch.rand(1, 3, 32, 32)
    found = candidates(resnet18(num_classes=3), images)
    assert Library.parse("torchvision:resnet18?num_classes=3") in found
    assert not any(lib.name.startswith("vgg") for lib in found)
    vit = get_model("vit_b_16", image_size=32)
    assert Library("torchvision", "vit_b_16", {"num_classes": 1000, "image_size": 32}) in (
        candidates(vit, images)
    )
    assert candidates(torch.nn.Linear(2, 2), images) == ()
