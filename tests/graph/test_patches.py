"""What is patched while a model is traced: code of torch and of models that asks for values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules import transformer

from rbpfx.graph.capture import trace
from rbpfx.graph.gates import apply_mask
from rbpfx.graph.groups import analyze
from rbpfx.graph.slicing import rewrite
from rbpfx.graph.verification import require_equal
from rbpfx.plan import PruningPlan

WIDTH, LENGTH = 8, 5


def causal(length: int) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(length)


def layer(kind: type[nn.Module]) -> nn.Module:
    return kind(WIDTH, 2, 16, 0.0, batch_first=True)


class Language(nn.Module):
    """An encoder that sees the past only, as in the tutorials of PyTorch."""

    def __init__(self, **hint: Any) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(layer(nn.TransformerEncoderLayer), 2)
        self.hint = hint

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.encoder(x, mask=causal(x.size(1)), **self.hint)
        return y


class Constant(Language):
    """Its mask is no buffer, but a tensor in an attribute."""

    mask = causal(LENGTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.encoder(x, mask=self.mask)
        return y


class Buffered(Language):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", causal(9))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.encoder(x, mask=self.mask[: x.size(1), : x.size(1)])
        return y


class Given(nn.Module):
    """A decoder that takes its mask from the caller."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.TransformerDecoder(layer(nn.TransformerDecoderLayer), 2)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        y: Tensor = self.decoder(x, memory, tgt_mask=mask)
        return y


class Both(nn.Module):
    """A whole transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Transformer(WIDTH, 2, 1, 1, 16, 0.0, batch_first=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z: Tensor = self.transformer(x, y, tgt_mask=causal(y.size(1)))
        return z


def draw(length: int = LENGTH, examples: int = 3) -> Tensor:
    return torch.randn(examples, length, WIDTH, dtype=torch.float64)


MASKED: dict[str, tuple[nn.Module, int]] = {
    "made for the length": (Language(), 1),
    "made for the length, and said to be causal": (Language(is_causal=True), 1),
    "made for the length, and said not to be": (Language(is_causal=False), 1),
    "a constant": (Constant(), 1),
    "a buffer": (Buffered(), 1),
    "a whole transformer": (Both(), 2),
}


@pytest.mark.filterwarnings("ignore:.*(mismatched|nested).*")
@pytest.mark.parametrize("how", MASKED)
def test_transformers_with_masks_are_captured(how: str) -> None:
    model, arguments = MASKED[how]
    model.double().eval()
    inputs = tuple(draw() for _ in range(arguments))
    gm = trace(model, inputs)
    assert isinstance(gm, fx.GraphModule)
    others = [tuple(draw(LENGTH, 2) for _ in inputs)]
    others += [] if how == "a constant" else [tuple(draw(7, 2) for _ in inputs)]
    for other in (inputs, *others):
        torch.testing.assert_close(gm(*other), model(*other))
    analysis = analyze(gm, normalization="exact")
    assert len(analysis.groups) >= 4
    plan = PruningPlan({g.name: range(0, g.size, 2) for g in analysis.groups})
    masked, pruned = (f(gm, analysis, plan) for f in (apply_mask, rewrite))
    assert require_equal(masked, pruned, inputs) < 1e-12


def test_any_mask_may_be_given() -> None:
    model = Given().double().eval()
    gm = trace(model, (draw(), draw(4), causal(LENGTH).double()))
    for mask in (causal(LENGTH).double(), torch.randn(LENGTH, LENGTH, dtype=torch.float64)):
        inputs = (draw(), draw(4), mask)
        torch.testing.assert_close(gm(*inputs), model(*inputs))


def test_torch_looks_at_masks_again_afterwards() -> None:
    before = (transformer._detect_is_causal_mask, F._none_or_dtype)
    trace(Language().double(), draw())
    assert (transformer._detect_is_causal_mask, F._none_or_dtype) == before
