"""Hostile saves: seeded mutations of real ones, and a watch over what reading them does."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from rbpfx.saving.architecture import Architecture
from rbpfx.saving.schema import WEIGHTS
from tests.saving.results import sealed

# -- the watch ----------------------------------------------------------------------------------

_FORBIDDEN = (
    *("socket.", "subprocess.", "pickle.", "marshal.", "ctypes.", "shutil.", "tempfile."),
    *("urllib.", "http.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn"),
    *("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"),
    *("os.chmod", "os.chown", "os.putenv", "os.kill"),
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_watched: list[Path] = []


class Escape(BaseException):
    """Reading did what it must not; no `except Exception` hides it."""


@contextmanager
def watched(directory: Path) -> Iterator[None]:
    """Raise `Escape` if anything is imported, unpickled, started, sent, written or read elsewhere.

    Sources of Python may be read, which tracebacks do, and parts of torch imported.
    """
    _watched.append(directory)
    try:
        yield
    finally:
        _watched.pop()


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if not _watched:
        return
    foreign = event == "import" and str(args[0]).partition(".")[0] not in ("torch", "rbpfx")
    if foreign or event.startswith(_FORBIDDEN) or (event == "open" and not _may_open(*args)):
        raise Escape(f"{event}{args[:2]}")


def _may_open(path: Any, mode: str | None, flags: int) -> bool:
    if isinstance(path, int) or flags & _WRITING or set(mode or "") & set("wax+"):
        return False
    place = Path(os.fsdecode(path))
    return place.suffix == ".py" or place.is_relative_to(_watched[-1])


sys.addaudithook(_hook)


# -- mutations ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Files:
    """What a stranger hands over.

    Attributes:
        plan: Content of plan.json.
        weights: Content of weights.safetensors.
    """

    plan: bytes
    weights: bytes


_WORDS = (
    *("", "\0", "\ud800", "\x1b[31m", "..", "../../etc/passwd", "/etc/passwd", "con", "weight"),
    *("torchvision:../../x", "timm:hf-hub:evil/model", "timm:local-dir:/etc", "os:system"),
    *("torchvision:resnet18?weights=DEFAULT", "timm:resnet18.\x1b", "__class__", "__import__"),
    *("tests.saving.results:Tied", "float64", "F64", "I64", "BOOL", "F8_E4M3", "parameter"),
    *("a" * 10**4, "\u202e", "é"),
)
_NUMBERS = (
    *(0, 1, -1, 2, 3, 4, 7, 8, 2**31, 2**32 - 1, 2**53 + 1, 2**60, 2**63 - 1, 2**63, 2**64, 10**31),
    *(10**40, 0.5, -0.0, 1e308, float("nan"), float("inf"), True, False, None),
)
_TREES = (
    *("[]", "{}", "[[]]", "[0]", "[0, 1]", "[1, 0]", '{"kept": {}}', "[1152921504606846976]"),
    *('{"tensor": ["float32", [1152921504606846976]]}', '{"tensor": ["int8", [1, 0]]}'),
    *('{"tensor": ["object", [1]]}', '{"list": []}', '{"dict": {"x": 1}}', '{"eval": "1"}'),
    *('["F32", [4611686018427387904, 4611686018427387904, 0]]', "[0, 1e400]", "[0, -4]"),
    *("[" * 150 + "]" * 150, '{"list": [' * 60 + "]}" * 60, "[" + "0," * 2000 + "0]"),
)
_RAW = {  # what `json.dumps` does not write, for what it does
    "@lists@": "[" * 10**5,
    "@objects@": '{"a":' * 10**5,
    "@digits@": "1" * 5000,
    "@float@": "1e999",
    "@twice@": '{"a": 1, "a": 2}',
}


def value(rng: Random) -> Any:
    """A value that is likely to hit something."""
    kind = rng.choice((_WORDS, _NUMBERS, _TREES, tuple(_RAW)))
    chosen: Any = rng.choice(kind)
    return json.loads(chosen) if kind is _TREES else chosen


def text_of(content: Any) -> bytes:
    """Any tree as something like JSON."""
    text = json.dumps(content)
    for mark, raw in _RAW.items():
        text = text.replace(f'"{mark}"', raw, 1)
    return text.encode()


def bytes_changed(content: bytes, rng: Random) -> bytes:
    """Flips, cuts, splices, repetitions."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        start = rng.randrange(len(changed) + 1)
        stop = min(len(changed), start + rng.choice((0, 1, 1, 4, 40)))
        other = rng.randrange(len(changed) + 1)
        match rng.randrange(6):
            case 0 if start < len(changed):
                changed[start] ^= 1 << rng.randrange(8)
            case 1:
                del changed[start:]
            case 2:
                changed[start:stop] = rng.randbytes(rng.randrange(9))
            case 3:
                changed[start:stop] = changed[other : other + rng.randrange(60)]
            case 4:
                changed[start:stop] = rng.choice(b'{}[],:"\\0-.e\x00\xff\xc0').to_bytes(1, "big")
            case _:
                changed[start:stop] = rng.choice(_WORDS).encode("utf-8", "surrogatepass")[:80]
    return bytes(changed)


def tree_changed(content: Any, rng: Random) -> None:
    """Replace, remove, add, rename or exchange something, anywhere in a tree, in place."""
    place = content
    while True:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        if not keys:
            return
        key = rng.choice(keys)
        if not (isinstance(place[key], (dict, list)) and place[key]) or rng.random() < 0.25:
            break
        place = place[key]
    match rng.randrange(6):
        case 0:
            del place[key]
        case 1:
            other = rng.choice(keys)
            place[key], place[other] = place[other], place[key]
        case 2 if isinstance(place, dict):
            place[rng.choice((*_WORDS, *map(str, keys)))] = place.pop(key)
        case 3 if isinstance(place, list):
            place.insert(key, value(rng))
        case 4 if type(place[key]) is int:
            place[key] += rng.choice((-1, 1, 8))
        case _:
            place[key] = value(rng)


def _plan_bytes(files: Files, rng: Random) -> Files:
    return replace(files, plan=bytes_changed(files.plan, rng))


def _plan_tree(files: Files, rng: Random) -> Files:
    """A lie whose hashes fit, as far as they can."""
    content = json.loads(files.plan)
    for _ in range(rng.choice((1, 1, 2, 4))):
        tree_changed(content, rng)
    return replace(files, plan=_sealed(content))


def _sealed(content: dict[str, Any]) -> bytes:
    with suppress(KeyError, TypeError, ValueError, AttributeError):
        original = content["original"]
        table = {n: (k, d, tuple(s)) for n, (k, d, s) in original["tensors"].items()}
        original["sha256"] = Architecture(table, tuple(original["operators"])).sha256
    with suppress(ValueError):  # not-a-number has no checksum
        content = json.loads(sealed(content))
    return text_of(content)


def _weights_bytes(files: Files, rng: Random) -> Files:
    return _stamped(files, bytes_changed(files.weights, rng))


def _unstamped(files: Files, rng: Random) -> Files:
    return replace(files, weights=bytes_changed(files.weights, rng))


def _header_tree(files: Files, rng: Random) -> Files:
    """Other entries in the header of the weights, or another length of it."""
    size = int.from_bytes(files.weights[:8], "little")
    header = json.loads(files.weights[8 : 8 + size])
    for _ in range(rng.choice((1, 1, 2, 4))):
        tree_changed(header, rng)
    text = text_of(header)
    claimed = len(text) if rng.random() < 0.9 else rng.choice((0, 1, 2**32, 2**63, 2**64 - 1))
    return _stamped(files, claimed.to_bytes(8, "little") + text + files.weights[8 + size :])


def _stamped(files: Files, weights: bytes) -> Files:
    content = json.loads(files.plan)
    content["files"][WEIGHTS] = [hashlib.sha256(weights).hexdigest(), len(weights)]
    return Files(sealed(content).encode(), weights)


Mutation = Callable[[Files, Random], Files]
MUTATIONS: tuple[Mutation, ...] = (
    *(_plan_bytes, _plan_tree, _plan_tree, _plan_tree),
    *(_weights_bytes, _unstamped, _header_tree, _header_tree),
)
