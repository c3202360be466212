"""Random small networks: programs over the operators that rbpfx claims to understand.

A `Program` is an `nn.Module` whose forward interprets a list of steps. It is built step by step on
a real example, so every step knows the shapes it meets; everything follows from one seed.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rbpfx.testing import randomize

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
        Builder(self, random.Random(seed), length, only).build()

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
    import_module("tests.graph.operators")  # here: the operators are registered with this module
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


def _input_shapes(seed: int, two: bool) -> list[tuple[int, ...]]:
    rng = random.Random(seed * 7 + 1)
    kinds: list[tuple[int, ...]] = [(3, 8, 8)] * 6 + [(3, 8), (4, 4, 4, 4), (6, 5), (10,)]
    first = rng.choice(kinds)
    if not two:
        return [first]
    return [first, first if rng.random() < 0.5 else rng.choice(kinds)]


class Builder:
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

    def writable(self, index: int) -> int | None:
        """A value that may be modified in place: the given one, or any other."""
        if index in self.fresh:
            return index
        return self.rng.choice(sorted(self.fresh)) if self.fresh else None

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
            result = self.call(conv(len(shape) - 2)(shape[1], width, 1, stride=3), index)
        else:
            result = self.call(conv(len(shape) - 2)(shape[1], width, 1), index, fresh=True)
        assert result is not None
        return result


OPERATORS: dict[str, tuple[Callable[[Builder, int], int | None], float]] = {}


def operator(weight: float = 1.0) -> Callable[[Any], Any]:
    """Register a random operator: returns a result's index, or None if it does not apply."""

    def register(function: Any) -> Any:
        OPERATORS[function.__name__] = (function, weight)
        return function

    return register


def conv(n: int, transposed: bool = False) -> Any:
    return getattr(nn, f"Conv{'Transpose' if transposed else ''}{n}d")


def divisors(n: int) -> list[int]:
    return [d for d in range(2, n) if n % d == 0]
