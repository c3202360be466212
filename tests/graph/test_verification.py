"""Verification measures differences and never looks away."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rbpfx.deployment.deploy import deploy
from rbpfx.errors import VerificationError
from rbpfx.graph import verification
from rbpfx.graph.capture import trace
from rbpfx.graph.gates import apply_mask
from rbpfx.graph.groups import analyze
from rbpfx.graph.slicing import rewrite
from rbpfx.graph.verification import difference, in_double, require_equal, verify
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


@pytest.mark.parametrize("first", [torch.log, torch.sqrt, torch.logit], ids=lambda f: f.__name__)
def test_inputs_of_a_restricted_domain(first: Callable[[Tensor], Tensor]) -> None:
    """Where normal numbers have no logarithm, numbers like the examples are compared."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(self.a(first(x)).relu())
            return y

    x = torch.rand(5, 3).clamp(0.01, 0.99)
    gm = trace(Net(), x)
    analysis, plan = analyze(gm), PruningPlan({"a": [1, 2]})
    masked, pruned = apply_mask(gm, analysis, plan), rewrite(gm, analysis, plan)
    assert require_equal(masked, pruned, x) < 1e-13
    deploy(pruned, x)
    with torch.no_grad():
        pruned.b.bias += 0.1
    assert verify(masked, pruned, x) > 1e-3
    drawn = verification.inputs_like(gm, x)["x"]
    assert not torch.equal(drawn, x) and (x - drawn).abs().max() <= 0.01


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


def by_writing(n: int) -> Tensor:
    table = torch.zeros(n, n)
    table[0] = 1.0
    table[1, 2] += 2
    return table


# All that makes a floating-point matrix (n, n) of none.
MADE: dict[str, Callable[[int], Tensor]] = {
    "ones": lambda n: torch.ones(n, n),
    "random": lambda n: torch.randn(n, n) * 0 + 1,
    "full": lambda n: torch.full((n, n), 0.5),
    "range": lambda n: torch.arange(0.0, n * n).view(n, n),
    "named": lambda n: torch.ones(n, n, dtype=torch.float32),
    "divided": lambda n: (torch.arange(n * n) / 16).view(n, n),
    "chosen": lambda n: torch.where(torch.arange(n * n).view(n, n) > 3, 1.0, 0.5),
    "rooted": lambda n: torch.arange(n * n).sqrt().view(n, n),
    "converted": lambda n: torch.eye(n).half().to(torch.float32),
    "typed": lambda n: torch.arange(n * n).view(n, n).type("torch.FloatTensor"),
    "written": by_writing,
}


class Multiplied(nn.Module):
    """Its result times a matrix that its forward makes; `@` takes no two dtypes."""

    def __init__(self, make: Callable[[int], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 4)
        self.make = make

    def forward(self, x: Tensor) -> Tensor:
        return self.make(x.size(0)) @ self.second(self.first(x).relu())


class Recurrent(nn.Module):
    """An LSTM whose first state its forward makes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.head = nn.Linear(3, 6), nn.LSTM(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(1, x.size(1), 5)
        y, _ = self.lstm(self.embed(x), (state, torch.zeros(1, x.size(1), 5)))
        return self.head(y)


class Inner(nn.Module):
    """Something to keep whole."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) @ torch.eye(6)


def halves(model: nn.Module, x: Tensor, **options: Any) -> tuple[nn.Module, nn.Module]:
    gm = trace(model, x, **options)
    analysis = analyze(gm)
    assert analysis.groups
    plan = PruningPlan({group.name: range(group.size // 2) for group in analysis.groups})
    return apply_mask(gm, analysis, plan), rewrite(gm, analysis, plan)


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_tensors_that_a_forward_makes_are_double_too(make: Callable[[int], Tensor]) -> None:
    x = torch.rand(5, 3)
    masked, pruned = halves(Multiplied(make), x)
    assert require_equal(masked, pruned, x) < 1e-12
    masked = in_double(copy.deepcopy(masked))
    assert masked(x.double()).dtype == torch.float64  # without `verify`, as `deploy` does
    pruned.get_parameter("second.bias").data += 1e-6
    with pytest.raises(VerificationError):
        require_equal(masked, pruned, x)


def test_first_states() -> None:
    x = torch.rand(4, 2, 3)
    masked, pruned = halves(Recurrent(), x)
    assert pruned.get_parameter("embed.weight").shape == (3, 3)
    assert require_equal(masked, pruned, x) < 1e-12


def test_modules_kept_whole_compute_in_double_too() -> None:
    x = torch.rand(4, 3)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6), Inner(), nn.Linear(6, 2))
    masked, pruned = halves(model, x, leaf_modules=[Inner])
    assert require_equal(masked, pruned, x) < 1e-12
