"""Tests for operators, rules and models of your own.

`check_rule` puts an operator between two layers and holds it to the laws of the compiler (see
`rbpfx.testing.laws`); `check_model` does the same to a whole model; a subclass of `RuleTestCase`
makes every law a test of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rbpfx.graph.groups import Analysis
from rbpfx.testing.laws import (
    LAWS,
    Compiled,
    Inputs,
    Law,
    check_again,
    check_both_modes,
    check_close,
    check_costs,
    check_identity,
    check_multipliers,
    compile_random,
    random_plan,
    randomize,
)

Operator: TypeAlias = nn.Module | Callable[..., Any]


def check_rule(
    operator: Operator,
    *examples: Tensor,
    dim: int = 1,
    plans: int = 10,
    prunable: bool = True,
    **options: Any,
) -> None:
    """Check that an operator between two layers is pruned exactly.

    Args:
        operator: A module or function of tensors, with a registered rule. Train mode must draw
            nothing at random.
        examples: Inputs of the operator, four at most, any values.
        dim: The channel axis: 1 or the last. Layers in front produce it, a layer behind reads it.
        plans: How many random plans to try.
        prunable: Whether the rule lets any channel go; if so, one must.
        options: For `rbpfx.analyze`.

    Raises:
        AssertionError: A law is broken; says which, and by which plan.
        RuleError: The rule contradicts the shapes, or leaves a graph that does not run.
        ValueError: `dim` is another axis.

    Examples:
        >>> check_rule(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()), torch.randn(3, 8, 5, 5))
        >>> check_rule(lambda x, y: x * y.sigmoid(), torch.randn(4, 6), torch.randn(4, 6))
    """
    model = Between(operator, *examples, dim=dim)
    check_model(model, model.inputs(), plans=plans, prunable=prunable, **options)


def check_model(
    model: nn.Module,
    inputs: Tensor | Inputs,
    *,
    plans: int = 10,
    prunable: bool = True,
    **options: Any,
) -> None:
    """Check that a model is pruned exactly by random plans.

    Args:
        model: Any traceable module; a copy in double precision is tested, with random statistics
            and biases in place of zeros and ones, which hide mistakes.
        inputs: Its positional inputs.
        plans: How many random plans to try.
        prunable: Whether any unit can be removed; if so, one must.
        options: For `rbpfx.analyze`.

    Raises:
        AssertionError: A law is broken; says which, and by which plan.
        RuleError: A rule contradicts the shapes, or leaves a graph that does not run.
    """
    model, inputs = _in_double(model, inputs)
    removed = 0
    for seed in range(plans):
        compiled = compile_random(model, inputs, seed, **options)
        removed += compiled.removed
        for law in LAWS:
            _hold(law, compiled, inputs, seed)
    assert removed or not prunable, _why_nothing(compiled.analysis)


class RuleTestCase:
    """A test per law: inherit, say what to test, and let pytest collect it.

    Attributes:
        dim: The channel axis of the examples: 1 or the last.
        plans: How many random plans to try.
        options: For `rbpfx.analyze`.

    Examples:
        >>> class TestGate(RuleTestCase):
        ...     def operator(self):
        ...         return lambda x, y: x * y.sigmoid()
        ...
        ...     def examples(self):
        ...         return torch.randn(4, 6), torch.randn(4, 6)
    """

    dim: int = 1
    plans: int = 10
    options: dict[str, Any] = {}  # noqa: RUF012  (never modified)

    def operator(self) -> Operator:
        """The module or function under test."""
        raise NotImplementedError

    def examples(self) -> Inputs:
        """Inputs of the operator."""
        raise NotImplementedError

    def model(self) -> tuple[nn.Module, Inputs]:
        """The network under test and its inputs: the operator between layers by default."""
        model = Between(self.operator(), *self.examples(), dim=self.dim)
        return model, model.inputs()

    def test_something_is_removed(self) -> None:
        """The rule does not pin everything."""
        compiled = [compiled for compiled, _, _ in self._compiled()]
        assert any(c.removed for c in compiled), _why_nothing(compiled[0].analysis)

    def test_sliced_equals_masked(self) -> None:
        """Outputs and gradients, in both modes."""
        self._check(check_both_modes)

    def test_pruned_graph_is_pruned_again(self) -> None:
        """The rule understands what its own `rewrite` leaves."""
        self._check(check_again)

    def test_useless_units_go(self) -> None:
        """Removing also what a plan leaves useless changes nothing."""
        self._check(check_close)

    def test_costs_are_predicted(self) -> None:
        """The multiply-accumulates that the analysis predicts are those of the sliced graph."""
        self._check(check_costs)

    def test_multipliers_are_folded(self) -> None:
        """Constants at the reads go into the weights there."""
        self._check(check_multipliers)

    def test_the_empty_plan_changes_nothing(self) -> None:
        """Not a bit."""
        self._check(check_identity)

    def _check(self, law: Law) -> None:
        for compiled, inputs, seed in self._compiled():
            _hold(law, compiled, inputs, seed)

    def _compiled(self) -> Iterable[tuple[Compiled, Inputs, int]]:
        model, inputs = _in_double(*self.model())
        for seed in range(self.plans):
            yield compile_random(model, inputs, seed, **self.options), inputs, seed


class Between(nn.Module):
    """An operator between layers that produce its inputs and layers that read its results.

    Args:
        operator: A module or function of tensors.
        examples: Inputs of the operator.
        dim: The channel axis: 1 or the last.
    """

    def __init__(self, operator: Operator, *examples: Tensor, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim
        self.examples = examples
        self.producers = nn.ModuleList(
            _pointwise(3, e.shape[dim], e.ndim, dim % e.ndim) for e in examples
        )
        self.operator = operator
        with torch.no_grad():
            results = tree_leaves(operator(*(e.to(_dtype(operator)) for e in examples)))
        dims = [min(dim, r.ndim - 1) % r.ndim for r in results]
        self.readers = nn.ModuleList(
            _pointwise(r.shape[d], 4, r.ndim, d) for r, d in zip(results, dims, strict=True)
        )

    def inputs(self) -> Inputs:
        """Inputs of this network."""
        return tuple(
            torch.randn([3 if d == self.dim % e.ndim else n for d, n in enumerate(e.shape)])
            for e in self.examples
        )

    def forward(
        self, a: Tensor, b: Tensor | None = None, c: Tensor | None = None, d: Tensor | None = None
    ) -> list[Tensor]:
        """The results of all readers."""
        given = [x for x in (a, b, c, d) if x is not None]
        results = self.operator(*(p(x) for p, x in zip(self.producers, given, strict=True)))
        if len(self.readers) == 1:
            return [self.readers[0](results)]
        return [reader(results[i]) for i, reader in enumerate(self.readers)]


def _pointwise(inputs: int, outputs: int, ndim: int, dim: int) -> nn.Module:
    """A layer from channels to channels along one axis."""
    if dim == ndim - 1:
        return nn.Linear(inputs, outputs)
    if dim == 1 and ndim <= 5:
        layer: nn.Module = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[ndim - 3](inputs, outputs, 1)
        return layer
    raise ValueError(f"the channel axis must be 1 or the last one, not {dim} of {ndim}")


def _in_double(model: nn.Module, inputs: Tensor | Inputs) -> tuple[nn.Module, Inputs]:
    given = (inputs,) if isinstance(inputs, Tensor) else inputs
    model = copy.deepcopy(model).double().eval()
    randomize(model)
    return model, tuple(x.double() if x.is_floating_point() else x for x in given)


def _dtype(operator: Operator) -> torch.dtype:
    parameters = operator.parameters() if isinstance(operator, nn.Module) else iter(())
    return next((p.dtype for p in parameters), torch.get_default_dtype())


def _hold(law: Law, compiled: Compiled, inputs: Inputs, seed: int) -> None:
    try:
        law(compiled, inputs, seed)
    except AssertionError as error:
        said = str(error).partition("\n")[0]
        raise AssertionError(
            f"{law.__name__} fails for the plan of seed {seed}, {compiled.plan.kept}: {said}"
        ) from error


def _why_nothing(analysis: Analysis) -> str:
    reasons = "; ".join(f"{axis.name}: {axis.reason}" for axis in analysis.frozen)
    return f"no plan removed anything. What stays, and why: {reasons}"


__all__ = [
    "Between",
    "RuleTestCase",
    "check_model",
    "check_rule",
    "random_plan",
    "randomize",
]
