"""The first half of the analysis: walk the graph once and let every rule speak.

`Propagation` is what rules talk to: it holds the label of every value, the atoms of every
parameter axis, the reads (edges where channels are contracted) and the contractions (what costs
multiply-accumulates).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, fx, nn

from rbpfx.errors import RuleError
from rbpfx.graph.aliasing import Memory
from rbpfx.graph.modes import evaluated_nodes
from rbpfx.graph.parts import captured_parts
from rbpfx.graph.provenance import Atoms, Block, Identities, Label
from rbpfx.graph.rules.base import Rule, find_rule, operator_name, shape_of, submodule

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
        if self.label.block(dim) is None and self.value is not None and self.user is not None:
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
    uses: Counter[str] = field(default_factory=Counter)
    read_uses: Counter[ParameterAxis] = field(default_factory=Counter)
    inexact: dict[str, Atoms] = field(default_factory=dict)
    cuts: dict[tuple[fx.Node, fx.Node, int], Cut] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tensors = (
            *self.model.named_parameters(remove_duplicate=False),
            *self.model.named_buffers(remove_duplicate=False),
        )
        first: dict[int, str] = {}
        self._canonical = {name: first.setdefault(id(t), name) for name, t in tensors}
        self._feature_atoms: dict[tuple[fx.Node, int], Atoms] = {}
        self._owners: list[ParameterAxis] = []
        self._starts: list[int] = []
        self._activations: set[fx.Node] = set()
        self._home: dict[str, str] = {}
        self._evaluated: set[fx.Node] = set()
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

    def parameter_axis(
        self, name: str, dim: int, size: int, known: Atoms | None = None
    ) -> Atoms:
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

    def is_activation(self, node: fx.Node) -> bool:
        """Whether a value depends on the inputs of the model, not on its parameters alone."""
        return node in self._activations

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
        counted = macs if node in self._evaluated else 0
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

    # -- the walk -------------------------------------------------------------------------

    def run(self) -> Propagation:
        """Visit every node of every part once, in order."""
        for name, gm in captured_parts(self.model).items():
            self.enter(name, gm)
            self._evaluated |= evaluated_nodes(gm.graph)
            self._walk(gm)
        self._pin_shared_features()
        return self

    def _walk(self, gm: fx.GraphModule) -> None:
        for node in gm.graph.nodes:
            depends = not self._activations.isdisjoint(node.all_input_nodes)
            # Sizes of an activation say nothing about its values.
            if node.op == "placeholder" or (depends and not _is_size(node.meta.get("val"))):
                self._activations.add(node)
            if node.op == "get_attr":
                self.labels[node] = self._attribute_label(node)
            elif node.op == "output":
                for source in node.all_input_nodes:
                    self.pin(self.labels.get(source), "output of the model")
            elif node.op != "placeholder":
                self.labels[node] = self._step(node)
        # What is changed in place through a view, and seen changed afterwards, stays.
        for write, holders in Memory(gm).entangled():
            for holder in holders:
                self.pin(self.labels.get(holder), f"changed in place by {write.name!r}")

    def _pin_shared_features(self) -> None:
        """Pin features of a weight that is used in any other way than to read them."""
        readers = Counter(read.weight for read in self.reads if len(read.atoms) > 1)
        for axis, atoms in self.features.items():
            if not self.uses[axis[0]] == self.read_uses[axis] == readers[axis]:
                self.identities.pin(atoms, f"parameter {axis[0]!r} has other uses")

    def _step(self, node: fx.Node) -> Labels:
        rule = find_rule(node, self.gm)
        if rule is not None:
            return self._apply(rule, node)
        if isinstance(node.target, type) and hasattr(node.target, "_fields"):
            values = (*node.args, *node.kwargs.values())
            return tuple(self._packed(value) for value in values)
        if isinstance(node.target, type) and is_dataclass(node.target):
            for source in node.all_input_nodes:
                self.pin(self.labels.get(source), "output of the model")
            return None
        name = operator_name(node, self.gm)
        touched = [self.labels[n] for n in node.all_input_nodes if self.labels.get(n) is not None]
        if touched and any(label.blocks for labels in touched for label in _flat(labels)):
            self.unknown[f"{self.prefix}{node.name}"] = name
        self.pin_call(
            node, node.meta.get("kept_whole") or f"no rule for {name} (node {node.name!r})"
        )
        return unfollowed(node)

    def _apply(self, rule: Rule, node: fx.Node) -> Labels:
        """Let a rule speak, and check that what it says has the shape of the value."""
        try:
            labels = rule.propagate(node, self)
        except ValueError as error:
            raise self._misfit(rule, node, str(error)) from error
        value = node.meta.get("val")
        if isinstance(labels, Label) and isinstance(value, Tensor):
            described = labels.shape == tuple(value.shape) and all(
                block.atoms.shape == tuple(labels.shape[d] for d in block.dims)
                for block in labels.blocks
            )
            if not described:
                message = f"it describes {labels}, the value has shape {tuple(value.shape)}"
                raise self._misfit(rule, node, message)
        return labels

    def _misfit(self, rule: Rule, node: fx.Node, message: str) -> RuleError:
        name = operator_name(node, self.gm)
        return RuleError(
            f"the rule {type(rule).__name__} does not fit {name} (node {node.name!r}): {message}"
        )

    def _packed(self, value: object) -> Label | None:
        """Label of a field of a named tuple; several values in one field are pinned."""
        label = self.labels.get(value) if isinstance(value, fx.Node) else None
        if isinstance(label, tuple):
            self.pin(label, "packed into a named tuple")
            return None
        return label

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

    def _attribute_label(self, node: fx.Node) -> Labels:
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


def _is_size(value: object) -> bool:
    return isinstance(value, (int, float, torch.Size, torch.dtype, torch.device))


def _flat(labels: Labels) -> tuple[Label, ...]:
    several = labels if isinstance(labels, tuple) else (labels,)
    return tuple(label for label in several if label is not None)


def _untracked_reason(source: fx.Node) -> str:
    if source.op == "placeholder":
        return "input of the model"
    return f"reads {source.name!r}, whose channels are not followed"
