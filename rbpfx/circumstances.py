"""Under which circumstances a result came about, in words."""

from __future__ import annotations

import platform
from datetime import datetime, timezone
from pathlib import Path

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


def processor() -> str:
    """The name of the processor; empty if the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "")


__all__ = ["environment", "processor"]
