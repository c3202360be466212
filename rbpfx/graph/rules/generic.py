"""Rules that fit many operators: per-channel parameters, and keeping everything whole."""

from __future__ import annotations

from torch import fx

from rbpfx.graph.calls import module_of
from rbpfx.graph.operands import Labels
from rbpfx.graph.propagation import Propagation, unfollowed
from rbpfx.graph.provenance import Block, Label
from rbpfx.graph.rules.base import Rule, tensor_input
from rbpfx.graph.slicing import Slicing


class PerChannel(Rule):
    """Treats every channel along one axis by itself, with tensors that hold its settings.

    Args:
        tensors: Names of the module's tensors or the call's arguments that have one entry per
            channel, in the order in which a call takes them after its input. One that is absent
            or has a single entry for all channels is fine.
        dim: The channel axis of the input and the result, which have the same shape.
        axis: The channel axis of the tensors.
        mixes: Whether the other axes are mixed, as a normalisation over space does; otherwise
            every element is treated by itself.
        size: The module's attribute that names the number of channels, if it has one.
    """

    def __init__(
        self,
        *tensors: str,
        dim: int = 1,
        axis: int = 0,
        mixes: bool = False,
        size: str | None = None,
    ) -> None:
        self.tensors = tensors
        self.dim = dim
        self.axis = axis
        self.mixes = mixes
        self.size = size

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Bind the tensors to the channels."""
        label = state.label(tensor_input(node))
        dim = self.channel_dim(node, label.ndim, state.gm)
        operands = [state.operand(node, i, name) for i, name in enumerate(self.tensors, start=1)]
        bound = []
        for operand in (o for o in operands if o is not None):
            if operand.shape and operand.shape[self.axis] > 1:
                operand.pin_rest(self.axis)
                bound.append(operand)
            else:
                operand.pin_rest()
        if self.mixes or bound:
            rest = set(range(label.ndim)) - {dim}
            label = state.collapse(label, rest, f"not the channel axis of {node.name!r}")
        if not bound:
            return label
        channels = state.axis(label, dim, f"{node.name!r} over channels that are not followed")
        for operand in bound:
            operand.bind(self.axis, channels)
        return Label(label.shape, (Block((dim,), channels),))

    def channel_dim(self, node: fx.Node, ndim: int, gm: fx.GraphModule) -> int:
        """The channel axis of the input."""
        return self.dim % ndim

    def rewrite(self, node: fx.Node, state: Slicing) -> None:
        """Name the number of channels."""
        module = module_of(state.twin(node), state.gm)
        label = state.label(node)
        changed = state.changed_sizes(label)
        dim = self.channel_dim(node, label.ndim, state.source)
        # One shared parameter, as of PReLU by default, stays one.
        if dim in changed and self.size and getattr(module, self.size, None) == label.shape[dim]:
            setattr(module, self.size, changed[dim])


class Pinned(Rule):
    """Keeps everything whole that an operator touches, by choice.

    An operator without a rule is treated the same, and listed in `Analysis.unknown`.

    Args:
        reason: Why, as the analysis shall report it.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Follow nothing."""
        state.pin_call(node, self.reason)
        return unfollowed(node)
