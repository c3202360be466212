"""Closed forms agree with torch's own fake tensors, to the stride and the storage."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torchvision.ops import StochasticDepth

from rbpfx.graph.metadata import fake_inputs, fake_mode
from rbpfx.graph.shapes import call_value, module_value


def layouts(*shape: int) -> list[Tensor]:
    """A tensor of a shape in several types and layouts."""
    x = torch.zeros(shape)
    made = [x, x.double(), x.bfloat16(), x.long()]
    made.append(torch.zeros(*shape[:-1], 2 * shape[-1])[..., ::2])
    if len(shape) > 1:
        made.append(x.transpose(-1, -2).contiguous().transpose(-1, -2))
        made.append(torch.zeros(shape[0], 2 * shape[1], *shape[2:]).chunk(2, 1)[1])
    if len(shape) == 4:
        made.append(x.contiguous(memory_format=torch.channels_last))
    return made


SHAPES = [(6,), (2, 4), (1, 4), (2, 4, 6), (2, 4, 8, 6), (1, 4, 8, 6), (2, 4, 1, 1), (3, 1, 8, 6)]
INPUTS = list(itertools.chain(*(layouts(*shape) for shape in SHAPES)))


def is_known(
    call: Callable[..., Any], form: Callable[[Any, Any], Any], *args: Any, **kwargs: Any
) -> bool:
    """Whether a form knows what a call returns; checks that it then says what torch says."""
    mode = fake_mode()
    args, kwargs = fake_inputs(mode, (args, kwargs))
    known = form(args, kwargs)
    try:
        with mode, torch.no_grad():
            expected = call(*args, **kwargs)
    except Exception:
        assert known is None, "torch refuses the call"
        return False
    if known is None:
        return False
    inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    assert type(known) is type(expected)
    for ours, theirs in zip(tree_leaves(known), tree_leaves(expected), strict=True):
        if isinstance(theirs, Tensor):
            assert description(ours, inputs) == description(theirs, inputs)
        else:
            assert ours == theirs
    return True


def description(value: Tensor, inputs: list[Tensor]) -> tuple[Any, ...]:
    """All that metadata says about a value, and which inputs it is or shares memory with."""
    memory = value.untyped_storage()._cdata
    return (
        value.shape,
        value.stride(),
        value.storage_offset(),
        value.dtype,
        value.device,
        value.requires_grad,
        [value is x for x in inputs],
        [memory == x.untyped_storage()._cdata for x in inputs],
    )


MODULES = [
    *(kind() for kind in (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.SiLU, nn.Mish)),
    *(kind() for kind in (nn.GELU, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Hardtanh)),
    *(kind() for kind in (nn.Hardswish, nn.Hardsigmoid, nn.Identity)),
    *(kind(inplace=True) for kind in (nn.ReLU, nn.SiLU, nn.ELU, nn.Hardswish, nn.Hardtanh)),
    nn.Dropout(0.5),
    nn.Dropout2d(0.5),
    StochasticDepth(0.5, "row"),
    nn.Softmax(-1),
    nn.LogSoftmax(1),
    nn.BatchNorm1d(4),
    nn.BatchNorm2d(4),
    nn.BatchNorm2d(4, affine=False),
    nn.BatchNorm2d(4, dtype=torch.float64),
    nn.GroupNorm(2, 4),
    nn.GroupNorm(2, 4, affine=False),
    nn.LayerNorm(6),
    nn.LayerNorm((8, 6), bias=False),
    nn.Linear(6, 5),
    nn.Linear(4, 5, bias=False),
    nn.Conv1d(4, 6, 3, stride=2, padding=1),
    nn.Conv2d(4, 6, 3, padding=(1, 0), dilation=2),
    nn.Conv2d(4, 6, 1, bias=False),
    nn.Conv2d(4, 6, (3, 1), groups=2, stride=(2, 1)),
    nn.Conv2d(1, 6, 3, dtype=torch.float64),
    nn.MaxPool2d(3, stride=2, padding=1),
    nn.AvgPool2d((2, 3), 2),
    nn.AdaptiveAvgPool2d((3, 1)),
    nn.AdaptiveAvgPool2d(1),
]

# Torch has to be asked about these.
OTHERS = [
    nn.BatchNorm2d(4, track_running_stats=False),
    nn.Conv2d(4, 6, 3, padding="same"),
    nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last),
    nn.MaxPool2d(3, 2, ceil_mode=True),
    nn.MaxPool2d(2, return_indices=True),
    nn.AdaptiveAvgPool2d((None, 2)),
    nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)),
    nn.Softmax(None),
]


@pytest.mark.parametrize("module", [*MODULES, *OTHERS], ids=str)
def test_modules(module: nn.Module) -> None:
    module.eval()
    known = [is_known(module, lambda *a: module_value(module, *a), x) for x in INPUTS]
    assert any(known) == any(module is m for m in MODULES)


def test_channels_may_come_last() -> None:
    x = torch.zeros(2, 4, 8, 6).contiguous(memory_format=torch.channels_last)
    for module in (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(4).eval(), nn.MaxPool2d(2), nn.GELU()):
        assert is_known(module, lambda *a, module=module: module_value(module, *a), x)
    for other in (x, torch.zeros(4, 1, 1), 2):
        assert holds(operator.mul, x, other)
        assert holds(operator.iadd, x, other)


def test_modules_in_train_mode_are_taken_as_in_eval_mode() -> None:
    drop = nn.Dropout(0.5)
    x = fake_inputs(fake_mode(), torch.zeros(3))
    assert module_value(drop, (x,), {}) is x


def test_hooks_and_instance_forwards_are_asked() -> None:
    x = fake_inputs(fake_mode(), torch.zeros(2, 3))
    hooked, patched = nn.Linear(3, 3), nn.Linear(3, 3)
    hooked.register_forward_hook(lambda *_: None)
    patched.forward = lambda x: x[0]  # type: ignore[method-assign]
    assert module_value(hooked, (x,), {}) is module_value(patched, (x,), {}) is None


def test_autocast_is_asked() -> None:
    x = fake_inputs(fake_mode(), torch.zeros(2, 3))
    with torch.autocast("cpu"):
        assert module_value(nn.Linear(3, 3), (x,), {}) is None


UNARY = [F.relu, F.gelu, F.silu, F.hardswish, F.sigmoid, torch.sigmoid, torch.exp, torch.sqrt]
UNARY += ["relu", "sigmoid", "tanh", "exp", "abs", operator.neg]


@pytest.mark.parametrize("target", UNARY)
def test_functions_element_by_element(target: Any) -> None:
    assert any(holds(target, x) for x in INPUTS)


BINARY = [operator.add, operator.mul, operator.truediv, torch.sub, torch.div, "add", "mul"]
BINARY += [operator.iadd, operator.imul, operator.itruediv, "add_", "mul_"]


@pytest.mark.parametrize("target", BINARY)
def test_two_operands(target: Any) -> None:
    operands = [*layouts(2, 4, 8, 6), *layouts(1, 4, 1, 1), *layouts(8, 6), torch.zeros(())]
    for x, y in itertools.product(operands, [*operands, 2, 0.5, True, 1j, None]):
        holds(target, x, y)
    for number in (2, 0.5, True):
        if callable(target):
            holds(target, number, INPUTS[0])
    plain = torch.zeros(2, 4, 8, 6)
    assert all(holds(target, plain, y) for y in (plain, plain[0], torch.zeros(4, 1, 1), 2, 0.5))


CALLS: list[tuple[Any, Any, dict[str, Any]]] = [
    (F.relu, (), {"inplace": True}),
    (F.softmax, (), {"dim": 1}),
    ("softmax", (-1,), {}),
    (F.layer_norm, ((6,),), {}),
    (F.layer_norm, ((8, 6), torch.ones(8, 6)), {}),
    (F.linear, (torch.ones(3, 6),), {}),
    (F.linear, (nn.Parameter(torch.ones(3, 4)), torch.ones(3)), {}),
    (F.adaptive_avg_pool2d, (1,), {}),
    (F.adaptive_avg_pool2d, ((2, 3),), {}),
    ("view", (-1,), {}),
    ("reshape", (-1, 2), {}),
    (torch.reshape, ((1, -1),), {}),
    ("flatten", (1,), {}),
    (torch.flatten, (), {"start_dim": 1}),
    ("unflatten", (1, (2, -1)), {}),
    ("permute", (0, 2, 3, 1), {}),
    (torch.permute, ((1, 0),), {}),
    ("transpose", (-1, -2), {}),
    ("unsqueeze", (1,), {}),
    ("squeeze", (), {}),
    ("squeeze", (-1,), {}),
    ("expand", (3, -1, -1, -1), {}),
    ("chunk", (2, 1), {}),
    (torch.chunk, (2,), {"dim": -1}),
    ("split", (3,), {"dim": 1}),
    (torch.split, ([1, 3], 1), {}),
    ("narrow", (-1, 1, 2), {}),
    ("unbind", (1,), {}),
    ("contiguous", (), {}),
    (operator.getitem, (0,), {}),
    (operator.getitem, ((slice(None), slice(0, 2), None, ..., -1),), {}),
    ("size", (), {}),
    ("size", (-1,), {}),
    (getattr, ("shape",), {}),
    (getattr, ("dtype",), {}),
    (getattr, ("device",), {}),
]


@pytest.mark.parametrize(("target", "args", "kwargs"), CALLS)
def test_calls(target: Any, args: Any, kwargs: Any) -> None:
    assert any(holds(target, x, *args, **kwargs) for x in INPUTS)


def test_indices_that_are_tensors_are_asked() -> None:
    assert not any(holds(operator.getitem, x, torch.zeros(2, dtype=torch.long)) for x in INPUTS)
    assert not any(holds(operator.getitem, x, [0, 1]) for x in INPUTS)


@pytest.mark.parametrize("dim", [0, 1, -1, 3, -4])
def test_concatenation(dim: int) -> None:
    tensors = [*layouts(2, 4, 8, 6), *layouts(2, 1, 8, 6), torch.zeros(0)]
    known = [holds(torch.cat, pair, dim) for pair in itertools.product(tensors, tensors)]
    assert any(known)
    plain = [torch.zeros(2, n, 8, 6) for n in (1, 2, 3)]
    assert holds(torch.cat, plain, dim=1)


@pytest.mark.parametrize("target", [operator.matmul, torch.matmul, "matmul"])
def test_products_of_matrices(target: Any) -> None:
    left = [*layouts(2, 4, 6), *layouts(2, 3, 4, 6), *layouts(4, 6), *layouts(6)]
    right = [*layouts(2, 6, 5), *layouts(2, 3, 6, 4), *layouts(1, 6, 5), *layouts(6, 4)]
    known = [holds(target, x, y) for x, y in itertools.product(left, right)]
    assert any(known)
    x = torch.zeros(2, 3, 5, 4)
    assert holds(target, x, x.transpose(-1, -2))


def holds(target: Any, *args: Any, **kwargs: Any) -> bool:
    """`is_known` for a function, or for the method of a name."""
    method = operator.methodcaller
    call = target if callable(target) else lambda x, *a, **k: method(target, *a, **k)(x)
    return is_known(call, lambda a, k: call_value(target, a, k), *args, **kwargs)
