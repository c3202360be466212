"""Models of other libraries: captured, faithful, exact and smaller (`benchmarks.coverage`)."""

from __future__ import annotations

import importlib.util

import pytest

from benchmarks import _zoo
from benchmarks._coverage_report import is_exact, is_faithful, is_smaller
from benchmarks.coverage import Subject

QUICK = {
    "timm": [
        "convnext_atto_rms",
        "dla46x_c",
        "ghostnetv2_100",
        "mobilevit_xxs",
        "nfnet_l0",
        "resnet10t",
        "vit_tiny_patch16_224",
    ],
    "transformers": [
        "bert",
        "clip_vision",
        "convnext",
        "gpt2",
        "llama",
        "segformer",
        "swin",
        "t5",
        "wav2vec2",
    ],
    "torchvision": ["deeplabv3_mobilenet_v3_large"],
}
CHOSEN = [(suite, name) for suite, names in QUICK.items() for name in names]
# What the slow suite leaves to `benchmarks.coverage`, which has a process for each: 300 M
# parameters and more.
LARGE = {"deepseek_vit_412m", "regnet_y_128gf", "vit_h_14", "vit_l_16", "vit_l_32"}


def everything() -> list[tuple[str, str]]:
    """All models of the suites whose library is installed."""
    found = []
    for suite in QUICK:
        if importlib.util.find_spec(suite) is not None:
            names = _zoo.suite(suite).keys() - LARGE - set(QUICK[suite])
            found += [(suite, name) for name in sorted(names)]
    return found


def check(suite: str, name: str) -> None:
    subject = Subject(suite, name)
    row = {}
    for stage in (
        subject.build,
        subject.capture,
        subject.fidelity,
        subject.analyse,
        subject.prune,
        subject.compare,
    ):
        row.update(stage())
    assert is_faithful(row), row
    assert is_exact(row), row
    assert is_smaller(row), row


@pytest.mark.parametrize(("suite", "name"), CHOSEN, ids=lambda value: value)
def test_a_model(suite: str, name: str) -> None:
    pytest.importorskip(suite)
    check(suite, name)


@pytest.mark.slow
@pytest.mark.parametrize(("suite", "name"), everything(), ids=lambda value: value)
def test_every_model(suite: str, name: str) -> None:
    check(suite, name)


def test_the_suites_name_existing_models() -> None:
    for suite, names in QUICK.items():
        pytest.importorskip(suite)
        assert set(names) <= _zoo.suite(suite).keys()
