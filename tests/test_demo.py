"""The demo: its network, its data, and the real thing from beginning to end."""

from __future__ import annotations

import sys

import pytest
import torch

from rbpfx import RbpfxError, analyze, demo, trace


def test_the_network_is_a_residual_one() -> None:
    model = demo.DigitsResNet()
    images = torch.zeros(2, 1, 8, 8)
    assert model(images).shape == (2, 10)
    sizes = {g.name: g.size for g in analyze(trace(model, images)).groups}
    assert sizes["stem"] == sizes["stage1.0.conv1"] == 32
    assert len(sizes) == 9  # three streams and six blocks


def test_the_data_are_split_without_overlap() -> None:
    loader, test_loader = demo.digits_loaders(seed=1)
    train, test = (part.dataset.tensors for part in (loader, test_loader))
    assert len(train[0]) + len(test[0]) == 1797
    assert train[0].shape[1:] == (1, 8, 8)
    assert train[0].min() == -1
    assert train[0].max() == 1
    assert torch.equal(train[1], demo.digits_loaders(seed=1)[0].dataset.tensors[1])
    assert not torch.equal(train[1], demo.digits_loaders(seed=2)[0].dataset.tensors[1])


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(RbpfxError, match=r"pip install 'rbpfx\[demo\]'"):
        demo.digits_loaders()


@pytest.mark.slow
@pytest.mark.parametrize("target", [None, 0.4])
def test_the_demo(target: float | None) -> None:
    report = demo.run(target, progress=False).report
    assert report.dense.accuracy > 0.95
    assert report.pruned.accuracy > report.dense.accuracy - 0.03
    assert report.pruned.macs < (target or 1) * report.dense.macs
    assert report.verification_error < 1e-9
