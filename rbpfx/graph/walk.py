"""The first half of the analysis: walk the graph once and let every rule speak."""

from __future__ import annotations

from collections import Counter
from dataclasses import is_dataclass

import torch
from torch import Tensor, fx, nn

from rbpfx.errors import RuleError
from rbpfx.graph.aliasing import Memory
from rbpfx.graph.calls import submodule
from rbpfx.graph.modes import evaluated_nodes
from rbpfx.graph.operands import Labels
from rbpfx.graph.parts import captured_parts
from rbpfx.graph.propagation import Propagation, unfollowed
from rbpfx.graph.provenance import Label
from rbpfx.graph.rules.base import Rule, find_rule, operator_name


def walk(model: nn.Module, unit: str, attention: str, normalization: str) -> Propagation:
    """Visit every node of every part once, in order.

    Args:
        model: A captured model.
        unit: See `rbpfx.analyze`, also for the others.
        attention: What a unit is where heads are contracted.
        normalization: What becomes of axes that are normalised.

    Returns:
        What the rules said.

    Raises:
        RuleError: What a rule says does not have the shape of the value.
    """
    state = Propagation(model, unit, attention, normalization)
    for name, gm in captured_parts(model).items():
        state.enter(name, gm)
        state.evaluated |= evaluated_nodes(gm.graph)
        _visit(gm, state)
    _pin_shared_features(state)
    return state


def _visit(gm: fx.GraphModule, state: Propagation) -> None:
    for node in gm.graph.nodes:
        depends = not state.activations.isdisjoint(node.all_input_nodes)
        # Sizes of an activation say nothing about its values.
        if node.op == "placeholder" or (depends and not _is_size(node.meta.get("val"))):
            state.activations.add(node)
        if node.op == "get_attr":
            state.labels[node] = state.attribute_label(node)
        elif node.op == "output":
            for source in node.all_input_nodes:
                state.pin(state.labels.get(source), "output of the model")
        elif node.op != "placeholder":
            state.labels[node] = _step(node, state)
    # What is changed in place through a view, and seen changed afterwards, stays.
    for write, holders in Memory(gm).entangled():
        for holder in holders:
            state.pin(state.labels.get(holder), f"changed in place by {write.name!r}")


def _step(node: fx.Node, state: Propagation) -> Labels:
    """The label of a node's value, by its rule; an operator without one pins what it touches."""
    rule = find_rule(node, state.gm)
    if rule is not None:
        return _apply(rule, node, state)
    if isinstance(node.target, type) and hasattr(node.target, "_fields"):
        values = (*node.args, *node.kwargs.values())
        return tuple(_packed(value, state) for value in values)
    if isinstance(node.target, type) and is_dataclass(node.target):
        for source in node.all_input_nodes:
            state.pin(state.labels.get(source), "output of the model")
        return None
    name = operator_name(node, state.gm)
    touched = (state.labels.get(source) for source in node.all_input_nodes)
    if any(label.blocks for labels in touched for label in _flat(labels)):
        state.unknown[f"{state.prefix}{node.name}"] = name
    reason = node.meta.get("kept_whole")
    if reason is not None:
        inside = _channels_inside(submodule(state.gm, str(node.target)))
        if inside:
            state.whole[f"{state.prefix}{node.target}"] = inside, reason
    state.pin_call(node, reason or f"no rule for {name} (node {node.name!r})")
    return unfollowed(node)


def _channels_inside(module: nn.Module) -> int:
    """How many channels the layers of a module have that no graph computes."""
    if isinstance(module, fx.GraphModule):
        return 0
    own = sum(len(weight) for weight in module.parameters(recurse=False) if weight.ndim > 1)
    return own + sum(map(_channels_inside, module.children()))


def _apply(rule: Rule, node: fx.Node, state: Propagation) -> Labels:
    """Let a rule speak, and check that what it says has the shape of the value."""
    try:
        labels = rule.propagate(node, state)
    except ValueError as error:
        raise _misfit(rule, node, state, str(error)) from error
    value = node.meta.get("val")
    if isinstance(labels, Label) and isinstance(value, Tensor):
        described = labels.shape == tuple(value.shape) and all(
            block.atoms.shape == tuple(labels.shape[d] for d in block.dims)
            for block in labels.blocks
        )
        if not described:
            message = f"it describes {labels}, the value has shape {tuple(value.shape)}"
            raise _misfit(rule, node, state, message)
    return labels


def _misfit(rule: Rule, node: fx.Node, state: Propagation, message: str) -> RuleError:
    name = operator_name(node, state.gm)
    return RuleError(
        f"the rule {type(rule).__name__} does not fit {name} (node {node.name!r}): {message}"
    )


def _packed(value: object, state: Propagation) -> Label | None:
    """Label of a field of a named tuple; several values in one field are pinned."""
    label = state.labels.get(value) if isinstance(value, fx.Node) else None
    if isinstance(label, tuple):
        state.pin(label, "packed into a named tuple")
        return None
    return label


def _pin_shared_features(state: Propagation) -> None:
    """Pin features of a weight that is used in any other way than to read them."""
    readers = Counter(read.weight for read in state.reads if len(read.atoms) > 1)
    for axis, atoms in state.features.items():
        if not state.uses[axis[0]] == state.read_uses[axis] == readers[axis]:
            state.identities.pin(atoms, f"parameter {axis[0]!r} has other uses")


def _is_size(value: object) -> bool:
    return isinstance(value, (int, float, torch.Size, torch.dtype, torch.device))


def _flat(labels: Labels) -> tuple[Label, ...]:
    several = labels if isinstance(labels, tuple) else (labels,)
    return tuple(label for label in several if label is not None)
