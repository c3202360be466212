"""Deployed networks compute what the network computes in eval mode, whatever it is made of."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_leaves
from torchvision import models

import rbpfx
from rbpfx.deployment import packing
from rbpfx.deployment.deploy import CompiledNetwork, deploy
from rbpfx.deployment.packing import PackedConv2d, PackedLayer, PackedLinear
from rbpfx.errors import InputError, VerificationError
from rbpfx.graph.verification import difference
from rbpfx.latency.operators import Operator, OperatorTimes
from rbpfx.testing import randomize
from tests.graph.generator import random_inputs, random_program
from tests.toy import ShortcutNet

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class PackedIsFaster(OperatorTimes):
    """The times of a machine on which every layer gains from packing."""

    def measure(self, operators: Iterable[Operator], progress: bool = False) -> None:
        for operator in operators:
            self.seconds[operator.key] = 1.0 if operator.key.startswith("packed") else 2.0


@pytest.fixture
def everything_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "OperatorTimes", PackedIsFaster)


def in_eval(model: nn.Module, inputs: Any) -> Any:
    with torch.no_grad():
        return copy.deepcopy(model).eval()(*inputs)


def check(model: nn.Module, *inputs: Tensor, **options: Any) -> nn.Module:
    """Deployed equals eval, on the examples and on another batch, and nothing else has changed."""
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    deployed = deploy(model, inputs, **options)
    for given in (inputs, tuple(torch.cat([x, x.flip(0)]) for x in inputs)):
        kept = copy.deepcopy(given)
        with torch.no_grad():
            result = deployed(*given)
        assert difference(in_eval(model, kept), result) < 1e-4
        assert all(torch.equal(a, b) for a, b in zip(given, kept, strict=True))
    assert all(torch.equal(state[name], v) for name, v in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    return deployed


def count(model: nn.Module, *kinds: type[nn.Module]) -> int:
    return sum(isinstance(module, kinds) for module in model.modules())


def network(layers: list[nn.Module]) -> nn.Module:
    model = nn.Sequential(*layers)
    randomize(model)
    return model


# -- random networks ----------------------------------------------------------------------


def check_random(seed: int) -> None:
    program = random_program(seed, dropout=0.3)
    inputs = random_inputs(program)
    deployed = deploy(program, inputs)
    with torch.no_grad():
        again = deploy(deployed, inputs)(*inputs)
        result = deployed(*inputs)
    expected = in_eval(program, inputs)
    assert difference(expected, result) < 1e-3
    assert difference(expected, again) < 1e-3


@pytest.mark.usefixtures("everything_packed")
@pytest.mark.parametrize("seed", range(12))
def test_random_networks(seed: int) -> None:
    check_random(seed)


@pytest.mark.slow
@pytest.mark.usefixtures("everything_packed")
@pytest.mark.parametrize("seed", range(12, 300))
def test_many_random_networks(seed: int) -> None:
    check_random(seed)


# -- BatchNorm ----------------------------------------------------------------------------

IMAGE = (2, 4, 6, 6)
FOLDS: dict[str, tuple[list[nn.Module], tuple[int, ...]]] = {
    "no bias": ([nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)], IMAGE),
    "bias": ([nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)], IMAGE),
    "not affine": ([nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False)], IMAGE),
    "cumulative average": ([nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, momentum=None)], IMAGE),
    "groups": ([nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)], IMAGE),
    "same padding": ([nn.Conv2d(4, 6, 3, padding="same"), nn.BatchNorm2d(6)], IMAGE),
    "lopsided padding": ([nn.Conv2d(4, 6, 2, padding="same"), nn.BatchNorm2d(6)], IMAGE),
    "reflected": (
        [nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6)],
        IMAGE,
    ),
    "transposed": ([nn.ConvTranspose2d(4, 6, 3, stride=2), nn.BatchNorm2d(6)], IMAGE),
    "transposed, groups": ([nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)], IMAGE),
    "1-d": ([nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)], (2, 4, 8)),
    "3-d": ([nn.Conv3d(4, 6, 2), nn.BatchNorm3d(6)], (2, 4, 3, 3, 3)),
    "linear": ([nn.Linear(4, 6), nn.BatchNorm1d(6)], (3, 4)),
    "dropout between": ([nn.Conv2d(4, 6, 3), nn.Dropout(), nn.BatchNorm2d(6)], IMAGE),
    "two": ([nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6)], IMAGE),
}
STAYS: dict[str, tuple[list[nn.Module], tuple[int, ...]]] = {
    "along another axis": ([nn.Linear(4, 4), nn.BatchNorm1d(4)], (2, 4, 4)),
    "statistics of the batch": (
        [nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)],
        IMAGE,
    ),
    "before": ([nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3)], IMAGE),
    "after an activation": ([nn.Conv2d(4, 6, 3), nn.ReLU(), nn.BatchNorm2d(6)], IMAGE),
}


@pytest.mark.usefixtures("everything_packed")
@pytest.mark.parametrize("case", FOLDS)
def test_batch_norm_is_folded(case: str) -> None:
    layers, shape = FOLDS[case]
    assert count(check(network([*layers, nn.ReLU()]), torch.randn(shape)), *BATCH_NORMS) == 0


@pytest.mark.usefixtures("everything_packed")
@pytest.mark.parametrize("case", STAYS)
def test_batch_norm_stays(case: str) -> None:
    layers, shape = STAYS[case]
    model = network(layers)
    deployed = deploy(model, torch.randn(shape))
    x = torch.randn(shape)
    assert count(deployed, *BATCH_NORMS) == 1
    assert difference(in_eval(model, (x,)), deployed(x)) < 1e-4


class ReadTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x + self.bn(x)


class Shared(nn.Module):
    """A convolution that is called twice, with a BatchNorm of its own each time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.tied = nn.Conv2d(4, 4, 3, padding=1)
        self.tied.weight = self.conv.weight
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.bn3(self.tied(self.bn2(self.conv(self.bn1(self.conv(x)).relu()))))


@pytest.mark.usefixtures("everything_packed")
def test_a_layer_that_others_read_too_is_not_folded() -> None:
    model = ReadTwice()
    randomize(model)
    assert count(check(model, torch.randn(IMAGE)), nn.BatchNorm2d) == 1


@pytest.mark.usefixtures("everything_packed")
def test_shared_layers_are_folded_call_by_call() -> None:
    model = Shared()
    randomize(model)
    assert count(check(model, torch.randn(IMAGE)), nn.BatchNorm2d) == 0


# -- constants and scales -----------------------------------------------------------------


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        std = self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / std, self.bias, self.stride, self.padding)


class Scaled(nn.Module):
    """Linear maps on channels last, scaled per channel after a permutation."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.scale = nn.Parameter(torch.randn(6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) / 2 - 1


def calls(model: nn.Module) -> list[str]:
    assert isinstance(model, torch.fx.GraphModule)
    return [n.op for n in model.graph.nodes if n.op.startswith("call")]


def test_computed_weights_are_computed_once() -> None:
    model = network([Standardised(4, 6, 3), nn.BatchNorm2d(6)])
    assert calls(check(model, torch.randn(IMAGE))) == ["call_module"]


def test_parametrised_weights_are_computed_once() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 6)), nn.ReLU())
    assert set(calls(check(model, torch.randn(3, 4), packed=False))) <= {
        "call_module",
        "call_function",
    }
    assert count(deploy(model, torch.randn(3, 4)), nn.Linear) == 1


def test_scales_are_folded_through_permutations() -> None:
    deployed = check(Scaled(), torch.randn(IMAGE))
    assert calls(deployed).count("call_method") == 2 and len(calls(deployed)) == 3


# -- what eval mode does not need ---------------------------------------------------------


def test_auxiliary_heads_and_their_parameters_go() -> None:
    model = models.googlenet(aux_logits=True, init_weights=False)
    x = torch.randn(1, 3, 64, 64)
    model.eval()
    names = dict(deploy(model, x).named_modules())
    assert not any(name.startswith("aux") for name in names)


def test_weights_that_became_layers_exist_once() -> None:
    """nn.MultiheadAttention gives its projection as a tensor; the layer made of it has its own."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    for model, x in ((layer, torch.randn(2, 5, 8)), (Scaled(), torch.randn(IMAGE))):
        plain = check(model, x, packed=False)
        held = sum(p.numel() for p in (*plain.parameters(), *plain.buffers()))
        assert held <= sum(p.numel() for p in model.parameters())


class Writes(nn.Module):
    """In-place operators that the results depend on, and memory that others read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.table = nn.Parameter(torch.randn(4, 6, 6))

    def forward(self, x: Tensor) -> list[Tensor]:
        first = self.conv(x)
        kept = first.permute(0, 2, 3, 1).reshape(-1, 4)
        second = F.relu(first)
        third = x + self.table
        x = x * 2
        x[:, :2] += second[:, :2]
        return [kept, second, third, x, torch.relu(self.table) + x, x.clone().relu_()]


@pytest.mark.usefixtures("everything_packed")
@pytest.mark.parametrize("channels_last", [False, True])
def test_nothing_is_overwritten_that_is_read_later(channels_last: bool) -> None:
    check(Writes(), torch.randn(IMAGE), channels_last=channels_last)


# -- packing ------------------------------------------------------------------------------


@pytest.mark.usefixtures("everything_packed")
def test_packed_layers_take_in_activations_and_shortcuts() -> None:
    model = ShortcutNet()
    randomize(model)
    deployed = check(model, torch.randn(2, 1, 6, 6))
    assert count(deployed, PackedConv2d) == 3
    convolutions = [m for m in deployed.modules() if isinstance(m, PackedConv2d)]
    assert all(m.activation is not None for m in convolutions)


@pytest.mark.usefixtures("everything_packed")
@pytest.mark.parametrize("size", [1, 2])
def test_shortcuts_of_small_maps(size: int) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(4, 4, 3, padding=1)
            self.second = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return F.relu(self.second(x) + x)

    deployed = check(Block(), torch.randn(2, 4, size, size))
    assert count(deployed, PackedConv2d) == 2


ACTIVATIONS = [
    nn.ReLU(),
    nn.ReLU6(),
    nn.Hardtanh(-0.3, 0.4),
    nn.SiLU(),
    nn.Hardswish(),
    nn.Hardsigmoid(),
    nn.LeakyReLU(0.2),
    nn.GELU(),
    nn.GELU(approximate="tanh"),
    nn.Sigmoid(),
    nn.Tanh(),
    nn.ELU(),
]


@pytest.mark.usefixtures("everything_packed")
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("packed", [True, False])
def test_activations(activation: nn.Module, packed: bool) -> None:
    model = network([nn.Conv2d(4, 6, 3), activation])
    check(model, torch.randn(IMAGE), packed=packed)
    check(network([nn.Linear(6, 6), activation]), torch.randn(IMAGE), packed=packed)


@pytest.mark.usefixtures("everything_packed")
def test_packed_networks_are_saved_and_loaded() -> None:
    model = network([nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(2), nn.Linear(16, 5), nn.GELU()])
    x = torch.randn(IMAGE)
    deployed = deploy(model, x)
    assert count(deployed, PackedConv2d) == count(deployed, PackedLinear) == 1
    expected = deployed(x)
    assert torch.equal(pickle.loads(pickle.dumps(deployed))(x), expected)
    assert torch.equal(copy.deepcopy(deployed)(x), expected)
    other = deploy(network([copy.deepcopy(layer) for layer in model]), x)
    other.load_state_dict(deployed.state_dict())
    assert torch.equal(other(x), expected)
    assert count(deploy(deployed, x, packed=False), PackedLayer) == 0


def packed_pair() -> tuple[nn.Module, Tensor]:
    x = torch.randn(IMAGE)
    return deploy(network([nn.Conv2d(4, 6, 3), nn.Flatten(2), nn.Linear(16, 5)]), x), x


@pytest.mark.usefixtures("everything_packed")
@pytest.mark.parametrize("name", ["0.weight", "2.weight", "2.bias"])
def test_missing_and_wrongly_shaped_weights_are_reported(name: str) -> None:
    deployed, x = packed_pair()
    expected, state = deployed(x), deployed.state_dict()
    with pytest.raises(RuntimeError, match=f'Missing key.*"{name}"'):
        deployed.load_state_dict({n: v for n, v in state.items() if n != name})
    with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
        deployed.load_state_dict({**state, name: torch.cat([state[name]] * 2)})
    assert deployed.load_state_dict({}, strict=False).missing_keys == list(state)
    assert torch.equal(deployed(x), expected)


@pytest.mark.usefixtures("everything_packed")
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("packed", [True, False])
def test_every_activation_can_be_pickled(activation: nn.Module, packed: bool) -> None:
    x = torch.randn(IMAGE)
    deployed = deploy(network([nn.Conv2d(4, 6, 3), activation]), x, packed=packed)
    assert torch.equal(pickle.loads(pickle.dumps(deployed))(x), deployed(x))


@pytest.mark.usefixtures("everything_packed")
def test_gradients_are_not_lost_silently() -> None:
    deployed, x = packed_pair()
    x.requires_grad_()
    with pytest.raises(InputError, match="packed=False"):
        deployed(x)
    with torch.no_grad():
        expected = deployed(x)
    plain = deploy(deployed, x.detach(), packed=False)
    plain(x).sum().backward()
    assert x.grad is not None and difference(expected, plain(x)) < 1e-5


# -- whole networks -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_torchvision(name: str) -> None:
    model = getattr(models, name)()
    randomize(model)
    assert count(check(model, torch.randn(1, 3, 64, 64)), nn.BatchNorm2d) == 0


def test_pruned_networks() -> None:
    model, x = models.resnet18(), torch.randn(1, 3, 64, 64)
    gm = rbpfx.trace(model, x)
    analysis = rbpfx.analyze(gm)
    plan = rbpfx.PruningPlan({g.name: range(g.size // 2 + 1) for g in analysis.groups})
    check(rbpfx.rewrite(gm, analysis, plan), x)


def test_deployed_twice_and_in_another_type() -> None:
    model, x = network([nn.Conv2d(4, 64, 3), nn.BatchNorm2d(64), nn.ReLU()]), torch.randn(IMAGE)
    deployed = deploy(model, x, dtype=torch.bfloat16)
    result = deployed(x)
    assert result.dtype == torch.float32
    assert 1e-6 < difference(in_eval(model, (x,)), result) < 0.05
    assert difference(result, deploy(deployed, x)(x)) < 0.05
    assert difference(in_eval(model, (x,)), deploy(deploy(model, x), x)(x)) < 1e-5


TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize(("own", "other"), list(itertools.permutations(TYPES, 2)))
def test_from_every_type_to_every_other(own: torch.dtype, other: torch.dtype) -> None:
    model = network([nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)])
    model, x = model.to(own), torch.randn(IMAGE).to(own)
    deployed = deploy(model, x, dtype=other)
    assert {parameter.dtype for parameter in deployed.parameters()} <= {other}
    result = deployed(x)
    assert result.dtype == own
    assert difference(in_eval(model, (x,)), result) < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_an_input_that_is_returned_stays_as_it_is(dtype: torch.dtype) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor, unused: Tensor) -> dict[str, Any]:
            return {"y": self.linear(x), "x": x, "all": (unused, x.flip(0))}

    x, unused = torch.randn(3, 4), torch.randn(3)
    result = deploy(Both(), (x, unused), dtype=dtype)(x, unused)
    assert torch.equal(result["x"], x)
    assert torch.equal(result["all"][0], unused)
    assert {t.dtype for t in tree_leaves(result)} == {torch.float32}


class Pair(NamedTuple):
    first: Tensor
    rest: Any


@dataclass
class Record:
    value: Tensor
    name: str = "record"


class Structured(nn.Module):
    """Results in containers of all kinds, from inputs in others."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, batch: dict[str, Any], scale: list[Tensor]) -> Any:
        x = self.linear(batch["nested"]["x"]) * scale[0]
        return {
            "pair": Pair(x, [x, Record(self.linear(x))]),
            "halves": torch.split(x, 2, 1),
            "index": batch["index"],
        }


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Record):
        return [value.value]
    children = value.values() if isinstance(value, dict) else value
    return [value] if isinstance(value, Tensor) else [t for v in children for t in tensors_in(v)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_containers_in_another_type(dtype: torch.dtype) -> None:
    batch = {"nested": {"x": torch.randn(3, 4)}, "index": torch.arange(3)}
    inputs = (batch, [torch.tensor(2.0)])
    model = network([Structured()])[0]  # type: ignore[index]
    deployed = deploy(model, inputs, dtype=dtype)
    with torch.no_grad():
        expected, result = model(*inputs), deployed(*inputs)
    assert deployed.linear.weight.dtype == dtype
    assert isinstance(result["pair"], Pair) and isinstance(result["pair"].rest[1], Record)
    pairs = list(zip(tensors_in(expected), tensors_in(result), strict=True))
    assert len(pairs) == 6 and all(a.dtype == b.dtype for a, b in pairs)
    assert all(difference(a, b) < 0.05 for a, b in pairs)


class MixedPrecision(nn.Module):
    """A normalisation in float32, all that follows in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.body = nn.Sequential(nn.Linear(16, 32, bias=False), nn.BatchNorm1d(32)).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.norm(x).bfloat16()).float()


def types_of(model: nn.Module) -> set[torch.dtype]:
    return {tensor.dtype for tensor in model.state_dict().values()}


def test_mixed_precision() -> None:
    model, x = MixedPrecision(), torch.randn(64, 16)
    randomize(model)
    model.eval()
    deployed = deploy(model, x)  # folding rounds in bfloat16, by far more than 1e-3
    assert types_of(deployed) == {torch.float32, torch.bfloat16}
    for dtype in (torch.float32, torch.bfloat16):
        deployed = deploy(model, x, dtype=dtype, tolerance=0.2, packed=False)
        assert types_of(deployed) - {torch.long} == {dtype}
        assert deployed(x).dtype == torch.float32


class Insistent(nn.Module):
    """Code that names a type which its weights need."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.to(torch.float32))


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Conv2d(4, 4, 3), nn.GRU(6, 6)], ids=str)
def test_code_that_names_a_type(layer: nn.Module) -> None:
    shape = IMAGE if isinstance(layer, nn.Conv2d) else (2, 4, 6)
    with pytest.raises(InputError, match=r"does not run.*dtype=None"):
        deploy(Insistent(layer), torch.randn(shape), dtype=torch.bfloat16)


def test_no_gradients() -> None:
    deployed = deploy(ShortcutNet(), torch.randn(2, 1, 6, 6))
    assert not any(p.requires_grad for p in deployed.parameters())


@pytest.mark.slow
def test_detectors_are_deployed_part_by_part() -> None:
    model = models.detection.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3
    ).eval()
    images = [torch.rand(3, 320, 320)]
    deployed = deploy(model, (images,))
    assert count(deployed.backbone, nn.BatchNorm2d) == 0
    with torch.no_grad():
        assert len(deployed([*images, *images])) == 2


def test_the_state_of_a_compiled_network_holds_everything_once() -> None:
    model, x = network([nn.Linear(4, 6), nn.ReLU()]), torch.randn(3, 4)
    compiled = deploy(model, x, compile=True)
    assert list(compiled.state_dict()) == ["network.0.weight", "network.0.bias"]
    assert len(list(compiled.parameters())) == 2
    copy.deepcopy(compiled).load_state_dict(compiled.state_dict())


@pytest.mark.slow
def test_compiled() -> None:
    model = ShortcutNet()
    randomize(model)
    deployed = check(model, torch.randn(2, 1, 6, 6), compile=True)
    assert isinstance(deployed, CompiledNetwork)
    assert difference(in_eval(model, (x := torch.randn(3, 1, 6, 6),)), deployed(x)) < 1e-4


# -- errors -------------------------------------------------------------------------------


def test_a_wrong_pass_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rbpfx.deployment.folding._aligned", lambda module, scale: 1.0)
    model = network([nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)])
    with pytest.raises(VerificationError, match=r"eval mode by .* torch\.float64"):
        deploy(model, torch.randn(IMAGE))


def test_the_tolerance_is_the_users() -> None:
    with pytest.raises(VerificationError, match="tolerance"):
        deploy(ShortcutNet(), torch.randn(2, 1, 6, 6), dtype=torch.bfloat16, tolerance=1e-9)


def test_inputs_that_do_not_fit() -> None:
    with pytest.raises(InputError):
        deploy(ShortcutNet(), torch.randn(2, 3, 6, 6))


class PlainIsFaster(PackedIsFaster):
    """The times of a machine on which no layer does."""

    def __getitem__(self, key: str) -> float:
        return 3.0 - super().__getitem__(key)


def test_layers_that_gain_nothing_are_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    for times, packed in ((PackedIsFaster, 2), (PlainIsFaster, 0)):
        monkeypatch.setattr(packing, "OperatorTimes", times)
        network = deploy(model, torch.zeros(2, 3, 8, 8))
        assert sum(isinstance(m, packing.PackedLayer) for m in network.modules()) == packed


def test_layers_are_timed_for_the_batch_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Noting(PackedIsFaster):
        def measure(self, operators: Iterable[Operator], progress: bool = False) -> None:
            chosen = list(operators)
            asked.extend(operator.key for operator in chosen)
            super().measure(chosen)

    monkeypatch.setattr(packing, "OperatorTimes", Noting)
    gm = rbpfx.trace(nn.Sequential(nn.Conv2d(3, 8, 3)), torch.zeros(2, 3, 8, 8))
    deploy(gm, torch.zeros(5, 3, 8, 8))
    assert asked and all("(5, 3, 8, 8)" in key for key in asked)


HOLDER = SimpleNamespace(model=ShortcutNet(), deploy=print)
WRONG_MODELS: dict[str, tuple[Any, str]] = {
    "a result": (HOLDER, "attribute `model`, or what its method deploy"),
    "no module": ("resnet18", "not a torch.nn.Module"),
    "in parallel": (nn.DataParallel(ShortcutNet()), r"pass model\.module"),
    "compiled": (torch.compile(ShortcutNet(), backend="eager"), r"pass model\._orig_mod"),
}


@pytest.mark.parametrize("kind", WRONG_MODELS)
def test_what_is_no_network(kind: str) -> None:
    model, message = WRONG_MODELS[kind]
    with pytest.raises(InputError, match=message):
        deploy(model, torch.randn(2, 1, 6, 6))


@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize(
    "inputs", [None, torch.zeros(2, 1, 6, 6).numpy(), torch.randn(2, 3, 6, 6), (1, 2)], ids=type
)
def test_wrong_examples(inputs: Any, captured: bool) -> None:
    model = ShortcutNet()
    if captured:
        model = rbpfx.trace(model, torch.zeros(2, 1, 6, 6))
    with pytest.raises(InputError, match="inputs"):
        deploy(model, inputs)


@pytest.mark.parametrize("tolerance", [-1e-3, float("nan"), "a", True])
def test_a_tolerance_is_a_number(tolerance: Any) -> None:
    with pytest.raises(InputError, match="tolerance="):
        deploy(ShortcutNet(), torch.randn(2, 1, 6, 6), tolerance=tolerance)
