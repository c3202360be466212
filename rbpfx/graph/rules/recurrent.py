"""Recurrent layers: LSTM, GRU, RNN. They read their input's channels; hidden channels stay."""

from __future__ import annotations

from math import prod

from torch import fx, nn

from rbpfx.graph.calls import module_of, submodule
from rbpfx.graph.operands import Labels
from rbpfx.graph.propagation import Propagation, unfollowed
from rbpfx.graph.rules.base import Rule, register, shape_of, tensor_input
from rbpfx.graph.slicing import Slicing

_INPUT_WEIGHTS = ("weight_ih", "weight_ih_l0", "weight_ih_l0_reverse")


class Recurrent(Rule):
    """Contracts the last axis of the input, in the first layer of both directions."""

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Read the input; keep everything hidden whole."""
        reason = f"hidden channels of {node.name!r}"
        source, *initial = node.all_input_nodes
        for hidden in initial:
            state.pin(state.labels.get(hidden), reason)
        label = state.label(source)
        last = label.ndim - 1
        label = state.collapse(label, range(last), f"axis that {node.name!r} mixes")
        steps = prod(shape_of(source)[:-1])
        module = submodule(state.gm, str(node.target))
        for name, tensor in module.named_parameters(recurse=False):
            weight = state.operand(node, 0, name)
            assert weight is not None
            state.identities.pin(weight.axis(0), reason)
            rows = (weight.axis(0),)
            if tensor.ndim < 2:
                continue
            if name in _INPUT_WEIGHTS:
                columns = state.read(node, source, last, weight, 1, label=label)
                weight.bind(1, columns[0])
            else:
                state.identities.pin(weight.axis(1), reason)
                columns = (weight.axis(1),)
            state.contract(node, columns, rows, macs=steps * tensor.numel())
        return unfollowed(node)

    def rewrite(self, node: fx.Node, state: Slicing) -> None:
        """Name the new width of the input."""
        module = module_of(state.twin(node), state.gm)
        assert isinstance(module, (nn.RNNBase, nn.RNNCellBase))
        weights = (getattr(module, name, None) for name in _INPUT_WEIGHTS)
        module.input_size = next(w.shape[1] for w in weights if w is not None)

    def macs(self, node: fx.Node, gm: fx.GraphModule) -> int:
        """One per weight and step."""
        parameters = submodule(gm, str(node.target)).parameters(recurse=False)
        steps = prod(shape_of(tensor_input(node))[:-1])
        return steps * sum(p.numel() for p in parameters if p.ndim > 1)


register(Recurrent(), nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)
