"""Saved networks: what commands say of one they have saved, and how others open it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rbpfx.cli.console import Answer
from rbpfx.cli.models import find_model
from rbpfx.cli.remedies import OPTION, advising
from rbpfx.errors import LoadError
from rbpfx.result import PruningResult
from rbpfx.saving.examples import build_inputs
from rbpfx.saving.files import read_plan
from rbpfx.saving.load import load
from rbpfx.saving.schema import SavedPlan


@dataclass(frozen=True)
class Saved:
    """A saved network and the model that it was made from.

    Attributes:
        plan: What plan.json says.
        original: A fresh instance of the model, whose weights do not matter.
        network: The pruned network, in eval mode.
        device: Where both are.
    """

    plan: SavedPlan
    original: nn.Module
    network: nn.Module
    device: torch.device

    @classmethod
    def open(cls, directory: Path, model: str | None, device: torch.device) -> Saved:
        """Open a directory.

        Args:
            directory: Where the network was saved.
            model: Name of the model that was pruned; None if the plan knows it.
            device: Where to put it.

        Raises:
            LoadError: There is no saved network, or its original is not known or another one.
        """
        plan = read_plan(directory)
        if model is not None:
            original = find_model(model).build()
        elif plan.library is not None:
            with advising(OPTION):
                original = plan.library.build()
        else:
            raise LoadError(
                f"what was pruned, a {plan.original.model}, is not known by name; {OPTION}"
            )
        network = load(directory, original, device=device).eval()
        return cls(plan, original.to(device).eval(), network, device)

    def example_inputs(self) -> Any:
        """Inputs like those that the network was captured with."""
        return build_inputs(self.plan.original.inputs, self.device)

    def dense(self) -> nn.Module:
        """The captured network in its original size."""
        return self.plan.original.capture(self.original)


def saved_answer(directory: Path, result: PruningResult) -> Answer:
    """What a command prints when it has saved a network.

    Args:
        directory: Where.
        result: The network, from a model that was given as such.
    """
    library = None if result.origin is None else result.origin.library
    call = f"rbpfx.load({str(directory)!r}{'' if library else ', model'})"
    fresh = "" if library else ", with a fresh instance of the model"
    return Answer(
        f"{result.report}\n\nsaved in {directory}; in Python: {call}{fresh}",
        {
            "directory": str(directory),
            "source": None if library is None else str(library),
            "report": result.report.to_dict(),
        },
    )


__all__ = ["Saved", "saved_answer"]
