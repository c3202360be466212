"""Convolutions: plain, grouped, depthwise and transposed, in one, two and three dimensions."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import numpy as np
import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torchvision import ops  # noqa: F401  (loads the operators of torchvision)

from rbpfx.graph.calls import module_of
from rbpfx.graph.operands import Labels, Operand
from rbpfx.graph.propagation import Propagation
from rbpfx.graph.provenance import Atoms, Block, Label
from rbpfx.graph.rules.base import (
    Rule,
    asks_for_examples,
    register,
    set_argument,
    setting,
    shape_of,
    tensor_input,
    value_of,
)
from rbpfx.graph.slicing import Slicing


class Convolution(Rule):
    """Contracts the input channels, brings the output channels to life.

    With several convolution groups a unit is one position in all of them, so that every group
    keeps the same width; where a group has one input channel (depthwise) nothing is contracted
    and the unit is the group.

    Args:
        transposed: The weight is (in, out / groups, ...) instead of (out, in / groups, ...).
        bias: Position of the bias in a call.
        groups: Position of the number of groups.
    """

    def __init__(self, transposed: bool = False, bias: int = 2, groups: int = 6) -> None:
        self.transposed = transposed
        self.bias = bias
        self.groups = groups

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Read the input channels, produce the output channels, follow no spatial axis.

        Heads that have become examples pass through.
        """
        weight = state.operand(node, 1, "weight")
        bias = state.operand(node, self.bias, "bias")
        assert weight is not None
        weight.pin_rest(0, 1)
        source = tensor_input(node)
        dim = _channel_dim(source, weight.shape)
        label = state.label(source)
        spatial = set(range(dim + 1, label.ndim))
        label = state.collapse(label, spatial, "spatial axis of a convolution")
        label = state.separate(label, {dim})
        if asks_for_examples(setting(node, state.gm, self.groups, "groups", 1)):
            # The channels of all examples, one behind the other, whatever led there.
            label = state.collapse(label, {dim}, f"{node.name!r} has a group for every example")
        through = label.without(dim)
        if self._is_depthwise(node, state.gm):
            inputs = state.axis(label, dim, "input of a depthwise convolution")
            atoms = self._depthwise(node, inputs, dim, weight, state)
            state.contract(node, (atoms,), *_flat(through))
        else:
            (inputs,) = state.read(
                node, source, dim, weight, 0 if self.transposed else 1, label=label
            )
            atoms = self._full(node, inputs, weight, state)
            state.contract(node, (inputs,), (atoms,), *_flat(through))
        if bias is not None:
            bias.bind(0, atoms)
        return Label(shape_of(node), (*through, Block((dim,), atoms)))

    def _full(self, node: fx.Node, inputs: Atoms, weight: Operand, state: Propagation) -> Atoms:
        groups = self._groups(node, state.gm)
        tie_groups(state, inputs, groups)
        if self.transposed:
            weight.bind(0, inputs)
            outputs = np.tile(state.produce(node, weight, 1), groups)
        else:
            weight.bind(1, inputs[: len(inputs) // groups])
            outputs = state.produce(node, weight, 0)
            tie_groups(state, outputs, groups)
        return outputs

    def _depthwise(
        self, node: fx.Node, inputs: Atoms, dim: int, weight: Operand, state: Propagation
    ) -> Atoms:
        outputs = np.repeat(inputs, shape_of(node)[dim] // len(inputs))
        weight.bind(0, inputs if self.transposed else outputs)
        weight.pin_rest(0)
        return outputs

    def rewrite(self, node: fx.Node, state: Slicing) -> None:
        """Name the new widths, and how many groups a depthwise convolution keeps."""
        groups = self._groups(node, state.source)
        if self._is_depthwise(node, state.source):
            source = tensor_input(node)
            dim = _channel_dim(source, _weight_shape(node, state.source))
            groups = state.sizes(state.label(source)).get(dim, groups)
        twin = state.twin(node)
        module = module_of(twin, state.gm)
        if isinstance(module, _ConvNd):
            rows, columns = module.weight.shape[:2]
            module.groups = groups
            module.in_channels = rows if self.transposed else columns * groups
            module.out_channels = columns * groups if self.transposed else rows
        elif groups != self._groups(node, state.source):
            set_argument(twin, self.groups, "groups", groups)

    def macs(self, node: fx.Node, gm: fx.GraphModule) -> int:
        """One per weight and position of the convolution's grid."""
        weight = _weight_shape(node, gm)
        grid = tensor_input(node) if self.transposed else node
        dim = _channel_dim(grid, weight)
        return prod(weight) * prod(n for d, n in enumerate(shape_of(grid)) if d != dim)

    def _is_depthwise(self, node: fx.Node, gm: fx.GraphModule) -> bool:
        source = tensor_input(node)
        channels = shape_of(source)[_channel_dim(source, _weight_shape(node, gm))]
        return 1 < self._groups(node, gm) == channels

    def _groups(self, node: fx.Node, gm: fx.GraphModule) -> int:
        return int(value_of(setting(node, gm, self.groups, "groups", 1)))


class DeformableConvolution(Convolution):
    """`torchvision.ops.deform_conv2d`: a convolution at positions that are computed.

    Offsets and masks hold one entry per position of the kernel and group of input channels. They
    are no channels; every group keeps the same number of channels.
    """

    def __init__(self) -> None:
        super().__init__(bias=4, groups=11)

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Treat the channels like a convolution does."""
        for position in (2, 3):
            source = node.args[position]
            if isinstance(source, fx.Node):
                state.pin(state.labels.get(source), f"offsets of {node.name!r}")
        source = tensor_input(node)
        inputs = state.axis(state.label(source), 1, f"input of {node.name!r}")
        tie_groups(state, inputs, int(value_of(node.args[12])))
        return super().propagate(node, state)


def _flat(blocks: tuple[Block, ...]) -> Iterator[tuple[Atoms]]:
    return ((block.atoms.ravel(),) for block in blocks)


def tie_groups(state: Propagation, atoms: Atoms, groups: int) -> None:
    """Make the channels at the same position of every convolution group one unit."""
    if groups > 1:
        by_group = atoms.reshape(groups, -1)
        state.identities.tie(by_group[1:], by_group[:1])


def channel_dim(node: fx.Node, gm: fx.GraphModule) -> int:
    """The channel axis of a convolution: 1, or 0 for an input without batch axis."""
    return _channel_dim(tensor_input(node), _weight_shape(node, gm))


def _channel_dim(value: fx.Node, weight_shape: tuple[int, ...]) -> int:
    return len(shape_of(value)) - len(weight_shape) + 1


def _weight_shape(node: fx.Node, gm: fx.GraphModule) -> tuple[int, ...]:
    module = module_of(node, gm)
    if isinstance(module, _ConvNd):
        return tuple(module.weight.shape)
    weight = node.args[1] if len(node.args) > 1 else node.kwargs["weight"]
    assert isinstance(weight, fx.Node)
    return shape_of(weight)


for _n in (1, 2, 3):
    for _prefix, _transposed in (("Conv", False), ("ConvTranspose", True)):
        _function = f"conv_transpose{_n}d" if _transposed else f"conv{_n}d"
        register(
            Convolution(_transposed),
            getattr(nn, f"{_prefix}{_n}d"),
            getattr(F, _function),
            getattr(torch, _function),
        )
# Capture traces into the module and the function, down to this operator.
register(DeformableConvolution(), torch.ops.torchvision.deform_conv2d)
