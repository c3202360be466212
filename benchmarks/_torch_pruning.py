"""Torch-Pruning 1.6.1 (Fang et al., DepGraph, CVPR 2023) at a budget of multiply-accumulates.

As its authors use it on CIFAR-10 (`reproduce/main.py` of its repository): `GroupNormPruner` with
`GroupMagnitudeImportance`, the layer of the class scores ignored; for sparse learning, the
importances divided by the largest of the group, a regulariser of 5e-4 in place of weight decay
and one ranking over all groups. Its pruning ratio is a number of channels; here it is found by
bisection, every candidate cut from a fresh copy, so that the network that comes out costs at most
the budget by our counter, and as nearly that as can be. Where every layer loses the same share,
all layers of one width lose their next channel at once, and up to a seventh of the budget would
be left over; there the first layers take the next smaller share, as many of them as fit.

**Zero-padded shortcuts.** Torch-Pruning reads the graph that autograd records. `F.pad` on channels
is an element-wise operation to it: it takes the 16, 32 and 64 channels of the three stages of a
CIFAR ResNet for one group of 16, and the network that it emits does not run (the last linear layer
has 32 inputs for 56 channels at a ratio of one half). So it is given the same function in terms
that it knows: the shortcut as a 1×1 convolution with fixed weights, one of an identity matrix
padded with zero rows. It then prunes every group, and the stages even apart from one another; what
is left of the fixed convolution is turned back into a choice of channels, which costs nothing and
trains nothing. While it ranks, the fixed weights are too small to count as importance. `tp-inner`
is the other way out, which needs no replacement: only the channels inside the blocks are pruned.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import MultiStepLR
from torchvision.models import resnet

from benchmarks._models import BasicBlock, ZeroPaddedShortcut
from rbpfx import count_macs, trace
from rbpfx.training.loop import batches
from rbpfx.training.task import Loader, Task

BISECTIONS = 14
STEPS = 10  # in which a candidate is cut: the importances are estimated anew after each
SPARSE_REGULARISER = 5e-4
TINY = 1e-18  # its square vanishes beside any weight, and is still a float32


@dataclass(frozen=True)
class Settings:
    """A way to use Torch-Pruning.

    Attributes:
        global_ranking: One ranking over all groups; by default every layer loses the same share.
        sparse: Whether sparse learning comes first.
        inner_only: Whether the residual stream stays whole.
        normalizer: What the importances within a group are divided by.
        round_to: Make widths a multiple of this number of channels.
    """

    global_ranking: bool = False
    sparse: bool = False
    inner_only: bool = False
    normalizer: str = "mean"
    round_to: int | None = None


METHODS = {
    "tp-group-norm": Settings(),
    "tp-group-norm-global": Settings(global_ranking=True),
    "tp-sparse": Settings(global_ranking=True, sparse=True, normalizer="max"),
    "tp-sparse-local": Settings(sparse=True, normalizer="max"),
    "tp-inner": Settings(inner_only=True),
    "tp-inner-global": Settings(inner_only=True, global_ranking=True),
}


class Cut(NamedTuple):
    """What a ratio left.

    Attributes:
        model: The smaller network.
        macs: Its multiply-accumulates per example.
        ratio: Share of the channels that Torch-Pruning was asked to remove.
        spared: How many of the first layers were asked for the next smaller share.
    """

    model: nn.Module
    macs: int
    ratio: float
    spared: int = 0


def understood(model: nn.Module) -> nn.Module:
    """A copy whose zero-padded shortcuts are convolutions that Torch-Pruning follows."""
    model = copy.deepcopy(model)
    for block in _blocks_with(model, ZeroPaddedShortcut):
        block.shortcut = _ShortcutConvolution(block.shortcut).to(block.conv1.weight.device)
    return model


def emitted(model: nn.Module) -> nn.Module:
    """The same function without those convolutions: a choice of channels in their place."""
    for block in _blocks_with(model, _ShortcutConvolution):
        block.shortcut = _Selection(block.shortcut)
    return model


def scope(model: nn.Module, settings: Settings) -> str:
    """What of the network may go, in words."""
    if settings.inner_only:
        return "inside the blocks only"
    if _blocks_with(model, ZeroPaddedShortcut):
        return "all groups; zero-padded shortcuts given as fixed 1x1 convolutions"
    return "all groups"


def learn_sparsity(
    model: nn.Module,
    loader: Loader,
    task: Task,
    epochs: float,
    lr: float,
    settings: Settings,
    teacher: nn.Module | None = None,
) -> nn.Module:
    """Train a copy with Torch-Pruning's group regulariser; what comes back is to be cut.

    Args:
        model: As `understood` gives it.
        loader: Training batches.
        task: Turns batches into losses.
        epochs: Passes over the loader.
        lr: Learning rate at the start; a tenth of it after 60 % and again after 80 % of the steps.
        settings: How the groups are formed.
        teacher: Network whose outputs are imitated in half of the loss.
    """
    model = copy.deepcopy(model)
    pruner = _pruner(model, _example(loader, task), 1.0, settings)
    pruner.update_regularizer()
    steps = round(epochs * task.batches_in(loader))
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(weights, lr, momentum=0.9, nesterov=True)
    schedule = MultiStepLR(optimizer, [round(0.6 * steps), round(0.8 * steps)])
    model.train()
    for batch in batches(loader, steps):
        loss = task.loss(model, batch, teacher)
        if not torch.isfinite(loss):
            raise FloatingPointError("sparse learning diverged")
        optimizer.zero_grad()
        loss.backward()
        pruner.regularize(model)
        optimizer.step()
        schedule.step()
    return model.eval()


def cut_to(model: nn.Module, inputs: Tensor, budget: float, settings: Settings) -> Cut | None:
    """The most expensive network within the budget that a ratio gives.

    Args:
        model: As `understood` gives it; left untouched.
        inputs: A small batch of images.
        budget: Multiply-accumulates per example.
        settings: How.

    Returns:
        The network, or None if no ratio reaches the budget.
    """
    best, too_small = nearest(lambda ratio: _cut(model, inputs, ratio, settings), budget)
    if best is None or settings.global_ranking:
        return best
    low, high = 0, len(_layers(model))
    while low < high:
        middle = (low + high + 1) // 2
        candidate = _cut(model, inputs, best.ratio, settings, middle, too_small)
        if candidate.macs <= budget:
            low = middle
            best = max(best, candidate, key=lambda cut: cut.macs)
        else:
            high = middle - 1
    return best


def nearest(
    cut: Callable[[float], Cut], budget: float, bisections: int = BISECTIONS
) -> tuple[Cut | None, float]:
    """Bisects the ratio: the dearest network met within the budget, the largest ratio beyond it."""
    best: Cut | None = None
    low, high = 0.0, 1.0
    for _ in range(bisections):
        middle = (low + high) / 2
        candidate = cut(middle)
        if candidate.macs <= budget:
            high = middle
            if best is None or candidate.macs > best.macs:
                best = candidate
        else:
            low = middle
    return best, low


def _cut(
    model: nn.Module,
    inputs: Tensor,
    ratio: float,
    settings: Settings,
    spared: int = 0,
    spared_ratio: float = 0.0,
) -> Cut:
    model = copy.deepcopy(model).eval()
    exceptions = dict.fromkeys(_layers(model)[:spared], spared_ratio)
    pruner = _pruner(model, inputs, ratio, settings, exceptions)
    for _ in range(STEPS):
        pruner.step()
    model = emitted(model)
    return Cut(model, count_macs(trace(model, inputs)), ratio, spared)


def _pruner(
    model: nn.Module,
    inputs: Tensor,
    ratio: float,
    settings: Settings,
    exceptions: dict[nn.Module, float] | None = None,
) -> Any:
    import torch_pruning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch_pruning.pruner.GroupNormPruner(
            model,
            inputs,
            importance=torch_pruning.importance.GroupMagnitudeImportance(
                p=2, normalizer=settings.normalizer
            ),
            reg=SPARSE_REGULARISER,
            global_pruning=settings.global_ranking,
            pruning_ratio=ratio,
            pruning_ratio_dict=exceptions or None,
            iterative_steps=STEPS,
            ignored_layers=_ignored(model, settings),
            round_to=settings.round_to,
        )


def _ignored(model: nn.Module, settings: Settings) -> list[nn.Module]:
    """The layer of the class scores and, if asked for, what writes to the residual stream."""
    ignored: list[nn.Module] = [m for m in model.modules() if isinstance(m, nn.Linear)][-1:]
    if settings.inner_only:
        blocks = [m for m in model.modules() if isinstance(m, BasicBlock | resnet.BasicBlock)]
        if not blocks:
            raise ValueError(f"{type(model).__name__} has no blocks, so nothing is inside of them")
        shortcuts = [b.shortcut if isinstance(b, BasicBlock) else b.downsample for b in blocks]
        ignored += [model.conv1, *(b.conv2 for b in blocks), *filter(None, shortcuts)]
    return ignored


def _layers(model: nn.Module) -> list[nn.Module]:
    """The layers whose outputs may go, in the order of the network."""
    kinds = (nn.Conv2d, nn.Linear)
    return [
        m
        for m in model.modules()
        if isinstance(m, kinds) and not isinstance(m, _ShortcutConvolution)
    ][:-1]


def _example(loader: Loader, task: Task) -> Tensor:
    return next(iter(loader))[0][:2].to(task.device)


def _blocks_with(model: nn.Module, shortcut: type[nn.Module]) -> list[BasicBlock]:
    blocks = (m for m in model.modules() if isinstance(m, BasicBlock))
    return [block for block in blocks if isinstance(block.shortcut, shortcut)]


class _ShortcutConvolution(nn.Conv2d):
    """A zero-padded shortcut as a convolution with fixed weights, scaled down by `TINY`."""

    def __init__(self, shortcut: ZeroPaddedShortcut) -> None:
        super().__init__(shortcut.planes_in, shortcut.planes, 1, shortcut.stride, bias=False)
        self.weight.requires_grad_(False).zero_()
        source = torch.arange(shortcut.planes_in)
        self.weight[source + shortcut.padding, source] = TINY

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, (self.weight != 0).to(x.dtype), stride=self.stride)


class _Selection(nn.Module):
    """What is left of it: for every channel, which one it copies, or none."""

    index: Tensor

    def __init__(self, convolution: _ShortcutConvolution) -> None:
        super().__init__()
        self.stride = convolution.stride[0]
        copies = convolution.weight.flatten(1) != 0  # (channels, channels read)
        nothing = copies.shape[1]  # the number of the channel of zeros that forward appends
        found = torch.where(copies.any(1), copies.int().argmax(1), nothing)
        self.register_buffer("index", found)

    def forward(self, x: Tensor) -> Tensor:
        seen = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, 1))
        return seen.index_select(1, self.index)
