"""Verification measures differences and never looks away."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rbpfx.errors import VerificationError
from rbpfx.graph import verification
from rbpfx.graph.capture import trace
from rbpfx.graph.gates import apply_mask
from rbpfx.graph.groups import analyze
from rbpfx.graph.slicing import rewrite
from rbpfx.graph.verification import difference, require_equal, verify
from rbpfx.plan import PruningPlan


def pair() -> tuple[nn.Module, nn.Module, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 2, 1)
    )
    x = torch.zeros(2, 3, 4, 4)
    gm = trace(model, x)
    analysis = analyze(gm)
    plan = PruningPlan({"0": [1, 2]})
    return apply_mask(gm, analysis, plan), rewrite(gm, analysis, plan), x


@pytest.mark.parametrize("train", [False, True])
def test_equal_networks(train: bool) -> None:
    masked, pruned, x = pair()
    assert verify(masked, pruned, x, train=train) < 1e-13
    assert require_equal(masked, pruned, x) < 1e-13


@pytest.mark.parametrize("size", [1e-7, 1e-2])
def test_a_perturbed_network(size: float) -> None:
    masked, pruned, x = pair()
    with torch.no_grad():
        pruned.get_parameter("3.weight")[0, 0, 0, 0] += size
    assert 0.01 * size < verify(masked, pruned, x) < 100 * size
    with pytest.raises(VerificationError, match=r"differs .* by \d"):
        require_equal(masked, pruned, x)


def test_a_fault_in_train_mode_only() -> None:
    masked, pruned, x = pair()
    pruned.get_submodule("1").eps = 0.1
    pruned.get_buffer("1.running_var").add_(1e-5 - 0.1)
    assert verify(masked, pruned, x) < 1e-6
    with pytest.raises(VerificationError):
        require_equal(masked, pruned, x)


def test_networks_are_left_as_they_are() -> None:
    masked, pruned, x = pair()
    masked.train()
    state = {k: v.clone() for k, v in masked.state_dict().items()}
    random_state = torch.get_rng_state()
    verify(masked, pruned, x, train=True)
    assert masked.training and masked.get_submodule("2").training
    assert next(masked.parameters()).dtype == torch.float32
    assert all(torch.equal(v, state[k]) for k, v in masked.state_dict().items())
    assert torch.equal(random_state, torch.get_rng_state())


class Classes(nn.Module):
    """Embeds integers: inputs drawn afresh must stay in range."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.seen: set[int] = set()

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        y: Tensor = self.embedding(tokens) * mask[..., None]
        return y


def test_integers_and_booleans_are_imitated() -> None:
    tokens = torch.tensor([[1, 4, 0, 2]])
    mask = torch.tensor([[True, False, True, True]])
    model = Classes()
    assert verify(model, model, (tokens, mask)) == 0.0
    assert verify(model, model, {"tokens": tokens, "mask": mask}) == 0.0


def test_differences() -> None:
    one, nan = torch.ones(2), torch.tensor([float("nan"), 1.0])
    assert difference(one, one) == 0.0
    assert difference(one, one * 1.5) == 0.5
    assert difference({"a": one, "b": [one]}, {"a": one, "b": [one * 3]}) == 2.0
    assert difference(one, torch.ones(3)) == float("inf")
    assert difference((one,), (one, one)) == float("inf")
    assert difference(one, nan) == float("inf")
    assert difference(nan, nan) == 0.0
    assert difference(torch.tensor([1, 2]), torch.tensor([1, 3])) == 0.5
    assert difference(torch.zeros(0), torch.zeros(0)) == 0.0
    assert difference(torch.zeros(2), one) > 1e300
    infinite = torch.tensor([float("inf"), 1.0])
    assert difference(infinite, infinite) == 0.0
    assert difference(infinite, torch.tensor([float("-inf"), 1.0])) == float("inf")
    assert difference(nan[:1], nan[:1]) == float("inf")


def test_the_smallest_of_a_few_draws_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    masked, pruned, x = pair()
    errors = {0: 3e-9, 1: 2e-12, 2: 1.0}
    drawn = []

    def measured(*_: object, train: bool = False, seed: int = 0) -> float:
        drawn.append((train, seed))
        return errors[seed] if train else 0.0

    monkeypatch.setattr(verification, "verify", measured)
    assert require_equal(masked, pruned, x) == 2e-12
    assert drawn == [(False, 0), (True, 0), (True, 1)]
    errors[1] = 1e-6
    with pytest.raises(VerificationError):
        require_equal(masked, pruned, x)
