"""The laws of `rbpfx.testing.laws`, under one name for the tests, and what no test may change."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from rbpfx.testing.laws import (
    TOLERANCE,
    Compiled,
    assert_close,
    check_again,
    check_close,
    check_costs,
    check_identity,
    check_law,
    check_multipliers,
    check_pickle,
    check_statistics,
    compile_random,
    random_plan,
    randomize,
    run,
)

__all__ = [
    "TOLERANCE",
    "Compiled",
    "Snapshot",
    "assert_close",
    "check_again",
    "check_close",
    "check_costs",
    "check_identity",
    "check_law",
    "check_multipliers",
    "check_pickle",
    "check_statistics",
    "compile_random",
    "random_plan",
    "randomize",
    "run",
]


@dataclass
class Snapshot:
    """What must not change in a model."""

    tensors: dict[str, Tensor]
    training: dict[str, bool]
    nodes: list[str]

    @classmethod
    def of(cls, module: nn.Module) -> Snapshot:
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        nodes = (
            [n.format_node() or n.name for n in module.graph.nodes]
            if isinstance(module, fx.GraphModule)
            else []
        )
        return cls(
            {name: t.detach().clone() for name, t in tensors.items()},
            {name: m.training for name, m in module.named_modules()},
            nodes,
        )

    def check(self, module: nn.Module) -> None:
        now = Snapshot.of(module)
        assert now.training == self.training
        assert now.nodes == self.nodes
        assert now.tensors.keys() == self.tensors.keys()
        for name, tensor in self.tensors.items():
            assert torch.equal(tensor, now.tensors[name]), name
