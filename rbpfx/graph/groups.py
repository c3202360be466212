"""The second half of the analysis: from solved identities to groups of removable channels.

Channels that were tied together are one *unit*; units that appear on the same producer axes form
a *group*, share one noise vector and are decided together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import networkx as nx
import numpy as np
import numpy.typing as npt
from torch import fx, nn

from rbpfx.errors import PlanError, RbpfxError
from rbpfx.graph.garbage import collection_paused
from rbpfx.graph.operands import Contraction, Labels, ParameterAxis, Read
from rbpfx.graph.parts import captured_parts, example_batch
from rbpfx.graph.propagation import Propagation
from rbpfx.graph.provenance import Atoms, Block, Keep, Label, Solution
from rbpfx.graph.shuffles import Shuffle, find_shuffles
from rbpfx.graph.walk import walk
from rbpfx.plan import PruningPlan

_HASH_BASE = np.int64(6364136223846793005)
UNITS = ("channel", "feature")
ATTENTION_UNITS = ("heads", "positions")
NORMALIZATIONS = ("freeze", "exact", "sliced")


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that can be removed one unit at a time, and are decided together.

    Attributes:
        name: Qualified name of the first producer; its second group has `#2` behind it.
        size: Number of units.
        producers: Names of the modules or parameters that bring the channels to life.
        reads: The edges on which the channels are contracted.
        macs_per_unit: Multiply-accumulates per example saved by removing one unit alone.
        foldable: Whether every read can absorb a constant multiplier into its weight.
        channels: Representative atom of every unit, `(size,)`.
    """

    name: str
    size: int
    producers: tuple[str, ...]
    reads: tuple[Read, ...]
    macs_per_unit: float
    foldable: bool
    channels: Atoms

    def __repr__(self) -> str:
        return f"ChannelGroup({self.name!r}, size={self.size}, reads={len(self.reads)})"


@dataclass(frozen=True, eq=False)
class FrozenAxis:
    """Channels that stay, and why.

    Attributes:
        name: The module or parameter that brings the channels to life, or a module kept whole.
        channels: How many of its channels stay.
        size: How many it has.
        reason: Why.
    """

    name: str
    channels: int
    size: int
    reason: str


class Analysis:
    """What `analyze` found out about a graph.

    Attributes:
        gm: The graph that was analysed.
        groups: The channel groups, in the order in which the network computes them.
        frozen: Producers with channels that stay, and why.
        unknown: Operators without a rule: node name -> operator.
    """

    def __init__(self, state: Propagation, solution: Solution, shuffles: Sequence[Shuffle]) -> None:
        self.shuffles = tuple(shuffles)
        self.gm: nn.Module = state.model
        self.reads: list[Read] = state.reads
        self.contractions: list[Contraction] = state.contractions
        self.labels: dict[fx.Node, Labels] = state.labels
        self.axes: dict[ParameterAxis, Atoms] = state.axes
        self.features: dict[ParameterAxis, Atoms] = state.features
        self.unknown: dict[str, str] = state.unknown
        self.cuts = tuple(state.cuts.values())
        self.channel = solution.channel
        self.group_of = np.full(len(self.channel), -1, dtype=np.int64)
        self.unit_of = np.full(len(self.channel), -1, dtype=np.int64)
        self.groups = self._find_groups(state, solution)
        self.frozen = tuple(self._frozen_axes(state, solution))
        self._normalized = state.inexact
        self._by_name = {group.name: group for group in self.groups}

    def __repr__(self) -> str:
        groups, units = len(self.groups), sum(g.size for g in self.groups)
        return f"Analysis({groups} groups, {units} units, {len(self.frozen)} frozen axes)"

    def group(self, name: str) -> ChannelGroup:
        """The group of a name.

        Raises:
            PlanError: There is none.
        """
        if name not in self._by_name:
            known = ", ".join(self._by_name) or "none"
            raise PlanError(f"no channel group is called {name!r}; this network has: {known}")
        return self._by_name[name]

    def keep(self, plan: PruningPlan) -> Keep:
        """For every atom, whether a plan keeps it, `(atoms,)`.

        Raises:
            PlanError: The plan names an unknown group or a unit that a group does not have.
        """
        keep = np.ones(len(self.channel), dtype=bool)
        for name, units in plan.kept.items():
            group = self.group(name)
            if units[-1] >= group.size:
                raise PlanError(
                    f"the plan keeps unit {units[-1]} of group {name!r}, "
                    f"which has units 0 to {group.size - 1}"
                )
            keep[group.channels] = False
            keep[group.channels[list(units)]] = True
        return keep[self.channel]

    def inexact(self, plan: PruningPlan | None = None) -> tuple[str, ...]:
        """Normalisations that `rewrite` slices without regard to exactness.

        Args:
            plan: Those that this plan touches; by default all that any plan may touch.

        Returns:
            Their names; there are none unless the analysis was asked for `normalization="sliced"`.
        """
        stays = self.group_of[self.channel] < 0 if plan is None else self.keep(plan)
        return tuple(n for n, atoms in self._normalized.items() if not stays[atoms].all())

    def gather(
        self, values: Mapping[str, npt.NDArray[np.float64] | float]
    ) -> npt.NDArray[np.float64]:
        """Spread one value per unit over the atoms; 1 where a group is absent, `(atoms,)`."""
        spread = np.ones(len(self.channel))
        for name, value in values.items():
            spread[self.group(name).channels] = value
        return spread[self.channel]

    def macs(self, share: npt.NDArray[np.float64] | Keep) -> float:
        """Multiply-accumulates of the example batch with shares of the atoms kept, `(atoms,)`."""
        total = 0.0
        for contraction in self.contractions:
            cost = float(contraction.macs)
            for factor in contraction.factors:
                cost *= float(np.prod([share[atoms] for atoms in factor], axis=0).mean())
            total += cost
        return total

    @cached_property
    def dense_macs(self) -> float:
        """Multiply-accumulates of the example batch if nothing is removed."""
        return self.macs(np.ones(len(self.channel), dtype=bool))

    def close(self, plan: PruningPlan) -> PruningPlan:
        """Remove also what a plan leaves useless: units of which every read is zero.

        A channel of which all flattened features go is useless, and a feature of a channel that
        goes. The last unit of a group always stays.
        """
        keep = self.keep(plan)
        while True:
            alive = np.zeros(len(keep), dtype=bool)
            for read in self.reads:
                live = np.logical_and.reduce([keep[atoms] for atoms in read.atoms])
                for atoms in read.atoms:
                    alive[self.channel[atoms[live]]] = True
            useless = [
                group.channels[keep[group.channels] & ~alive[group.channels]]
                for group in self.groups
                if alive[group.channels].any()
            ]
            removed = np.isin(self.channel, np.concatenate([*useless, self.channel[:0]]))
            if not removed.any():
                break
            keep &= ~removed
        kept = {group.name: keep[group.channels] for group in self.groups}
        return PruningPlan(
            {name: np.flatnonzero(k).tolist() for name, k in kept.items() if not k.all()}
        )

    @cached_property
    def graph(self) -> nx.DiGraph[str]:
        """The coupling graph: one node per group, an edge where one is computed from another."""
        graph: nx.DiGraph[str] = nx.DiGraph()
        for group in self.groups:
            graph.add_node(group.name, size=group.size, macs_per_unit=group.macs_per_unit)
        for contraction in self.contractions:
            if len(contraction.factors) < 2:
                continue
            sources, targets = (self._names(factor) for factor in contraction.factors[:2])
            graph.add_edges_from(
                (source, target, {"node": contraction.node.name})
                for source in sources
                for target in targets
            )
        return graph

    def _names(self, factor: tuple[Atoms, ...]) -> list[str]:
        indices = np.unique(self.group_of[self.channel[np.concatenate(factor)]])
        return [self.groups[i].name for i in indices if i >= 0]

    def _find_groups(self, state: Propagation, solution: Solution) -> tuple[ChannelGroup, ...]:
        signature = _signatures(state, solution)
        found: list[tuple[str, Atoms, list[str]]] = []
        position: dict[int, int] = {}
        for name, atoms in state.producers.items():
            channels = solution.channel[atoms]
            channels = channels[~solution.pinned[channels]]
            _, first = np.unique(channels, return_index=True)
            channels = channels[np.sort(first)]
            for key in dict.fromkeys(signature[channels].tolist()):
                if key not in position:
                    position[key] = len(found)
                    found.append((name, channels[signature[channels] == key], [name]))
                else:
                    found[position[key]][2].append(name)
        found = [entry for entry in found if len(entry[1]) > 1]
        for index, (_, channels, _) in enumerate(found):
            self.group_of[channels] = index
            self.unit_of[channels] = np.arange(len(channels))
        reads = self._reads_by_group(len(found))
        macs = self._macs_saved()
        taken: dict[str, int] = {}
        groups = []
        for index, (name, channels, producers) in enumerate(found):
            taken[name] = taken.get(name, 0) + 1
            unique = name if taken[name] == 1 else f"{name}#{taken[name]}"
            groups.append(
                ChannelGroup(
                    name=unique,
                    size=len(channels),
                    producers=tuple(producers),
                    reads=tuple(reads[index]),
                    macs_per_unit=float(macs[channels].mean()),
                    foldable=all(state.absorbs(read) for read in reads[index]),
                    channels=channels,
                )
            )
        return tuple(groups)

    def _reads_by_group(self, count: int) -> list[list[Read]]:
        by_group: list[list[Read]] = [[] for _ in range(count)]
        for read in self.reads:
            touched = self.group_of[self.channel[np.concatenate(read.atoms)]]
            for index in np.unique(touched[touched >= 0]):
                by_group[index].append(read)
        return by_group

    def _macs_saved(self) -> npt.NDArray[np.float64]:
        """For every channel, the multiply-accumulates that go when it goes alone, `(atoms,)`."""
        saved = np.zeros(len(self.channel))
        count = np.zeros(len(self.channel))  # all zero between two factors
        batch = example_batch(self.gm)
        for contraction in self.contractions:
            factors = [self.channel[np.concatenate(factor)] for factor in contraction.factors]
            touched = np.concatenate([*factors, self.channel[:0]])
            left = np.ones(len(touched))
            for channels, factor in zip(factors, contraction.factors, strict=True):
                np.add.at(count, channels, 1 / max(len(factor[0]), 1))
                left *= 1 - count[touched]
                count[channels] = 0
            # A channel that occurs several times gets the same value every time.
            saved[touched] = saved[touched] + contraction.macs / batch * (1 - left)
        return saved

    def _frozen_axes(self, state: Propagation, solution: Solution) -> Iterator[FrozenAxis]:
        for name, atoms in state.producers.items():
            stay = atoms[self.group_of[solution.channel[atoms]] < 0]
            if len(stay):
                reasons = (reason or "no other unit like it" for reason in solution.reasons(stay))
                yield FrozenAxis(name, len(stay), len(atoms), "; ".join(reasons))
        yield from (FrozenAxis(n, size, size, why) for n, (size, why) in state.whole.items())


@collection_paused()
def analyze(
    gm: nn.Module,
    *,
    unit: str = "channel",
    attention: str = "heads",
    normalization: str = "freeze",
) -> Analysis:
    """Find the channel groups of a captured graph.

    Args:
        gm: A graph with metadata, from `rbpfx.trace`.
        unit: "channel", or "feature" to make every position of a flattened feature map, where a
            linear layer reads it, a unit of its own beside the channels. Removing one slices the
            linear layer and costs one `index_select`.
        attention: What a unit of attention is: "heads" for a whole head (a key/value head with
            all of its query heads), or "positions" for one position of every head, so that all
            heads stay and become narrower. Where something mixes the positions within a head (a
            rotary embedding, a normalisation over the head), heads are the units in any case.
        normalization: What becomes of channels that a LayerNorm, RMSNorm or GroupNorm mixes.
            "freeze" keeps them. "exact" lets them go: `rewrite` emits a normalisation that
            divides by the original count of channels, so that removed ones count as zeros.
            "sliced" lets them go and normalises what is left, which is fast and changes the
            function: a sliced network then differs from the masked one (see `inexact`).

    Returns:
        The analysis: groups, frozen axes with reasons, the coupling graph.

    Raises:
        RbpfxError: The graph has no metadata, or an option has no such value.
        RuleError: An operator rule contradicts the shapes in the graph.
    """
    if unit not in UNITS:
        raise RbpfxError(f"unit must be one of {UNITS}, not {unit!r}")
    if attention not in ATTENTION_UNITS:
        raise RbpfxError(f"attention must be one of {ATTENTION_UNITS}, not {attention!r}")
    if normalization not in NORMALIZATIONS:
        raise RbpfxError(f"normalization must be one of {NORMALIZATIONS}, not {normalization!r}")
    parts = captured_parts(gm)
    if not parts:
        raise RbpfxError(f"{type(gm).__name__} is no captured model; capture it with rbpfx.trace")
    missing = [
        node.name
        for part in parts.values()
        for node in part.graph.nodes
        if node.op == "placeholder" and "val" not in node.meta
    ]
    if missing:
        raise RbpfxError(
            f"the graph has no tensor metadata on {missing[0]!r}; capture it with rbpfx.trace"
        )
    state = walk(gm, unit, attention, normalization)
    solution = state.identities.solve()
    shuffles = []
    for name, part in parts.items():
        state.enter(name, part)
        shuffles += find_shuffles(state)
    moved = {id(block) for shuffle in shuffles for block in shuffle.blocks}
    joint = [b for b in _blocks(state) if len(b.dims) > 1 and id(b) not in moved]
    while sum(_make_rectangular(state, solution, block) for block in joint):
        solution = state.identities.solve()
    return Analysis(state, solution, shuffles)


def _make_rectangular(state: Propagation, solution: Solution, block: Block) -> bool:
    """Tie a joint block along all but one axis, so that what is left of it is a tensor.

    Returns:
        Whether anything was tied. The axis that keeps most units apart stays free.
    """
    channels = solution.channel[block.atoms]
    if solution.pinned[channels].all():
        return False
    slabs = [channels.take([0], axis=axis) for axis in range(channels.ndim)]
    varying = [axis for axis, slab in enumerate(slabs) if (channels != slab).any()]
    if len(varying) <= 1:
        return False
    others = {axis: tuple(a for a in range(channels.ndim) if a != axis) for axis in varying}
    free = max(varying, key=lambda a: len(np.unique(channels.min(axis=others[a]))))
    first = block.atoms[tuple(slice(None) if a == free else [0] for a in range(channels.ndim))]
    state.identities.tie(block.atoms, first)
    return True


def _signatures(state: Propagation, solution: Solution) -> Atoms:
    """For every channel a number that tells the set of axes it appears on, `(atoms,)`.

    Every axis is then a union of whole groups, and as every group keeps a unit, no axis can
    ever become empty.
    """
    axes = {id(atoms): atoms for atoms in state.producers.values()}
    axes |= {id(block.atoms): block.atoms for block in _blocks(state)}
    # A polynomial hash in 64-bit arithmetic: no set has to be built or sorted.
    draws = np.random.default_rng(0).integers(2**62, size=len(axes))
    signature = np.zeros(len(solution.channel), dtype=np.int64)
    for atoms, draw in zip(axes.values(), draws, strict=True):
        channels = solution.channel[atoms]
        signature[channels] = signature[channels] * _HASH_BASE + draw
    return signature


def _blocks(state: Propagation) -> Iterator[Block]:
    for labels in state.labels.values():
        for label in labels if isinstance(labels, tuple) else (labels,):
            if isinstance(label, Label):
                yield from label.blocks
