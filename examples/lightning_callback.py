"""Prune in the middle of a training by PyTorch Lightning; optimiser and schedule go on.

The callback prunes the network after an epoch, without fine-tuning: that is what the rest of the
training is for. `rbpfx.rebind` slices momentum as the weights were sliced, and lets the optimiser
train the smaller network.

    pip install pytorch-lightning
    python examples/lightning_callback.py --epochs 20 --at 10 --macs 0.3
"""

from __future__ import annotations

import argparse

import pytorch_lightning as pl
import torch
from _shared import parser, trained_digits
from torch import Tensor, nn
from torch.nn import functional as F

import rbpfx


class Classifier(pl.LightningModule):
    """A network and its training."""

    def __init__(self, network: nn.Module, epochs: int) -> None:
        super().__init__()
        self.network = network
        self.epochs = epochs

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        images, labels = batch
        hits = self.network(images).argmax(1) == labels
        self.log("accuracy", hits.float().mean(), prog_bar=True)

    def configure_optimizers(self) -> tuple[list, list]:
        optimizer = torch.optim.SGD(self.network.parameters(), 0.02, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)]


class Pruning(pl.Callback):
    """Prunes `module.network` at the start of an epoch, on one device."""

    def __init__(self, epoch: int, target: rbpfx.Target, recursion: rbpfx.Recursion) -> None:
        self.epoch = epoch
        self.target = target
        self.recursion = recursion

    def on_train_epoch_start(self, trainer: pl.Trainer, module: Classifier) -> None:
        if trainer.current_epoch != self.epoch:
            return
        dense = module.network  # has to live until the optimisers are rebound
        result = rbpfx.prune(
            dense,
            trainer.train_dataloader,
            target=self.target,
            recursion=self.recursion,
            recovery=rbpfx.FineTune(epochs=0),
            progress=False,
        )
        for optimizer in trainer.optimizers:
            rbpfx.rebind(optimizer, result)
        module.network = result.model
        print(result.report)


def main(options: argparse.Namespace) -> None:
    """Train, prune, train on."""
    network, loader, test_loader = trained_digits(options.tiny)
    pruning = Pruning(
        options.at, rbpfx.Target(macs=options.macs), rbpfx.Recursion(epochs=options.noise_epochs)
    )
    quiet = {"enable_progress_bar": False, "enable_model_summary": False} if options.tiny else {}
    trainer = pl.Trainer(
        max_epochs=options.epochs,
        callbacks=[pruning],
        accelerator="cpu" if options.tiny else "auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        **quiet,
    )
    trainer.fit(Classifier(network, options.epochs), loader, test_loader)
    print({name: f"{value:.1%}" for name, value in trainer.callback_metrics.items()})


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--epochs", type=int, default=20)
    arguments.add_argument("--at", type=int, default=10, help="epoch before which to prune")
    arguments.add_argument("--macs", type=float, default=0.3, help="share to keep")
    arguments.add_argument("--noise-epochs", type=float, default=8)
    options = arguments.parse_args()
    if options.tiny:
        options.epochs, options.at, options.noise_epochs = 2, 1, 0.5
    main(options)
