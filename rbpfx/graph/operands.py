"""What rules hand to the walk: weights, reads, and what costs multiply-accumulates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from torch import fx

from rbpfx.graph.provenance import Atoms, Block, Label

if TYPE_CHECKING:
    from rbpfx.graph.propagation import Propagation

Labels: TypeAlias = Label | tuple["Label | None", ...] | None
ParameterAxis: TypeAlias = tuple[str, int]


@dataclass(frozen=True, eq=False)
class Read:
    """An edge on which channels are contracted, so that a zero there removes the channel.

    Attributes:
        node: The operator that contracts.
        source: The value it reads.
        dim: The contracted axis of `source`.
        atoms: For every index of that axis its channel; a second array where the positions of a
            flattened feature map are units of their own.
        weight: The parameter axis that meets the contracted axis and can absorb a constant
            multiplier, if it is a parameter.
    """

    node: fx.Node
    source: fx.Node
    dim: int
    atoms: tuple[Atoms, ...]
    weight: ParameterAxis | None


@dataclass(frozen=True, eq=False)
class Contraction:
    """An operator that costs multiply-accumulates, as a product of shares of its axes.

    With `keep` a 0/1 array over atoms, its cost is `macs` times, for every factor, the mean over
    the axis of the product of `keep[atoms]` over the factor's arrays.
    """

    node: fx.Node
    macs: int
    factors: tuple[tuple[Atoms, ...], ...]


@dataclass(frozen=True, eq=False)
class Cut:
    """An axis of a computed weight that is sliced where it is used, and whole before.

    Statistics over an axis of a weight (weight standardisation) need all of it, channels that are
    gone included; what they give is a weight like any other.

    Attributes:
        node: The operator that uses the weight.
        weight: The computed weight.
        dim: The axis.
        atoms: The channels along it.
    """

    node: fx.Node
    weight: fx.Node
    dim: int
    atoms: Atoms


@dataclass(frozen=True, eq=False)
class Operand:
    """A weight-like input of an operator: a module's tensor or a value of the graph."""

    state: Propagation
    name: str | None
    shape: tuple[int, ...]
    label: Label | None
    reason: str = "meets an axis that is not followed"
    value: fx.Node | None = None
    user: fx.Node | None = None

    def axis(self, dim: int) -> Atoms:
        """The atoms along an axis."""
        if self.name is not None:
            return self.state.parameter_axis(self.name, dim, self.shape[dim])
        assert self.label is not None
        unfollowed = self.label.block(dim) is None
        if unfollowed and self.value is not None and self.user is not None:
            # Computed from parameters alone, it can be sliced here instead of there.
            if not self.state.is_activation(self.value):
                return self.state.cut(self.user, self.value, dim, self.shape[dim])
        return self.state.axis(self.label, dim, self.reason)

    def bind(self, dim: int, atoms: Atoms) -> None:
        """Say that an axis is indexed by these channels."""
        if self.name is None:
            axis = self.axis(dim)
        else:
            axis = self.state.parameter_axis(self.name, dim, self.shape[dim], atoms)
        self.state.identities.tie(axis, atoms)

    def pin_rest(self, *used: int) -> None:
        """Pin the axes of a graph value that the operator does not treat as channels."""
        if self.label is not None:
            for block in self.label.without(*used):
                self.state.identities.pin(block.atoms, "axis of a weight that is no channel axis")

    def parameter_axis(self, dim: int) -> ParameterAxis | None:
        """The parameter axis, if the operand is a parameter."""
        return (self.name, dim) if self.name is not None else None

    def as_label(self) -> Label:
        """The label of the operand as a value."""
        if self.label is not None:
            return self.label
        sizes = enumerate(self.shape)
        return Label(
            self.shape, tuple(Block((dim,), self.axis(dim)) for dim, size in sizes if size > 1)
        )
