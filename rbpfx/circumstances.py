"""Under which circumstances a result came about, in words."""

from __future__ import annotations

import platform
from dataclasses import MISSING, Field, fields, is_dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch


def environment() -> dict[str, str]:
    """Date, versions and processor; nothing that tells whose machine it is."""
    import rbpfx

    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "rbpfx": rbpfx.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
    }


def in_words(settings: object) -> str:
    """A settings object by what differs from its defaults; functions by their names."""
    if settings is None or isinstance(settings, (str, bool, int, float)):
        return str(settings)
    if callable(settings):
        return getattr(settings, "__qualname__", type(settings).__qualname__)
    if not is_dataclass(settings) or isinstance(settings, type):
        return type(settings).__name__
    values = ((field, getattr(settings, field.name)) for field in fields(settings))
    given = [
        f"{field.name}={in_words(value) if callable(value) else repr(value)}"
        for field, value in values
        if value != _default(field)
    ]
    return f"{type(settings).__name__}({', '.join(given)})"


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def processor() -> str:
    """The name of the processor; empty if the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "")


__all__ = ["environment", "in_words", "processor"]
