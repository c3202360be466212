"""Pages of Markdown: their code blocks, and running them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

import rbpfx
from tests.toy import ShortcutNet, stripes


def code_blocks(page: Path, language: str = "python") -> list[str]:
    """The fenced blocks of a language, in the order of the page."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def given_names() -> dict[str, Any]:
    """What every page may take for granted: torch, rbpfx, a model and its loaders."""
    return {
        "__name__": "page",
        "torch": torch,
        "rbpfx": rbpfx,
        "model": ShortcutNet(width=32),
        "train_loader": stripes(),
        "val_loader": stripes(),
    }


def run(code: str, page: Path, names: dict[str, Any]) -> None:
    """Run a block; errors name the page."""
    # Not inherited: this file's `annotations` import would change how dataclasses are read.
    exec(compile(code, str(page), "exec", dont_inherit=True), names)
