"""plan.json: all that it takes to rebuild a pruned network, but for the weights.

The file may come from strangers: it is bounded in size, checked field by field, and names neither
a file nor code to run. A checksum over its own content tells damage from intent, not friend from
foe.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any, NamedTuple

from rbpfx.errors import LoadError, SaveError
from rbpfx.parsing import MAX_PLAN_BYTES, parse_json, quoted
from rbpfx.saving.architecture import Architecture
from rbpfx.saving.examples import check_inputs, is_tensor
from rbpfx.saving.library import Library
from rbpfx.saving.origin import Origin

FORMAT = "rbpfx pruned network"
VERSION = 1
PLAN, WEIGHTS, PROGRAM = "plan.json", "weights.safetensors", "network.pt2"


class Stamp(NamedTuple):
    """What tells one file from another: SHA-256 of its content, and its size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True)
class SavedPlan:
    """The content of plan.json.

    Attributes:
        rbpfx: Version of rbpfx that wrote it.
        torch: Version of torch.
        method: Name of the pruning method.
        library: Where to get the original by name, or None.
        original: What is known of the original.
        groups: Group name -> number of units in the original.
        kept: Group name -> the units that stay, ascending.
        tied: Name of a tensor -> the name under which the same tensor is stored.
        training: Qualified names of the modules that are in train mode.
        files: Name of a file beside plan.json -> its stamp.
        report: Figures, as from `Report.to_dict`.
    """

    rbpfx: str
    torch: str
    method: str
    library: Library | None
    original: Origin
    groups: Mapping[str, int]
    kept: Mapping[str, Sequence[int]]
    tied: Mapping[str, str]
    training: Sequence[str]
    files: Mapping[str, Stamp]
    report: Mapping[str, Any] = field(repr=False)

    def to_json(self) -> str:
        """The file's text.

        Raises:
            SaveError: It could not be read back: the network is too large to be described, say.
        """
        original, architecture = self.original, self.original.architecture
        content: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            **{f.name: getattr(self, f.name) for f in fields(self)},
            "library": None if self.library is None else str(self.library),
            "original": {
                **{name: getattr(original, name) for name in _ORIGINAL},
                "sha256": architecture.sha256,
                "tensors": architecture.tensors,
                "operators": architecture.operators,
            },
        }
        text = _lines({**content, "checksum": checksum(content)})
        try:
            SavedPlan.from_json(text)
        except LoadError as error:
            raise SaveError(f"the network could not be loaded again: {error}") from error
        return text

    @classmethod
    def from_json(cls, text: str | bytes) -> SavedPlan:
        """Read a plan back.

        Raises:
            LoadError: The text is no plan, is damaged, or is of another version.
        """
        try:
            content = parse_json(text)
        except ValueError as error:
            raise LoadError(
                f"plan.json is truncated, damaged or no plan of rbpfx: {error}. Save the network "
                "again"
            ) from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise LoadError(f"plan.json is no {FORMAT}: its field 'format' says something else")
        if content.get("version") != VERSION or type(content["version"]) is not int:
            raise LoadError(
                f"plan.json has format version {quoted(content.get('version'))} and was written by "
                f"rbpfx {quoted(content.get('rbpfx'))}; this rbpfx reads version {VERSION}. Use "
                "the version of rbpfx that wrote it"
            )
        expected = checksum({k: v for k, v in content.items() if k != "checksum"})
        if content.get("checksum") != expected:
            raise LoadError(
                "plan.json was changed after it was written: its checksum differs. Save the "
                "network again"
            )
        for name, check in _CHECKS.items():
            if name not in content or not check(content[name]):
                raise LoadError(f"plan.json: field {name!r} is {quoted(content.get(name))}")
        return _built(content)


def _built(content: dict[str, Any]) -> SavedPlan:
    """The plan in JSON whose fields have the right types.

    Raises:
        LoadError: Fields contradict each other, or describe too large a thing.
    """
    original = content["original"]
    for name, check in _ORIGINAL_CHECKS.items():
        if name not in original or not check(original[name]):
            raise LoadError(f"plan.json: field {name!r} is {quoted(original.get(name))}")
    check_inputs(original["inputs"])
    architecture = Architecture(
        {name: (kind, dtype, tuple(s)) for name, (kind, dtype, s) in original["tensors"].items()},
        tuple(original["operators"]),
    )
    if architecture.sha256 != original["sha256"]:
        raise LoadError("plan.json: the architecture does not have the hash that is given for it")
    groups = content["groups"]
    for name, units in content["kept"].items():
        ascending = all(a < b for a, b in pairwise(units))
        if not units or not ascending or units[0] < 0 or units[-1] >= groups.get(name, 0):
            raise LoadError(
                f"plan.json: the kept units of group {quoted(name)} are not ascending numbers from "
                f"0 to below its size, {groups.get(name)}"
            )
    library = content["library"]
    plain = {f.name: content[f.name] for f in fields(SavedPlan)}
    special = {
        "library": None if library is None else Library.parse(library),
        "original": Origin(architecture=architecture, **{n: original[n] for n in _ORIGINAL}),
        "files": {name: Stamp(*stamp) for name, stamp in content["files"].items()},
    }
    return SavedPlan(**{**plain, **special})


def _lines(value: Any, margin: str = "") -> str:
    """JSON with an entry of a mapping, and a string of a list, on every line."""
    inner = f"{margin}  "
    if isinstance(value, Mapping) and value:
        entries = [f"{json.dumps(k)}: {_lines(v, inner)}" for k, v in value.items()]
        opening, closing = "{}"
    elif isinstance(value, (list, tuple)) and len(value) > 1 and all(map(_text, value[1:])):
        entries, (opening, closing) = [json.dumps(entry) for entry in value], "[]"
    else:
        return json.dumps(value)
    return f"{opening}\n{inner}" + f",\n{inner}".join(entries) + f"\n{margin}{closing}"


def checksum(content: Mapping[str, Any]) -> str:
    """The checksum of a plan's JSON without its checksum, however it is laid out."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


# -- checks of single fields --------------------------------------------------------------------

Check = Callable[[Any], bool]
_LONGEST_LINE = 240  # ours


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _line(value: Any) -> bool:
    """What may be shown in a terminal as it is."""
    return _text(value) and len(value) <= _LONGEST_LINE and value.isprintable()


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(check(entry) for entry in value)


def _mapping_of(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(check(entry) for entry in value.values())


def _tensor(value: Any) -> bool:
    kinds = ("parameter", "buffer")
    return isinstance(value, list) and value[:1] in [[k] for k in kinds] and is_tensor(value[1:])


def _files(value: Any) -> bool:
    """Only names that we know: a plan can point nowhere else."""
    return (
        isinstance(value, dict)
        and {WEIGHTS} <= value.keys() <= {WEIGHTS, PROGRAM}
        and all(_stamp(stamp) for stamp in value.values())
    )


def _stamp(value: Any) -> bool:
    is_pair = isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)
    return is_pair and re.fullmatch("[0-9a-f]{64}", value[0]) is not None and _count(value[1])


_CHECKS: dict[str, Check] = {
    "rbpfx": _line,
    "torch": _line,
    "method": _line,
    "library": lambda value: value is None or isinstance(value, str),
    "original": lambda value: isinstance(value, dict),
    "groups": _mapping_of(_count),
    "kept": _mapping_of(_list_of(_count)),
    "tied": _mapping_of(_text),
    "training": _list_of(_text),
    "files": _files,
    "report": lambda value: isinstance(value, dict),
}
_ORIGINAL = ("model", "inputs", "leaf_modules", "analysis")
_ORIGINAL_CHECKS: dict[str, Check] = {
    "model": _line,
    "inputs": lambda value: True,  # by `check_inputs`
    "leaf_modules": _list_of(_text),
    "analysis": lambda value: (
        _mapping_of(_line)(value) and value.keys() == {"unit", "attention", "normalization"}
    ),
    "sha256": _text,
    "tensors": _mapping_of(_tensor),
    "operators": _list_of(_text),
}

__all__ = [
    "MAX_PLAN_BYTES",
    "PLAN",
    "PROGRAM",
    "VERSION",
    "WEIGHTS",
    "SavedPlan",
    "Stamp",
    "checksum",
]
