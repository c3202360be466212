"""Times of operators at any widths: the very shapes of the emitted network, timed once."""

import weakref

import numpy as np
import pytest
import torch
import torchvision.models
from torch import nn
from torch.nn import functional as F

from rbpfx import Analysis, PruningPlan, analyze, rewrite, trace
from rbpfx.graph.modes import evaluated_nodes
from rbpfx.graph.parts import captured_parts
from rbpfx.latency.knapsack import total
from rbpfx.latency.model import LatencyModel
from rbpfx.latency.nodes import Layer, is_layer, operator_of
from tests.latency.machine import StairTimes


class Functional(nn.Module):
    """Convolutions and linear layers spelt as functions, grouped, depthwise and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(32, 3, 3, 3))
        self.depthwise = nn.Parameter(torch.randn(32, 1, 3, 3))
        self.grouped = nn.Parameter(torch.randn(32, 8, 3, 3))
        self.up = nn.ConvTranspose2d(32, 24, 2, 2)
        self.bias = nn.Parameter(torch.randn(32))
        self.last = nn.Parameter(torch.randn(10, 24))

    def forward(self, x):
        x = F.conv2d(x, self.first, self.bias, padding=1).relu()
        x = F.conv2d(x, self.depthwise, groups=32).relu()
        x = F.conv2d(x, self.grouped, None, 1, 0, 1, 4).relu()
        return F.linear(self.up(x).mean((2, 3)), self.last)


class Concatenated(nn.Module):
    """Four layers read by one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3, 16, 3, padding=1) for _ in range(4))
        self.last = nn.Conv2d(64, 10, 1)

    def forward(self, x):
        return self.last(torch.cat([layer(x).relu() for layer in self.layers], 1)).mean((2, 3))


def captured(name: str, unit: str = "channel"):
    torch.manual_seed(0)
    if name == "functional":
        model, inputs = Functional(), torch.randn(2, 3, 16, 16)
    elif name == "encoder":
        model = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        inputs = torch.randn(2, 5, 32)
    elif name == "flattened":
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 20), nn.Linear(20, 4)
        )
        inputs = torch.randn(2, 3, 8, 8)
    else:
        model, inputs = getattr(torchvision.models, name)(), torch.randn(2, 3, 64, 64)
    gm = trace(model.eval(), inputs)
    return gm, analyze(gm, unit=unit)


def uniform(analysis: Analysis, share: float) -> np.ndarray:
    return np.maximum([round(share * g.size) for g in analysis.groups], 1)


def plan_of(analysis: Analysis, widths: np.ndarray) -> PruningPlan:
    pairs = zip(analysis.groups, widths, strict=True)
    return PruningPlan({group.name: range(int(width)) for group, width in pairs})


NETWORKS = ["functional", "encoder", "flattened", "resnet18", "mobilenet_v2", "regnet_y_400mf"]


def test_a_layer_that_is_timed_has_the_attributes_of_its_kind() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    gm = trace(model, torch.zeros(2, 8))
    analysis = analyze(gm)
    (node,) = (n for n in gm.graph.nodes if n.target == "0")
    (operator,) = Layer(analysis, node, node, gm, False).operators(np.array([5]))
    twin = operator.prepare().func
    assert (twin.in_features, twin.out_features) == (8, 5)
    assert vars(twin).keys() == vars(model[0]).keys()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("share", [0.3, 0.75, 1.0])
def test_layers_have_the_shapes_of_the_emitted_network(name: str, share: float) -> None:
    gm, analysis = captured(name)
    widths = uniform(analysis, share)
    model = LatencyModel(analysis, times=StairTimes())
    emitted = rewrite(gm, analysis, plan_of(analysis, widths))
    nodes = [n for n in emitted.graph.nodes if n in evaluated_nodes(emitted.graph)]
    expected = {n.name: operator_of(n, emitted, False) for n in nodes if is_layer(n, emitted)}
    layers = {n.node.name: n for n in model.nodes if isinstance(n, Layer)}
    assert layers.keys() == expected.keys() and layers
    for layer_name, layer in layers.items():
        (operator,) = layer.operators(widths)
        with torch.no_grad():
            found, wanted = operator.prepare()(), expected[layer_name].prepare()()
        assert found.shape == wanted.shape, layer_name
        inputs = [a.shape for a in operator.prepare().args if isinstance(a, torch.Tensor)]
        wanted_inputs = [
            a.shape for a in expected[layer_name].prepare().args if isinstance(a, torch.Tensor)
        ]
        assert inputs == wanted_inputs, layer_name


def test_flattened_features_count() -> None:
    gm, analysis = captured("flattened", unit="feature")
    assert len(analysis.groups) == 3
    kept = {8: range(4), 288: range(0, 288, 2), 20: range(10)}
    plan = analysis.close(PruningPlan({g.name: kept[g.size] for g in analysis.groups}))
    widths = np.array([len(kept[g.size]) for g in analysis.groups])
    model = LatencyModel(analysis, times=StairTimes())
    layer = next(n for n in model.nodes if isinstance(n, Layer) and n.features is not None)
    (operator,) = layer.operators(widths)
    emitted = rewrite(gm, analysis, plan)
    wanted = emitted.get_submodule(str(layer.node.target)).in_features
    assert operator.prepare().args[0].shape[-1] == pytest.approx(wanted, rel=0.1)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "encoder"])
def test_tables_add_up_to_the_time(name: str) -> None:
    _, analysis = captured(name)
    model = LatencyModel(analysis, times=StairTimes())
    rng = np.random.default_rng(0)
    candidates = [np.unique(rng.integers(1, g.size + 1, size=3)) for g in analysis.groups]
    tables = model.tables(candidates, model.sizes)
    for _ in range(5):
        places = np.array([rng.integers(len(widths)) for widths in candidates])
        widths = np.array([w[p] for w, p in zip(candidates, places, strict=True)])
        assert total(places, tables) == pytest.approx(model.seconds(widths))


def test_many_groups_are_linearised_around_the_present_widths() -> None:
    gm = trace(Concatenated(), torch.randn(2, 3, 16, 16))
    analysis = analyze(gm)
    model = LatencyModel(analysis, times=StairTimes())
    candidates = [np.array([4, 8, 16])] * 4
    present = np.array([8, 8, 8, 8])
    tables = model.tables(candidates, present)
    assert max(len(scope) for scope in tables) == 1
    assert total(np.array([1, 1, 1, 1]), tables) == pytest.approx(model.seconds(present))
    for group in range(4):
        places, widths = np.ones(4, dtype=int), present.copy()
        places[group], widths[group] = 2, 16
        assert total(places, tables) == pytest.approx(model.seconds(widths))
    # A shared axis is timed at a few sizes, not at all sums of widths.
    last = next(n for n in model.nodes if isinstance(n, Layer) and len(n.groups) == 4)
    keys = {
        operator.key
        for total_width in range(4, 64)
        for operator in last.operators(np.array([total_width - 3, 1, 1, 1]))
    }
    assert len(keys) <= 9


def test_a_single_table_for_every_group_if_coupling_is_too_dense() -> None:
    _, analysis = captured("resnet18")
    model = LatencyModel(analysis, times=StairTimes())
    candidates = [np.array([g.size // 2, g.size]) for g in analysis.groups]
    tables = model.tables(candidates, model.sizes, joint=1)
    assert max(len(scope) for scope in tables) == 1
    full = np.ones(len(candidates), dtype=int)
    assert total(full, tables) == pytest.approx(model.seconds(model.sizes))


def test_operators_of_many_groups_are_evaluated_once_at_the_base() -> None:
    _, analysis = captured("resnet18")
    model = LatencyModel(analysis, times=StairTimes())
    node = max(model.nodes, key=lambda n: len(n.groups))
    asked: list[tuple[int, ...]] = []
    seconds = node.seconds
    node.seconds = lambda widths, times: asked.append(tuple(widths)) or seconds(widths, times)
    base = model.sizes - 1
    model.tables([np.array([g.size // 2, g.size]) for g in analysis.groups], base, joint=1)
    assert asked.count(tuple(base)) == 2  # the constant table, and what the others differ from
    assert len(asked) == 2 + 2 * len(node.groups)


def test_another_batch_size() -> None:
    _, analysis = captured("resnet18")
    times = [
        LatencyModel(analysis, torch.zeros(n, 3, 64, 64), times=StairTimes()) for n in (1, 2, 6)
    ]
    seconds = [model.seconds(model.sizes) for model in times]
    assert seconds[1] == pytest.approx(2 * seconds[0], rel=0.01)
    assert seconds[2] == pytest.approx(6 * seconds[0], rel=0.02)


def test_operators_are_timed_once() -> None:
    _, analysis = captured("resnet18")
    times = StairTimes()
    model = LatencyModel(analysis, times=times)
    model.seconds(model.sizes)
    count = len(times.seconds)
    # Repeated blocks share operators.
    assert count < sum(len(list(n.operators(model.sizes))) for n in model.nodes) * 5
    LatencyModel(analysis, times=times).seconds(model.sizes)
    assert len(times.seconds) == count


@pytest.mark.parametrize("name", ["flattened", "functional"])
def test_what_was_timed_is_freed(name: str) -> None:
    """The candidates of one large linear layer would else fill the memory."""
    gm, analysis = captured(name)
    for node in [n for n in gm.graph.nodes if is_layer(n, gm)]:
        layer = Layer(analysis, node, node, gm, channels_last=False)
        for operator in layer.operators(uniform(analysis, 0.5)):
            call = operator.prepare()
            held = [*call.args, *getattr(call.func, "_parameters", {}).values()]
            made = [weakref.ref(value) for value in held if isinstance(value, torch.Tensor)]
            del call, held
            assert len(made) >= 2 and not any(reference() is not None for reference in made)


def test_the_weights_of_the_network_are_left_alone() -> None:
    gm, analysis = captured("functional")
    before = {name: value.clone() for name, value in gm.state_dict().items()}
    with torch.no_grad():
        model = LatencyModel(analysis)
        model.seconds(uniform(analysis, 0.5))
    assert all(torch.equal(value, before[name]) for name, value in gm.state_dict().items())
    assert len(captured_parts(gm)) == 1


def test_real_times_grow_with_the_work() -> None:
    _, analysis = captured("resnet18")
    model = LatencyModel(analysis, torch.zeros(4, 3, 64, 64))
    assert 0 < model.seconds(uniform(analysis, 0.25)) < 0.7 * model.seconds(model.sizes)
