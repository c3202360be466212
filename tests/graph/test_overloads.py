"""Overloads: spelled as torch calls that export to the same overloads again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.nn import functional as F

from rbpfx.graph.capture import trace
from rbpfx.graph.overloads import named_arguments, spellings
from rbpfx.graph.rules.base import find_rule

Function = Callable[[Tensor], Any]

# What a model may write, on (2, 4, 6, 6).
CALLS: dict[str, Function] = {
    "slice": lambda x: x[:, 1:3, ::2, -2:],
    "slice of the last axis": lambda x: torch.ops.aten.slice.Tensor(x, -2, 1, 5),
    "all of it": lambda x: x[...],
    "newaxis and int": lambda x: x[:, None, 1],
    "index": lambda x: x[:, [0, 2]],
    "two indices": lambda x: x[:, :, torch.tensor([0, 1]), torch.tensor([2, 3])],
    "transposes": lambda x: x[0, 0].T + x.mT[0, 0],
    "permute": lambda x: x.permute(0, 2, 3, 1).contiguous(),
    "view": lambda x: x.view(2, 4, 36),
    "reshape": lambda x: x.flatten(1).unflatten(1, (4, -1)).reshape(2, -1),
    "squeeze": lambda x: x[:, :1].squeeze(1).unsqueeze(-1).squeeze(),
    "expand": lambda x: x[:, :1].expand(-1, 3, 6, 6) + x.new_zeros(3, 1, 1).expand(3, 6, 6),
    "chunk": lambda x: x.chunk(2, 1)[0] * x.split([1, 3], 1)[0] + x.split(2, 1)[1],
    "unbind": lambda x: torch.stack(x.unbind(1), 2),
    "cat": lambda x: torch.cat([x, x.neg()], 1),
    "pad": lambda x: F.pad(x, (1, 2), value=3.0) + F.pad(x[0], (1, 2), mode="circular"),
    "constant pad": lambda x: torch.constant_pad_nd(x, [1, 0, 0, 1], 2.0),
    "roll": lambda x: torch.roll(x, 3) + torch.roll(x, (1, 2), (2, 3)),
    "flip and repeat": lambda x: x.flip(1).repeat(1, 2, 1, 1).repeat_interleave(2, 1),
    "shuffles": lambda x: F.pixel_unshuffle(F.pixel_shuffle(F.channel_shuffle(x, 2), 2), 2),
    "unfold": lambda x: F.fold(F.unfold(x, 3, stride=3), (6, 6), 3, stride=3),
    "unfold of an axis": lambda x: x.unfold(2, 3, 2),
    "to": lambda x: x.to(torch.float64).to("cpu").float().to(x.dtype),
    "factories": lambda x: torch.arange(6) * torch.full((6,), 0.5) + torch.zeros_like(x),
    "arithmetic": lambda x: (2 - x).div(3, rounding_mode="floor") + torch.add(x, x, alpha=2) ** 2,
    "in place": lambda x: x.clone().mul_(2).add_(x).clamp_(-1, 1),
    "in-place activations": lambda x: F.hardswish(F.silu(F.relu6(x * 2, True), True), True),
    "write": lambda x: _written(x.clone()),
    "bits": lambda x: ((x > 0) & (x < 1)) | (x < -1),
    "activations": lambda x: F.gelu(x, approximate="tanh") + F.leaky_relu(x, 0.2) + F.elu(x, 0.5),
    "more activations": lambda x: F.hardtanh(x, -2, 2) + F.softplus(x, 2) + F.glu(x, 1).sum(),
    "softmax": lambda x: x.softmax(1) + F.log_softmax(x, -1) + x.cumsum(2),
    "pooling": lambda x: F.max_pool2d(x, 2) + F.avg_pool2d(x, 2, ceil_mode=True),
    "pooling with indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "adaptive pooling": lambda x: F.adaptive_avg_pool2d(x, 2) + F.adaptive_max_pool2d(x, 2),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2),
    "interpolate linearly": lambda x: F.interpolate(x, (3, 5), mode="bilinear", antialias=True),
    "interpolate exactly": lambda x: F.interpolate(x[0], 12, mode="nearest-exact"),
    "interpolate cubically": lambda x: F.interpolate(x, 9, mode="bicubic", align_corners=True),
    "norms": lambda x: (
        F.normalize(x) + torch.linalg.vector_norm(x, 1, 1, True) + x.norm(2, 1, True)
    ),
    "reductions": lambda x: x.mean((2, 3)) + x.amax((2, 3)) + x.std((2, 3)) + x.max(3)[0].sum(2),
    "matmul": lambda x: x @ x.mT + torch.einsum("bchw,bcvw->bchv", x, x),
    "addmm": lambda x: torch.addmm(x[0, 0], x[0, 1], x[0, 2], beta=0.5),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True, scale=0.3),
    "gather": lambda x: x.gather(1, (x > 0).long()) + x.index_select(1, torch.arange(4)),
    "where": lambda x: torch.where(x > 0, x, 0.0).masked_fill(x > 1, -1.0),
    "normalisations": lambda x: F.layer_norm(x, (6,)) + F.group_norm(x, 2) + F.instance_norm(x),
    "convolutions": lambda x: F.conv2d(x, x.new_ones(2, 4, 3, 3), padding="same", dilation=2),
    "transposed convolutions": lambda x: F.conv_transpose2d(x, x.new_ones(4, 2, 3, 3), stride=2),
    "embedding": lambda x: F.embedding((x > 0).long(), torch.arange(6.0).view(2, 3), padding_idx=1),
    "sort": lambda x: x.sort(1)[0] + x.topk(4, 1)[0],
}


def _written(x: Tensor) -> Tensor:
    x[:, :2] = x[:, 2:]
    x[:, 3] = 0
    return x


class Calling(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


# Of which torch has several that do the same.
SYNONYMS = {
    "aten.__and__.Tensor": "aten.bitwise_and.Tensor",
    "aten.__or__.Tensor": "aten.bitwise_or.Tensor",
    "aten.constant_pad_nd.default": "aten.pad.default",
    "aten.to.dtype_layout": "aten.to.device",
}
SKIPPED = frozenset(
    f"aten.{name}.default"
    for name in ("lift_fresh_copy", "clone", "detach", "detach_", "_assert_tensor_metadata")
)


def takes_all(node: fx.Node) -> bool:
    """Whether this is a slice of a whole axis, which torch 2.8 records."""
    return node.target is torch.ops.aten.slice.Tensor and node.args[2:] in ((), (0, sys.maxsize))


def operators(model: nn.Module, x: Tensor) -> list[str]:
    """What torch.export records of a model."""
    nodes = torch.export.export(model, (x,)).graph.nodes
    calls = [n for n in nodes if isinstance(n.target, OpOverload) and not takes_all(n)]
    names = [str(n.target) for n in calls]
    return [SYNONYMS.get(name, name) for name in names if name not in SKIPPED]


@pytest.mark.parametrize("name", CALLS)
def test_exporting_gives_the_operators_back(name: str) -> None:
    model, x = Calling(CALLS[name]), torch.randn(2, 4, 6, 6)
    gm = trace(torch.export.export(model, (x,)))
    assert not [n for n in gm.graph.nodes if isinstance(n.target, OpOverload)]
    assert torch.equal(model(x), gm(x))
    assert operators(gm, x) == operators(model, x)


def spelled(overload: OpOverload, *args: Any, **kwargs: Any) -> list[Any]:
    return list(spellings(overload, named_arguments(overload, args, kwargs)))


def test_python_functions_get_arguments_by_name() -> None:
    x = fx.Graph().placeholder("x")
    # F.elu has no scale, and its third argument is another one.
    assert all(c.target is not F.elu for c in spelled(torch.ops.aten.elu.default, x, 1.0, 2.0))
    (call,) = (c for c in spelled(torch.ops.aten.elu.default, x, 0.5, 1.0) if c.target is F.elu)
    assert call.args == (x, 0.5)
    (call,) = spelled(torch.ops.aten.hardswish_.default, x)
    assert call == ("call_function", F.hardswish, (x, True), {})


def test_defaults_at_the_end_are_left_out() -> None:
    x = fx.Graph().placeholder("x")
    calls = spelled(torch.ops.aten.roll.default, x, [1], [])
    assert calls and all(call.args == (x, [1]) for call in calls)


def test_operators_of_others_are_called_by_their_packet() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, rois: Tensor) -> Tensor:
            return torch.ops.torchvision.roi_align(x, rois, 1.0, 2, 2, 2, False)

    inputs = torch.randn(1, 4, 6, 6), torch.tensor([[0.0, 1, 1, 4, 4]])
    gm = trace(torch.export.export(Model(), inputs))
    node = next(n for n in gm.graph.nodes if n.target is torch.ops.torchvision.roi_align)
    assert find_rule(node, gm) is not None
    assert torch.equal(Model()(*inputs), gm(*inputs))
