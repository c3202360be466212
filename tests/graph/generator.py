"""Random small networks: programs over the operators that rbpfx claims to understand.

A `Program` is an `nn.Module` whose forward interprets a list of steps. It is built step by step on
a real example, so every step knows the shapes it meets; everything follows from one seed.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rbpfx.errors import PlanError
from rbpfx.graph.groups import Analysis
from rbpfx.graph.slicing import kept_indices
from rbpfx.plan import PruningPlan

BATCH = 3
Function = Callable[..., Any]


class Pair(NamedTuple):
    """A model output with names."""

    first: Tensor
    rest: Any


@dataclass
class Step:
    """`fn(model, *values)`; `outputs` values are appended to the list of values."""

    fn: Function
    inputs: tuple[int, ...]
    outputs: int = 1


class Program(nn.Module):
    """A random network.

    Args:
        seed: Everything follows from it.
        length: Number of random operators, composites counted once.
        dropout: Probability of all dropouts; 0 keeps train mode deterministic.
        only: Names of the operators to draw from; all by default.
    """

    def __init__(
        self,
        seed: int,
        length: int = 9,
        dropout: float = 0.0,
        only: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.seed = seed
        self.dropout_rate = dropout
        self.steps: list[Step] = []
        self.operators: Counter[str] = Counter()
        self.output_kind = "tensor"
        self.results: list[int] = []
        self.blocks = nn.ModuleDict()
        _Builder(self, random.Random(seed), length, only).build()

    def run(self, *inputs: Tensor) -> Any:
        values: list[Any] = list(inputs)
        for step in self.steps:
            result = step.fn(self, *(values[i] for i in step.inputs))
            if step.outputs == 1:
                values.append(result)
            else:
                values.extend(result[i] for i in range(step.outputs))
        first, *rest = (values[i] for i in self.results)
        if not rest:
            return first
        if self.output_kind == "dict":
            return {"first": first, "rest": rest}
        if self.output_kind == "namedtuple":
            return Pair(first, rest[0])
        return (first, *rest)


class OneInput(Program):
    """A program of one input."""

    def forward(self, x: Tensor) -> Any:
        return self.run(x)


class TwoInputs(Program):
    """A program of two inputs."""

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.run(x, y)


def random_program(seed: int, **options: Any) -> Program:
    """The network of a seed."""
    cls = TwoInputs if seed % 5 == 4 else OneInput
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cls(seed, **options).double().eval()


def random_inputs(program: Program, batch: int = BATCH, seed: int = 0) -> tuple[Tensor, ...]:
    """Inputs that fit a program."""
    generator = torch.Generator().manual_seed(seed)
    shapes = _input_shapes(program.seed, isinstance(program, TwoInputs))
    return tuple(
        torch.randn(batch, *shape, generator=generator, dtype=torch.float64) for shape in shapes
    )


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


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Give BatchNorms, biases and slopes values that hide no mistake."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: Tensor, low: float, high: float) -> None:
        values = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
        tensor.copy_(values * (high - low) + low)

    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            leaf = name.rpartition(".")[2]
            if leaf.startswith("running_var"):
                draw(tensor, 0.5, 2.0)
            elif leaf.startswith(("running_mean", "bias")):
                draw(tensor, -0.5, 0.5)
            elif tensor.ndim == 1 and tensor.is_floating_point():
                draw(tensor, 0.4, 1.6)


def _input_shapes(seed: int, two: bool) -> list[tuple[int, ...]]:
    rng = random.Random(seed * 7 + 1)
    kinds: list[tuple[int, ...]] = [(3, 8, 8)] * 6 + [(3, 8), (4, 4, 4, 4), (6, 5), (10,)]
    first = rng.choice(kinds)
    if not two:
        return [first]
    return [first, first if rng.random() < 0.5 else rng.choice(kinds)]


class _Builder:
    """Draws operators and applies them to the example values."""

    def __init__(
        self, program: Program, rng: random.Random, length: int, only: Sequence[str] | None
    ) -> None:
        self.program = program
        self.rng = rng
        self.length = length
        self.only = only
        two = isinstance(program, TwoInputs)
        shapes = _input_shapes(program.seed, two)
        self.values: list[Tensor] = [torch.randn(BATCH, *shape) for shape in shapes]
        self.used: set[int] = set()
        self.fresh: set[int] = set()  # may be modified in place: nobody has saved them
        self.called: list[tuple[str, tuple[int, ...]]] = []

    def build(self) -> None:
        program, rng = self.program, self.rng
        inputs = len(self.values)
        for index in range(inputs):
            self.produce(index)
        names = [n for n in OPERATORS if self.only is None or n in self.only]
        weights = [OPERATORS[n][1] for n in names]
        while sum(program.operators.values()) < self.length:
            name = rng.choices(names, weights)[0]
            if OPERATORS[name][0](self, self.pick()) is not None:
                program.operators[name] += 1
        self.outputs(inputs)
        randomize(program, program.seed)

    def outputs(self, inputs: int) -> None:
        program, rng = self.program, self.rng
        loose = [i for i in range(inputs, len(self.values)) if i not in self.used]
        chosen = loose[-3:] or [len(self.values) - 1]
        for index in chosen:
            # A head keeps the channels before it free; without one they are the model's output.
            program.results.append(self.produce(index) if rng.random() < 0.85 else index)
        program.output_kind = rng.choice(["tuple", "dict", "namedtuple"])
        if program.output_kind == "namedtuple":
            program.results = program.results[:2]

    # -- helpers for operators ----------------------------------------------------------

    def pick(self) -> int:
        """A value, recent ones more likely."""
        recent = range(max(0, len(self.values) - 4), len(self.values))
        return self.rng.choice(recent if self.rng.random() < 0.8 else range(len(self.values)))

    def shape(self, index: int) -> tuple[int, ...]:
        return tuple(self.values[index].shape)

    def add(self, fn: Function, *inputs: int, outputs: int = 1, fresh: bool = False) -> int | None:
        """Append a step if its result is of sensible size; the index of its first result."""
        with torch.no_grad():
            result = fn(self.program, *(self.values[i].clone() for i in inputs))
        results = [result] if outputs == 1 else [result[i] for i in range(outputs)]
        for value in results:
            if not 2 <= value.ndim <= 5 or not 0 < value[0].numel() <= 1500:
                return None
            if value.shape[0] != BATCH:
                return None
        self.program.steps.append(Step(fn, inputs, outputs))
        self.used.update(inputs)
        self.fresh.difference_update(inputs)
        start = len(self.values)
        self.values.extend(value.detach() for value in results)
        if fresh:
            self.fresh.update(range(start, len(self.values)))
        return start

    def module(self, module: nn.Module) -> str:
        """Give a module a (nested) place in the program and return its name."""
        number = len(self.program.blocks)
        kind = type(module).__name__.lower()
        if self.rng.random() < 0.3:
            self.program.blocks[f"b{number}"] = nn.Sequential(nn.Identity(), module)
            return f"blocks.b{number}.1"
        self.program.blocks[f"{kind}{number}"] = module
        return f"blocks.{kind}{number}"

    def parameter(self, tensor: Tensor, kind: str = "w") -> str:
        name = f"{kind}{len(list(self.program.parameters()))}"
        self.program.register_parameter(name, nn.Parameter(tensor))
        return name

    def call(self, module: nn.Module, index: int, *, fresh: bool = False) -> int | None:
        name = self.module(module)
        result = self.add(lambda m, x: m.get_submodule(name)(x), index, fresh=fresh)
        if result is not None and not getattr(module, "inplace", False):
            self.called.append((name, self.shape(index)))
        return result

    def produce(self, index: int) -> int:
        """A convolution or linear layer that always fits."""
        shape = self.shape(index)
        width = self.rng.choice([4, 6, 8, 12])
        small = torch.Size(shape[1:-1]).numel() <= 100
        if len(shape) == 2 or (small and self.rng.random() < 0.15):
            result = self.call(nn.Linear(shape[-1], width), index, fresh=True)
        elif torch.Size(shape[2:]).numel() > 100:
            result = self.call(_conv(len(shape) - 2)(shape[1], width, 1, stride=3), index)
        else:
            result = self.call(_conv(len(shape) - 2)(shape[1], width, 1), index, fresh=True)
        assert result is not None
        return result


OPERATORS: dict[str, tuple[Callable[[_Builder, int], int | None], float]] = {}


def operator(weight: float = 1.0) -> Callable[[Any], Any]:
    """Register a random operator: returns a result's index, or None if it does not apply."""

    def register(function: Any) -> Any:
        OPERATORS[function.__name__] = (function, weight)
        return function

    return register


def _conv(n: int, transposed: bool = False) -> Any:
    return getattr(nn, f"Conv{'Transpose' if transposed else ''}{n}d")


def _divisors(n: int) -> list[int]:
    return [d for d in range(2, n) if n % d == 0]


# -- layers -------------------------------------------------------------------------------


def _any_conv(b: _Builder, x: int, transposed: bool) -> int | None:
    shape = b.shape(x)
    if len(shape) < 3:
        return None
    n, channels = len(shape) - 2, shape[1]
    kind = b.rng.choice(["plain", "plain", "grouped", "depthwise"])
    groups = 1
    if kind == "grouped":
        groups = b.rng.choice(_divisors(channels) or [1])
    elif kind == "depthwise":
        groups = channels
    width = channels * b.rng.choice([1, 1, 2]) if groups == channels else None
    width = width or groups * b.rng.choice([2, 3, 4]) if groups > 1 else b.rng.choice([4, 6, 8])
    kernel = b.rng.choice([1, 3])
    bias = b.rng.random() < 0.7
    options = {"stride": b.rng.choice([1, 1, 2]), "padding": kernel // 2, "groups": groups}
    layer = _conv(n, transposed)(channels, width, kernel, bias=bias, **options)
    if b.rng.random() < 0.7:
        return b.call(layer, x, fresh=True)
    weight = b.parameter(layer.weight.detach())
    offset = b.parameter(layer.bias.detach(), "bias") if bias else None
    home = b.rng.choice([F, torch])
    function = getattr(home, f"conv_transpose{n}d" if transposed else f"conv{n}d")

    def apply(m: Any, v: Any) -> Any:
        return function(v, getattr(m, weight), getattr(m, offset) if offset else None, **options)

    return b.add(apply, x, fresh=True)


@operator(4)
def convolution(b: _Builder, x: int) -> int | None:
    return _any_conv(b, x, transposed=False)


@operator(1.5)
def transposed_convolution(b: _Builder, x: int) -> int | None:
    return _any_conv(b, x, transposed=True)


@operator(2)
def linear(b: _Builder, x: int) -> int | None:
    layer = nn.Linear(b.shape(x)[-1], b.rng.choice([4, 6, 8]), bias=b.rng.random() < 0.7)
    if b.rng.random() < 0.7 or layer.bias is None:
        return b.call(layer, x, fresh=True)
    weight, bias = b.parameter(layer.weight.detach()), b.parameter(layer.bias.detach(), "bias")
    return b.add(lambda m, v: F.linear(v, getattr(m, weight), bias=getattr(m, bias)), x)


@operator(2)
def batch_norm(b: _Builder, x: int) -> int | None:
    shape = b.shape(x)
    cls = nn.BatchNorm1d if len(shape) < 4 else {4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    kind = b.rng.choice(["affine", "affine", "plain", "untracked", "functional"])
    if kind != "functional":
        layer = cls(shape[1], affine=kind == "affine", track_running_stats=kind != "untracked")
        return b.call(layer, x, fresh=True)
    number = len(b.program.steps)
    for name in ("running_mean", "running_var"):
        b.program.register_buffer(f"{name}{number}", torch.ones(shape[1]))
    scale, bias = b.parameter(torch.ones(shape[1])), b.parameter(torch.zeros(shape[1]), "bias")

    def apply(m: Any, v: Any) -> Any:
        mean, var = getattr(m, f"running_mean{number}"), getattr(m, f"running_var{number}")
        tensors = (mean, var, getattr(m, scale), getattr(m, bias))
        return F.batch_norm(v, *tensors, training=m.training)

    return b.add(apply, x)


@operator(1)
def shared_call(b: _Builder, x: int) -> int | None:
    """Call a module a second time."""
    known = [name for name, shape in b.called if shape[1:] == b.shape(x)[1:]]
    if not known:
        return None
    name = b.rng.choice(known)
    return b.add(lambda m, v: m.get_submodule(name)(v), x)


@operator(1.5)
def tied_weight(b: _Builder, x: int) -> int | None:
    """A new layer over an old layer's weight."""
    for name, shape in reversed(b.called):
        old = b.program.get_submodule(name)
        if shape[1:] == b.shape(x)[1:] and type(old) in (nn.Conv2d, nn.Linear):
            if isinstance(old, nn.Linear):
                new: nn.Module = nn.Linear(old.in_features, old.out_features)
            else:
                options = {"stride": old.stride, "padding": old.padding, "groups": old.groups}
                new = nn.Conv2d(old.in_channels, old.out_channels, old.kernel_size, **options)
            new.weight = old.weight
            return b.call(new, x)
    return None


# -- element by element -------------------------------------------------------------------

_ACTIVATIONS: list[Function] = [
    lambda v: F.gelu(v),
    lambda v: torch.tanh(v),
    lambda v: v.sigmoid(),
    lambda v: torch.relu(v) + 0.5,
    lambda v: F.softplus(v),
    lambda v: v.cos(),
    lambda v: F.leaky_relu(v, negative_slope=0.2),
    lambda v: torch.clamp(v, -1.0, 1.5),
    lambda v: 1.0 - v,
    lambda v: -v,
    lambda v: (v * 0.5) ** 2,
    lambda v: v.mul(0.7).add(0.2),
    lambda v: v.clamp(max=1.0).exp().contiguous(),
    lambda v: torch.sigmoid(input=v),
    lambda v: F.hardswish(v),
    lambda v: F.silu(v, inplace=False).to(v.dtype).type_as(v),
]
_MODULES: list[Callable[[], nn.Module]] = [
    nn.ReLU,
    nn.Sigmoid,
    nn.Hardsigmoid,
    nn.GELU,
    nn.Softplus,
    nn.Identity,
    lambda: nn.ELU(0.5),
]


@operator(2.5)
def activation(b: _Builder, x: int) -> int | None:
    if b.rng.random() < 0.4:
        return b.call(b.rng.choice(_MODULES)(), x)
    function = b.rng.choice(_ACTIVATIONS)
    return b.add(lambda m, v: function(v), x)


@operator(2)
def in_place(b: _Builder, x: int) -> int | None:
    """Later steps may read the value from before; they see it changed."""
    if x not in b.fresh:
        return None
    functions: list[Function] = [
        lambda v: F.relu(v, inplace=True),
        lambda v: v.relu_(),
        lambda v: v.add_(0.3).mul_(1.2),
        lambda v: F.leaky_relu_(v, 0.1),
    ]
    if b.rng.random() < 0.4:
        layer = nn.ReLU(inplace=True)
        name = b.module(layer)
        result = b.add(lambda m, v: m.get_submodule(name)(v), x)
    else:
        function = b.rng.choice(functions)
        result = b.add(lambda m, v: function(v), x)
    if result is not None:
        b.values[x] = b.values[result]
    return result


@operator(2)
def in_place_on_slice(b: _Builder, x: int) -> int | None:
    """Changes a part of a value through a view of it."""
    size = b.shape(x)[1]
    if x not in b.fresh or size < 4:
        return None
    part = b.rng.choice([slice(1, 3), slice(None, None, 2), slice(-2, None)])
    result = b.add(lambda m, v: v[:, part].mul_(0.5), x)
    return None if result is None else b.add(lambda m, v: torch.sin(v), x)


@operator(1)
def prelu(b: _Builder, x: int) -> int | None:
    size = b.rng.choice([1, b.shape(x)[1]])
    if b.rng.random() < 0.6:
        return b.call(nn.PReLU(size), x)
    slope = b.parameter(torch.rand(size))
    return b.add(lambda m, v: F.prelu(v, getattr(m, slope)), x)


@operator(0.8)
def dropout(b: _Builder, x: int) -> int | None:
    rate = b.program.dropout_rate
    if b.rng.random() < 0.5:
        return b.call(nn.Dropout(rate), x)
    return b.add(lambda m, v: F.dropout(v, p=rate, training=m.training), x)


@operator(1)
def layer_scale(b: _Builder, x: int) -> int | None:
    """A bare parameter or buffer that meets an axis by broadcasting."""
    shape = b.shape(x)
    axis = b.rng.choice([1, len(shape) - 1])
    sizes = [shape[d] if d == axis else 1 for d in range(axis, len(shape))]
    if b.rng.random() < 0.5:
        name = b.parameter(torch.rand(sizes), "scale")
    else:
        name = f"constant{len(b.program.steps)}"
        b.program.register_buffer(name, torch.rand(sizes))
    functions: list[Function] = [
        lambda v, w: v * w,
        lambda v, w: v + w,
        lambda v, w: torch.where(v > w, v, w * 0.1),
        lambda v, w: v + w * torch.tensor([0.5]),
        lambda v, w: torch.maximum(v, w),
        lambda v, w: v.clamp(max=w),
    ]
    function = b.rng.choice(functions)
    return b.add(lambda m, v: function(v, getattr(m, name)), x)


@operator(0.6)
def position_embedding(b: _Builder, x: int) -> int | None:
    name = b.parameter(torch.randn(1, *b.shape(x)[1:]) * 0.3)
    return b.add(lambda m, v: v + getattr(m, name), x)


@operator(1)
def size_arithmetic(b: _Builder, x: int) -> int | None:
    def unpacked(v: Any) -> Any:
        _, c = v.shape[:2]
        return v * c**-0.5

    functions: list[Function] = [
        lambda v: v * v.shape[1] ** -0.5,
        lambda v: v / v.size(-1),
        lambda v: v * (2.0 / v.size()[1]),
        unpacked,
        lambda v: v - 1.0 / v.shape[-1],
        lambda v: v.mul(v.size(dim=1) * 0.1),
        lambda v: v.reshape(v.shape) + 0.1,
        lambda v: v.view(v.size()) * 0.9,
    ]
    function = b.rng.choice(functions)
    return b.add(lambda m, v: function(v.contiguous()), x)


_BINARY: list[Function] = [
    lambda v, w: v + w,
    lambda v, w: v - w,
    lambda v, w: v * torch.sigmoid(w),
    lambda v, w: v / (w.abs() + 1.0),
    lambda v, w: torch.add(v, w, alpha=0.5),
    lambda v, w: v.mul(w.tanh()),
    lambda v, w: torch.minimum(v, w) if hasattr(torch, "minimum") else v + w,
    lambda v, w: torch.lerp(v, w, 0.3),
    lambda v, w: torch.addcmul(v, v, w, value=0.1),
    lambda v, w: v.where(w > 0, w),
]


@operator(3)
def binary(b: _Builder, x: int) -> int | None:
    """Two values whose shapes broadcast."""
    fitting = []
    for other in range(len(b.values)):
        try:
            shape = torch.broadcast_shapes(b.shape(x), b.shape(other))
        except RuntimeError:
            continue
        if shape[0] == BATCH and len(b.shape(other)) == len(b.shape(x)):
            fitting.append(other)
    if not fitting:
        return None
    function = b.rng.choice(_BINARY)
    same = b.rng.choice(fitting)
    return b.add(lambda m, v, w: function(v, w), x, same)


@operator(2)
def residual(b: _Builder, x: int) -> int | None:
    """x + f(x), in place or not."""
    shape = b.shape(x)
    if len(shape) != 4:
        return None
    width = b.rng.choice([4, 6])
    inner = b.call(nn.Conv2d(shape[1], width, 3, padding=1, bias=False), x)
    if inner is None:
        return None
    normed = b.call(nn.BatchNorm2d(width), inner)
    assert normed is not None
    active = b.call(nn.ReLU(inplace=True), normed)
    assert active is not None
    outer = b.call(nn.Conv2d(width, shape[1], 1), active)
    assert outer is not None

    def add(m: Any, v: Any, w: Any) -> Any:
        v += w
        return v

    if b.rng.random() < 0.5:
        return b.add(add, outer, x)
    return b.add(lambda m, v, w: v + w, x, outer)


@operator(1.2)
def squeeze_excite(b: _Builder, x: int) -> int | None:
    shape = b.shape(x)
    if len(shape) != 4:
        return None
    first = b.module(nn.Conv2d(shape[1], 4, 1))
    second = b.module(nn.Conv2d(4, shape[1], 1))
    mean = b.rng.choice(
        [
            lambda v: v.mean((2, 3), keepdim=True),
            lambda v: torch.mean(v, dim=(-2, -1), keepdim=True),
            lambda v: F.adaptive_avg_pool2d(v, 1),
        ]
    )

    def gate(m: Any, v: Any) -> Any:
        hidden = F.relu(m.get_submodule(first)(mean(v)))
        return v * m.get_submodule(second)(hidden).sigmoid()

    return b.add(gate, x)


# -- space --------------------------------------------------------------------------------


@operator(1.5)
def pooling(b: _Builder, x: int) -> int | None:
    shape = b.shape(x)
    n = len(shape) - 2
    if n < 1 or min(shape[2:]) < 3:
        return None
    kind = b.rng.choice(["Max", "Avg", "AdaptiveAvg", "AdaptiveMax", "function", "indices"])
    if kind.startswith("Adaptive"):
        return b.call(getattr(nn, f"{kind}Pool{n}d")(b.rng.choice([1, 2])), x)
    if kind == "function":
        function = getattr(F, b.rng.choice([f"max_pool{n}d", f"avg_pool{n}d"]))
        return b.add(lambda m, v: function(v, 3, stride=2, padding=1), x)
    if kind == "indices":
        function = getattr(F, f"max_pool{n}d")
        return b.add(lambda m, v: function(v, 2, return_indices=True)[0], x)
    return b.call(getattr(nn, f"{kind}Pool{n}d")(3, stride=b.rng.choice([1, 2]), padding=1), x)


@operator(0.8)
def interpolate(b: _Builder, x: int) -> int | None:
    shape = b.shape(x)
    if len(shape) < 3 or shape[-1] > 8:
        return None
    modes = {3: "linear", 4: "bilinear", 5: "trilinear"}
    functions: list[Function] = [
        lambda v: F.interpolate(v, scale_factor=2),
        lambda v: F.interpolate(v, size=v.shape[2:], mode=modes[len(shape)]),
        lambda v: F.interpolate(v, size=[s + 1 for s in shape[2:]], mode="nearest"),
    ]
    function = b.rng.choice(functions)
    return b.add(lambda m, v: function(v), x)


@operator(1.2)
def reduction(b: _Builder, x: int) -> int | None:
    shape = b.shape(x)
    if len(shape) < 3:
        return None
    dims = b.rng.choice([(2,), (-1,), tuple(range(2, len(shape))), (1,)])
    keep = b.rng.random() < 0.5
    functions: list[Function] = [
        lambda v: v.mean(dims, keepdim=keep),
        lambda v: torch.sum(v, dim=dims, keepdim=keep) * 0.3,
        lambda v: torch.amax(v, dims, keep),
        lambda v: v.mean(axis=dims, keepdims=keep),
        lambda v: v.logsumexp(dims, keepdim=keep),
    ]
    function = b.rng.choice(functions)
    return b.add(lambda m, v: function(v), x)


# -- axes ---------------------------------------------------------------------------------


@operator(1.5)
def concatenation(b: _Builder, x: int) -> int | None:
    shape = b.shape(x)
    axis = b.rng.choice([1, 1, 1, len(shape) - 1])

    def rest(other: tuple[int, ...]) -> tuple[int, ...]:
        return other[:axis] + other[axis + 1 :]

    others = [i for i in range(len(b.values)) if rest(b.shape(i)) == rest(shape)]
    others = [i for i in others if len(b.shape(i)) == len(shape)]
    chosen = [x, *b.rng.choices(others, k=b.rng.choice([1, 2]))]
    b.rng.shuffle(chosen)
    negative = axis - len(shape)
    functions: list[Function] = [
        lambda vs: torch.cat(vs, axis),
        lambda vs: torch.cat(tuple(vs), dim=negative),
        lambda vs: torch.concat(vs, axis=axis),
    ]
    function = b.rng.choice(functions)
    return b.add(lambda m, *vs: function(list(vs)), *chosen)


@operator(2)
def split(b: _Builder, x: int) -> int | None:
    shape = b.shape(x)
    axis = b.rng.choice([1, 1, 1, -1])
    size = shape[axis]
    if size < 4:
        return None
    cut = b.rng.randint(1, size - 1)
    functions: list[Function] = [
        lambda v: v.chunk(2, dim=axis),
        lambda v: torch.chunk(v, 2, axis),
        lambda v: torch.split(v, [cut, size - cut], dim=axis),
        lambda v: v.split((size + 1) // 2, axis),
        lambda v: torch.tensor_split(v, 2, dim=axis),
    ]
    function = b.rng.choice(functions)
    if b.rng.random() < 0.2:
        return b.add(lambda m, v: torch.cat(function(v), axis), x)
    return b.add(lambda m, v: function(v), x, outputs=2)


@operator(2)
def slicing(b: _Builder, x: int) -> int | None:
    shape = b.shape(x)
    size = shape[1]
    if size < 4:
        return None
    a, c = sorted(b.rng.sample(range(size + 1), 2))
    functions: list[Function] = [
        lambda v: v[:, a:c],
        lambda v: v[:, ::2],
        lambda v: v[:, 1::3],
        lambda v: v[:, -3:],
        lambda v: v[:, :-2],
        lambda v: v[..., 1:],
        lambda v: v[..., ::2],
        lambda v: v.narrow(1, a, c - a),
        lambda v: torch.narrow(v, dim=1, start=-2, length=2),
        lambda v: v[:, 2],
        lambda v: v[..., 0],
        lambda v: v[:, : v.shape[1] // 2],
        lambda v: v[:, None, 1:].squeeze(1),
        lambda v: v[:, v.size(1) // 2 :] * 0.5,
        lambda v: v[:, [0, 2]],
    ]
    function = b.rng.choice(functions)
    return b.add(lambda m, v: function(v), x)


@operator(1.5)
def flatten(b: _Builder, x: int) -> int | None:
    if len(b.shape(x)) < 3:
        return None
    functions: list[Function] = [
        lambda v: v.flatten(1),
        lambda v: torch.flatten(v, 1),
        lambda v: v.reshape(v.size(0), -1),
        lambda v: v.flatten(1, 2),
        lambda v: torch.flatten(v, start_dim=-2),
        lambda v: v.flatten(2),
    ]
    if b.rng.random() < 0.3:
        return b.call(nn.Flatten(), x)
    function = b.rng.choice(functions)
    return b.add(lambda m, v: function(v), x)


@operator(1)
def flatten_sizes(b: _Builder, x: int) -> int | None:
    """Merge the channel axis with the next one by arithmetic on sizes, and take it apart."""
    shape = b.shape(x)
    if len(shape) < 3:
        return None
    tail = shape[3:]
    functions: list[Function] = [
        lambda v: v.reshape(v.shape[0], v.shape[1] * v.shape[2], *tail),
        lambda v: v.reshape(-1, v.size(1) * v.size(2), *tail),
        lambda v: (
            v.reshape(v.shape[0] * v.shape[1], *shape[2:])
            .mul(0.5)
            .reshape(v.shape[0], v.shape[1], *shape[2:])
        ),
        lambda v: v.reshape(v.shape[0], -1).sin().view(v.shape[0], shape[1], *shape[2:]),
        lambda v: v.flatten(1).unflatten(1, (v.shape[1], *shape[2:])),
    ]
    if b.rng.random() < 0.3:
        # Channels that become examples for a while, and are mixed by nothing.
        name = b.module(nn.Linear(shape[-1], 4))

        def folded(m: Any, v: Any) -> Any:
            n, c = v.shape[0], v.shape[1]
            rows = v.reshape(n * c, *shape[2:])
            return m.get_submodule(name)(rows).sigmoid().reshape(n, c, *shape[2:-1], 4)

        return b.add(folded, x)
    function = b.rng.choice(functions)
    return b.add(lambda m, v: function(v), x)


@operator(1.5)
def permutation(b: _Builder, x: int) -> int | None:
    n = len(b.shape(x))
    if n < 3:
        return None
    order = [0, *b.rng.sample(range(1, n), n - 1)]
    functions: list[Function] = [
        lambda v: v.permute(*order),
        lambda v: torch.permute(v, order),
        lambda v: v.transpose(1, -1),
        lambda v: torch.transpose(v, 1, 2),
        lambda v: v.movedim(1, -1),
        lambda v: torch.swapaxes(v, -1, -2),
    ]
    function = b.rng.choice(functions)
    return b.add(lambda m, v: function(v), x)


@operator(1)
def unit_axes(b: _Builder, x: int) -> int | None:
    n = len(b.shape(x))
    axis = b.rng.randint(1, n)
    functions: list[Function] = [
        lambda v: v.unsqueeze(axis),
        lambda v: torch.unsqueeze(v, axis - n - 1),
        lambda v: v.unsqueeze(axis).squeeze(axis),
        lambda v: v.squeeze(1),
        lambda v: torch.squeeze(v, -1),
        lambda v: v[:, :, None] if n == 2 else v.squeeze(),
    ]
    function = b.rng.choice(functions)
    return b.add(lambda m, v: function(v), x)


@operator(1.5)
def group_view(b: _Builder, x: int) -> int | None:
    """(N, C, ...) as (N, g, C / g, ...), shuffled, and back."""
    shape = b.shape(x)
    if not _divisors(shape[1]):
        return None
    g = b.rng.choice(_divisors(shape[1]))
    rest = shape[2:]

    def shuffle(v: Any) -> Any:
        n, c = v.size(0), v.size(1)
        v = v.reshape(n, g, c // g, *rest).transpose(1, 2).contiguous()
        return v.view(n, c, *rest) if b_view else v.flatten(1, 2)

    b_view = b.rng.random() < 0.5
    scale = b.parameter(torch.rand(1, g, 1, *(1 for _ in rest)), "scale")
    functions: list[Function] = [
        lambda m, v: v.reshape(v.shape[0], g, -1, *rest),
        lambda m, v: v.reshape(v.shape[0], g, shape[1] // g, *rest),
        lambda m, v: v.unflatten(1, (g, -1)),
        lambda m, v: torch.unflatten(v, 1, (-1, g)),
        lambda m, v: shuffle(v),
        lambda m, v: shuffle(v),
        lambda m, v: (v.unflatten(1, (g, -1)) * getattr(m, scale)).flatten(1, 2),
        lambda m, v: v.unflatten(1, (g, -1)).sum(1),
        lambda m, v: v.unflatten(1, (g, -1))[:, 1:].flatten(1, 2),
    ]
    if b.rng.random() < 0.2:
        return b.call(nn.Unflatten(1, (g, shape[1] // g)), x)
    return b.add(b.rng.choice(functions), x)


@operator(0.8)
def computed_weight(b: _Builder, x: int) -> int | None:
    """Weights that are the result of operators, or that have another use."""
    features = b.shape(x)[-1]
    weight, scale = b.parameter(torch.randn(6, features) * 0.3), b.parameter(torch.rand(6, 1))
    functions: list[Function] = [
        lambda m, v: F.linear(v, getattr(m, weight) * getattr(m, scale)),
        lambda m, v: F.linear(v, getattr(m, weight)) + getattr(m, weight).mean(),
        lambda m, v: F.linear(v, getattr(m, weight).tanh()),
        lambda m, v: F.linear(v, getattr(m, weight).t().contiguous().t()),
        lambda m, v: F.linear(F.linear(v, getattr(m, weight)), getattr(m, weight).t()),
        lambda m, v: F.linear(v, getattr(m, weight), getattr(m, scale)[:, 0]),
        lambda m, v: F.linear(v, torch.cat([getattr(m, weight), getattr(m, weight)[1:3]])),
        lambda m, v: F.linear(v, getattr(m, weight)[::2]),
    ]
    if b.rng.random() < 0.2:
        layer = nn.Linear(features, 6)
        nn.utils.parametrize.register_parametrization(layer, "weight", _Doubled())
        return b.call(layer, x)
    return b.add(b.rng.choice(functions), x)


class _Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2.0


@operator(0.8)
def expansion(b: _Builder, x: int) -> int | None:
    shape = b.shape(x)
    if len(shape) < 3:
        return None
    rest = (3,) * (len(shape) - 2)
    dims = tuple(range(2, len(shape)))
    functions: list[Function] = [
        lambda v: v.mean(dims, keepdim=True).expand(-1, -1, *rest),
        lambda v: v.mean(dims, keepdim=True).expand(v.shape[0], v.shape[1], *rest),
        lambda v: v.mean(dims, keepdim=True).expand_as(v),
        lambda v: v.mean(dims, keepdim=True).expand(v.size()) + v,
        lambda v: v.mean(1, keepdim=True).expand_as(v),
        lambda v: torch.broadcast_to(v.amax(1, True), v.shape) * v,
        lambda v: v.mean(1, keepdim=True).expand(-1, shape[1], *shape[2:]),
    ]
    function = b.rng.choice(functions)
    return b.add(lambda m, v: function(v), x)


@operator(1.5)
def padding(b: _Builder, x: int) -> int | None:
    shape = b.shape(x)
    if len(shape) < 3:
        return None
    left, right = b.rng.choice([(1, 1), (0, 3), (2, 0), (-1, -1), (0, -2), (3, -1), (-2, 2)])
    if shape[1] + min(left, 0) + min(right, 0) < 1:
        return None
    spatial = (0, 0) * (len(shape) - 2)
    value = b.rng.choice([0.0, 0.7])
    functions: list[Function] = [
        lambda v: F.pad(v, (*spatial, left, right)),
        lambda v: F.pad(v, (*spatial, left, right), value=value),
        lambda v: F.pad(v, (1, 0, *spatial[2:], left, right), "constant", value),
        lambda v: F.pad(v, (1, 1)),
        lambda v: F.pad(v, pad=(v.shape[-1] // 2, 0), mode="constant", value=1.0),
    ]
    if len(shape) == 3:
        functions.append(lambda v: F.pad(v[..., :], (1, 1), mode="replicate"))
    if len(shape) == 4:
        functions += [
            lambda v: F.pad(v[:, :, ::2, ::2], (0, 0, 0, 0, max(left, 0), max(right, 0))),
            nn.ZeroPad2d(1),
            nn.ReflectionPad2d((1, 0, 0, 0)) if shape[-1] > 1 else nn.ConstantPad2d(1, 0.5),
        ]
    function = b.rng.choice(functions)
    if isinstance(function, nn.Module):
        return b.call(function, x)
    return b.add(lambda m, v: function(v), x)


@operator(0.8)
def without_rule(b: _Builder, x: int) -> int | None:
    """Operators that rbpfx does not know."""
    shape = b.shape(x)
    kind = b.rng.choice(["LayerNorm", "GroupNorm", "function"])
    if kind == "LayerNorm":
        return b.call(nn.LayerNorm(shape[-1]), x)
    if kind == "GroupNorm":
        return b.call(nn.GroupNorm(1, shape[1]), x)
    functions: list[Function] = [
        lambda v: torch.softmax(v, 1),
        lambda v: torch.matmul(v, v.transpose(-1, -2)) * 0.1 if len(shape) > 2 else v.flip(1),
        lambda v: v.roll(1, 1),
        lambda v: v @ v.transpose(-1, -2) * 0.1 if len(shape) > 2 else v.sort(1)[0],
        lambda v: torch.stack([v, v * 2], dim=1) if len(shape) < 5 else v.flip(-1),
        lambda v: v.repeat(1, 2, *(1 for _ in shape[2:])),
    ]
    function = b.rng.choice(functions)
    return b.add(lambda m, v: function(v), x)


@operator(0.3)
def cumulative_sum(b: _Builder, x: int) -> int | None:
    """Another one, on its own so that a test can teach rbpfx a wrong rule for it."""
    return b.add(lambda m, v: v.cumsum(1) * 0.2, x)
