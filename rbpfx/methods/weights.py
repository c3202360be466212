"""The weights of the units of a group, for methods that look at weights instead of noise."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rbpfx.errors import RbpfxError
from rbpfx.graph.groups import Analysis, ChannelGroup

SCOPES = ("local", "global", "l2")
COMPUTED = ".parametrizations."


class UnitWeights:
    """What goes with every unit of a group when it is removed.

    Args:
        model: Holds the parameters, under the names that they had when the graph was analysed.
        analysis: The analysis.
        group: The group.

    Attributes:
        filters: Weights that produce the channels: `(parameter, axis, unit of every index)`.
        readers: Weights that read them.
        scales: Scales of BatchNorm layers on them.

    Raises:
        RbpfxError: There are none at all.
    """

    Member = tuple[nn.Parameter, int, Tensor]

    def __init__(self, model: nn.Module, analysis: Analysis, group: ChannelGroup) -> None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        number = next(i for i, g in enumerate(analysis.groups) if g.name == group.name)
        self.group, self.size = group.name, group.size
        self._computed = sorted({n.partition(COMPUTED)[0] for n in parameters if COMPUTED in n})
        self.filters: list[UnitWeights.Member] = []
        self.readers: list[UnitWeights.Member] = []
        self.scales: list[UnitWeights.Member] = []
        for (name, dim), atoms in chain(analysis.axes.items(), analysis.features.items()):
            channels = analysis.channel[atoms]
            mine = analysis.group_of[channels] == number
            if name not in parameters or not mine.any():
                continue
            unit = torch.from_numpy(analysis.unit_of[channels].copy())
            unit[~torch.from_numpy(mine)] = group.size  # one place behind the last
            parameter = parameters[name]
            owner = name.rpartition(".")[0]
            member = (parameter, dim, unit)
            if parameter.ndim > 1:
                produces = owner in group.producers or name in group.producers
                (self.filters if produces else self.readers).append(member)
            elif isinstance(model.get_submodule(owner), _BatchNorm) and name.endswith("weight"):
                self.scales.append(member)
        if not (self.filters or self.readers or self.scales):
            raise self._nothing()

    def _nothing(self) -> RbpfxError:
        """What is raised if there are no weights to look at."""
        cause, remedy = "no parameter has an axis for its units", ""
        if self._computed:
            cause += f": parametrizations compute the weights of {', '.join(self._computed)}"
            remedy = (
                "call torch.nn.utils.parametrize.remove_parametrizations(module, 'weight') before "
                "pruning, "
            )
        return RbpfxError(
            f"the method looks at the weights of group {self.group!r}, but {cause}; {remedy}"
            f"leave the group out by Target(exclude=[{self.group!r}]), or take a method that does "
            "not look at weights, such as 'taylor' or 'rbp'"
        )

    def power_sum(self, members: list[Member], power: float) -> Tensor:
        """Sum of |w|^power over all weights of every unit, `(size,)`; differentiable."""
        if not members:
            raise self._nothing()
        total = members[0][0].new_zeros(self.size + 1)
        for parameter, dim, unit in members:
            others = [d for d in range(parameter.ndim) if d != dim]
            powers = parameter.abs().pow(power)
            sums = powers.sum(others) if others else powers
            total = total.index_add(0, unit.to(sums.device), sums)
        return total[: self.size]


def in_scope(score: Tensor, scope: str) -> Tensor:
    """Make a ranking comparable between groups.

    Args:
        score: One per unit, `(size,)`.
        scope: "local" for the rank within the group as a share, in (0, 1), so that one threshold
            keeps the same share of every group; "global" for the score divided by the group's
            mean, so that groups with few outstanding units lose more; "l2" for the score divided
            by the L2 norm of the group's scores, so that, beside that, units of large groups go
            first (Molchanov et al., ICLR 2017).

    Returns:
        `(size,)`, in the same order.
    """
    if scope != "local":
        size = score.mean() if scope == "global" else score.square().sum().sqrt()
        return score / size.clamp_min(torch.finfo(score.dtype).tiny)
    rank = score.argsort(stable=True).argsort(stable=True).to(score.dtype)
    return (rank + 0.5) / len(score)


def require_scope(scope: str) -> None:
    """Check the name of a scope."""
    if scope not in SCOPES:
        raise RbpfxError(f"scope must be one of {SCOPES}, not {scope!r}")
