"""FastNAS of NVIDIA's Model Optimizer at a budget of multiply-accumulates.

FastNAS narrows one layer at a time, recalibrates BatchNorm and measures how much the accuracy on
images that it is given falls; then it takes in every layer the narrowest width whose loss stays
below one threshold, bisected until the network fits. Here the accuracy is that on the last 2 000
training images, which no method trains on where rows use fewer images than there are; widths are
multiples of 4 (its default, 32, is all that a layer of a CIFAR ResNet has) in steps of a twentieth,
as by default; BatchNorm sees 10 batches. It refuses weights in channels-last. Its count of FLOPs is
not our count of multiply-accumulates, so its constraint is bisected until the network fits by ours.

Needs `pip install nvidia-modelopt "torchprofile==0.0.4"`.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks._data import ImageData, TensorLoader
from benchmarks._torch_pruning import Cut, nearest
from benchmarks._train import accuracy
from rbpfx import count_macs, trace

METHOD = "modelopt-fastnas"
SCOPE = "the channels that FastNAS can narrow"
SCORED_IMAGES = 2_000
CALIBRATION_BATCHES = 10
DIVISOR = 4
BISECTIONS = 8
RATIOS = tuple(i / 20 for i in range(1, 21))


def cut_to(
    model: nn.Module, loader: TensorLoader, data: ImageData, inputs: Tensor, budget: float
) -> Cut | None:
    """The most expensive network within the budget that FastNAS gives.

    Args:
        model: Left untouched.
        loader: Training batches, for the statistics of BatchNorm.
        data: Whose last training images tell how good a network is.
        inputs: A small batch of images.
        budget: Multiply-accumulates per example.

    Returns:
        The network, or None if no constraint reaches the budget.
    """
    import modelopt.torch.prune as mtp

    device = inputs.device
    scored = TensorLoader(
        data.train_images[-SCORED_IMAGES:], data.train_labels[-SCORED_IMAGES:], SCORED_IMAGES
    )
    widths = {"features_ratio": RATIOS, "feature_divisor": DIVISOR}
    space = {
        "nn.Conv2d": {
            "*": {"channels_ratio": RATIOS, "kernel_size": (), "channel_divisor": DIVISOR}
        },
        "nn.BatchNorm2d": {"*": widths},
        "nn.Linear": {"*": widths},
    }
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        search = {
            "data_loader": loader,
            "collect_func": lambda batch: batch[0].to(device),
            "max_iter_data_loader": CALIBRATION_BATCHES,
            "score_func": lambda network: accuracy(network, scored),
            "verbose": False,
            "checkpoint": str(Path(folder) / "sensitivity.pth"),  # measured once
        }

        def cut(ratio: float) -> Cut:
            found, _ = mtp.prune(
                copy.deepcopy(model).to(memory_format=torch.contiguous_format),
                mode=[("fastnas", space)],
                constraints={"flops": f"{100 * (1 - ratio):.4f}%"},
                dummy_input=inputs,
                config=search,
            )
            return Cut(found, count_macs(trace(found, inputs)), ratio)

        return nearest(cut, budget, BISECTIONS)[0]
