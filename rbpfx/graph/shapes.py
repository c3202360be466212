"""Values in closed form: what common operators return, without asking torch.

To run an operator on fake tensors takes torch 100 microseconds and more, most of it in Python.
The operators that most networks consist of need no more than a line of arithmetic each. A form
knows the ordinary case only: plain floating-point tensors of one type that fit each other. For
everything else it returns None, and torch is asked (and complains, where it should).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager
from torch.nn import functional as F

Shape: TypeAlias = Sequence[int]
Form: TypeAlias = Callable[..., Any]
Forms = TypeVar("Forms", bound=Form)
_MODULES: dict[Hashable, Form] = {}
_CALLS: dict[Hashable, Form] = {}
_FLOATING = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def module_value(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a module returns in eval mode for fake tensors; None if torch has to be asked."""
    form = _MODULES.get(type(module))
    if form is None or kwargs or len(args) != 1 or not _is_plain(args[0]):
        return None
    if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
        return None
    return form(module, *args)


def call_value(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a function, or a method of a name, returns; None if torch has to be asked."""
    form = _CALLS.get(target)
    if form is None or not args:
        return None
    return form(*args, **kwargs)


def _for_modules(*kinds: type[nn.Module]) -> Callable[[Forms], Forms]:
    """Register the form of modules: a function of the module and its one plain input."""
    return lambda form: (_MODULES.update(dict.fromkeys(kinds, form)), form)[1]


def _for_calls(*targets: Hashable) -> Callable[[Forms], Forms]:
    """Register the form of functions and methods: a function of the same arguments."""
    return lambda form: (_CALLS.update(dict.fromkeys(targets, form)), form)[1]


# -- tensors ------------------------------------------------------------------------------


def _is_plain(value: Any) -> bool:
    """Whether a value is a floating-point fake tensor, its elements in order, no autocast."""
    return (
        type(value) is FakeTensor
        and value.dtype in _FLOATING
        and value.layout is torch.strided
        and value.stride() == _strides(value.shape)
        and not torch.is_autocast_enabled(value.fake_device.type)
    )


def _strides(shape: Shape) -> tuple[int, ...]:
    """The strides of a tensor whose elements are in order."""
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _fits(x: FakeTensor, tensor: Tensor | None, *shape: int) -> bool:
    """Whether a parameter or buffer is absent, or goes with `x` and has this shape."""
    if tensor is None:
        return True
    return tensor.shape == shape and tensor.dtype == x.dtype and tensor.device == x.fake_device


def _new(x: FakeTensor, shape: Shape) -> FakeTensor:
    """A new plain tensor of the type and device of `x`."""
    return FakeTensor(
        x.fake_mode, torch.empty(shape, dtype=x.dtype, device="meta"), x.fake_device
    )


# -- element by element -------------------------------------------------------------------

_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.SiLU, nn.Mish, nn.Hardtanh)
_GATES = (nn.GELU, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.LogSigmoid)
_HARD = (nn.Hardswish, nn.Hardsigmoid)


@_for_modules(*_ACTIVATIONS, *_GATES, *_HARD)
def _activation(module: nn.Module, x: FakeTensor) -> FakeTensor:
    return x if getattr(module, "inplace", False) else _new(x, x.shape)


@_for_modules(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
def _unchanged(module: nn.Module, x: FakeTensor) -> FakeTensor:
    return x


@_for_calls(F.relu, F.relu6, F.silu, F.hardswish, F.hardsigmoid)
def _activation_call(input: Any, inplace: bool = False) -> FakeTensor | None:
    if not _is_plain(input):
        return None
    return input if inplace else _new(input, input.shape)


@_for_calls(torch.relu, torch.sigmoid, torch.tanh, torch.exp, torch.sqrt, torch.abs, torch.neg)
@_for_calls("relu", "sigmoid", "tanh", "exp", "sqrt", "abs", "neg", F.sigmoid, F.tanh, F.gelu)
@_for_calls(operator.neg)
def _pointwise(input: Any, *, approximate: str = "none") -> FakeTensor | None:
    return _new(input, input.shape) if _is_plain(input) else None


@_for_calls(operator.add, operator.sub, operator.mul, operator.truediv)
@_for_calls(torch.add, torch.sub, torch.mul, torch.div, "add", "sub", "mul", "div")
def _binary(input: Any, other: Any) -> FakeTensor | None:
    tensor, partner = (input, other) if isinstance(input, Tensor) else (other, input)
    if not _is_plain(tensor):
        return None
    if type(partner) in (int, float):
        return _new(tensor, tensor.shape)
    if not _is_plain(partner) or not _alike(tensor, partner):
        return None
    if tensor.shape == partner.shape or _spreads(partner, tensor):
        return _new(tensor, tensor.shape)
    return _new(tensor, partner.shape) if _spreads(tensor, partner) else None


@_for_calls(operator.iadd, operator.isub, operator.imul, operator.itruediv)
@_for_calls("add_", "sub_", "mul_", "div_")
def _in_place(input: Any, other: Any) -> FakeTensor | None:
    result = _binary(input, other)
    fits = result is not None and isinstance(input, Tensor) and result.shape == input.shape
    return input if fits else None


def _alike(first: FakeTensor, second: FakeTensor) -> bool:
    return first.dtype == second.dtype and first.fake_device == second.fake_device


def _spreads(small: FakeTensor, large: FakeTensor) -> bool:
    """Whether a tensor of at least one axis broadcasts to the shape of another."""
    missing = large.ndim - small.ndim
    if missing < 0 or not small.ndim:
        return False
    pairs = zip(small.shape, large.shape[missing:], strict=True)
    return all(few in (1, many) for few, many in pairs)


@_for_modules(nn.Softmax, nn.LogSoftmax)
def _softmax(module: nn.Module, x: FakeTensor) -> FakeTensor | None:
    dim = module.dim
    return _new(x, x.shape) if isinstance(dim, int) and -x.ndim <= dim < x.ndim else None


@_for_calls(F.softmax, F.log_softmax, torch.softmax, torch.log_softmax, "softmax", "log_softmax")
def _softmax_call(input: Any, dim: Any = None) -> FakeTensor | None:
    if not _is_plain(input) or not isinstance(dim, int) or not -input.ndim <= dim < input.ndim:
        return None
    return _new(input, input.shape)


# -- layers -------------------------------------------------------------------------------


@_for_modules(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def _batch_norm(module: nn.Module, x: FakeTensor) -> FakeTensor | None:
    ndim = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}[type(module)]
    tensors = (module.running_mean, module.running_var, module.weight, module.bias)
    if x.ndim not in ndim or module.running_mean is None:
        return None
    return _new(x, x.shape) if all(_fits(x, t, x.shape[1]) for t in tensors) else None


@_for_modules(nn.GroupNorm)
def _group_norm(module: nn.Module, x: FakeTensor) -> FakeTensor | None:
    if x.ndim < 3 or x.shape[1] != module.num_channels or x.shape[1] % module.num_groups:
        return None
    fits = _fits(x, module.weight, x.shape[1]) and _fits(x, module.bias, x.shape[1])
    return _new(x, x.shape) if fits else None


@_for_modules(nn.LayerNorm)
def _layer_norm(module: nn.Module, x: FakeTensor) -> FakeTensor | None:
    return F_layer_norm(x, module.normalized_shape, module.weight, module.bias)


@_for_calls(F.layer_norm)
def F_layer_norm(
    input: Any, normalized_shape: Shape, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> FakeTensor | None:
    """`F.layer_norm`."""
    if not _is_plain(input) or tuple(input.shape[-len(normalized_shape) :]) != tuple(
        normalized_shape
    ):
        return None
    fits = _fits(input, weight, *normalized_shape) and _fits(input, bias, *normalized_shape)
    return _new(input, input.shape) if fits else None


@_for_modules(nn.Linear)
def _linear_layer(module: nn.Module, x: FakeTensor) -> FakeTensor | None:
    return _linear(x, module.weight, module.bias)


@_for_calls(F.linear)
def _linear(input: Any, weight: Any, bias: Any = None) -> FakeTensor | None:
    if not _is_plain(input) or not isinstance(weight, Tensor) or weight.ndim != 2 or not input.ndim:
        return None
    size = weight.shape[0]
    fits = _fits(input, weight, size, input.shape[-1]) and _fits(input, bias, size)
    return _new(input, (*input.shape[:-1], size)) if fits else None


@_for_modules(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def _convolution(module: nn.Module, x: FakeTensor) -> FakeTensor | None:
    weight = module.weight
    out_channels, width, *kernel = weight.shape
    channels = width * module.groups
    if x.ndim != weight.ndim or out_channels % module.groups or isinstance(module.padding, str):
        return None
    if module.padding_mode != "zeros" or weight.stride() != _strides(weight.shape):
        return None
    if x.shape[1] != channels or not _fits(x, weight, *weight.shape):
        return None
    if not _fits(x, module.bias, out_channels):
        return None
    return _slid(x, out_channels, kernel, module.stride, module.padding, module.dilation)


def _slid(
    x: FakeTensor, channels: int, kernel: Shape, stride: Shape, padding: Shape, dilation: Shape
) -> FakeTensor | None:
    """The result of a window that slides over the axes of space."""
    settings = zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
    sizes = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in settings]
    return _new(x, (x.shape[0], channels, *sizes)) if all(size > 0 for size in sizes) else None


# -- pooling ------------------------------------------------------------------------------


@_for_modules(nn.MaxPool2d)
def _max_pool(module: nn.Module, x: FakeTensor) -> FakeTensor | None:
    return None if module.return_indices else _pooled(module, x, _pair(module.dilation))


@_for_modules(nn.AvgPool2d)
def _average_pool(module: nn.Module, x: FakeTensor) -> FakeTensor | None:
    return _pooled(module, x, (1, 1))


def _pooled(module: nn.Module, x: FakeTensor, dilation: Shape) -> FakeTensor | None:
    kernel, stride, padding = map(_pair, (module.kernel_size, module.stride, module.padding))
    too_wide = any(2 * p > k for p, k in zip(padding, kernel, strict=True))
    if x.ndim != 4 or module.ceil_mode or too_wide:
        return None
    return _slid(x, x.shape[1], kernel, stride, padding, dilation)


def _pair(setting: Any) -> Shape:
    return (setting, setting) if isinstance(setting, int) else setting


@_for_modules(nn.AdaptiveAvgPool2d)
def _adaptive_pool_layer(module: nn.Module, x: FakeTensor) -> FakeTensor | None:
    return _adaptive_pool(x, module.output_size)


@_for_calls(F.adaptive_avg_pool2d)
def _adaptive_pool(input: Any, output_size: Any) -> FakeTensor | None:
    sizes = _pair(output_size)
    if not _is_plain(input) or input.ndim != 4 or not all(isinstance(s, int) for s in sizes):
        return None
    return _new(input, (*input.shape[:2], *sizes))


# -- several tensors ----------------------------------------------------------------------


@_for_calls(torch.cat, torch.concat)
def _concatenation(tensors: Any, dim: int = 0) -> FakeTensor | None:
    first = tensors[0] if isinstance(tensors, (list, tuple)) and tensors else None
    if not all(_is_plain(t) and t.ndim == first.ndim and _alike(t, first) for t in tensors):
        return None
    if not -first.ndim <= dim < first.ndim:
        return None
    dim %= first.ndim
    shape = list(first.shape)
    shape[dim] = 1
    for tensor in tensors:
        others = [1 if d == dim else size for d, size in enumerate(tensor.shape)]
        if others != shape:
            return None
    shape[dim] = sum(t.shape[dim] for t in tensors)
    return _new(first, shape)


# -- views --------------------------------------------------------------------------------


@_for_calls(operator.getitem)
def _item(input: Any, index: Any) -> Any:
    if isinstance(input, (tuple, list)):
        return input[index]
    items = index if isinstance(index, tuple) else (index,)
    basic = all(i is Ellipsis or i is None or type(i) in (int, slice) for i in items)
    return _of_meta_kernel(operator.getitem, input, index) if basic else None


def _register_views() -> None:
    """Views, for which the meta kernels of torch are in C++, and need no arithmetic from us."""
    for name in (
        "view reshape flatten unflatten permute transpose swapaxes movedim unsqueeze squeeze "
        "expand chunk split narrow select unbind contiguous"
    ).split():
        _for_calls(name)(partial(_of_meta_kernel, methodcaller_of(name)))


def _of_meta_kernel(operator: Callable[..., Any], input: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operator's meta kernel without the rest of what fake tensors do."""
    if type(input) is not FakeTensor or input.layout is not torch.strided or input.constant:
        return None
