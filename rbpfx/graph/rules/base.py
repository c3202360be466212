"""What a rule is, and the registry that finds the rule of a node.

A rule says three things about an operator: how channel identities pass through it (`propagate`),
what must change in the graph when channels go (`rewrite`), and how many multiply-accumulates it
costs (`macs`). Rules are registered for a module class, a function, or a method name; all
spellings of an operator share one rule.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import getitem
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, overload

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from rbpfx.errors import RuleError
from rbpfx.graph.calls import module_of, submodule

if TYPE_CHECKING:
    from rbpfx.graph.operands import Labels
    from rbpfx.graph.propagation import Propagation
    from rbpfx.graph.slicing import Slicing


class Rule:
    """How one kind of operator treats channels. Subclass, and register an instance."""

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Describe the result of `node`; tie, pin and read channels on `state` as needed.

        Args:
            node: A call of the operator, with the value of the example in `node.meta["val"]`.
            state: The analysis under way.

        Returns:
            The label of the result; a tuple of them for several results, None for no tensor.
        """
        raise NotImplementedError

    def rewrite(self, node: fx.Node, state: Slicing) -> None:
        """Adapt the twin of `node` in the emitted graph, and its module's attributes.

        Parameters and buffers bound during `propagate` are sliced already.

        Args:
            node: The call in the analysed graph.
            state: The emission under way; `state.twin(node)` is the call in the emitted graph.
        """

    def moves(self, node: fx.Node) -> bool:
        """Whether the result holds elements of the first argument, moved and nothing else."""
        return False

    def macs(self, node: fx.Node, gm: fx.GraphModule) -> int:
        """Multiply-accumulates of `node` for the whole example batch."""
        return 0


Operator: TypeAlias = type[nn.Module] | Callable[..., Any] | str
# Names that torch accepts for its own.
_NUMPY_NAMES = {"dim": "axis", "keepdim": "keepdims"}
_REGISTRY: dict[Any, Rule] = {}
R = TypeVar("R", bound=Rule)


def register(rule: R, *operators: Operator) -> R:
    """Register a rule.

    Args:
        rule: The rule.
        operators: Module classes, functions, or names of tensor methods (strings).

    Returns:
        The rule.
    """
    for operator in operators:
        _REGISTRY[operator] = rule
    return rule


@overload
def register_rule(operator: Operator, rule: R) -> R: ...
@overload
def register_rule(operator: Operator) -> Callable[[type[R]], type[R]]: ...
def register_rule(operator: Operator, rule: Rule | None = None) -> Any:
    """Say how an operator of yours treats channels.

    Calls of the operator then stay whole when a model is captured, and this rule speaks for them.

    Args:
        operator: A module class (subclasses that inherit its `forward` share the rule), a
            function (marked with `torch.fx.wrap` if it is written in Python), or the name of a
            tensor method. A rule that exists already is replaced.
        rule: The rule. Without it, the result decorates a rule class that needs no arguments.

    Returns:
        The rule, or a decorator that returns the class.

    Raises:
        RuleError: `operator` or `rule` is of another kind.

    Examples:
        >>> from rbpfx.rules import Elementwise, register_rule
        >>> class Cube(nn.Module):
        ...     def forward(self, x: Tensor) -> Tensor:
        ...         return x**3
        >>> cube = register_rule(Cube, Elementwise())
    """
    if isinstance(operator, nn.Module) or not (isinstance(operator, str) or callable(operator)):
        raise RuleError(
            f"a rule is registered for a module class, a function or the name of a tensor method, "
            f"not for {operator!r}"
        )
    if rule is None:
        return lambda cls: (register_rule(operator, cls()), cls)[1]
    if not isinstance(rule, Rule):
        raise RuleError(f"the rule of {operator!r} must be an instance of rbpfx.Rule, not {rule!r}")
    return register(rule, operator)


def find_rule(node: fx.Node, gm: fx.GraphModule) -> Rule | None:
    """The rule of a node: by module class, function or method name.

    A subclass shares the rule of its nearest registered base as long as it inherits `forward`. A
    module with forward hooks has no rule: they may do anything.
    """
    if node.op == "call_module":
        return rule_of_module(submodule(gm, str(node.target)))
    # The target of any other node is a name of the user's, and may be that of a method.
    return _REGISTRY.get(node.target) if node.op in ("call_function", "call_method") else None


def rule_of_module(module: nn.Module) -> Rule | None:
    """The rule for calls of a module, if there is one."""
    base = next((c for c in type(module).__mro__ if c in _REGISTRY), None)
    inherited = base is not None and getattr(base, "forward", None) is type(module).forward
    return _REGISTRY[base] if inherited and not _has_hooks(module) else None


def python_functions() -> list[FunctionType]:
    """Functions of other packages that have a rule, so that calls of them are operators."""
    written = (operator for operator in _REGISTRY if isinstance(operator, FunctionType))
    return [f for f in written if not f.__module__.startswith(("torch.", "rbpfx."))]


def rule_of_function(function: Callable[..., Any]) -> Rule | None:
    """The rule for calls of a function, if there is one."""
    return _REGISTRY.get(function)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def operator_name(node: fx.Node, gm: fx.GraphModule) -> str:
    """The operator of a node as a user would write it, for messages."""
    if node.op == "call_module":
        called = submodule(gm, str(node.target))
        kind = type(called).__name__
        return f"{kind} with forward hooks" if _has_hooks(called) else kind
    if node.op == "call_method":
        return f"Tensor.{node.target}"
    if isinstance(node.target, Callable):  # type: ignore[arg-type]
        module = getattr(node.target, "__module__", None)
        name = getattr(node.target, "__name__", str(node.target))
        return f"{module}.{name}" if module else name
    return str(node.target)


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call by position or name (torch's or numpy's), whichever the call used."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, node.kwargs.get(_NUMPY_NAMES.get(name, name), default))


def set_argument(node: fx.Node, position: int, name: str, value: Any) -> None:
    """Replace an argument where the call has it, or add it by name."""
    if len(node.args) > position:
        node.update_arg(position, value)
    else:
        node.update_kwarg(name, value)


def tensor_input(node: fx.Node) -> fx.Node:
    """The first argument of a call, which every operator here names `input` or `self`."""
    source = node.args[0] if node.args else node.kwargs["input"]
    assert isinstance(source, fx.Node)
    return source


def setting(node: fx.Node, gm: fx.GraphModule, position: int, name: str, default: Any) -> Any:
    """A non-tensor setting: the module's attribute, or the call's argument."""
    module = module_of(node, gm)
    return argument(node, position, name, default) if module is None else getattr(module, name)


def value_of(argument: Any) -> Any:
    """The example value of an argument: a node's metadata, anything else as it is."""
    return argument.meta.get("val") if isinstance(argument, fx.Node) else argument


def asks_for_examples(size: Any) -> bool:
    """Whether a number in a call is computed from the length of a first axis, such as the batch's.

    Args:
        size: An argument of a call: a node, or anything else.
    """
    if not isinstance(size, fx.Node) or isinstance(value_of(size), Tensor):
        return False
    source = size.args[0] if size.args else None
    if size.op == "call_method" and size.target == "size":
        return bool(argument(size, 1, "dim") == 0)
    if size.target is getitem and isinstance(value_of(source), torch.Size):
        return bool(size.args[1] == 0)
    return any(map(asks_for_examples, size.all_input_nodes))


def call_on(node: fx.Node, gm: fx.GraphModule, value: Tensor) -> Any:
    """What the operator of a node gives for another first argument, with its other arguments."""
    module = module_of(node, gm)
    if module is not None:
        return module(value)
    args = _evaluated(node.args[1:])
    kwargs = {k: a for k, a in _evaluated(node.kwargs).items() if k != "input"}
    if node.op == "call_method":
        return getattr(value, str(node.target))(*args, **kwargs)
    assert callable(node.target)
    return node.target(value, *args, **kwargs)


def _evaluated(arguments: Any) -> Any:
    """Arguments with example values for nodes."""
    return map_aggregate(arguments, value_of)


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Shape of the tensor that a node computes on the example inputs."""
    value = node.meta["val"]
    assert isinstance(value, Tensor), node.format_node()
    return tuple(value.shape)
