"""Operators that treat every element of one tensor alike: activations, dropout, copies.

The function may be anything, f(0) = 0 is not needed: multipliers sit at the reads, after it.
"""

from __future__ import annotations

import operator
from math import prod

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth, stochastic_depth

from rbpfx.graph.calls import call_leaf
from rbpfx.graph.operands import Labels
from rbpfx.graph.propagation import Propagation, unfollowed
from rbpfx.graph.provenance import Label
from rbpfx.graph.rules.base import (
    Rule,
    argument,
    register,
    shape_of,
    tensor_input,
    value_of,
)
from rbpfx.graph.rules.generic import PerChannel
from rbpfx.graph.slicing import Slicing
from rbpfx.graph.values import assume, length, of_numpy, rounded, truncated


class Elementwise(Rule):
    """The result has the channels of the input."""

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Hand the label on."""
        if not isinstance(node.meta.get("val"), Tensor):
            return unfollowed(node)
        return Label(shape_of(node), state.label(tensor_input(node)).blocks)


class Copy(Elementwise):
    """The result has the elements of the input."""

    def moves(self, node: fx.Node) -> bool:
        """Nothing but moving."""
        return True


class Glimpse(Rule):
    """Questions about a tensor that no channel's value answers: shape, dtype, device, ..."""

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Nothing is followed, but the tensors that are attributes of a tensor."""
        if node.target is not getattr or not isinstance(node.meta.get("val"), Tensor):
            return unfollowed(node)
        label, name = state.label(tensor_input(node)), node.args[1]
        if name == "data":
            return label
        if name in ("T", "H"):
            return label.permuted([*reversed(range(label.ndim))])
        if name in ("mT", "mH"):
            return label.permuted([*range(label.ndim - 2), -1, -2])
        state.pin(label, f"attribute {name!r}")
        return unfollowed(node)

    def rewrite(self, node: fx.Node, state: Slicing) -> None:
        """A size that the model asks for keeps its original value where channels have gone.

        Scales such as `x.shape[1] ** -0.5` then mean what they meant; sizes given to reshapes
        are set by the reshape's own rule.
        """
        label = state.labels.get(node.all_input_nodes[0]) if node.all_input_nodes else None
        if not isinstance(label, Label):
            return
        original = {d: label.shape[d] for d in state.changed_sizes(label)}
        if original and node.target in (torch.numel, "numel", "nelement"):
            _restore_count(node, original, state)
        whole = node.target == "size" or (node.target is getattr and node.args[1] == "shape")
        if not original or not whole:
            return
        if isinstance(node.meta.get("val"), int):
            asked = int(value_of(argument(node, 1, "dim"))) % label.ndim
            if asked in original:
                state.replace_by_constant(node, original[asked])
            return
        for user in list(node.users):
            dim = user.args[1] if user.target is operator.getitem else None
            if not isinstance(dim, int):
                _restore_sizes(user, node, original, state)
            elif dim % label.ndim in original:
                state.replace_by_constant(user, original[dim % label.ndim])


def _restore_count(node: fx.Node, original: dict[int, int], state: Slicing) -> None:
    """Scale a number of elements, which may depend on the batch, back to what it was."""
    twin, sizes = state.twin(node), state.sizes(state.label(tensor_input(node)))
    users = list(twin.users)
    with state.gm.graph.inserting_after(twin):
        share = state.gm.graph.call_function(
            operator.floordiv, (twin, prod(sizes[d] for d in original))
        )
    with state.gm.graph.inserting_after(share):
        count = state.gm.graph.call_function(operator.mul, (share, prod(original.values())))
    for user in users:
        user.replace_input_with(twin, count)


def with_sizes(shape: torch.Size, dims: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Size:
    """A shape with some axes at other sizes."""
    changed = dict(zip(dims, sizes, strict=True))
    return torch.Size(changed.get(d, n) for d, n in enumerate(shape))


def _restore_sizes(user: fx.Node, node: fx.Node, original: dict[int, int], state: Slicing) -> None:
    """Hand a user of a whole shape the original one."""
    user, node = state.twin(user), state.twin(node)
    with state.gm.graph.inserting_before(user):
        args = (node, tuple(original), tuple(original.values()))
        user.replace_input_with(node, call_leaf(state.gm.graph, with_sizes, args))


_MODULES = (
    "ReLU ReLU6 LeakyReLU RReLU ELU SELU CELU GELU SiLU Mish Hardswish Hardsigmoid Hardtanh "
    "Sigmoid Tanh Softplus Softsign Tanhshrink Hardshrink Softshrink LogSigmoid Threshold "
    "Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout"
).split()
_FUNCTIONS = (
    "relu relu_ relu6 leaky_relu leaky_relu_ rrelu rrelu_ elu elu_ selu selu_ celu celu_ gelu "
    "silu mish hardswish hardsigmoid hardtanh hardtanh_ sigmoid tanh softplus softsign "
    "tanhshrink hardshrink softshrink logsigmoid threshold threshold_ dropout dropout1d dropout2d "
    "dropout3d alpha_dropout feature_alpha_dropout dropout_ alpha_dropout_ feature_dropout "
    "abs abs_ neg neg_ negative exp exp_ log log_ log1p expm1 sqrt sqrt_ rsqrt square sign sin cos "
    "erf reciprocal sigmoid_ tanh_ floor ceil round "
    "nan_to_num logical_not bitwise_not isnan zeros_like ones_like full_like rand_like "
    "to type type_as float double half bfloat16 int long bool cpu cuda "
    "requires_grad_ zero_ fill_ bernoulli bernoulli_ uniform_ normal_ randn_like "
    "erfinv erfc asin acos atan sinh cosh asinh acosh atanh tan log2 log10 exp2 frac trunc sgn "
    "isinf isfinite sinc square_ reciprocal_ rsqrt_ absolute absolute_ negative_ positive fix "
    "arcsin arccos arctan arcsinh arccosh arctanh deg2rad rad2deg logit signbit lgamma digamma "
    "i0 empty_like randint_like"
).split()
_SPECIAL = "expit erf erfc erfinv exp2 expm1 log1p logit sinc round ndtr log_ndtr gammaln".split()
ELEMENTWISE = register(Elementwise(), *(getattr(nn, name) for name in _MODULES))
for _name in _FUNCTIONS:
    for _home in (torch, F):
        if hasattr(_home, _name):
            register(ELEMENTWISE, getattr(_home, _name))
    if hasattr(Tensor, _name):
        register(ELEMENTWISE, _name)
register(ELEMENTWISE, *(getattr(torch.special, name) for name in _SPECIAL))
register(Copy(), nn.Identity, torch.clone, torch.detach, "clone", "detach", "contiguous")
register(ELEMENTWISE, operator.neg, operator.abs, operator.pos, operator.invert)
# Stochastic depth drops whole rows or the whole batch, never single channels.
register(ELEMENTWISE, stochastic_depth, StochasticDepth)
register(PerChannel("weight", size="num_parameters"), nn.PReLU, F.prelu, torch.prelu, "prelu")
register(Glimpse(), "size", "numel", "nelement", "dim", "is_floating_point", "get_device")
register(Glimpse(), torch.numel, torch.is_floating_point)
register(Glimpse(), getattr, length, rounded, truncated, of_numpy, assume)
