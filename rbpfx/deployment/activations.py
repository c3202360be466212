"""Activations: one spelling for modules, functions and methods that do the same to every entry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from rbpfx.graph.calls import module_of

_MODULES: dict[Any, type[nn.Module]] = {
    F.relu: nn.ReLU,
    F.relu6: nn.ReLU6,
    F.hardtanh: nn.Hardtanh,
    F.silu: nn.SiLU,
    F.hardswish: nn.Hardswish,
    F.hardsigmoid: nn.Hardsigmoid,
    F.leaky_relu: nn.LeakyReLU,
    F.gelu: nn.GELU,
    **dict.fromkeys((torch.relu, torch.relu_, F.relu_, "relu", "relu_"), nn.ReLU),
    **dict.fromkeys((torch.sigmoid, torch.sigmoid_, F.sigmoid, "sigmoid", "sigmoid_"), nn.Sigmoid),
    **dict.fromkeys((torch.tanh, torch.tanh_, F.tanh, "tanh", "tanh_"), nn.Tanh),
}


@dataclass(frozen=True)
class Activation:
    """A function of every entry.

    Attributes:
        name: What oneDNN calls it.
        function: The torch function, called with the value and `scalars`.
        scalars: Its parameters.
        options: Its keyword arguments.
        in_place: The function that writes into its argument; takes the same arguments.
    """

    name: str
    function: Callable[..., Tensor]
    scalars: tuple[float, ...] = ()
    options: dict[str, str] = field(default_factory=dict)
    in_place: Callable[..., Tensor] | None = None


def activation_of(gm: fx.GraphModule, node: fx.Node) -> Activation | None:
    """The activation that a node computes, in place or not; None if it is something else."""
    if len(node.all_input_nodes) != 1:
        return None
    module = module_of(node, gm)
    if module is None and node.op in ("call_function", "call_method"):
        kind = _MODULES.get(node.target)
        options = {name: value for name, value in node.kwargs.items() if name != "input"}
        module = kind(*node.args[1:], **options) if kind is not None else None
    return None if module is None else _activation(module)


def _activation(module: nn.Module) -> Activation | None:
    kind = type(module)
    if kind is nn.ReLU:
        return Activation("relu", torch.relu, in_place=torch.relu_)
    if kind is nn.Sigmoid:
        return Activation("sigmoid", torch.sigmoid, in_place=torch.sigmoid_)
    if kind is nn.Tanh:
        return Activation("tanh", torch.tanh, in_place=torch.tanh_)
    if isinstance(module, nn.Hardtanh) and kind in (nn.Hardtanh, nn.ReLU6):
        bounds = (float(module.min_val), float(module.max_val))
        return Activation("hardtanh", torch.clamp, bounds, in_place=torch.clamp_)
    if isinstance(module, nn.LeakyReLU):
        slope = (float(module.negative_slope),)
        return Activation("leaky_relu", F.leaky_relu, slope, in_place=F.leaky_relu_)
    if isinstance(module, nn.GELU):
        return Activation("gelu", F.gelu, options={"approximate": module.approximate})
    if kind is nn.SiLU:
        return Activation("swish", F.silu, in_place=torch.ops.aten.silu_.default)
    if kind is nn.Hardswish:
        return Activation("hardswish", F.hardswish, in_place=torch.ops.aten.hardswish_.default)
    if kind is nn.Hardsigmoid:
        return Activation(
            "hardsigmoid", F.hardsigmoid, in_place=torch.ops.aten.hardsigmoid_.default
        )
    return None
