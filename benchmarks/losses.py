"""Networks whose loss is no cross-entropy over ten classes, whose data are few or batches small.

    python -m benchmarks.losses
    python -m benchmarks.losses --tasks friedman --seeds 0

Every task is a small network, trained here in seconds on data that scikit-learn embeds or makes,
and pruned with all the defaults of `rbpfx.prune`: without a target, and at half the
multiply-accumulates. Whatever the unit of the loss, the automatic mode should leave a smaller
network that is about as good, never one that has forgotten everything.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_breast_cancer, load_digits, load_wine, make_friedman1
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import rbpfx
from benchmarks._record import Deadline, Record

RESULTS = Path(__file__).parent / "results" / "losses.json"
TARGETS = ("auto", "0.5")
ACCURACY, R2, IOU = "accuracy", "R2", "intersection over union"

Loss = Callable[[Tensor, Tensor], Tensor]
Split = tuple[Tensor, Tensor]


class Prepared(NamedTuple):
    """A trained network with its data.

    Attributes:
        model: The network.
        train: Training examples.
        test: Examples that nothing is decided on.
        loss_fn: What it was trained by.
        metric: Name of what is measured on the test examples.
        batch_size: Of the training examples, while pruning.
    """

    model: nn.Module
    train: Split
    test: Split
    loss_fn: Loss
    metric: str
    batch_size: int = 32


# -- tasks ---------------------------------------------------------------------------------


def friedman(std: float, seed: int, loss_fn: Loss = F.mse_loss) -> Prepared:
    """Regression (Friedman 1991) by an MLP that is far too wide; answers spread by `std`."""
    x, y = make_friedman1(2500, noise=1.0, random_state=seed)
    x, y = _standardised(torch.tensor(x)), _standardised(torch.tensor(y))[:, None]
    model = _mlp(10, 1)
    _train(model, _loader((x[:2000], y[:2000])), F.mse_loss, 30)
    with torch.no_grad():  # the same function in another unit
        model[-1].weight.mul_(std)
        model[-1].bias.mul_(std)
    return Prepared(model, (x[:2000], std * y[:2000]), (x[2000:], std * y[2000:]), loss_fn, R2)


def autoencoder(loss_fn: Loss, seed: int) -> Prepared:
    """Digits through 32 numbers."""
    x = torch.tensor(load_digits().images / 16).float().flatten(1)
    x = x[torch.randperm(len(x))]
    model = nn.Sequential(_mlp(64, 32, 256, 1), nn.ReLU(), _mlp(32, 64, 256, 1))
    _train(model, _loader((x[:1400], x[:1400])), F.mse_loss, 40)
    return Prepared(model, (x[:1400], x[:1400]), (x[1400:], x[1400:]), loss_fn, R2)


def table(load: Callable[..., Any], examples: int, seed: int) -> Prepared:
    """A table of a few hundred examples in two or three classes; the MLP is far too wide."""
    x, y = map(torch.tensor, load(return_X_y=True))
    x, order = _standardised(x), torch.randperm(len(x))
    train, test = (
        (x[order[:examples]], y[order[:examples]]),
        (x[order[examples:]], y[order[examples:]]),
    )
    model = _mlp(x.shape[1], int(y.max()) + 1)
    _train(model, _loader(train), F.cross_entropy, 20)
    return Prepared(model, train, test, F.cross_entropy, ACCURACY)


def digits(examples: int, batch_size: int, seed: int) -> Prepared:
    """Digits, by a small convolutional network, from few of them or in batches of another size."""
    data = load_digits()
    x, y = torch.tensor(data.images / 8 - 1).float()[:, None], torch.tensor(data.target)
    order = torch.randperm(len(x))
    x, y = x[order], y[order]
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1024, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )
    train = x[:examples], y[:examples]
    _train(model, _loader(train), F.cross_entropy, max(15, 6000 // examples))
    test = x[1200:], y[1200:]
    return Prepared(model, train, test, F.cross_entropy, ACCURACY, batch_size)


def segmentation(loss_fn: Loss, seed: int) -> Prepared:
    """Discs in noise, by a U-Net."""
    train, test = _discs(800), _discs(300)
    model = UNet()
    _train(model, _loader(train, 16), F.binary_cross_entropy_with_logits, 8, 3e-3)
    return Prepared(model, train, test, loss_fn, IOU, 16)


def _summed(loss: Loss) -> Loss:
    """The sum over all elements: of another size for every batch size."""
    return lambda output, target: loss(output, target, reduction="sum")  # type: ignore[call-arg]


TASKS: dict[str, Callable[[int], Prepared]] = {
    "friedman": lambda seed: friedman(1, seed),
    "friedman, std 1000": lambda seed: friedman(1000, seed),
    "friedman, std 0.03": lambda seed: friedman(0.03, seed),
    "friedman, smooth L1": lambda seed: friedman(1, seed, F.smooth_l1_loss),
    "autoencoder": lambda seed: autoencoder(F.mse_loss, seed),
    "autoencoder, summed": lambda seed: autoencoder(_summed(F.mse_loss), seed),
    "breast cancer, 400 examples": lambda seed: table(load_breast_cancer, 400, seed),
    "wine, 120 examples": lambda seed: table(load_wine, 120, seed),
    "digits": lambda seed: digits(1200, 32, seed),
    "digits, 100 examples": lambda seed: digits(100, 32, seed),
    "digits, batch 1": lambda seed: digits(1200, 1, seed),
    "digits, batch 4": lambda seed: digits(1200, 4, seed),
    "digits, batch 1000": lambda seed: digits(1200, 1000, seed),
    "discs": lambda seed: segmentation(F.binary_cross_entropy_with_logits, seed),
    "discs, summed": lambda seed: segmentation(_summed(F.binary_cross_entropy_with_logits), seed),
}


class UNet(nn.Module):
    """Two levels, with skips by concatenation.

    Args:
        width: Channels of the first level.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.down1, self.down2 = _block(1, width), _block(width, 2 * width)
        self.bottom = _block(2 * width, 4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.join2 = _block(4 * width, 2 * width)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.join1 = _block(2 * width, width)
        self.out = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        c = self.bottom(F.max_pool2d(b, 2))
        b = self.join2(torch.cat([self.up2(c), b], 1))
        return self.out(self.join1(torch.cat([self.up1(b), a], 1)))


def _block(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def _mlp(inputs: int, outputs: int, width: int = 512, hidden: int = 2) -> nn.Sequential:
    widths = [inputs, *[width] * hidden]
    layers = [
        layer
        for before, after in pairwise(widths)
        for layer in (nn.Linear(before, after), nn.ReLU())
    ]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def _discs(count: int) -> Split:
    """Images of 32 pixels, `(N, 1, 32, 32)`, and where their discs are."""
    down, right = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    masks = torch.zeros(count, 32, 32)
    for _ in range(2):
        x, y, radius = (
            32 * torch.rand(count, 1, 1),
            32 * torch.rand(count, 1, 1),
            3 + 5 * torch.rand(count, 1, 1),
        )
        masks = torch.maximum(masks, ((right - x) ** 2 + (down - y) ** 2 < radius**2).float())
    return (masks + 0.8 * torch.randn(count, 32, 32))[:, None], masks[:, None]


def _standardised(values: Tensor) -> Tensor:
    return ((values - values.mean(0)) / values.std(0)).float()


def _loader(split: Split, batch_size: int = 32, shuffle: bool = True) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*split), batch_size, shuffle=shuffle)


def _train(
    model: nn.Module, loader: DataLoader[Any], loss_fn: Loss, epochs: int, lr: float = 1e-3
) -> None:
    """Adam on a cosine."""
    optimizer = torch.optim.Adam(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    model.train()
    for _ in range(epochs):
        for inputs, target in loader:
            optimizer.zero_grad()
            loss_fn(model(inputs), target).backward()
            optimizer.step()
            schedule.step()
    model.eval()


# -- rows ----------------------------------------------------------------------------------


def measured(name: str) -> Callable[[nn.Module, Iterable[Split]], float]:
    """The metric of a name, over a whole loader."""

    def metric(model: nn.Module, loader: Iterable[Split]) -> float:
        pairs = [(model(inputs), target) for inputs, target in loader]
        output, target = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        if name == ACCURACY:
            return float((output.argmax(1) == target).double().mean())
        if name == R2:
            return float(1 - F.mse_loss(output, target) / target.var(0).mean())
        found = output > 0
        return float((found * target).sum() / torch.maximum(found.float(), target).sum())

    return metric


def run(task: str, target: str, seed: int) -> dict[str, Any]:
    """One row; a row that fails says why."""
    torch.manual_seed(seed)
    prepared = TASKS[task](seed)
    row: dict[str, Any] = {
        "task": task,
        "target": target,
        "seed": seed,
        "metric": prepared.metric,
        "batch_size": prepared.batch_size,
    }
    try:
        report = rbpfx.prune(
            prepared.model,
            _loader(prepared.train, prepared.batch_size),
            target=None if target == "auto" else rbpfx.Target(macs=float(target)),
            loss_fn=prepared.loss_fn,
            val_loader=_loader(prepared.test, 500, shuffle=False),
            metric=measured(prepared.metric),
            seed=seed,
            progress=False,
        ).report
    except rbpfx.RbpfxError as error:
        return row | {"failure": f"{type(error).__name__}: {error}"[:300]}
    return row | {
        "dense": report.dense.accuracy,
        "after_cut": report.accuracy_after_cut,
        "pruned": report.pruned.accuracy,
        "macs_ratio": round(report.dense.macs / report.pruned.macs, 2),
        "forgotten": report.forgotten,
        "widths": "-".join(str(kept) for _, kept in report.widths.values()),
        "seconds": round(report.seconds, 1),
    }


def main() -> None:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, help="time box")
    options = parser.parse_args()
    record, deadline = Record(options.results), Deadline(options.seconds)
    for seed in options.seeds:
        for task in options.tasks:
            for target in options.targets:
                key = f"{task}/{target}/seed={seed}"
                if record.done(key) or deadline.expired:
                    continue
                record.add(key, run(task, target, seed))
                print(key, {k: v for k, v in record.rows[key].items() if k not in key}, flush=True)
    lines = [_line(record, task) for task in options.tasks]
    print(tabulate(lines, _HEADERS, "github", disable_numparse=True))


_HEADERS = ("task", "metric", "dense", "auto", "at the cut", "2x", "at the cut")


def _line(record: Record, task: str) -> list[str]:
    """Means over the seeds."""
    rows = [row for row in record.rows.values() if row["task"] == task]
    cells = [task, rows[0]["metric"] if rows else ""]
    for target in TARGETS:
        found = [row for row in rows if row["target"] == target and "failure" not in row]
        if not found:
            cells += ["failed"] * (3 if target == "auto" else 2)
            continue
        dense, cut, pruned = (_mean(found, name) for name in ("dense", "after_cut", "pruned"))
        if target == "auto":
            cells += [f"{dense:.3f}", f"{pruned:.3f} at {_mean(found, 'macs_ratio'):.1f}x"]
        else:
            cells += [f"{pruned:.3f}"]
        cells += [f"{cut:.3f}"]
    return cells


def _mean(rows: list[dict[str, Any]], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


if __name__ == "__main__":
    main()
