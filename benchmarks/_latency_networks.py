"""The networks of the latency benchmark: four sources, each in up to four forms.

A *source* is where the widths come from: the dense network, rbpfx at a budget of
multiply-accumulates with widths as they fall (`ragged`) or in multiples of 16 (`rounded`), and
Torch-Pruning 1.6.1 at the multiply-accumulates of `ragged`. A *form* is how it runs: as `emitted`,
`deployed` by `rbpfx.deploy`, exported to `onnx` for ONNX Runtime, or `compiled` by
`torch.compile`. Weights are random and untrained, which changes no kernel; scores are magnitudes.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

import rbpfx
from benchmarks import _torch_pruning
from benchmarks._isolate import first_line
from benchmarks._zoo import torchvision_model
from rbpfx import Target
from rbpfx.graph.verification import difference
from rbpfx.training.loop import refresh_batchnorm
from rbpfx.training.task import Task

PEER = "torch-pruning"
TARGETS: dict[str, Callable[[float], Target]] = {
    "ragged": lambda share: Target(macs=share),
    "rounded": lambda share: Target(macs=share, round_to=16),
}
SOURCES = ("dense", *TARGETS, PEER)
FORMS = ("emitted", "deployed", "onnx", "compiled")

Built = nn.Module | str
"""A network, or why there is none."""


# -- sources -------------------------------------------------------------------------------


@cache
def dense(name: str, image_size: int) -> nn.Module:
    """A torchvision classifier, in eval mode, whose BatchNorms fit its random weights."""
    torch.manual_seed(0)
    model = torchvision_model(name)
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and not layer.weight.any():
            layer.reset_parameters()  # a head of zeros would hide every difference
    return _settled(model, image_size)


@cache
def source(name: str, network: str, ratio: float, image_size: int) -> Built:
    """A network of one of the sources, on the CPU.

    Args:
        name: Of `SOURCES`.
        network: Of torchvision.
        ratio: Times fewer multiply-accumulates.
        image_size: Pixels on a side.
    """
    model, image = dense(network, image_size), _image(image_size)
    if name == "dense":
        return model
    try:
        if name == PEER:
            return _settled(_by_peer(network, ratio, image_size), image_size)
        return _settled(_by_rbpfx(model, image, TARGETS[name](1 / ratio)), image_size)
    except Exception as error:  # the other sources go on
        return first_line(error)


def macs(model: nn.Module, image_size: int) -> int:
    """Multiply-accumulates for one image."""
    return rbpfx.count_macs(rbpfx.trace(model, _image(image_size)))


def _by_rbpfx(model: nn.Module, image: Tensor, target: Target) -> nn.Module:
    """What `prune(method="magnitude")` would emit, without any training."""
    gm = rbpfx.trace(model, image)
    analysis = rbpfx.analyze(gm)
    selection = rbpfx.Selection(analysis, target)
    return rbpfx.rewrite(gm, analysis, selection.plan(magnitudes(gm, analysis, selection)))


def magnitudes(
    gm: nn.Module, analysis: rbpfx.Analysis, selection: rbpfx.Selection
) -> dict[str, np.ndarray]:
    """The scores of `method="magnitude"`: group name -> score of every unit."""
    names = [group.name for group in selection.groups]
    noisy = rbpfx.insert_noise(gm, analysis, "magnitude", groups=names)
    return {g.group: g.score().double().cpu().numpy() for g in rbpfx.noise_gates(noisy)}


def _by_peer(network: str, ratio: float, image_size: int) -> nn.Module:
    """Torch-Pruning, every layer losing the same share, at the cost of our `ragged` network."""
    ours = source("ragged", network, ratio, image_size)
    if isinstance(ours, str):
        raise RuntimeError(f"no network of ours to match: {ours}")
    model, settings = dense(network, image_size), _torch_pruning.Settings()
    if isinstance(model, VisionTransformer):
        model = _with_free_width(model)
        # It narrows the residual stream, which all heads share.
        heads = model.encoder.layers[0].self_attention.num_heads
        settings = _torch_pruning.Settings(round_to=heads)
    budget = macs(ours, image_size)
    cut = _torch_pruning.cut_to(model, _image(image_size), budget, settings)
    if cut is None:
        raise RuntimeError("no ratio of channels reaches the budget")
    return cut.model


class _FreeWidth(VisionTransformer):
    """A vision transformer that asks its layers for its width, as its forward checks it."""

    @property
    def hidden_dim(self) -> int:
        return self.conv_proj.out_channels


def _with_free_width(model: VisionTransformer) -> VisionTransformer:
    model = copy.deepcopy(model)
    del model.hidden_dim
    model.__class__ = _FreeWidth
    return model


def _settled(model: nn.Module, image_size: int) -> nn.Module:
    """With BatchNorm statistics of its own: random weights would else let the signal vanish."""
    images = torch.randn(4, 3, image_size, image_size)
    refresh_batchnorm(model, [(images, torch.zeros(4, dtype=torch.long))], Task())
    return model.eval()


def _image(image_size: int) -> Tensor:
    return torch.randn(1, 3, image_size, image_size)


# -- forms ---------------------------------------------------------------------------------


def in_form(form: str, network: nn.Module, images: Tensor, threads: int) -> nn.Module:
    """A network in a form, on the device of the images.

    Args:
        form: Of `FORMS`.
        network: On the CPU; left as it is.
        images: Example images of the batch size that is measured.
        threads: CPU threads that ONNX Runtime gets.
    """
    if images.device.type != "cpu":
        network = copy.deepcopy(network).to(images.device)
    if form == "emitted":
        return network
    if form == "deployed":
        return rbpfx.deploy(network, images)
    if form == "compiled":
        return torch.compile(network, dynamic=False)  # type: ignore[return-value]
    return OnnxNetwork(network, images, threads)


class OnnxNetwork(nn.Module):
    """A network exported to ONNX, run by ONNX Runtime on the CPU.

    Args:
        network: What is exported.
        images: Images `(N, C, H, W)`; the batch size is fixed to theirs.
        threads: CPU threads of an operator.
    """

    def __init__(self, network: nn.Module, images: Tensor, threads: int) -> None:
        super().__init__()
        import onnxruntime

        if images.device.type != "cpu":
            raise RuntimeError("ONNX Runtime is measured on the CPU only")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        with tempfile.TemporaryDirectory() as folder:
            file = str(Path(folder) / "network.onnx")
            torch.onnx.export(network, (images,), file, dynamo=True, verbose=False)
            providers = ["CPUExecutionProvider"]
            self.session = onnxruntime.InferenceSession(file, options, providers=providers)
        self.input = self.session.get_inputs()[0].name

    def forward(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self.session.run(None, {self.input: images.numpy()})[0])


class Variant(NamedTuple):
    """A source in a form, or why there is none.

    Attributes:
        network: What is measured.
        difference: Of its outputs from those of the source as emitted, as a share of their scale.
        failure: The first line of what went wrong.
    """

    network: nn.Module | None
    difference: float | None = None
    failure: str | None = None


def variants(
    network: str, ratio: float, forms: Iterable[str], images: Tensor, threads: int
) -> dict[tuple[str, str], Variant]:
    """Every source in every form, each having run once: (source, form) -> network."""
    torch.compiler.reset()
    found = {}
    for name in SOURCES:
        emitted = source(name, network, ratio, images.shape[-1])
        for form in forms:
            if isinstance(emitted, str):
                found[name, form] = Variant(None, failure=emitted)
            else:
                found[name, form] = _variant(form, emitted, images, threads)
    return found


@torch.no_grad()
def _variant(form: str, emitted: nn.Module, images: Tensor, threads: int) -> Variant:
    try:
        network = in_form(form, emitted, images, threads).eval()
        return Variant(network, difference(emitted(images.cpu()), network(images).cpu()))
    except Exception as error:
        return Variant(None, failure=first_line(error))
