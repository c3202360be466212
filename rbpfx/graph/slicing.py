"""Rewriting: emit a smaller graph with really sliced tensors.

One deep copy does most of the work: parameters are sliced first and put into the copy's memo, so
that the copy picks up the small tensors and never copies the large ones. Rules then adapt the
attributes of modules and the constants in the graph.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn

from rbpfx.errors import InputError, PlanError, RuleError
from rbpfx.graph.calls import submodule
from rbpfx.graph.copying import copy_model
from rbpfx.graph.device import device_of
from rbpfx.graph.garbage import collection_paused
from rbpfx.graph.metadata import record_metadata
from rbpfx.graph.parts import captured_parts
from rbpfx.graph.provenance import Atoms, Keep, Label
from rbpfx.graph.rules.base import find_rule, shape_of
from rbpfx.plan import PruningPlan
from rbpfx.surroundings import usual_modes

if TYPE_CHECKING:
    from rbpfx.graph.groups import Analysis
    from rbpfx.graph.operands import Cut, Labels, Read

Multipliers = Mapping[str, Tensor]


@usual_modes()
@collection_paused()
def rewrite(
    gm: nn.Module,
    analysis: Analysis,
    plan: PruningPlan,
    *,
    multipliers: Multipliers | None = None,
) -> nn.Module:
    """Emit the network that a plan leaves.

    Args:
        gm: The graph that was analysed, or a copy of it with other parameter values.
        analysis: What `rbpfx.analyze` found.
        plan: Which units stay.
        multipliers: Group name -> one constant per unit `(size,)`, folded into the weights at
            the group's reads.

    Returns:
        A new graph with sliced parameters and buffers, the same submodule names and fresh
        metadata. It equals `apply_mask` of the same plan and multipliers. `gm` is not modified.

    Raises:
        PlanError: The plan does not fit the network, or a multiplier cannot be folded.
        RuleError: The emitted graph does not run.
    """
    keep = analysis.keep(plan)
    memo: dict[int, Any] = {}
    for name, tensor in sliced_tensors(gm, analysis, keep, multipliers or {}).items():
        memo[id(_tensor(gm, name))] = tensor
    emitted = copy_model(gm, memo)
    parts = [captured_parts(model).values() for model in (analysis.gm, gm, emitted)]
    for analysed, source, part in zip(*parts, strict=True):
        _rewrite_part(analysed, Slicing(analysed, source, part, analysis, keep), analysis)
    return emitted


def _rewrite_part(analysed: fx.GraphModule, state: Slicing, analysis: Analysis) -> None:
    ragged = [
        shuffle
        for shuffle in analysis.shuffles
        if shuffle.source.graph is analysed.graph and shuffle.is_ragged(state.keep)
    ]
    moved = {node for shuffle in ragged for node in shuffle.nodes}
    for cut in analysis.cuts:
        if cut.node.graph is analysed.graph:
            state.cut(cut)
    for node in analysed.graph.nodes:
        rule = find_rule(node, analysed)
        if rule is not None and node not in moved:
            rule.rewrite(node, state)
    for shuffle in ragged:
        shuffle.rewrite(state)
    state.gm.graph.lint()
    state.gm.graph = state.gm.graph  # changed: its code is another
    try:
        record_metadata(state.gm)
    except InputError as error:
        raise RuleError(
            f"the sliced network does not run, so an operator rule is wrong: {error} Exclude the "
            "part of the network with leaf_modules=[...] and please report the model."
        ) from error


def kept_indices(analysis: Analysis, keep: Keep) -> dict[str, dict[int, Atoms]]:
    """For every parameter and buffer that shrinks: axis -> the indices that stay.

    Raises:
        PlanError: A parameter keeps no index.
    """
    shrunk: dict[str, dict[int, Atoms]] = {}
    # The tensors of a normalisation, and of the layer before it, share one array of atoms.
    found: dict[tuple[int, int], Atoms | None] = {}
    for (name, dim), atoms in analysis.axes.items():
        features = analysis.features.get((name, dim))
        key = (id(atoms), id(features))
        if key not in found:
            stays = keep[atoms] if features is None else keep[atoms] & keep[features]
            if not stays.any():
                raise PlanError(
                    f"the plan leaves nothing of axis {dim} of {name!r}: none of the features it "
                    "keeps belongs to a channel it keeps. Analysis.close shows what a plan amounts "
                    "to"
                )
            found[key] = None if stays.all() else np.flatnonzero(stays)
        indices = found[key]
        if indices is not None:
            shrunk.setdefault(name, {})[dim] = indices
    return shrunk


def sliced_tensors(
    gm: nn.Module, analysis: Analysis, keep: Keep, multipliers: Multipliers
) -> dict[str, Tensor]:
    """New values of all parameters and buffers that a plan or a multiplier changes."""
    shrunk = kept_indices(analysis, keep)
    factors = _folded_factors(analysis, multipliers)
    tensors = {}
    for name in shrunk.keys() | factors.keys():
        old = _tensor(gm, name)
        new = old.detach()
        for dim, factor in factors.get(name, {}).items():
            shape = [-1 if d == dim else 1 for d in range(new.ndim)]
            new = new * torch.from_numpy(factor).to(new).reshape(shape)
        # The first axis first: its slices lie together in memory.
        for dim, indices in sorted(shrunk.get(name, {}).items()):
            new = new.index_select(dim, torch.from_numpy(indices).to(new.device))
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        tensors[name] = new
    return tensors


def _folded_factors(
    analysis: Analysis, multipliers: Multipliers
) -> dict[str, dict[int, npt.NDArray[np.float64]]]:
    """Parameter -> axis -> the constant to multiply every index by."""
    factors: dict[str, dict[int, npt.NDArray[np.float64]]] = {}
    values = {}
    for name, multiplier in multipliers.items():
        group = analysis.group(name)
        values[name] = multiplier.detach().double().cpu().numpy()
        if not group.foldable and (values[name] != 1).any():
            raise PlanError(
                f"group {name!r} is read by an operator without a weight of its own, so a "
                "multiplier cannot be folded there; leave the group at 1"
            )
    if not values:
        return factors
    spread = analysis.gather(values)
    for read in analysis.reads:
        if read.weight is None:
            continue
        name, dim = read.weight
        factor = spread[analysis.axes[name, dim]]
        if read.weight in analysis.features:
            factor = factor * spread[analysis.features[name, dim]]
        if (factor != 1).any():
            factors.setdefault(name, {})[dim] = factor
    return factors


def _tensor(module: nn.Module, name: str) -> Tensor:
    owner, _, attribute = name.rpartition(".")
    home = submodule(module, owner)
    tensor: Tensor | None = home._parameters.get(attribute)
    tensor = home._buffers[attribute] if tensor is None else tensor
    assert tensor is not None
    return tensor


class Slicing:
    """What rules talk to while they rewrite.

    Attributes:
        source: The graph that is rewritten; rules see its nodes.
        gm: The graph that is emitted.
        keep: For every atom, whether it stays.
        labels: Node of `source` -> its label.
    """

    def __init__(
        self,
        analysed: fx.GraphModule,
        source: fx.GraphModule,
        emitted: fx.GraphModule,
        analysis: Analysis,
        keep: Keep,
    ) -> None:
        self.source = source
        self.gm = emitted
        self.keep = keep
        self.labels: dict[fx.Node, Labels] = analysis.labels
        self._cut: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
        self._reads = {read.node: read for read in analysis.reads}
        # Copies of a graph hold the same nodes in the same order.
        pairs = zip(analysed.graph.nodes, emitted.graph.nodes, strict=True)
        self._twins: dict[fx.Node, fx.Node] = dict(pairs)
        self._calls = Counter(n.target for n in emitted.graph.nodes if n.op == "call_module")

    def twin(self, node: fx.Node) -> fx.Node:
        """The node of the emitted graph that stands for `node`."""
        return self._twins[node]

    def label(self, node: fx.Node) -> Label:
        """The label of a tensor value."""
        label = self.labels.get(node)
        return label if isinstance(label, Label) else Label(shape_of(node))

    def is_read(self, node: fx.Node) -> bool:
        """Whether an operator reads channels."""
        return node in self._reads

    def read_of(self, node: fx.Node) -> Read:
        """The read of an operator that has one."""
        return self._reads[node]

    def kept_along(self, label: Label, dim: int) -> Keep:
        """Which indices of an axis stay, `(size,)`."""
        dim %= label.ndim
        block = label.block(dim)
        if block is None:
            return np.ones(label.shape[dim], dtype=bool)
        others = tuple(a for a, d in enumerate(block.dims) if d != dim)
        return np.asarray(self.keep[block.atoms].any(axis=others))

    def sizes(self, label: Label) -> dict[int, int]:
        """Followed axis -> its new size."""
        dims = [d for block in label.blocks for d in block.dims]
        return {d: int(self.kept_along(label, d).sum()) for d in dims}

    def changed_sizes(self, label: Label) -> dict[int, int]:
        """Axis that shrinks -> its new size."""
        return {d: size for d, size in self.sizes(label).items() if size != label.shape[d]}

    def own_module(self, twin: fx.Node) -> nn.Module | None:
        """The module that an emitted call calls, copied if other calls use it too."""
        if twin.op != "call_module":
            return None
        name = str(twin.target)
        module = self.gm.get_submodule(name)
        if self._calls[name] > 1:
            self._calls[name] -= 1
            module = copy.deepcopy(module)
            twin.target = self._free_name(name)
            self.gm.add_submodule(twin.target, module)
        return module

    def select(self, before: fx.Node, value: fx.Node, dim: int, positions: Atoms) -> fx.Node:
        """Insert `index_select(value, dim, positions)` in front of a node."""
        name = self._free_name("kept_positions")
        device = device_of(self.gm)
        index = torch.from_numpy(positions.astype(np.int64)).to(device)
        # A constant of the graph, like a padding: the state_dict keeps the keys of the model.
        self.gm.register_buffer(name, index, persistent=False)
        with self.gm.graph.inserting_before(before):
            node = self.gm.graph.get_attr(name)
            return self.gm.graph.call_function(torch.index_select, (value, dim, node))

    def widen(self, node: fx.Node, source: fx.Node) -> None:
        """Let an operator read an operand at its original width.

        Other channels stand in for those that are gone: `narrow` must take them out again.
        """
        twin, label = self.twin(node), self.label(source)
        wide = self.twin(source)
        for dim in self.changed_sizes(label):
            place = np.maximum(np.cumsum(self.kept_along(label, dim)) - 1, 0)
            wide = self.select(twin, wide, dim, place)
        twin.replace_input_with(self.twin(source), wide)

    def cut(self, cut: Cut) -> None:
        """Slice a computed weight in front of the operator that uses it."""
        keep = self.keep[cut.atoms]
        if not keep.all():
            twin = self.twin(cut.node)
            weight = self._cut.get((cut.node, cut.weight), self.twin(cut.weight))
            sliced = self.select(twin, weight, cut.dim, keep.nonzero()[0])
            twin.replace_input_with(weight, sliced)
            self._cut[cut.node, cut.weight] = sliced

    def narrow(self, node: fx.Node) -> None:
        """Take the channels that are gone out of a value that was computed at full width."""
        twin, label = self.twin(node), self.label(node)
        users = list(twin.users)
        narrow = twin
        for dim in self.changed_sizes(label):
            narrow = self.select(twin.next, narrow, dim, self.kept_along(label, dim).nonzero()[0])
        for user in users:
            user.replace_input_with(twin, narrow)
        self._twins[node] = narrow

    def replace(self, node: fx.Node, new: fx.Node) -> None:
        """Let another node stand for `node` from here on."""
        old = self._twins[node]
        old.replace_all_uses_with(new)
        new.meta = {**old.meta, **new.meta}
        self.gm.graph.erase_node(old)
        self._twins[node] = new

    def replace_by_constant(self, node: fx.Node, value: int) -> None:
        """Use a constant wherever a node was used."""
        twin = self._twins[node]
        for user in list(twin.users):
            user.args = _substituted(user.args, twin, value)
            user.kwargs = _substituted(user.kwargs, twin, value)

    def _free_name(self, name: str) -> str:
        numbered = (f"{name}_{i}" for i in itertools.count())
        owner, _, _ = name.rpartition(".")
        parent = self.gm.get_submodule(owner)
        return next(n for n in numbered if not hasattr(parent, n.rpartition(".")[2]))


def _substituted(args: Any, old: fx.Node, new: int) -> Any:
    return fx.node.map_aggregate(args, lambda a: new if a is old else a)


__all__ = ["Multipliers", "Slicing", "kept_indices", "rewrite", "sliced_tensors"]
