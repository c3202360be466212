"""Packing for CPUs: layers run by oneDNN with weights laid out for it, activations fused.

torch's eager convolutions lay out their weights anew in every call, and its linear maps do not use
oneDNN. A packed layer keeps the weight in oneDNN's own layout; the activation that follows, and the
addition of a shortcut, happen while the result is in the registers. Packed layers run on CPUs only
and know no gradients; `unpack` brings the plain graph back, for exports, conversion and analysis.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from rbpfx.deployment.activations import Activation, activation_of
from rbpfx.deployment.inplace import Sharing
from rbpfx.deployment.nodes import (
    LINEAR,
    are_alike,
    copied,
    module_calls,
    replace,
    set_module,
    with_weights,
)
from rbpfx.errors import InputError
from rbpfx.graph.calls import modifies_in_place, module_of
from rbpfx.latency.operators import Call, Operator, OperatorTimes, filled

_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_LINEAR = torch.ops.mkldnn._linear_pointwise
_CONVOLUTION = torch.ops.mkldnn._convolution_pointwise
_FUSED = frozenset("relu sigmoid tanh hardtanh leaky_relu gelu swish hardswish".split())
_FUSED_AFTER_ADDITION = frozenset({"relu"})


class PackedLayer(nn.Module):
    """A layer whose weight is in the layout of oneDNN.

    Args:
        layer: The plain layer; its bias is shared, its weight copied.

    Attributes:
        activation: What is fused into it.
    """

    bias: Tensor | None

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.training = False
        self.activation: Activation | None = None
        bias = layer.bias
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.weight = self._packed(layer.weight.detach())

    def _packed(self, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def plain(self) -> nn.Module:
        """The layer with a weight in torch's layout, without what was fused into it."""
        raise NotImplementedError

    def _post_operation(self) -> tuple[str, list[float], str]:
        """The activation as oneDNN's operators take it."""
        activation = self.activation
        if activation is None:
            return "none", [], ""
        return activation.name, list(activation.scalars), activation.options.get("approximate", "")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight.to_dense()

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        # As a buffer, so that torch tells of missing and wrongly shaped weights.
        dense = self.weight.to_dense()
        del self.weight
        self.register_buffer("weight", dense)
        super()._load_from_state_dict(state, prefix, *rest)
        loaded = self._buffers.pop("weight")
        assert loaded is not None
        self.weight = self._packed(loaded)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "weight": self.weight.to_dense()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.weight = self._packed(state["weight"])


class PackedLinear(PackedLayer):
    """`nn.Linear` and an activation."""

    def _packed(self, weight: Tensor) -> Tensor:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        return packed

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        _require_no_gradients(x)
        layer = (self.weight, self.bias)
        result: Tensor = _LINEAR.default(x, *layer, *self._post_operation())
        return result

    def plain(self) -> nn.Module:
        """The linear map alone."""
        weight = self.weight.to_dense()
        layer = nn.Linear(weight.shape[1], weight.shape[0], self.bias is not None, device="meta")
        return with_weights(layer, weight, self.bias)


class PackedConv2d(PackedLayer):
    """`nn.Conv2d`, the addition of another value, and an activation; channels last."""

    def __init__(self, layer: nn.Conv2d) -> None:
        padding = _padding(layer)
        assert padding is not None
        self.settings = (padding, layer.stride, layer.dilation, layer.groups)
        super().__init__(layer)

    def _packed(self, weight: Tensor) -> Tensor:
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        packed: Tensor = reorder(weight.to_mkldnn(), *self.settings, None)
        return packed

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """(N, in, H, W) to (N, out, H', W'); `other` is added to it."""
        _require_no_gradients(x, other)
        x = x.contiguous(memory_format=torch.channels_last)
        layer = (self.weight, self.bias, *self.settings)
        if other is None:
            result: Tensor = _CONVOLUTION.default(x, *layer, *self._post_operation())
        elif other.shape[2:].numel() == 1:
            # torch 2.8 finds no layout for an addition to maps of a single position.
            result = _CONVOLUTION.default(x, *layer, "none", [], "") + other
            if self.activation is not None:
                applied = self.activation
                result = applied.function(result, *applied.scalars, **applied.options)
        else:
            other = other.contiguous(memory_format=torch.channels_last)
            after = None if self.activation is None else self.activation.name
            result = _CONVOLUTION.binary(x, other, *layer, "add", 1.0, after, [], "")
        return result

    def plain(self) -> nn.Module:
        """The convolution alone."""
        weight = self.weight.to_dense()
        padding, stride, dilation, groups = self.settings
        outputs, inputs, *kernel = weight.shape
        layer = nn.Conv2d(
            inputs * groups,
            outputs,
            _pair(kernel),
            _pair(stride),
            padding,
            _pair(dilation),
            groups,
            self.bias is not None,
            device="meta",
        )
        return with_weights(layer, weight, self.bias)


def pack(gm: fx.GraphModule) -> None:
    """Let oneDNN run layers where that is faster on this machine; the graph is changed in place.

    Packed layers are no faster everywhere: calls of small ones take longer to begin, linear maps of
    one vector wait for their weights, and for some widths oneDNN picks a kernel that takes a
    hundred times as long. So every layer is timed both ways, at the shapes of the metadata.
    """
    pairs = {}
    for node in module_calls(gm, *LINEAR, nn.Conv2d):
        layer = module_of(node, gm)
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and _can_pack(layer, node):
            packed = PackedLinear(layer) if isinstance(layer, nn.Linear) else PackedConv2d(layer)
            pairs[node] = (_operator(layer, layer, node), _operator(packed, layer, node), packed)
    times = OperatorTimes(torch.device("cpu"))
    times.measure(operator for *both, _ in pairs.values() for operator in both)
    for node, (plain, other, packed) in pairs.items():
        if times[other.key] < times[plain.key]:
            set_module(gm, node, packed)
            node.args, node.kwargs = (node.all_input_nodes[0],), {}
    for node in module_calls(gm, PackedConv2d):
        _fuse_addition(gm, node)
    for node in module_calls(gm, PackedConv2d, PackedLinear):
        _fuse_activation(gm, node)


def unpack(gm: fx.GraphModule) -> None:
    """Undo `pack`; the graph is changed in place."""
    for node in module_calls(gm, PackedConv2d, PackedLinear):
        packed = module_of(node, gm)
        assert isinstance(packed, PackedLayer)
        set_module(gm, node, packed.plain())
        source, *others = cast(tuple[fx.Node, ...], node.args)
        users = list(node.users)
        result = node
        node.args = (source,)
        for other in others:
            with gm.graph.inserting_after(result):
                result = copied(gm.graph.call_function(operator.add, (node, other)), node)
        if packed.activation is not None:
            applied = packed.activation
            with gm.graph.inserting_after(result):
                call = gm.graph.call_function(
                    applied.function, (result, *applied.scalars), dict(applied.options)
                )
            result = copied(call, node)
        for user in users:
            user.replace_input_with(node, result)


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this machine's torch has oneDNN for a type."""
    if not torch.backends.mkldnn.is_available():
        return False
    has_bfloat16 = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return bool(dtype == torch.float32 or has_bfloat16)


def _require_no_gradients(*inputs: Tensor | None) -> None:
    """Refuse what torch only warns of: gradients that never arrive.

    Raises:
        InputError: A gradient would have to pass.
    """
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        raise InputError(
            "no gradients pass through packed layers, and an input asks for them. Deploy the "
            "network with packed=False; or call it under torch.no_grad() if none are needed."
        )


def _can_pack(layer: nn.Linear | nn.Conv2d, node: fx.Node) -> bool:
    if layer.weight.device.type != "cpu" or not can_pack(layer.weight.dtype):
        return False
    if node.all_input_nodes[0].meta["val"].dtype != layer.weight.dtype:
        return False
    if isinstance(layer, nn.Linear):
        return True
    return node.meta["val"].ndim == 4 and _padding(layer) is not None


def _operator(called: nn.Module, layer: nn.Linear | nn.Conv2d, node: fx.Node) -> Operator:
    """A layer, packed or not, on the input that the metadata shows."""
    value = node.all_input_nodes[0].meta["val"]

    def prepare() -> Call:
        return partial(called, filled(value, value.shape, channels_last=True))

    kind = "packed " if called is not layer else ""
    return Operator(f"{kind}{layer} on {tuple(value.shape)} {value.dtype} channels_last", prepare)


def _padding(layer: nn.Conv2d) -> tuple[int, int] | None:
    """The zeros on both ends of each axis; None if there are others, or not as many."""
    if layer.padding_mode != "zeros":
        return None
    if not isinstance(layer.padding, str):
        return _pair(layer.padding)
    # Both ends of every axis, the last axis first.
    ends = layer._reversed_padding_repeated_twice
    return (ends[2], ends[0]) if ends[::2] == ends[1::2] else None


def _pair(values: Sequence[int]) -> tuple[int, int]:
    first, second = values
    return first, second


def _fuse_addition(gm: fx.GraphModule, node: fx.Node) -> None:
    user = _only_user(node)
    if user is None or user.target not in _ADDITIONS or len(user.args) != 2 or user.kwargs:
        return
    first, second = user.args
    other = second if first is node else first
    if not isinstance(other, fx.Node) or other is node or not are_alike(node, other, user):
        return
    sharing = Sharing(gm, (PackedLayer,))
    is_read_later = other is first and not sharing.may_be_overwritten(other, user)
    if modifies_in_place(user, gm) and is_read_later:
        return
    if not sharing.is_untouched(node.all_input_nodes[0], node, user):
        return
    with gm.graph.inserting_before(user):
        fused = gm.graph.call_module(str(node.target), (node.args[0], other))
    replace(user, copied(fused, user))
    gm.graph.erase_node(node)


def _fuse_activation(gm: fx.GraphModule, node: fx.Node) -> None:
    user, packed = _only_user(node), module_of(node, gm)
    activation = None if user is None else activation_of(gm, user)
    fused = _FUSED if len(node.args) == 1 else _FUSED_AFTER_ADDITION
    if user is None or activation is None or activation.name not in fused:
        return
    assert isinstance(packed, PackedLayer)
    # Nothing works in place in there, and torch's own in-place operators cannot be pickled.
    packed.activation = dataclasses.replace(activation, in_place=None)
    replace(user, node)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
