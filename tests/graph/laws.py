"""The laws of the compiler, as functions that any test can apply to any model."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_leaves, tree_map

from rbpfx.graph.capture import trace
from rbpfx.graph.gates import apply_mask
from rbpfx.graph.groups import Analysis, analyze
from rbpfx.graph.slicing import kept_indices, rewrite
from rbpfx.plan import PruningPlan
from tests.graph.generator import random_plan

TOLERANCE = 1e-9


@dataclass
class Compiled:
    """A model with a plan, masked and sliced."""

    gm: fx.GraphModule
    analysis: Analysis
    plan: PruningPlan
    masked: fx.GraphModule
    sliced: fx.GraphModule

    @property
    def removed(self) -> int:
        return sum(self.analysis.group(n).size - len(k) for n, k in self.plan.kept.items())


def compile_random(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    seed: int,
    unit: str = "channel",
    **options: str,
) -> Compiled:
    """Trace, analyse (with these options) and prune by a random plan."""
    gm = trace(model, inputs)
    analysis = analyze(gm, unit=unit, **options)
    plan = random_plan(analysis, seed)
    return Compiled(gm, analysis, plan, apply_mask(gm, analysis, plan), rewrite(gm, analysis, plan))


def check_law(compiled: Compiled, inputs: tuple[Tensor, ...], *, train: bool) -> None:
    """Masked equals sliced: outputs, gradients of inputs and of every remaining parameter."""
    masked, sliced = copy.deepcopy(compiled.masked), copy.deepcopy(compiled.sliced)
    expected, expected_inputs = _outputs_and_gradients(masked, inputs, train)
    actual, actual_inputs = _outputs_and_gradients(sliced, inputs, train)
    assert_close(expected, actual, "outputs")
    analysis = compiled.analysis
    kept = kept_indices(analysis, analysis.keep(compiled.plan))
    sliced_parameters = dict(sliced.named_parameters())
    wanted, found = list(expected_inputs), list(actual_inputs)
    for name, parameter in masked.named_parameters():
        want, have = parameter.grad, sliced_parameters[name].grad
        assert (want is None) == (have is None), f"gradient of {name}"
        if want is not None and have is not None:
            for dim, indices in kept.get(name, {}).items():
                want = want.index_select(dim, torch.from_numpy(indices))
            wanted.append(want)
            found.append(have)
    # One scale for all: behind a BatchNorm the gradient of a bias is nothing but rounding.
    assert_close(wanted, found, "gradients", joint=True)


def check_statistics(compiled: Compiled, inputs: tuple[Tensor, ...]) -> None:
    """A step in train mode leaves the same running statistics behind."""
    masked, sliced = copy.deepcopy(compiled.masked), copy.deepcopy(compiled.sliced)
    for network in (masked, sliced):
        network.train()
        network(*(x.clone() for x in inputs))
    kept = kept_indices(compiled.analysis, compiled.analysis.keep(compiled.plan))
    buffers = dict(sliced.named_buffers())
    for name, buffer in masked.named_buffers():
        if name in buffers and buffer.is_floating_point():
            for dim, indices in kept.get(name, {}).items():
                buffer = buffer.index_select(dim, torch.from_numpy(indices))
            assert_close(buffer, buffers[name], name)


def check_costs(compiled: Compiled) -> None:
    """The MACs that the analysis predicts are those of the sliced graph."""
    from rbpfx.graph.cost import count_macs
    from rbpfx.graph.groups import example_batch

    analysis = compiled.analysis
    batch = example_batch(compiled.gm)
    closed = analysis.close(compiled.plan)
    predicted = analysis.macs(analysis.keep(closed)) / batch
    assert round(predicted) == count_macs(rewrite(compiled.gm, analysis, closed))
    assert abs(predicted - round(predicted)) < 1e-6
    full = count_macs(compiled.gm)
    assert round(analysis.macs(np.ones(len(analysis.channel)))) == full * batch
    for group in analysis.groups:
        differences = []
        for unit in range(group.size):
            rest = [i for i in range(group.size) if i != unit]
            keep = analysis.keep(PruningPlan({group.name: rest}))
            differences.append(full - analysis.macs(keep) / batch)
        assert abs(np.mean(differences) - group.macs_per_unit) <= 1e-9 * max(full, 1)


def check_close(compiled: Compiled, inputs: tuple[Tensor, ...]) -> None:
    """Removing also what a plan leaves useless changes nothing."""
    analysis = compiled.analysis
    closed = analysis.close(compiled.plan)
    assert not (analysis.keep(closed) & ~analysis.keep(compiled.plan)).any()
    assert analysis.close(closed) == closed
    other = apply_mask(compiled.gm, analysis, closed)
    assert_close(run(compiled.masked, inputs), run(other, inputs), "closed plan")
    assert_close(
        run(compiled.masked, inputs), run(rewrite(compiled.gm, analysis, closed), inputs), "sliced"
    )


def check_again(
    compiled: Compiled, inputs: tuple[Tensor, ...], seed: int, unit: str, **options: str
) -> None:
    """The pruned graph is analysed and pruned again."""
    gm = compiled.sliced
    analysis = analyze(gm, unit=unit, **options)
    plan = random_plan(analysis, seed + 1)
    again = Compiled(
        gm, analysis, plan, apply_mask(gm, analysis, plan), rewrite(gm, analysis, plan)
    )
    check_law(again, inputs, train=False)


def check_multipliers(compiled: Compiled, inputs: tuple[Tensor, ...], seed: int) -> None:
    """Constants at the reads are folded into the weights there."""
    generator = torch.Generator().manual_seed(seed)
    multipliers = {
        group.name: torch.rand(group.size, generator=generator, dtype=torch.float64) + 0.5
        for group in compiled.analysis.groups
        if group.foldable
    }
    arguments = (compiled.gm, compiled.analysis, compiled.plan)
    masked = apply_mask(*arguments, multipliers=multipliers)
    sliced = rewrite(*arguments, multipliers=multipliers)
    assert_close(run(masked, inputs), run(sliced, inputs), "multipliers")


def check_identity(compiled: Compiled, inputs: tuple[Tensor, ...]) -> None:
    """The empty plan changes nothing."""
    whole = PruningPlan({})
    for network in (
        rewrite(compiled.gm, compiled.analysis, whole),
        apply_mask(compiled.gm, compiled.analysis, whole),
        rewrite(
            compiled.gm,
            compiled.analysis,
            PruningPlan({g.name: range(g.size) for g in compiled.analysis.groups}),
        ),
    ):
        assert_close(run(compiled.gm, inputs), run(network, inputs), "empty plan", tolerance=0.0)


def check_pickle(compiled: Compiled, inputs: tuple[Tensor, ...]) -> None:
    """Traced, masked and sliced graphs survive pickling, in both modes."""
    if any(is_parametrized(module) for module in compiled.gm.modules()):
        return  # torch refuses
    for network in (compiled.gm, compiled.masked, compiled.sliced):
        twin = pickle.loads(pickle.dumps(network))
        for mode in (True, False):
            results = [
                copy.deepcopy(n).train(mode)(*(x.clone() for x in inputs)) for n in (network, twin)
            ]
            assert_close(*results, "pickle", tolerance=0.0)


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


def run(network: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """Outputs in eval mode."""
    with torch.no_grad():
        return network.eval()(*(x.clone() for x in inputs))


def assert_close(
    expected: Any, actual: Any, what: str, *, joint: bool = False, tolerance: float = TOLERANCE
) -> None:
    """Equal to rounding, relative to the largest entry of each tensor (`joint`: of them all)."""
    pairs = list(zip(_tensors(expected), _tensors(actual), strict=True))
    largest = max((float(e.detach().abs().max()) for e, _ in pairs if e.numel()), default=0.0)
    for e, a in pairs:
        assert e.shape == a.shape, f"{what}: shapes {tuple(e.shape)} and {tuple(a.shape)}"
        assert torch.isfinite(e).all(), f"{what}: not finite"
        if e.numel():
            scale = largest if joint else float(e.detach().abs().max())
            error = float((e - a).detach().abs().max())
            assert error <= tolerance * scale, f"{what}: differ by {error:.2e} of {scale:.2e}"


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _outputs_and_gradients(
    network: nn.Module, inputs: tuple[Tensor, ...], train: bool
) -> tuple[list[Tensor], list[Tensor]]:
    network.train(train)
    leaves = [x.clone().requires_grad_() for x in inputs]
    outputs = _tensors(network(*tree_map(lambda x: x * 1.0, leaves)))
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros((), dtype=torch.float64)
    for output in outputs:
        weight = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        total = total + (output * weight).sum()
    if total.requires_grad:
        total.backward()
    gradients = [x.grad if x.grad is not None else torch.zeros_like(x) for x in leaves]
    return [o.detach() for o in outputs], gradients
