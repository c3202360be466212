"""Normalisations that treat every channel on its own: BatchNorm."""

from __future__ import annotations

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from rbpfx.graph.propagation import Labels, Propagation
from rbpfx.graph.provenance import Block, Label
from rbpfx.graph.rules.base import Rule, module_of, register, tensor_input
from rbpfx.graph.slicing import Slicing

_ARGUMENTS = (("running_mean", 1), ("running_var", 2), ("weight", 3), ("bias", 4))
_TORCH_ARGUMENTS = (("weight", 1), ("bias", 2), ("running_mean", 3), ("running_var", 4))


class BatchNorm(Rule):
    """Statistics, scale and shift belong to the channels of axis 1.

    Args:
        arguments: Names and positions of the per-channel tensors in the functional call.
    """

    def __init__(self, arguments: tuple[tuple[str, int], ...]) -> None:
        self.arguments = arguments

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Bind the per-channel tensors to axis 1; statistics run over all other axes."""
        label = state.label(tensor_input(node))
        rest = set(range(label.ndim)) - {1}
        label = state.collapse(label, rest, "statistics of a BatchNorm")
        operands = [state.operand(node, position, name) for name, position in self.arguments]
        bound = [operand for operand in operands if operand is not None]
        if not bound:
            return label
        channels = state.axis(label, 1, "a BatchNorm over channels that are not followed")
        for operand in bound:
            operand.bind(0, channels)
        return Label(label.shape, (Block((1,), channels),))

    def rewrite(self, node: fx.Node, state: Slicing) -> None:
        """Name the number of channels."""
        module = module_of(state.twin(node), state.gm)
        if isinstance(module, _BatchNorm):
            label = state.labels[node]
            assert isinstance(label, Label)
            module.num_features = state.sizes(label).get(1, module.num_features)


register(BatchNorm(_ARGUMENTS), nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
register(BatchNorm(_ARGUMENTS), F.batch_norm)
register(BatchNorm(_TORCH_ARGUMENTS), torch.batch_norm)
