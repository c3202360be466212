"""What rules talk to while the graph is walked (`rbpfx.graph.walk`).

`Propagation` holds the label of every value, the atoms of every parameter axis, the reads (edges
where channels are contracted) and the contractions (what costs multiply-accumulates).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from rbpfx.graph.calls import submodule
from rbpfx.graph.operands import Contraction, Cut, Labels, Operand, ParameterAxis, Read
from rbpfx.graph.parts import captured_parts
from rbpfx.graph.provenance import Atoms, Block, Identities, Label
from rbpfx.graph.rules.base import find_rule, shape_of


@dataclass
class Propagation:
    """State of the walk over one graph.

    Attributes:
        model: The captured model, with metadata.
        unit: "channel", or "feature" to make flattened features units of their own.
        attention: "heads" or "positions", what a unit is where heads are contracted.
        normalization: "freeze", "exact" or "sliced", what becomes of axes that are normalised.
        labels: Node -> label of its value (a tuple for several values, None for no tensor).
        axes: (parameter, dim) -> its atoms.
        features: (parameter, dim) -> atoms of the flattened features that it reads.
        producers: Axes that bring channels to life, in graph order: name for users -> atoms.
        unknown: Operators without a rule: node -> operator name.
        whole: Modules kept whole: name for users -> how many channels they have inside, and why.
        uses: How often every parameter is used.
        read_uses: How often every parameter axis meets a contracted axis.
        inexact: Normalisations that are sliced without regard to exactness: name for users ->
            the channels they mix.
        cuts: Axes of computed weights that are sliced where they are used.
    """

    model: nn.Module
    unit: str = "channel"
    attention: str = "heads"
    normalization: str = "freeze"
    identities: Identities = field(default_factory=Identities)
    labels: dict[fx.Node, Labels] = field(default_factory=dict)
    axes: dict[ParameterAxis, Atoms] = field(default_factory=dict)
    features: dict[ParameterAxis, Atoms] = field(default_factory=dict)
    producers: dict[str, Atoms] = field(default_factory=dict)
    reads: list[Read] = field(default_factory=list)
    contractions: list[Contraction] = field(default_factory=list)
    unknown: dict[str, str] = field(default_factory=dict)
    whole: dict[str, tuple[int, str]] = field(default_factory=dict)
    uses: Counter[str] = field(default_factory=Counter)
    read_uses: Counter[ParameterAxis] = field(default_factory=Counter)
    inexact: dict[str, Atoms] = field(default_factory=dict)
    cuts: dict[tuple[fx.Node, fx.Node, int], Cut] = field(default_factory=dict)

    def __post_init__(self) -> None:
        first: dict[int, str] = {}
        self._canonical = {
            name: first.setdefault(id(tensor), name)
            for prefix, module in self.model.named_modules(remove_duplicate=False)
            for attribute, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None
            for name in (f"{prefix}.{attribute}" if prefix else attribute,)
        }
        self._feature_atoms: dict[tuple[fx.Node, int], Atoms] = {}
        self._owners: list[ParameterAxis] = []
        self._starts: list[int] = []
        self.activations: set[fx.Node] = set()
        self._home: dict[str, str] = {}
        self.evaluated: set[fx.Node] = set()
        self._repeated: set[int] = set()
        self._inner_parts = [name for name in captured_parts(self.model) if name]
        self.enter("", nn.Module())

    def enter(self, name: str, gm: nn.Module) -> None:
        """Turn to a part of the model: the one whose nodes rules are asked about."""
        self.gm: Any = gm
        self.prefix = f"{name}." if name else ""

    # -- what rules ask -------------------------------------------------------------------

    def label(self, node: fx.Node) -> Label:
        """The label of a tensor value; an empty one if nothing is followed."""
        label = self.labels.get(node)
        return label if isinstance(label, Label) else Label(shape_of(node))

    def axis(self, label: Label, dim: int, reason: str) -> Atoms:
        """Atoms along one axis; fresh pinned ones if the axis is not followed on its own."""
        dim %= label.ndim
        block = label.block(dim)
        if block is not None and len(block.dims) == 1:
            return block.atoms
        if block is not None:
            self.identities.pin(block.atoms, reason)
        atoms = self.identities.new(label.shape[dim])
        self.identities.pin(atoms, reason)
        return atoms

    def operand(self, node: fx.Node, position: int, name: str) -> Operand | None:
        """A weight-like input: the module's tensor `name`, or the call's argument."""
        if node.op == "call_module":
            tensor = getattr(submodule(self.gm, str(node.target)), name, None)
            if not isinstance(tensor, Tensor):
                return None
            qualified = f"{self.prefix}{node.target}.{name}"
            canonical = self._canonical.get(qualified)
            if canonical is not None:
                self.uses[canonical] += 1
                return Operand(self, canonical, tuple(tensor.shape), None)
            # Computed by a parametrization or hook: no parameter to slice, so it pins.
            shape, reason = tuple(tensor.shape), f"{qualified!r} is computed by a parametrization"
            return Operand(self, None, shape, Label(shape), reason)
        value = node.args[position] if len(node.args) > position else node.kwargs.get(name)
        return self.value_operand(value, node) if isinstance(value, fx.Node) else None

    def value_operand(self, value: fx.Node, user: fx.Node | None = None) -> Operand:
        """A value of the graph as a weight-like input of an operator."""
        reason = f"meets an axis of {value.name!r} that is not followed"
        name, shape, label = self._attribute(value), shape_of(value), self.label(value)
        return Operand(self, name, shape, label, reason, value, user)

    def cut(self, user: fx.Node, weight: fx.Node, dim: int, size: int) -> Atoms:
        """The channels along an axis of a computed weight that is sliced only where it is used."""
        key = (user, weight, dim)
        if key not in self.cuts:
            self.cuts[key] = Cut(user, weight, dim, self.identities.new(size))
        return self.cuts[key].atoms

    def parameter_axis(self, name: str, dim: int, size: int, known: Atoms | None = None) -> Atoms:
        """Atoms of a parameter's axis: at its first use the known ones if any, else fresh ones.

        Most axes are bound to channels that exist already; taking those spares atoms and ties.
        """
        if (name, dim) not in self.axes:
            self._home.setdefault(name, self.prefix)
            if known is not None and known.shape == (size,):
                self.axes[name, dim] = known
            else:
                self.axes[name, dim] = self._fresh_axis(name, dim, size)
        if self._home[name] != self.prefix:
            reason = f"parameter {name!r} is used in several graphs"
            self.identities.pin(self.axes[name, dim], reason)
        return self.axes[name, dim]

    def _fresh_axis(self, name: str, dim: int, size: int) -> Atoms:
        atoms = self.identities.new(size)
        if size:
            self._owners.append((name, dim))
            self._starts.append(int(atoms[0]))
        return atoms

    def repetition(self, size: int) -> Atoms:
        """Fresh atoms for an axis along which one value is repeated."""
        atoms = self.identities.new(size)
        self._repeated.update(atoms.tolist())
        return atoms

    def is_repetition(self, block: Block | None) -> bool:
        """Whether a block is known by the atoms of a repetition, not by those of channels."""
        first = block.atoms.flat[:1].tolist() if block is not None else []
        return not self._repeated.isdisjoint(first)

    def is_activation(self, node: fx.Node) -> bool:
        """Whether a value depends on the inputs of the model, not on its parameters alone."""
        return node in self.activations

    # -- what rules say -------------------------------------------------------------------

    def produce(self, node: fx.Node, operand: Operand, dim: int) -> Atoms:
        """The channels that an operator brings to life, indexed by an axis of its weight.

        They are named after the module or the parameter; a weight that is computed from
        parameters along this axis (a part of one, for example) counts as those parameters.
        """
        atoms = operand.axis(dim)
        if node.op == "call_module":
            born = {f"{self.prefix}{node.target}": atoms}
        elif operand.name is not None:
            born = {operand.name: atoms}
        else:
            born = self._parameters_of(atoms) or {f"{self.prefix}{node.name}": atoms}
        for name, axis in born.items():
            if not np.array_equal(self.producers.setdefault(name, axis), axis):
                self.producers[f"{name}[{dim}]"] = axis
        return atoms

    def _parameters_of(self, atoms: Atoms) -> dict[str, Atoms]:
        """The parameter axes that atoms belong to: name -> all atoms of the axis."""
        last = np.searchsorted(self._starts, np.unique(atoms), side="right") - 1
        axes = [self._owners[place] for place in np.unique(last[last >= 0])]
        owned = {name: self.axes[name, dim] for name, dim in axes}
        return {name: axis for name, axis in owned.items() if np.isin(axis, atoms).any()}

    def read(
        self,
        node: fx.Node,
        source: fx.Node,
        dim: int,
        operand: Operand | None = None,
        weight_dim: int = 0,
        *,
        label: Label | None = None,
        split_features: bool = False,
    ) -> tuple[Atoms, ...]:
        """Record that `node` contracts axis `dim` of `source`: a zero there adds nothing.

        Args:
            node: The operator.
            source: The value it reads.
            dim: The contracted axis.
            operand: The weight that the axis meets, if it meets one.
            weight_dim: The weight's axis.
            label: The label of `source` as the operator sees it; the one it has by default.
            split_features: Whether the positions of a flattened channel may become units.

        Returns:
            The atoms of the axis; a second array for flattened features.
        """
        label = self.label(source) if label is None else label
        dim %= label.ndim
        atoms: tuple[Atoms, ...] = (self.axis(label, dim, _untracked_reason(source)),)
        axis = operand.parameter_axis(weight_dim) if operand is not None else None
        may_split = split_features and self.unit == "feature" and axis is not None
        if may_split and axis is not None and len(np.unique(atoms[0])) < len(atoms[0]):
            atoms = (*atoms, self._flattened_features(node, source, dim, axis))
        self.add_read(Read(node, source, dim, atoms, axis))
        return atoms

    def add_read(self, read: Read) -> None:
        """Record a read."""
        self.reads.append(read)
        if read.weight is not None:
            self.read_uses[read.weight] += 1

    def absorbs(self, read: Read) -> bool:
        """Whether a constant multiplier at a read can be folded into the weight there.

        It can if the weight is a parameter that is used in reads along the same axis only.
        """
        if read.weight is None:
            return False
        return self.uses[read.weight[0]] == self.read_uses[read.weight]

    def contract(self, node: fx.Node, *factors: tuple[Atoms, ...], macs: int | None = None) -> None:
        """Record what an operator costs, as a function of the shares kept of its axes.

        Contracted and produced channels come first. What only train mode runs costs nothing.

        Args:
            node: The operator.
            factors: The atoms of its axes.
            macs: Its multiply-accumulates, or those of a part of it; all that its rule counts by
                default.
        """
        if macs is None:
            rule = find_rule(node, self.gm)
            assert rule is not None
            macs = rule.macs(node, self.gm)
        counted = macs if node in self.evaluated else 0
        self.contractions.append(Contraction(node, counted, factors))

    def pin(self, labels: Labels, reason: str) -> None:
        """Pin everything a label follows."""
        for label in labels if isinstance(labels, tuple) else (labels,):
            for block in label.blocks if label is not None else ():
                self.identities.pin(block.atoms, reason)

    def pin_call(self, node: fx.Node, reason: str) -> None:
        """Pin everything that a call touches: its inputs, and the tensors of a module."""
        for source in node.all_input_nodes:
            self.pin(self.labels.get(source), reason)
        if node.op == "call_module":
            self._pin_tensors(str(node.target), reason)

    def collapse(self, label: Label, dims: Iterable[int], reason: str) -> Label:
        """Follow a value along `dims` no further, because an operator mixes what lies there.

        A block over these axes alone is pinned. One that has other axes too is tied along `dims`:
        what the operator mixes becomes one unit, which the other axes still follow (the positions
        of an attention head under a softmax, for example).
        """
        mixed = set(dims)
        blocks = []
        for block in label.blocks:
            rest = tuple(d for d in block.dims if d not in mixed)
            if rest == block.dims:
                blocks.append(block)
            elif rest:
                first = tuple(0 if d in mixed else slice(None) for d in block.dims)
                slab = Block(rest, block.atoms[first])
                self.identities.tie(block.atoms, slab.aligned(block.dims))
                blocks.append(slab)
            else:
                self.identities.pin(block.atoms, reason)
        return Label(label.shape, tuple(blocks))

    def unit_axis(self, dims: Sequence[int]) -> int:
        """Of the axes of a joint block, such as (heads, head_dim), the one that makes units."""
        return dims[-1] if self.attention == "positions" else dims[0]

    def separate(self, label: Label, contracted: Iterable[int]) -> Label:
        """Untangle the joint blocks that an operator contracts along some of their axes.

        Of (heads, head_dim) with head_dim contracted, either the head or the position within
        every head becomes the unit: a head passes through the contraction, a position is read by
        it.

        Args:
            label: An operand's label.
            contracted: The contracted axes.

        Returns:
            The label with every block over one contracted axis, or over none.
        """
        mixed = set(contracted)
        for block in label.blocks:
            inside = [d for d in block.dims if d in mixed]
            outside = [d for d in block.dims if d not in mixed]
            if not inside or len(block.dims) == 1:
                continue
            read = not outside or self.attention == "positions"
            stay = [self.unit_axis(inside)] if read else outside
            label = self.collapse(label, set(block.dims) - set(stay), "contracted")
        return label

    # -- parameters -----------------------------------------------------------------------

    def _pin_tensors(self, target: str, reason: str) -> None:
        """Pin the parameters and buffers of a module."""
        module = self.gm.get_submodule(target)
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            qualified = f"{self.prefix}{target}.{name}"
            if any(qualified.startswith(f"{part}.") for part in self._inner_parts):
                continue  # captured on its own
            canonical = self._canonical[qualified]
            self.uses[canonical] += 1
            for dim, size in enumerate(tensor.shape):
                self.identities.pin(self.parameter_axis(canonical, dim, size), reason)

    def _attribute(self, node: fx.Node) -> str | None:
        """Canonical name of the parameter or buffer that a get_attr node fetches."""
        name = f"{self.prefix}{node.target}"
        return self._canonical.get(name) if node.op == "get_attr" else None

    def attribute_label(self, node: fx.Node) -> Labels:
        """The label of a parameter or buffer that a get_attr node fetches."""
        name = self._attribute(node)
        if name is None:
            return unfollowed(node)
        self.uses[name] += len(node.users)
        return Operand(self, name, shape_of(node), None).as_label()

    def _flattened_features(
        self, node: fx.Node, source: fx.Node, dim: int, axis: ParameterAxis
    ) -> Atoms:
        key = (source, dim)
        if key not in self._feature_atoms:
            self._feature_atoms[key] = self.identities.new(self.label(source).shape[dim])
            called = f"{self.prefix}{node.target}"
            reader = called if node.op == "call_module" else axis[0]
            self.producers[f"{reader}.features"] = self._feature_atoms[key]
        atoms = self._feature_atoms[key]
        if axis in self.features:
            self.identities.tie(self.features[axis], atoms)
        return self.features.setdefault(axis, atoms)


def unfollowed(node: fx.Node) -> Labels:
    """A label that follows nothing, of the right shape, for a node's value."""
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return Label(tuple(value.shape))
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        return tuple(Label(tuple(v.shape)) if isinstance(v, Tensor) else None for v in value)
    return None


def _untracked_reason(source: fx.Node) -> str:
    if source.op == "placeholder":
        return "input of the model"
    return f"reads {source.name!r}, whose channels are not followed"
