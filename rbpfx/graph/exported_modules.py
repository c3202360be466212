"""The modules of an exported program: places for its tensors, under the names of the model.

Only a BatchNorm is more than that. It has a mode and statistics of its own, so it becomes the
module again that it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

_TENSORS = ("weight", "bias", "running_mean", "running_var")
_COUNTER = "num_batches_tracked"
_CLASSES = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def share_state(source: nn.Module, gm: fx.GraphModule) -> None:
    """Give a graph module the parameters and buffers of another module, under their names.

    Tied parameters come out of a file as tensors of their own in the same memory.
    """
    tied: dict[Any, nn.Parameter] = {}
    for name, parameter in source.named_parameters(remove_duplicate=False):
        memory = (parameter.data_ptr() or id(parameter), parameter.shape, parameter.stride())
        shared = tied.setdefault(memory, parameter)
        _owner(gm, name).register_parameter(_leaf(name), shared)
    for path, module in source.named_modules(remove_duplicate=False):
        for leaf, buffer in module._buffers.items():
            persistent = leaf not in module._non_persistent_buffers_set
            _owner(gm, f"{path}.{leaf}").register_buffer(leaf, buffer, persistent)


def add_constant(gm: fx.GraphModule, name: str, value: Tensor) -> None:
    """Add a tensor of the program that is no state of the model."""
    _owner(gm, name).register_buffer(_leaf(name), value, persistent=False)


def holds(gm: nn.Module, name: str) -> bool:
    """Whether there is something of a qualified name."""
    try:
        attrgetter(name)(gm)
    except AttributeError:
        return False
    return True


def restore_batch_norm(gm: fx.GraphModule, given: Mapping[str, Any]) -> str | None:
    """Put a BatchNorm module where the tensors of a call of `batch_norm` come from.

    Training refreshes the statistics of such modules, verification switches their mode: they have
    to be there as modules. All other layers do as well as functions.

    Args:
        gm: Holds the tensors in modules that are nothing but a place for them.
        given: The arguments of the call by name; tensors are `get_attr` nodes.

    Returns:
        The qualified name of the module, in the mode of the call; None if the tensors are not
        those of one module, or if another call uses it in another way.
    """
    path = _place(gm, given)
    if path is None:
        return None
    momentum = given["momentum"]
    if momentum == 0 and not given["training"]:
        momentum = None  # in eval mode, this is how a module without momentum calls
    settings = {"eps": given["eps"], "momentum": momentum, "training": given["training"]}
    place = gm.get_submodule(path)
    if isinstance(place, _BatchNorm):
        same = all(getattr(place, name) == value for name, value in settings.items())
        return path if same else None
    has_statistics = given["running_mean"] is not None
    module = _CLASSES[given["input"].meta["val"].ndim](
        0, affine=given["weight"] is not None, track_running_stats=has_statistics
    )
    module._parameters.update(place._parameters)
    module._buffers.update(place._buffers)
    module.num_features = next(t.shape[0] for t in (*place.parameters(), *place.buffers()))
    if not has_statistics:
        settings["training"] = False  # says nothing about the mode
    for name, value in settings.items():
        setattr(module, name, value)
    gm.add_submodule(path, module)
    return path


def _place(gm: fx.GraphModule, given: Mapping[str, Any]) -> str | None:
    """The module that holds the tensors of a call, and no others."""
    nodes = {name: given[name] for name in _TENSORS if given[name] is not None}
    if not all(n.op == "get_attr" for n in nodes.values()):
        return None
    paths = {str(n.target).rpartition(".")[0] for n in nodes.values()}
    named = all(str(n.target).endswith(f".{name}") for name, n in nodes.items())
    if len(paths) != 1 or not named or isinstance(given["momentum"], fx.Node):
        return None
    (path,) = paths
    place = gm.get_submodule(path)
    held = {n for n, t in (*place._parameters.items(), *place._buffers.items()) if t is not None}
    return path if held - {_COUNTER} == set(nodes) and not place._modules else None


def _owner(gm: fx.GraphModule, name: str) -> nn.Module:
    """The module that holds a tensor of a qualified name; made if there is none."""
    path = name.rpartition(".")[0]
    if path and not holds(gm, path):
        gm.add_submodule(path, nn.Module())
    return gm.get_submodule(path)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
