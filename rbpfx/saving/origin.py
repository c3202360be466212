"""Where a pruned network comes from: what has to be known of the original to rebuild it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from rbpfx.errors import LoadError, RbpfxError
from rbpfx.graph.capture import ExampleInputs, LeafModule, trace
from rbpfx.graph.copying import copy_model
from rbpfx.graph.device import device_of
from rbpfx.saving.architecture import (
    Architecture,
    TensorEntry,
    describe,
    state_table,
    state_tensors,
)
from rbpfx.saving.examples import DTYPES, build_inputs, describe_inputs
from rbpfx.saving.library import Library, candidates
from rbpfx.surroundings import seeded


@dataclass(frozen=True)
class Origin:
    """What is remembered of the model that was pruned.

    Attributes:
        model: Its class, for messages.
        inputs: Description of the example inputs.
        leaf_modules: Qualified names of modules that are kept whole.
        analysis: Options of `rbpfx.analyze`.
        architecture: Its identity.
        candidates: Models of libraries that it may be. Not saved.
    """

    model: str
    inputs: Any
    leaf_modules: Sequence[str]
    analysis: Mapping[str, str]
    architecture: Architecture
    candidates: tuple[Library, ...] = field(default=(), compare=False)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        gm: nn.Module,
        inputs: ExampleInputs,
        leaf_modules: Iterable[LeafModule],
        **analysis: str,
    ) -> Origin:
        """The origin of a captured model.

        Args:
            model: The model.
            gm: Its graph, as captured.
            inputs: What it was captured with.
            leaf_modules: Classes or names of modules kept whole.
            **analysis: Options of `rbpfx.analyze`.
        """
        kind = fx.GraphModule if isinstance(model, fx.GraphModule) else type(model)
        return cls(
            f"{kind.__module__}.{kind.__qualname__}",
            describe_inputs(inputs),
            tuple(_named(model, leaf_modules)),
            analysis,
            describe(gm),
            candidates(model, inputs),
        )

    def capture(self, model: nn.Module) -> nn.Module:
        """Capture a fresh instance of the original, in the dtypes of the original.

        Raises:
            LoadError: It is another architecture; says what differs.
            RbpfxError: It cannot be captured.
        """
        model = self._with_dtypes(model)
        self._require_same(Architecture(state_table(model), self.architecture.operators), model)
        device = device_of(model)
        with seeded(0, torch.device("cpu")):
            inputs = build_inputs(self.inputs, device)
            gm = trace(model, inputs, leaf_modules=self.leaf_modules)
        self._require_same(describe(gm), model)
        return gm

    @cached_property
    def library(self) -> Library | None:
        """The model of a library that was pruned, if it is certain which one it is."""
        return next((library for library in self.candidates if self._is(library)), None)

    def _is(self, library: Library) -> bool:
        try:
            library = Library.parse(str(library))  # within the limits on arguments
            # The skeleton is quick to build, and does away with most of them.
            if _shapes(state_table(library.skeleton())) != _shapes(self.architecture.tensors):
                return False
            self.capture(library.build())
        except RbpfxError:
            return False
        return True

    def _with_dtypes(self, model: nn.Module) -> nn.Module:
        """The model, or a copy with other floating dtypes: these are no part of a class."""
        wanted = {n: DTYPES.get(e[1]) for n, e in self.architecture.tensors.items()}

        def differs(name: str, tensor: torch.Tensor) -> bool:
            dtype = wanted.get(name, tensor.dtype)
            floats = dtype is not None and dtype.is_floating_point
            return floats and tensor.is_floating_point() and dtype != tensor.dtype

        if not any(differs(name, tensor) for name, tensor in state_tensors(model)):
            return model
        model = copy_model(model, {})
        for name, tensor in state_tensors(model):
            if differs(name, tensor):
                tensor.data = tensor.data.to(wanted[name])
        return model

    def _require_same(self, found: Architecture, model: nn.Module) -> None:
        difference = self.architecture.difference(found)
        if difference is not None:
            raise LoadError(
                f"{type(model).__name__} is not the architecture that was pruned, a {self.model}: "
                f"{difference}. Build the model with the arguments it had then"
            )


def _shapes(tensors: Mapping[str, TensorEntry]) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, (_, _, shape) in tensors.items()}


def _named(model: nn.Module, leaf_modules: Iterable[LeafModule]) -> list[str]:
    """Qualified names of modules that are given as classes or names."""
    leaves = tuple(leaf_modules)
    types = tuple(leaf for leaf in leaves if isinstance(leaf, type))
    names = {leaf for leaf in leaves if isinstance(leaf, str)}
    return [n for n, m in model.named_modules() if n in names or isinstance(m, types)]


__all__ = ["Origin"]
