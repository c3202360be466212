"""The laws of `rbpfx.testing` hold for right rules, and tell what is wrong with wrong ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import rbpfx
from rbpfx.errors import RuleError
from rbpfx.graph.rules import base
from rbpfx.rules import Combine, Elementwise, Label, Labels, PerChannel, Pinned, Propagation
from rbpfx.testing import RuleTestCase, check_model, check_rule, randomize


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))


class Snake(nn.Module):
    """x + sin(a x)^2 / a with a frequency per channel, as a module with code of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.frequency = nn.Parameter(torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == self.channels
        a = self.frequency.view(-1, *(1 for _ in x.shape[2:]))
        return x + torch.sin(a * x) ** 2 / a


class Standardize(nn.Module):
    """Subtracts the mean over channels: not element-wise at all."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True)


class Pair(nn.Module):
    """Two inputs, two results."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x * y.sigmoid(), x - y


@fx.wrap
def cubed(x: Tensor, scale: Tensor) -> Tensor:
    return x**3 * scale


def snake(rule: rbpfx.Rule, examples: Tensor | None = None, **options: Any) -> None:
    rbpfx.register_rule(Snake, rule)
    examples = torch.randn(3, 6, 4, 4) if examples is None else examples
    check_rule(Snake(6), examples, plans=4, **options)


@pytest.mark.parametrize("shape", [(3, 6, 4, 4), (3, 6, 5), (3, 6)])
def test_a_right_rule_passes(shape: tuple[int, ...]) -> None:
    snake(PerChannel("frequency", size="channels"), torch.randn(shape))


def test_a_rule_that_forgets_a_parameter_fails() -> None:
    with pytest.raises((AssertionError, RuleError)):
        snake(Elementwise())


def test_a_rule_that_forgets_an_attribute_fails() -> None:
    with pytest.raises(RuleError, match="does not run"):
        snake(PerChannel("frequency"))


def test_a_rule_that_claims_too_much_fails() -> None:
    rbpfx.register_rule(Standardize, Elementwise())
    with pytest.raises(AssertionError, match=r"fails for the plan of seed 0.*: outputs: "):
        check_rule(Standardize(), torch.randn(3, 6, 4))


def test_a_rule_that_pins_everything_is_told_apart() -> None:
    rbpfx.register_rule(Standardize, Pinned("its mean runs over the channels"))
    with pytest.raises(AssertionError, match="its mean runs over the channels"):
        check_rule(Standardize(), torch.randn(3, 6, 4), plans=2)
    check_rule(Standardize(), torch.randn(3, 6, 4), plans=2, prunable=False)


def test_a_pinned_operator_is_not_unknown() -> None:
    model = nn.Sequential(nn.Linear(3, 6), Standardize(), nn.Linear(6, 2))
    rbpfx.register_rule(Standardize, Pinned("a choice"))
    analysis = rbpfx.analyze(rbpfx.trace(model, torch.zeros(2, 3)))
    assert not analysis.unknown
    assert [axis.reason for axis in analysis.frozen] == ["a choice", "output of the model"]


def test_pinned_keeps_the_tensors_of_a_module() -> None:
    model = nn.Sequential(nn.Linear(3, 6), Snake(6), nn.Linear(6, 2))
    rbpfx.register_rule(Snake, Pinned("a choice"))
    assert not rbpfx.analyze(rbpfx.trace(model, torch.zeros(2, 3))).groups


def test_functions_have_rules() -> None:
    rbpfx.register_rule(cubed, PerChannel("scale", dim=-1))
    scale = nn.Parameter(torch.rand(6) + 0.5)

    class Cubed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = scale

        def forward(self, x: Tensor) -> Tensor:
            return cubed(x, self.scale)

    check_rule(Cubed(), torch.randn(3, 5, 6), dim=-1, plans=3)


def test_several_inputs_and_results() -> None:
    check_rule(Pair(), torch.randn(3, 6, 4), torch.randn(3, 6, 4), plans=3)


def test_a_rule_class_is_registered_by_decoration() -> None:
    @rbpfx.register_rule(Snake)
    class SnakeRule(PerChannel):
        def __init__(self) -> None:
            super().__init__("frequency", size="channels")

    assert isinstance(SnakeRule(), PerChannel)
    check_rule(Snake(6), torch.randn(3, 6, 4), plans=2)


def test_a_rule_is_replaced() -> None:
    rbpfx.register_rule(nn.ReLU, Pinned("not today"))
    with pytest.raises(AssertionError, match="not today"):
        check_rule(nn.ReLU(), torch.randn(3, 6), plans=1)


@pytest.mark.parametrize(
    ("operator", "rule"), [(nn.ReLU(), Elementwise()), (5, Elementwise()), (nn.ReLU, Elementwise)]
)
def test_what_is_no_operator_or_no_rule_is_refused(operator: Any, rule: Any) -> None:
    with pytest.raises(RuleError, match=r"registered for|instance of"):
        rbpfx.register_rule(operator, rule)


def test_a_label_of_the_wrong_shape_is_refused() -> None:
    class Wrong(rbpfx.Rule):
        def propagate(self, node: fx.Node, state: Propagation) -> Labels:
            return Label((1, 2))

    rbpfx.register_rule(Snake, Wrong())
    with pytest.raises(RuleError, match="Wrong does not fit Snake"):
        check_rule(Snake(6), torch.randn(3, 6))


def test_a_channel_axis_must_be_the_first_or_the_last() -> None:
    with pytest.raises(ValueError, match="the channel axis must be 1 or the last"):
        check_rule(nn.ReLU(), torch.randn(2, 3, 4, 5), dim=2)


def test_a_whole_model_is_checked() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    check_model(model, torch.randn(2, 3, 6, 6), plans=3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class TestCombination(RuleTestCase):
    """The abstract test case on a function of two tensors."""

    plans = 3

    def operator(self) -> Any:
        return lambda x, y: x * y.sigmoid()

    def examples(self) -> tuple[Tensor, ...]:
        return torch.randn(3, 6), torch.randn(3, 6)


class TestNetwork(RuleTestCase):
    """The abstract test case on a network, with options."""

    plans = 2
    options = {"unit": "feature"}  # noqa: RUF012

    def model(self) -> tuple[nn.Module, tuple[Tensor, ...]]:
        layers = nn.Conv2d(3, 6, 3), nn.Flatten(), nn.Linear(24, 5), nn.ReLU(), nn.Linear(5, 2)
        return nn.Sequential(*layers), (torch.randn(3, 3, 4, 4),)


def test_an_abstract_test_case_says_what_is_missing() -> None:
    with pytest.raises(NotImplementedError):
        RuleTestCase().test_costs_are_predicted()


def test_randomized_values_hide_nothing() -> None:
    module = nn.Sequential(nn.BatchNorm2d(4), nn.Linear(4, 4))
    nn.init.zeros_(module[1].weight)
    module[1].register_buffer("table", torch.zeros(4))
    randomize(module)
    for tensor in (*module.parameters(), module[0].running_mean, module[0].running_var):
        assert len(tensor.unique()) == tensor.numel()
    assert (module[0].running_var > 0).all()
    assert (module[1].table == 0).all()


def test_combine_is_reusable() -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.logaddexp(x, y)

    rbpfx.register_rule(Sum, Combine())
    check_rule(Sum(), torch.randn(3, 6, 4), torch.randn(3, 6, 4), plans=3)


def test_the_page_on_writing_a_rule_runs() -> None:
    page = (Path(__file__).parents[1] / "docs" / "writing-a-rule.md").read_text()
    names: dict[str, Any] = {"__name__": "page"}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(code, names)
    case = names["TestClippedReLU"]()
    tests = [name for name in dir(case) if name.startswith("test_")]
    for name in tests:
        getattr(case, name)()
    assert len(tests) >= 7
