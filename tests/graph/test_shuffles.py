"""Channel shuffles: what is only moved is not coupled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import shufflenet_v2_x1_0

from rbpfx.graph.capture import trace
from rbpfx.graph.groups import analyze
from rbpfx.graph.slicing import rewrite
from rbpfx.plan import PruningPlan
from tests.graph.laws import check_again, check_law, check_pickle, compile_random


def by_views(x: Tensor) -> Tensor:
    n, c, h, w = x.size()
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


def through_the_batch(x: Tensor) -> tuple[Tensor, Tensor]:
    """As the original implementation of ShuffleNet v2 does it."""
    n, c, h, w = x.shape
    x = x.reshape(n * c // 2, 2, h * w).permute(1, 0, 2)
    x = x.reshape(2, -1, c // 2, h, w)
    return torch.cat([x[0], x[1]], 1)


SHUFFLES: dict[str, Callable[[Tensor], Any]] = {
    "views": by_views,
    "operator": lambda x: torch.channel_shuffle(x, 4),
    "two shuffles": lambda x: by_views(by_views(x)),
    "to channels last": lambda x: (
        x.unflatten(1, (2, -1)).permute(0, 3, 4, 2, 1).flatten(-2).permute(0, 3, 1, 2)
    ),
    "transposed space": lambda x: x.unflatten(1, (4, 2)).permute(0, 2, 1, 4, 3).flatten(1, 2),
    "one half": lambda x: torch.cat(
        [half.flatten(1, 2) for half in x.unflatten(1, (2, 4)).transpose(1, 2).chunk(2, 1)], 1
    ),
    "flipped": lambda x: x.unflatten(1, (4, 2)).flip(2).flatten(1, 2),
}


class Shuffled(nn.Module):
    """Every channel before the shuffle can go alone."""

    def __init__(self, shuffle: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.shuffle = shuffle
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.shuffle(self.stem(x)).cos())
        return y


@pytest.mark.parametrize("name", SHUFFLES)
def test_channels_that_are_only_moved_go_one_by_one(name: str) -> None:
    inputs = (torch.randn(2, 3, 4, 4, dtype=torch.float64),)
    model = Shuffled(SHUFFLES[name]).double()
    gm = trace(model, inputs)
    assert sum(group.size for group in analyze(gm).groups) == 8
    for seed in range(4):
        compiled = compile_random(model, inputs, seed)
        for train in (False, True):
            check_law(compiled, inputs, train=train)
        check_again(compiled, inputs, seed)
    check_pickle(compiled, inputs)


@pytest.mark.parametrize(("kept", "ragged"), [([0, 1, 4, 5], False), ([0, 1, 4], True)])
def test_views_stay_where_what_is_left_is_a_tensor(kept: list[int], ragged: bool) -> None:
    gm = trace(Shuffled(by_views), torch.zeros(2, 3, 4, 4))
    pruned = rewrite(gm, analyze(gm), PruningPlan({"stem": kept}))
    called = [str(getattr(node.target, "__name__", node.target)) for node in pruned.graph.nodes]
    assert ("index_select" in called, "view" in called) == (ragged, not ragged)


def test_computing_between_the_views_couples_them() -> None:
    """Every row gets its own scale, so what is left must be rows and columns."""
    scaled = Shuffled(lambda x: (x.unflatten(1, (2, 4)) * 2.0).transpose(1, 2).flatten(1, 2))
    assert [group.size for group in analyze(trace(scaled, torch.zeros(2, 3, 4, 4))).groups] == [4]


def test_shuffle_net_is_not_coupled_as_a_whole() -> None:
    analysis = analyze(trace(shufflenet_v2_x1_0(), torch.zeros(2, 3, 64, 64)))
    assert len(analysis.shuffles) == 16
    assert sum(group.size for group in analysis.groups) > 5600
    assert [frozen.name for frozen in analysis.frozen if frozen.channels > 2] == ["fc"]
