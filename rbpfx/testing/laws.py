"""The laws of the compiler, as functions of a captured model and a plan.

The one law: for every plan, the sliced network equals the masked one, forward and backward, in
train and in eval mode, in double precision. The others are its corollaries: closing a plan, pruning
again, folding constants, predicting costs.
"""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_leaves

from rbpfx.errors import PlanError
from rbpfx.graph.capture import trace
from rbpfx.graph.cost import count_macs
from rbpfx.graph.gates import apply_mask
from rbpfx.graph.groups import Analysis, analyze
from rbpfx.graph.parts import example_batch
from rbpfx.graph.slicing import kept_indices, rewrite
from rbpfx.plan import PruningPlan

TOLERANCE = 1e-9
SAME = 1e-12
"""Of two runs of the same operators: kernels round differently by where their operands lie."""

Inputs: TypeAlias = tuple[Tensor, ...]


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Give parameters and statistics values that hide no mistake: none is 0 or 1 everywhere."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: Tensor, low: float, high: float) -> Tensor:
        values = torch.rand(tensor.shape, generator=generator, dtype=torch.float64, device="cpu")
        return (values * (high - low) + low).to(tensor)

    statistics = ((n, b) for n, b in module.named_buffers() if "running_" in n)
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *statistics):
            leaf = name.rpartition(".")[2]
            if not tensor.is_floating_point() or not tensor.numel():
                continue
            if leaf.startswith("running_var"):
                tensor.copy_(draw(tensor, 0.5, 2.0))
            elif leaf.startswith(("running_mean", "bias")):
                tensor.copy_(draw(tensor, -0.5, 0.5))
            elif tensor.ndim == 1:
                tensor.copy_(draw(tensor, 0.4, 1.6))
            elif (tensor == tensor.flatten()[0]).all():
                tensor.add_(draw(tensor, -0.3, 0.3))


def random_plan(analysis: Analysis, seed: int) -> PruningPlan:
    """Removes units at random: some groups stay whole, some keep a single unit."""
    rng = random.Random(seed)
    kept = {}
    for group in analysis.groups:
        draw = rng.random()
        if draw < 0.2:
            continue
        count = 1 if draw < 0.4 else rng.randint(1, group.size)
        kept[group.name] = rng.sample(range(group.size), count)
    plan = PruningPlan(kept)
    try:
        kept_indices(analysis, analysis.keep(plan))
    except PlanError:  # features and their channels have nothing in common
        return PruningPlan({n: units for n, units in kept.items() if ".features" not in n})
    return plan


@dataclass
class Compiled:
    """A captured model with a plan, masked and sliced.

    Attributes:
        options: What the analysis was asked for.
    """

    gm: nn.Module
    analysis: Analysis
    plan: PruningPlan
    masked: nn.Module
    sliced: nn.Module
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def removed(self) -> int:
        """How many units the plan removes."""
        return sum(self.analysis.group(n).size - len(k) for n, k in self.plan.kept.items())


def compile_random(model: nn.Module, inputs: Inputs, seed: int, **options: Any) -> Compiled:
    """Trace, analyse and prune by a random plan."""
    return prune_random(trace(model, inputs), seed, **options)


def prune_random(gm: nn.Module, seed: int, **options: Any) -> Compiled:
    """Analyse a graph and prune it by a random plan."""
    analysis = analyze(gm, **options)
    plan = random_plan(analysis, seed)
    masked, sliced = apply_mask(gm, analysis, plan), rewrite(gm, analysis, plan)
    return Compiled(gm, analysis, plan, masked, sliced, options)


def check_both_modes(compiled: Compiled, inputs: Inputs, seed: int) -> None:
    """The law in both modes, with the statistics that train mode leaves behind."""
    for train in (False, True):
        check_law(compiled, inputs, train=train)
    check_statistics(compiled, inputs)


def check_law(compiled: Compiled, inputs: Inputs, *, train: bool) -> None:
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


def check_statistics(compiled: Compiled, inputs: Inputs) -> None:
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


def check_again(compiled: Compiled, inputs: Inputs, seed: int) -> None:
    """The pruned graph is analysed and pruned again."""
    check_law(prune_random(compiled.sliced, seed + 1, **compiled.options), inputs, train=False)


def check_costs(compiled: Compiled, inputs: Inputs = (), seed: int = 0) -> None:
    """The MACs that the analysis predicts are those of the sliced graph."""
    analysis = compiled.analysis
    batch = example_batch(compiled.gm)
    closed = analysis.close(compiled.plan)
    predicted = analysis.macs(analysis.keep(closed)) / batch
    counted = count_macs(rewrite(compiled.gm, analysis, closed))
    assert abs(predicted - counted) < 1e-6, f"MACs: {predicted} predicted, {counted} counted"
    full, dense = count_macs(compiled.gm), analysis.dense_macs / batch
    assert abs(dense - full) < 1e-6, f"MACs of the whole: {dense} predicted, {full} counted"
    for group in analysis.groups:
        differences = []
        for unit in range(group.size):
            rest = [i for i in range(group.size) if i != unit]
            keep = analysis.keep(PruningPlan({group.name: rest}))
            differences.append(full - analysis.macs(keep) / batch)
        mean, told = float(np.mean(differences)), group.macs_per_unit
        assert abs(mean - told) <= 1e-9 * max(full, 1), f"{group.name}: {told} a unit, not {mean}"


def check_close(compiled: Compiled, inputs: Inputs, seed: int = 0) -> None:
    """Removing also what a plan leaves useless changes nothing."""
    analysis = compiled.analysis
    closed = analysis.close(compiled.plan)
    returned = analysis.keep(closed) & ~analysis.keep(compiled.plan)
    assert not returned.any(), "closing a plan brings channels back"
    assert analysis.close(closed) == closed, "closing a plan twice removes more"
    expected = run(compiled.masked, inputs)
    assert_close(expected, run(apply_mask(compiled.gm, analysis, closed), inputs), "closed plan")
    assert_close(expected, run(rewrite(compiled.gm, analysis, closed), inputs), "sliced")


def check_multipliers(compiled: Compiled, inputs: Inputs, seed: int) -> None:
    """Constants at the reads are folded into the weights there."""
    generator = torch.Generator().manual_seed(seed)
    multipliers = {
        group.name: torch.rand(group.size, generator=generator, dtype=torch.float64, device="cpu")
        + 0.5
        for group in compiled.analysis.groups
        if group.foldable
    }
    arguments = (compiled.gm, compiled.analysis, compiled.plan)
    masked = apply_mask(*arguments, multipliers=multipliers)
    sliced = rewrite(*arguments, multipliers=multipliers)
    # An output that is nearly constant over the batch is rounding once a BatchNorm has scaled it.
    assert_close(run(masked, inputs), run(sliced, inputs), "multipliers", joint=True)


def check_identity(compiled: Compiled, inputs: Inputs, seed: int = 0) -> None:
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
        assert_close(run(compiled.gm, inputs), run(network, inputs), "empty plan", tolerance=SAME)


def check_pickle(compiled: Compiled, inputs: Inputs) -> None:
    """Traced, masked and sliced graphs survive pickling, in both modes."""
    if any(is_parametrized(module) for module in compiled.gm.modules()):
        return  # torch refuses
    for network in (compiled.gm, compiled.masked, compiled.sliced):
        twin = pickle.loads(pickle.dumps(network))
        for mode in (True, False):
            expected, actual = (
                copy.deepcopy(n).train(mode)(*(x.clone() for x in inputs)) for n in (network, twin)
            )
            assert_close(expected, actual, "pickle", tolerance=SAME)


Law: TypeAlias = Callable[[Compiled, Inputs, int], None]
LAWS: tuple[Law, ...] = (
    check_both_modes,
    check_again,
    check_close,
    check_costs,
    check_multipliers,
    check_identity,
)


def run(network: nn.Module, inputs: Inputs) -> Any:
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
    network: nn.Module, inputs: Inputs, train: bool
) -> tuple[list[Tensor], list[Tensor]]:
    network.train(train)
    leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    # A leaf may not be modified in place, which the first operator of a network may do.
    outputs = _tensors(network(*(x * 1.0 if x.requires_grad else x for x in leaves)))
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    for output in outputs:
        weight = torch.randn(output.shape, generator=generator, dtype=torch.float64, device="cpu")
        total = total + (output * weight).sum()
    if total.requires_grad:
        total.backward()
    gradients = [x.grad if x.grad is not None else torch.zeros_like(x) for x in leaves]
    return [o.detach() for o in outputs], gradients
