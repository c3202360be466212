"""Values in closed form: what common operators return, without asking torch.

To run an operator on fake tensors takes torch 100 microseconds and more, most of it in Python.
The operators that most networks consist of need no more than a line of arithmetic each. A form
knows the ordinary case only, tensors that have a format (see `rbpfx.graph.formats`) and fit each
other. For everything else it returns None, and torch is asked (and complains, where it should).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torchvision.ops import StochasticDepth

from rbpfx.graph.formats import (
    Shape,
    format_of,
    goes_with,
    is_ordinary,
    is_plain,
    new_like,
    new_tensor,
    plain_strides,
    suits,
)

Form: TypeAlias = Callable[..., Any]
AnyForm = TypeVar("AnyForm", bound=Form)
_MODULES: dict[type[nn.Module], Form] = {}
_CALLS: dict[Hashable, Form] = {}


def module_value(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a module returns in eval mode for fake tensors; None if torch has to be asked."""
    form = _MODULES.get(type(module))
    if form is None or kwargs or len(args) != 1 or format_of(args[0]) is None:
        return None
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return None
    return form(module, *args)


def call_value(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a function, or the method of a name, returns; None if torch has to be asked."""
    form = _CALLS.get(target)
    try:
        return form(*args, **kwargs) if form is not None else None
    except TypeError:
        return None  # other arguments than the form knows


def _for_modules(*kinds: type[nn.Module]) -> Callable[[AnyForm], AnyForm]:
    """Register the form of modules: a function of the module and its one input."""

    def register(form: AnyForm) -> AnyForm:
        _MODULES.update(dict.fromkeys(kinds, form))
        return form

    return register


def _for_calls(*targets: Hashable) -> Callable[[AnyForm], AnyForm]:
    """Register the form of functions and methods: a function of the same arguments."""

    def register(form: AnyForm) -> AnyForm:
        _CALLS.update(dict.fromkeys(targets, form))
        return form

    return register


# -- element by element -------------------------------------------------------------------


@_for_modules(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.SiLU, nn.Mish, nn.Hardtanh)
@_for_modules(nn.GELU, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Hardswish, nn.Hardsigmoid)
def _activation(module: Any, x: FakeTensor) -> FakeTensor | None:
    return x if getattr(module, "inplace", False) else new_like(x)


@_for_modules(nn.Identity, nn.Dropout, nn.Dropout2d, StochasticDepth)
def _unchanged(module: Any, x: FakeTensor) -> FakeTensor:
    return x


@_for_calls(F.relu, F.relu6, F.silu, F.hardswish, F.hardsigmoid)
def _activation_call(input: Any, inplace: bool = False) -> FakeTensor | None:
    like = new_like(input)
    return input if inplace and like is not None else like


@_for_calls(F.gelu, F.sigmoid, F.tanh, torch.relu, torch.sigmoid, torch.tanh, torch.exp)
@_for_calls("relu", "sigmoid", "tanh", "exp", "sqrt", "abs", operator.neg, torch.sqrt, torch.abs)
def _pointwise(input: Any, *, approximate: str = "none") -> FakeTensor | None:
    return new_like(input)


@_for_calls(operator.add, operator.sub, operator.mul, operator.truediv)
@_for_calls(torch.add, torch.sub, torch.mul, torch.div, "add", "sub", "mul", "div")
def _binary(input: Any, other: Any) -> FakeTensor | None:
    pair: tuple[Any, Any] = (input, other) if isinstance(input, Tensor) else (other, input)
    tensor, partner = pair
    if type(partner) in (int, float):
        return new_like(tensor)
    formats = (format_of(tensor), format_of(partner))
    if None in formats or not goes_with(tensor, partner):
        return None
    small, large = (tensor, partner) if tensor.numel() <= partner.numel() else (partner, tensor)
    # Of operands in two formats one decides, unless the other has no order: at most one axis.
    agree = formats[0] is formats[1] or sum(size > 1 for size in small.shape) <= 1
    return new_like(large) if agree and _spreads(small, large) else None


@_for_calls(operator.iadd, operator.isub, operator.imul, operator.itruediv)
@_for_calls("add_", "sub_", "mul_", "div_")
def _in_place(input: Any, other: Any) -> FakeTensor | None:
    if format_of(input) is None:
        return None
    if type(other) in (int, float):
        return input  # type: ignore[no-any-return]
    fits = format_of(other) is not None and goes_with(input, other) and _spreads(other, input)
    return input if fits else None


def _spreads(small: FakeTensor, large: FakeTensor) -> bool:
    """Whether a tensor broadcasts to the shape of another (one without axes aside)."""
    missing = large.ndim - small.ndim
    if missing < 0 or not small.ndim:
        return False
    pairs = zip(small.shape, large.shape[missing:], strict=True)
    return all(few in (1, many) for few, many in pairs)


@_for_modules(nn.Softmax, nn.LogSoftmax)
def _softmax(module: Any, x: FakeTensor) -> FakeTensor | None:
    return _softmax_call(x, module.dim)


@_for_calls(F.softmax, F.log_softmax, torch.softmax, torch.log_softmax, "softmax", "log_softmax")
def _softmax_call(input: Any, dim: Any) -> FakeTensor | None:
    if not is_plain(input) or not isinstance(dim, int) or not -input.ndim <= dim < input.ndim:
        return None
    return new_tensor(input, input.shape)


# -- layers -------------------------------------------------------------------------------


def _tensors(module: nn.Module, *names: str) -> list[Any]:
    """Parameters or buffers, past `nn.Module.__getattr__`: slow, and patched during a trace."""
    tensors = module._parameters | module._buffers
    return [tensors[name] for name in names]


@_for_modules(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def _batch_norm(module: Any, x: FakeTensor) -> FakeTensor | None:
    axes = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}[type(module)]
    tensors = _tensors(module, "running_mean", "running_var", "weight", "bias")
    if x.ndim not in axes or tensors[0] is None:
        return None
    return new_like(x) if all(suits(x, t, x.shape[1]) for t in tensors) else None


@_for_modules(nn.GroupNorm)
def _group_norm(module: Any, x: FakeTensor) -> FakeTensor | None:
    if x.ndim < 3 or x.shape[1] != module.num_channels or not is_plain(x):
        return None
    fits = all(suits(x, t, x.shape[1]) for t in _tensors(module, "weight", "bias"))
    return new_tensor(x, x.shape) if fits else None


@_for_modules(nn.LayerNorm)
def _layer_norm(module: Any, x: FakeTensor) -> FakeTensor | None:
    return _layer_norm_call(x, module.normalized_shape, *_tensors(module, "weight", "bias"))


@_for_calls(F.layer_norm)
def _layer_norm_call(
    input: Any, normalized_shape: Shape, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> FakeTensor | None:
    shape = tuple(normalized_shape)
    if not is_plain(input) or input.shape[-len(shape) :] != shape:
        return None
    fits = suits(input, weight, *shape) and suits(input, bias, *shape)
    return new_tensor(input, input.shape) if fits else None


@_for_modules(nn.Linear, NonDynamicallyQuantizableLinear)
def _linear(module: Any, x: FakeTensor) -> FakeTensor | None:
    return _linear_call(x, *_tensors(module, "weight", "bias"))


@_for_calls(F.linear)
def _linear_call(input: Any, weight: Any, bias: Any = None) -> FakeTensor | None:
    if not is_plain(input) or not input.ndim or weight.ndim != 2:
        return None
    size = weight.shape[0]
    fits = suits(input, weight, size, input.shape[-1]) and suits(input, bias, size)
    return new_tensor(input, (*input.shape[:-1], size)) if fits else None


@_for_modules(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def _convolution(module: Any, x: FakeTensor) -> FakeTensor | None:
    weight, bias = _tensors(module, "weight", "bias")
    groups = module.groups
    channels, width, *kernel = weight.shape
    if module.padding_mode != "zeros" or isinstance(module.padding, str) or channels % groups:
        return None
    if x.ndim != weight.ndim or x.shape[1] != width * groups or not goes_with(x, weight):
        return None
    if weight.stride() != plain_strides(weight.shape) or not suits(x, bias, channels):
        return None
    return _slid(x, channels, kernel, module.stride, module.padding, module.dilation)


def _slid(
    x: FakeTensor, channels: int, kernel: Shape, stride: Shape, padding: Shape, dilation: Shape
) -> FakeTensor | None:
    """The result of a window that slides over the axes of space."""
    settings = zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
    sizes = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in settings]
    memory_format = format_of(x)
    if memory_format is None or min(sizes) <= 0:
        return None
    return new_tensor(x, (x.shape[0], channels, *sizes), memory_format)


@_for_modules(nn.MaxPool2d)
def _max_pool(module: Any, x: FakeTensor) -> FakeTensor | None:
    return None if module.return_indices else _pooled(module, x, _pair(module.dilation))


@_for_modules(nn.AvgPool2d)
def _average_pool(module: Any, x: FakeTensor) -> FakeTensor | None:
    return _pooled(module, x, (1, 1))


def _pooled(module: Any, x: FakeTensor, dilation: Shape) -> FakeTensor | None:
    kernel, stride, padding = map(_pair, (module.kernel_size, module.stride, module.padding))
    too_wide = any(2 * p > k for p, k in zip(padding, kernel, strict=True))
    if x.ndim != 4 or module.ceil_mode or too_wide:
        return None
    return _slid(x, x.shape[1], kernel, stride, padding, dilation)


@_for_modules(nn.AdaptiveAvgPool2d)
def _adaptive_pool(module: Any, x: FakeTensor) -> FakeTensor | None:
    return _adaptive_pool_call(x, module.output_size)


@_for_calls(F.adaptive_avg_pool2d)
def _adaptive_pool_call(input: Any, output_size: Any) -> FakeTensor | None:
    sizes = _pair(output_size)
    if not is_plain(input) or input.ndim != 4 or not all(type(size) is int for size in sizes):
        return None
    return new_tensor(input, (*input.shape[:2], *sizes))


def _pair(setting: Any) -> Shape:
    return (setting, setting) if isinstance(setting, int) else setting


# -- several tensors ----------------------------------------------------------------------


@_for_calls(torch.cat, torch.concat)
def _concatenation(tensors: Any, dim: int = 0) -> FakeTensor | None:
    first = tensors[0]
    if not all(is_plain(t) and t.ndim == first.ndim and goes_with(first, t) for t in tensors):
        return None
    if not -first.ndim <= dim < first.ndim:
        return None
    before, after = first.shape[: dim % first.ndim], first.shape[dim % first.ndim + 1 :]
    size = 0
    for tensor in tensors:
        *leading, here = tensor.shape[: len(before) + 1]
        if (*leading, *tensor.shape[len(before) + 1 :]) != (*before, *after):
            return None
        size += here
    return new_tensor(first, (*before, size, *after))


@_for_calls(torch.matmul, operator.matmul, "matmul", "__matmul__")
def _matrix_product(input: Any, other: Any) -> FakeTensor | None:
    """Products of batches of matrices, which may be transposed."""
    if not is_ordinary(input) or type(other) is not FakeTensor:
        return None
    if not 3 <= input.ndim == other.ndim or not goes_with(input, other):
        return None
    batch, rows, inner = input.shape[:-2], input.shape[-2], input.shape[-1]
    if other.shape[:-2] != batch or other.shape[-2] != inner:
        return None
    return new_tensor(input, (*batch, rows, other.shape[-1]))


# -- views and sizes ----------------------------------------------------------------------


def _of_meta_kernel(call: Form, input: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a meta kernel of torch without the rest of what fake tensors do."""
    if type(input) is not FakeTensor or input.layout is not torch.strided or input.constant:
        return None
    try:
        with torch.no_grad(), in_kernel_invocation_manager(input.fake_mode):
            result = call(input, *args, **kwargs)
    except Exception:
        return None  # torch will say what is wrong

    def fake(tensor: Tensor) -> Tensor:
        return input if tensor is input else FakeTensor(input.fake_mode, tensor, input.fake_device)

    return fake(result) if isinstance(result, Tensor) else type(result)(map(fake, result))


# Views, for which meta kernels are in C++ and quick.
for _name in (
    "view reshape flatten unflatten permute transpose swapaxes movedim unsqueeze squeeze expand "
    "chunk split narrow select unbind contiguous"
).split():
    for _owner, _target in ((Tensor, _name), (torch, getattr(torch, _name, _name))):
        if hasattr(_owner, _name):
            _CALLS[_target] = partial(_of_meta_kernel, getattr(_owner, _name))


@_for_calls(operator.getitem)
def _item(input: Any, index: Any) -> Any:
    if isinstance(input, (tuple, list)):
        return input[index]
    items = index if isinstance(index, tuple) else (index,)
    is_basic = all(i is Ellipsis or i is None or type(i) in (int, slice) for i in items)
    return _of_meta_kernel(operator.getitem, input, index) if is_basic else None


@_for_calls("size")
def _size(input: Any, dim: int | None = None) -> Any:
    return input.size() if dim is None else input.size(dim)


@_for_calls(getattr)
def _attribute(input: Any, name: str) -> Any:
    return getattr(input, name) if name in ("shape", "dtype", "device") else None


__all__ = ["call_value", "module_value"]
