"""The operators of a network as functions of the widths of its groups."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from math import prod
from operator import attrgetter
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate, map_arg
from torch.utils._pytree import tree_leaves, tree_map_only

from rbpfx.graph.calls import submodule
from rbpfx.graph.groups import Analysis
from rbpfx.graph.operands import Labels
from rbpfx.graph.provenance import Atoms, Label
from rbpfx.graph.rules.base import (
    argument,
    find_rule,
    operator_name,
    setting,
    tensor_input,
    value_of,
)
from rbpfx.graph.rules.convolution import Convolution, channel_dim
from rbpfx.graph.rules.linear import Linear
from rbpfx.latency.operators import Call, Operator, OperatorTimes, filled

Widths = npt.NDArray[np.int64]

SHARED_STEPS = 8
"""An axis that more than two groups share (a concatenation) is timed at so many sizes; ours."""

_TENSORS = ((1, "weight"), (2, "bias"))
_OPERANDS = ("input", "weight", "bias")
_GROUPS_PLACE = 3
"""Place of the number of groups among the arguments of a convolution after the bias."""


class Extent:
    """The size of an axis as a function of the widths of all groups.

    Args:
        analysis: The analysis.
        atoms: The channels along the axis, `(size,)`.
    """

    def __init__(self, analysis: Analysis, atoms: Atoms) -> None:
        groups, counts = np.unique(analysis.group_of[analysis.channel[atoms]], return_counts=True)
        self.dense = len(atoms)
        self.per_unit = {
            int(g): float(count) / analysis.groups[g].size
            for g, count in zip(groups, counts, strict=True)
            if g >= 0
        }
        self.constant = float(counts[groups < 0].sum())

    def __call__(self, widths: Widths) -> float:
        """The size if so many units of every group stay, `(groups,)`."""
        return self.constant + sum((n * float(widths[g]) for g, n in self.per_unit.items()), 0.0)


class Shape:
    """The shape of a tensor as a function of the widths of all groups.

    Args:
        analysis: The analysis.
        value: The tensor as it is, fake or real.
        label: Whose channels its axes hold; None if nobody follows them.
    """

    def __init__(self, analysis: Analysis, value: Tensor, label: Label | None) -> None:
        self.value = value
        self.extents: dict[int, Extent] = {}
        for block in label.blocks if label is not None else ():
            channels = analysis.channel[block.atoms]
            for axis, dim in enumerate(block.dims):
                first = channels.take([0], axis)
                if len(block.dims) == 1 or (channels != first).any():
                    others = tuple(slice(None) if a == axis else 0 for a in range(channels.ndim))
                    self.extents[dim] = Extent(analysis, block.atoms[others])

    @property
    def groups(self) -> set[int]:
        """The groups that it depends on."""
        return {group for extent in self.extents.values() for group in extent.per_unit}

    def at(self, widths: Widths) -> tuple[int, ...]:
        """The shape if so many units of every group stay, `(groups,)`."""
        sizes = list(self.value.shape)
        for dim, extent in self.extents.items():
            sizes[dim] = max(round(extent(widths)), 1)
        return tuple(sizes)


def shapes(analysis: Analysis, value: Any, labels: Labels) -> list[Shape]:
    """The shapes of all tensors in the value of a node."""
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    flat = list(labels) if isinstance(labels, tuple) else [labels]
    if len(flat) != len(tensors):
        flat = [None] * len(tensors)
    return [Shape(analysis, t, label) for t, label in zip(tensors, flat, strict=True)]


class Node(Protocol):
    """An operator of the network.

    Attributes:
        groups: The groups that its time depends on, ascending.
    """

    groups: tuple[int, ...]

    def operators(self, widths: Widths) -> Iterable[Operator]:
        """What has to be timed to know its time at these widths, `(groups,)`."""

    def seconds(self, widths: Widths, times: OperatorTimes) -> float:
        """Its time at these widths, `(groups,)`."""


class Layer:
    """A convolution or linear layer, timed at the very shapes in question.

    Args:
        analysis: The analysis.
        node: The node, with the labels of the analysis.
        twin: The same node in the graph that is timed.
        gm: That graph.
        channels_last: Whether 4-d tensors lie with their channels last.
    """

    def __init__(
        self,
        analysis: Analysis,
        node: fx.Node,
        twin: fx.Node,
        gm: fx.GraphModule,
        channels_last: bool,
    ) -> None:
        self.node, self.gm, self.channels_last = twin, gm, channels_last
        rule = find_rule(twin, gm)
        self.rule = rule if isinstance(rule, Convolution) else None
        source = tensor_input(node)
        (self.input,) = shapes(
            analysis, tensor_input(twin).meta["val"], analysis.labels.get(source)
        )
        (self.output,) = shapes(analysis, twin.meta["val"], analysis.labels[node])
        ndim = self.input.value.ndim
        self.dim = ndim - 1 if self.rule is None else channel_dim(twin, gm)
        self.dense = int(self.input.value.shape[self.dim])
        read = next((r for r in analysis.reads if r.node is node and len(r.atoms) > 1), None)
        self.features = None if read is None else Extent(analysis, read.atoms[1])
        of_features = self.features.per_unit if self.features else ()
        self.groups = tuple(sorted(self.input.groups | self.output.groups | set(of_features)))
        self._made: dict[tuple[Any, ...], Operator] = {}

    def operators(self, widths: Widths) -> Iterator[Operator]:
        """The operator at these widths, or at the two sizes of a shared axis around them."""
        return (operator for _, operator in self._weighted(widths))

    def seconds(self, widths: Widths, times: OperatorTimes) -> float:
        """Its time, interpolated along an axis that many groups share."""
        return sum(weight * times[operator.key] for weight, operator in self._weighted(widths))

    def _weighted(self, widths: Widths) -> Iterator[tuple[float, Operator]]:
        inputs, output = list(self.input.at(widths)), self.output.at(widths)[self.dim]
        if self.features is not None:
            share = self.features(widths) / self.features.dense
            inputs[self.dim] = max(round(inputs[self.dim] * share), 1)
        extent = self.input.extents.get(self.dim)
        place = inputs[self.dim] * SHARED_STEPS / self.dense
        above = place % 1 if extent is not None and len(extent.per_unit) > 2 else 0.0
        if not above:
            yield 1.0, self._operator(tuple(inputs), output)
            return
        for weight, step in ((1 - above, int(place)), (above, int(place) + 1)):
            inputs[self.dim] = max(self.dense * step // SHARED_STEPS, 1)
            yield weight, self._operator(tuple(inputs), output)

    def _operator(self, inputs: tuple[int, ...], width: int) -> Operator:
        if (inputs, width) not in self._made:
            make = self._of_module if self.node.op == "call_module" else self._of_function
            channels = inputs[self.dim]
            groups = 1
            if self.rule is not None:
                groups = int(value_of(setting(self.node, self.gm, self.rule.groups, "groups", 1)))
            if 1 < groups == self.dense:
                groups = channels  # depthwise: a group is a channel
            width = max(width // groups, 1) * groups
            sizes = (width, max(channels // groups, 1))
            if self.rule is not None and self.rule.transposed:
                sizes = (channels, width // groups)
            self._made[inputs, width] = make(inputs, width, sizes, groups)
        return self._made[inputs, width]

    def _of_module(
        self, inputs: tuple[int, ...], width: int, sizes: tuple[int, ...], groups: int
    ) -> Operator:
        layer = submodule(self.gm, str(self.node.target))
        twin = layer.__new__(type(layer))
        twin.__dict__ = {**layer.__dict__, "_parameters": dict(layer._parameters)}
        if self.rule is None:
            vars(twin).update(in_features=inputs[self.dim], out_features=width)
        else:
            vars(twin).update(in_channels=inputs[self.dim], out_channels=width, groups=groups)

        def prepare() -> Call:
            weights: dict[str, nn.Parameter | None] = dict.fromkeys(layer._parameters)
            for name, tensor in layer._parameters.items():
                if tensor is not None:
                    shape = (*sizes, *tensor.shape[2:]) if name == "weight" else (width,)
                    value = filled(tensor, shape, self.channels_last)
                    weights[name] = nn.Parameter(value, requires_grad=False)
            timed = layer.__new__(type(layer))  # and not `twin`, which lives as long as the table
            timed.__dict__ = {**vars(twin), "_parameters": weights}
            return partial(timed, filled(self.input.value, inputs, self.channels_last))

        return Operator(self._key(repr(twin), inputs), prepare)

    def _of_function(
        self, inputs: tuple[int, ...], width: int, sizes: tuple[int, ...], groups: int
    ) -> Operator:
        node = self.node
        weight, bias = (value_of(argument(node, i, name)) for i, name in _TENSORS)
        rest = [value_of(a) for a in node.args[3:]]
        named = {k: value_of(a) for k, a in node.kwargs.items() if k not in _OPERANDS}
        if groups > 1:
            if len(rest) > _GROUPS_PLACE:
                rest[_GROUPS_PLACE] = groups
            else:
                named["groups"] = groups
        shape = (*sizes, *weight.shape[2:])

        def prepare() -> Call:
            operands = [
                filled(self.input.value, inputs, self.channels_last),
                filled(weight, shape, self.channels_last),
                None if bias is None else filled(bias, (width,)),
            ]
            assert callable(node.target)
            return partial(node.target, *operands, *rest, **named)

        settings = (
            f"{operator_name(node, self.gm)}({shape}, bias={bias is not None}, {rest}, {named})"
        )
        return Operator(self._key(settings, inputs), prepare)

    def _key(self, described: str, inputs: tuple[int, ...]) -> str:
        layout = " channels_last" if self.channels_last else ""
        return f"{described} on {inputs} {self.input.value.dtype}{layout}"


class Mover:
    """An operator whose time follows from the elements it touches.

    Args:
        analysis: The analysis.
        node: The node, with the labels of the analysis.
        twin: The same node in the graph that is timed.
    """

    def __init__(self, analysis: Analysis, node: fx.Node, twin: fx.Node) -> None:
        self.name = twin.name
        self._shapes = [
            shape
            for n, t in zip(
                (*node.all_input_nodes, node), (*twin.all_input_nodes, twin), strict=True
            )
            for shape in shapes(analysis, t.meta.get("val"), analysis.labels.get(n))
        ]
        self.groups = tuple(sorted({g for shape in self._shapes for g in shape.groups}))
        self._probes: list[tuple[float, Operator]] = []

    def probe(self, widths: Widths, operator: Operator) -> None:
        """Note what the operator is in a network of these widths, `(groups,)`."""
        self._probes.append((self._elements(widths), operator))

    def operators(self, widths: Widths) -> Iterator[Operator]:
        """Those of the probes, whatever the widths."""
        return (operator for _, operator in self._probes)

    def seconds(self, widths: Widths, times: OperatorTimes) -> float:
        """Interpolated between the probes."""
        if not self._probes:
            return 0.0
        measured = sorted((elements, times[operator.key]) for elements, operator in self._probes)
        elements, seconds = np.array(measured).T
        return float(np.interp(self._elements(widths), elements, seconds))

    def _elements(self, widths: Widths) -> float:
        return float(sum(prod(shape.at(widths)) for shape in self._shapes))


def operator_of(node: fx.Node, gm: fx.GraphModule, channels_last: bool) -> Operator:
    """The operator of a node with metadata, at the shapes that it has.

    Args:
        node: The node.
        gm: Its graph; must live until the operator has been timed.
        channels_last: Whether 4-d tensors lie with their channels last.
    """

    def operand(source: fx.Node) -> Any:
        if source.op == "get_attr":
            return attrgetter(str(source.target))(gm)
        value = source.meta["val"]
        return tree_map_only(Tensor, lambda t: filled(t, t.shape, channels_last), value)

    def prepare() -> Call:
        args, kwargs = map_arg(node.args, operand), map_arg(node.kwargs, operand)
        if node.op == "call_module":
            return partial(submodule(gm, str(node.target)), *args, **kwargs)
        if node.op == "call_method":
            return partial(getattr(args[0], str(node.target)), *args[1:], **kwargs)
        assert callable(node.target)
        return partial(node.target, *args, **kwargs)

    described = operator_name(node, gm)
    if node.op == "call_module":
        described = repr(submodule(gm, str(node.target)))
    args = map_aggregate((node.args, node.kwargs), _described)
    layout = " channels_last" if channels_last else ""
    return Operator(f"{described} on {args}{layout}", prepare)


def _described(argument: Any) -> Any:
    if not isinstance(argument, fx.Node):
        return argument
    return tree_map_only(
        Tensor, lambda t: f"{t.dtype}{tuple(t.shape)}", argument.meta.get("val", argument.name)
    )


def is_layer(node: fx.Node, gm: fx.GraphModule) -> bool:
    """Whether a node is a convolution or a linear layer, so that `Layer` can time it."""
    return type(find_rule(node, gm)) in (Convolution, Linear)
