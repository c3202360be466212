"""Operators that mix along one axis and keep it: softmax, cumulative sums, sorting."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from rbpfx.graph.operands import Labels
from rbpfx.graph.propagation import Propagation
from rbpfx.graph.provenance import Label
from rbpfx.graph.rules.base import Rule, register, setting, tensor_input, value_of
from rbpfx.graph.rules.reduction import keep_whole, over_channels


class Along(Rule):
    """Channels along the axis stay; all others pass.

    Args:
        default: The axis of a call that names none; None for the one that softmax guesses.
    """

    def __init__(self, default: int | None = None) -> None:
        self.default = default

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Hand the label on, for every result."""
        label = state.label(tensor_input(node))
        dim = value_of(setting(node, state.gm, 1, "dim", self.default))
        if not isinstance(dim, int) or isinstance(dim, bool):
            dim = self.default if self.default is not None else _implicit_dim(label)
        label = keep_whole(node, state, label, {dim % label.ndim}, over_channels(node, state))
        return label if isinstance(node.meta["val"], Tensor) else (label, label)


class ChannelSoftmax(Along):
    """`nn.Softmax2d`: softmax over the third axis from the end."""

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Hand the label on."""
        label = state.label(tensor_input(node))
        return keep_whole(node, state, label, {label.ndim - 3}, over_channels(node, state))


def _implicit_dim(label: Label) -> int:
    """The axis that torch's softmax takes if it is given none."""
    return 0 if label.ndim in (0, 1, 3) else 1


register(Along(), nn.Softmax, nn.LogSoftmax, nn.Softmin)
register(Along(), F.softmax, F.log_softmax, F.softmin)
for _rule, _names in (
    (Along(), "softmax log_softmax cumsum cumprod logcumsumexp cummax cummin"),
    (Along(default=-1), "sort argsort"),
):
    for _name in _names.split():
        register(_rule, getattr(torch, _name), _name)
register(ChannelSoftmax(), nn.Softmax2d)
