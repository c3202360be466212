"""A pruned network as readable Python: one class, all widths written out, the graph as `forward`.

Submodules have the names of the original, so that the saved weights fit. Every layer is written as
a call of its constructor, which is tried: it must make a layer of the same tensors and settings.
"""

from __future__ import annotations

import inspect
import os
import re
import textwrap
from collections.abc import Iterator, Mapping
from keyword import iskeyword
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from rbpfx.errors import SaveError
from rbpfx.files import written_aside
from rbpfx.graph.parts import captured_parts
from rbpfx.saving.architecture import constructed, is_plain
from rbpfx.saving.definitions import Definitions, literal
from rbpfx.saving.save import distinct
from rbpfx.surroundings import generators_kept

_NUMBERED = re.compile(r'getattr\((self(?:\.\w+|\[\d+\])+), "(\d+)"\)')
# Larger constants come with the weights only (ours).
_LARGEST_LITERAL = 4096

_HEADER = '''"""{name}, pruned by rbpfx {version}.

    network = {name}()
    network.load_state_dict(safetensors.torch.load_file("weights.safetensors"))

With tied parameters: `safetensors.torch.load_model(network, "weights.safetensors")`.
"""

from __future__ import annotations

'''

_PART = '''class Part(nn.Module):
    """A place for submodules."""

    def __init__(self, /, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
'''


def write_source(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a pruned network as Python; see `PruningResult.to_source`.

    Raises:
        SaveError: A part of the network cannot be written as source, or the file not written.
    """
    text = source_of(model)
    path = Path(path)
    try:
        with written_aside(path) as file:
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SaveError(f"the source cannot be written to {str(path)!r}: {error}") from error


def source_of(model: nn.Module) -> str:
    """The Python source of a pruned network.

    Raises:
        SaveError: A part of the network cannot be written as source.
    """
    import rbpfx

    if captured_parts(model).keys() != {""} or not isinstance(model, fx.GraphModule):
        raise SaveError(
            f"{type(model).__name__} runs Python code of its own over captured parts, which cannot "
            "be written as source; save it and load it with rbpfx.load"
        )
    writer = _Writer(model)
    body = [*writer.layers(), *writer.tensors(), *writer.ties()]
    forward = writer.forward()
    definitions = writer.definitions
    definitions.imports |= {"import torch", "from torch import nn"}
    lines = textwrap.indent("\n".join(body), " " * 8)
    part = [_PART.rstrip()] if "Part(" in lines else []
    chapters = ["\n".join(definitions.import_lines()), *part, *definitions.sources.values()]
    chapters.append(
        f"class {writer.name}(nn.Module):\n    def __init__(self) -> None:\n"
        f"        super().__init__()\n{lines}\n\n{textwrap.indent(forward, '    ')}"
    )
    header = _HEADER.format(name=writer.name, version=rbpfx.__version__)
    return header + "\n\n\n".join(chapters) + "\n"


class _Writer:
    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.definitions = Definitions()
        self.name = re.sub(r"\W", "_", type(gm).__name__)
        self.called = {str(n.target) for n in gm.graph.nodes if n.op == "call_module"}
        self.first: dict[nn.Module, str] = {}
        self.shared: dict[str, str] = {}
        self.lists: set[str] = set()
        self.attributes: list[str] = []

    # -- modules ----------------------------------------------------------------------------

    def layers(self) -> Iterator[str]:
        """Statements that make all submodules."""
        for name, expression in self._children(self.gm, ""):
            plain = name.isidentifier() and not iskeyword(name)
            yield f"self.{name} = {expression}" if plain else _add("", name, expression)
        for name, first in self.shared.items():
            owner, _, leaf = name.rpartition(".")
            yield _add(owner, leaf, f"self.get_submodule({first!r})")
        yield from self.attributes

    def _children(self, module: nn.Module, prefix: str) -> Iterator[tuple[str, str]]:
        for name, child in module._modules.items():
            path = f"{prefix}{name}"
            if child is None:
                continue
            if self.first.setdefault(child, path) != path:
                self.shared[path] = self.first[child]
            elif path in self.called or _is_layer(child):
                yield name, self._layer(child, path)
            else:
                yield name, self._part(path, dict(self._children(child, f"{path}.")))

    def _part(self, path: str, children: dict[str, str]) -> str:
        """The expression that makes a place for submodules."""
        if children and list(children) == [str(i) for i in range(len(children))]:
            self.lists.add(path)
            lines = "".join(f"{expression},\n" for expression in children.values())
            return f"nn.ModuleList(\n    [\n{textwrap.indent(lines, ' ' * 8)}    ]\n)"
        if all(name.isidentifier() and not iskeyword(name) for name in children):
            lines = "".join(f"{name}={expression},\n" for name, expression in children.items())
            return f"Part(\n{textwrap.indent(lines, ' ' * 4)})" if children else "Part()"
        lines = "".join(f"{name!r}: {expression},\n" for name, expression in children.items())
        return f"Part(\n    **{{\n{textwrap.indent(lines, ' ' * 8)}    }}\n)"

    def _layer(self, module: nn.Module, path: str) -> str:
        """The constructor call that makes a layer."""
        kind = type(module)
        signature = _signature(kind)
        arguments = constructed(module, signature)
        dtypes = {t.dtype for t in _own(module).values() if t.is_floating_point()}
        if "dtype" in signature and len(dtypes) == 1 and dtypes != {torch.float32}:
            arguments["dtype"] = dtypes.pop()
        own = _annotated(module)
        if isinstance(module, nn.PReLU):
            arguments["num_parameters"] = module.weight.numel()
        if isinstance(module, nn.GroupNorm) and module.num_channels % module.num_groups:
            # The constructor refuses groups of unequal sizes, which the exact one has.
            arguments["num_groups"], own["num_groups"] = 1, module.num_groups
        short = _shortened(arguments, signature)
        if _failure(module, short, own) is None:
            arguments = short
        elif (failure := _failure(module, arguments, own)) is not None:
            raise SaveError(
                f"module {path!r} of class {kind.__name__} cannot be written as source: the "
                f"arguments of its constructor cannot be told from attributes of the same names; "
                f"{failure}. Save the network and load it with rbpfx.load"
            )
        for name, value in own.items():
            self.attributes.append(f"{_place(path)}.{name} = {literal(value)}")
        if kind.__module__.startswith("torch.nn") and getattr(nn, kind.__name__, None) is kind:
            called = f"nn.{kind.__name__}"
        else:
            called = self.definitions.reference(kind)
        required = [n for n, p in signature.items() if p.default is p.empty and n in arguments]
        first = [literal(arguments.pop(name)) for name in required]
        rest = [f"{name}={literal(value)}" for name, value in arguments.items()]
        return f"{called}({', '.join(first + rest)})"

    # -- tensors ----------------------------------------------------------------------------

    def tensors(self) -> Iterator[str]:
        """Statements that make the tensors outside of layers."""
        stored, _ = distinct(self.gm)
        for path, module in self.gm.named_modules():
            if path in self.called or _is_layer(module):
                continue
            for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
                if (f"{path}.{leaf}" if path else leaf) in stored and tensor is not None:
                    constant = leaf in module._non_persistent_buffers_set
                    yield f"{_place(path)}.{_register(leaf, tensor, constant)}"

    def ties(self) -> Iterator[str]:
        """Statements that tie tensors which are one."""
        for name, first in distinct(self.gm)[1].items():
            (path, _, leaf), (other, _, other_leaf) = name.rpartition("."), first.rpartition(".")
            if leaf == other_leaf and self.gm.get_submodule(path) is self.gm.get_submodule(other):
                continue  # a module in two places
            tensor = f"{_place(other)}.{other_leaf}"
            yield f"{_place(path)}.{leaf} = {tensor}"

    # -- the graph --------------------------------------------------------------------------

    def forward(self) -> str:
        """The method `forward`."""
        code = self.gm.graph.python_code("self")
        text = code.src[code.src.index("def forward") :].strip()
        text = re.sub(r"torch\._C\._nn\.(\w+)", _public_function, text)
        indexed, text = text, _NUMBERED.sub(self._indexed, text)
        while indexed != text:  # numbered modules in numbered modules
            indexed, text = text, _NUMBERED.sub(self._indexed, text)
        for name, value in code.globals.items():
            if re.search(rf"\b{name}\b", text):
                self.definitions.reference(value, name)
        return text

    def _indexed(self, match: re.Match[str]) -> str:
        """`self.layers[0]` for `getattr(self.layers, "0")`, where it is a list."""
        path = re.sub(r"\[(\d+)\]", r".\1", match[1]).removeprefix("self.")
        return f"{match[1]}[{match[2]}]" if path in self.lists else match[0]


def _public_function(match: re.Match[str]) -> str:
    """`torch.nn.functional.f` for `torch._C._nn.f`, where it is the same function."""
    public = getattr(nn.functional, match[1], None)
    same = public is not None and public is getattr(torch._C._nn, match[1], None)
    return f"torch.nn.functional.{match[1]}" if same else match[0]


def _is_layer(module: nn.Module) -> bool:
    """Whether a module that no node calls is a layer all the same, not a place for others."""
    of_torch = type(module).__module__.startswith("torch.nn.modules")
    return of_torch and type(module) is not nn.Module and not module._modules and bool(_own(module))


def _add(owner: str, name: str, expression: str) -> str:
    return f"{_place(owner)}.add_module({name!r}, {expression})"


def _place(path: str) -> str:
    return f"self.get_submodule({path!r})" if path else "self"


def _register(leaf: str, tensor: Tensor, constant: bool) -> str:
    small = tensor.numel() <= _LARGEST_LITERAL
    if constant and small and not tensor.is_complex():
        value = f"torch.tensor({literal(tensor.tolist())}, dtype={tensor.dtype})"
        if not tensor.numel():
            value = f"torch.zeros({tuple(tensor.shape)!r}, dtype={tensor.dtype})"
    else:
        dtype = "" if tensor.dtype == torch.float32 else f", dtype={tensor.dtype}"
        value = f"torch.zeros({tuple(tensor.shape)!r}{dtype})"
    if not isinstance(tensor, nn.Parameter):
        return f"register_buffer({leaf!r}, {value})"
    flag = "" if tensor.is_floating_point() else ", requires_grad=False"
    return f"register_parameter({leaf!r}, nn.Parameter({value}{flag}))"


def _own(module: nn.Module) -> dict[str, Tensor]:
    return dict((*module.named_parameters(), *module.named_buffers()))


def _kinds(module: nn.Module) -> dict[str, Any]:
    return {name: (tuple(t.shape), t.dtype, type(t)) for name, t in _own(module).items()}


def _annotated(module: nn.Module) -> dict[str, Any]:
    """What a module of rbpfx has besides the arguments of the constructor it inherits."""
    kind = type(module)
    if not kind.__module__.startswith("rbpfx."):
        return {}
    return {name: getattr(module, name) for name in inspect.get_annotations(kind)}


def _shortened(
    arguments: Mapping[str, Any], signature: Mapping[str, inspect.Parameter]
) -> dict[str, Any]:
    """Arguments as people write them: `3` for `(3, 3)`, and none that are the default then."""
    short = {}
    for name, value in arguments.items():
        if isinstance(value, tuple) and len(set(value)) == 1:
            value = value[0]
        if value != signature[name].default:
            short[name] = value
    return short


def _failure(module: nn.Module, arguments: Mapping[str, Any], own: Mapping[str, Any]) -> str | None:
    """Why a constructor with these arguments does not make such a module; None if it does."""
    signature = _signature(type(module))
    try:
        # Numbers that are not written out shall not depend on the default dtype of the reader.
        explicit = {"dtype": torch.float32} if "dtype" in signature else {}
        with torch.device("meta"), generators_kept(torch.device("cpu")):
            twin = type(module)(**{**explicit, **arguments})
        for name, value in own.items():
            setattr(twin, name, value)
    except Exception as error:
        return f"it refuses them: {error}"
    made, wanted = ({**_kinds(m), **_settings(m)} for m in (twin, module))
    odd = next((name for name in {**made, **wanted} if made.get(name) != wanted.get(name)), None)
    if odd is None:
        return None
    return f"they make one whose {odd!r} is {made.get(odd)!r} instead of {wanted.get(odd)!r}"


def _settings(module: nn.Module) -> dict[str, Any]:
    """The numbers, texts and such among the attributes of a module and of those in it."""
    settings = {
        f"{path}.{name}" if path else name: value
        for path, part in module.named_modules()
        for name, value in vars(part).items()
        if name != "training" and is_plain(value)
    }
    if isinstance(module, nn.PReLU):
        settings.pop("num_parameters")  # its weight tells, also where one slope serves all channels
    return settings


def _signature(kind: type[nn.Module]) -> Mapping[str, inspect.Parameter]:
    """The parameters of a constructor; recurrent layers take them from their base class."""
    if kind not in (nn.LSTM, nn.GRU, nn.RNN):
        return inspect.signature(kind.__init__).parameters
    parameters = dict(inspect.signature(nn.RNNBase.__init__).parameters)
    mode = parameters.pop("mode")
    if kind is nn.RNN:
        parameters["nonlinearity"] = mode.replace(name="nonlinearity", default="tanh")
    return parameters


__all__ = ["source_of", "write_source"]
