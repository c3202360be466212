"""The pruning plan: which units of every channel group stay."""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rbpfx.errors import PlanError
from rbpfx.parsing import parse_json, quoted

_FORM = 'a plan is written like {"kept": {"conv1": [0, 2, 5]}}'


@dataclass(frozen=True)
class PruningPlan:
    """Group name -> indices of the units that stay; groups that are absent stay whole.

    Attributes:
        kept: For every group its kept units, ascending, each in `range(group.size)`.

    Raises:
        PlanError: A group keeps no unit, or an index is negative, repeated or no whole number.

    Examples:
        >>> PruningPlan({"conv1": [2, 0]}).kept
        {'conv1': (0, 2)}
    """

    kept: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kept = {}
        for name, indices in self.kept.items():
            try:
                units = tuple(sorted(operator.index(i) for i in indices))
            except TypeError as error:
                raise PlanError(
                    f"the plan for group {quoted(name)} must list whole numbers: {error}"
                ) from error
            if not units:
                raise PlanError(
                    f"the plan removes every unit of group {quoted(name)}; keep at least one"
                )
            if units[0] < 0 or len(set(units)) < len(units):
                raise PlanError(
                    f"the plan for group {quoted(name)} must list each unit once, from 0 upwards"
                )
            kept[str(name)] = units
        object.__setattr__(self, "kept", kept)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON types."""
        return {"kept": {name: list(units) for name, units in self.kept.items()}}

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str | bytes) -> PruningPlan:
        """Read a plan back; it may come from strangers.

        Raises:
            PlanError: The text is no plan, or larger than 16 MiB.
        """
        try:
            content = parse_json(text)
        except ValueError as error:
            raise PlanError(f"this is not a pruning plan: {error}; {_FORM}") from error
        kept = content.get("kept") if isinstance(content, dict) else None
        if not isinstance(kept, dict):
            raise PlanError(f"this is not a pruning plan: it has no object 'kept'; {_FORM}")
        for name, units in kept.items():
            if not (isinstance(units, list) and all(type(unit) is int for unit in units)):
                raise PlanError(
                    f"the plan for group {quoted(name)} must list whole numbers, not "
                    f"{quoted(units)}; {_FORM}"
                )
        return cls(kept)
