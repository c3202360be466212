"""The linear layer: contracts the last axis."""

from __future__ import annotations

from math import prod

from torch import fx, nn
from torch.nn import functional as F

from rbpfx.graph.calls import module_of
from rbpfx.graph.operands import Labels
from rbpfx.graph.propagation import Propagation
from rbpfx.graph.provenance import Block, Label
from rbpfx.graph.rules.base import Rule, register, shape_of, tensor_input
from rbpfx.graph.slicing import Slicing


class Linear(Rule):
    """Contracts the last axis of the input, brings the output features to life."""

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Read the last axis, follow all others through."""
        source = tensor_input(node)
        weight = state.operand(node, 1, "weight")
        bias = state.operand(node, 2, "bias")
        assert weight is not None
        label = state.label(source)
        last = label.ndim - 1
        label = state.separate(label, (last,))
        inputs = state.read(node, source, last, weight, 1, label=label, split_features=True)
        weight.bind(1, inputs[0])
        outputs = state.produce(node, weight, 0)
        if bias is not None:
            bias.bind(0, outputs)
        through = label.without(last)
        state.contract(node, inputs, (outputs,), *((block.atoms.ravel(),) for block in through))
        return Label(shape_of(node), (*through, Block((last,), outputs)))

    def rewrite(self, node: fx.Node, state: Slicing) -> None:
        """Name the new widths; select the flattened features that are left."""
        read = state.read_of(node)
        if len(read.atoms) > 1:
            channels = state.keep[read.atoms[0]]
            chosen = state.keep[read.atoms[1]][channels]
            if not chosen.all():
                twin = state.twin(node)
                selected = state.select(twin, tensor_input(twin), read.dim, chosen.nonzero()[0])
                twin.replace_input_with(tensor_input(twin), selected)
        module = module_of(state.twin(node), state.gm)
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape

    def macs(self, node: fx.Node, gm: fx.GraphModule) -> int:
        """One per output element and input feature."""
        return prod(shape_of(node)) * shape_of(tensor_input(node))[-1]


register(Linear(), nn.Linear, F.linear)
