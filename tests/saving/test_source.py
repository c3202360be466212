"""Generated source computes what the network computes, bit for bit, without rbpfx."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import get_model

from rbpfx import PruningPlan, PruningResult, SaveError, analyze, rewrite, trace
from rbpfx.saving.source import source_of
from rbpfx.testing.laws import randomize
from tests.saving.results import Custom, Doubling, Tied, halved, outputs, small_vit
from tests.toy import ShortcutNet

IMAGES = torch.rand(2, 3, 32, 32)
PAIR = {"pair": [torch.rand(3, 4), torch.rand(3, 4)], "gain": 2.0}

CASES: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, str]]] = {
    "resnet18": (lambda: get_model("resnet18", num_classes=3), IMAGES, {}),
    "mobilenet_v2": (lambda: get_model("mobilenet_v2", num_classes=3), IMAGES, {}),
    "densenet121": (lambda: get_model("densenet121", num_classes=3), IMAGES, {}),
    "shufflenet": (lambda: get_model("shufflenet_v2_x0_5", num_classes=3), IMAGES, {}),
    "vit": (small_vit, IMAGES, {}),
    "vit_exact": (small_vit, IMAGES, {"normalization": "exact"}),
    "features": (ShortcutNet, torch.rand(2, 1, 6, 6), {"unit": "feature"}),
    "tied": (Tied, torch.randint(11, (2, 5)), {}),
}

CHECK = """
import importlib, sys
import safetensors.torch, torch

torch.set_num_threads(1)
for name in sys.argv[1:]:
    module = importlib.import_module(f"{name}.network")
    kind = [c for c in vars(module).values() if getattr(c, "__module__", "") == module.__name__][-1]
    network = kind().eval()
    safetensors.torch.load_model(network, f"{name}/weights.safetensors")
    if name != "tied":
        network.load_state_dict(safetensors.torch.load_file(f"{name}/weights.safetensors"))
    data = safetensors.torch.load_file(f"{name}/data.safetensors")
    with torch.no_grad():
        assert torch.equal(network(data["input"]), data["output"]), name
assert "rbpfx" not in sys.modules
"""


def test_in_a_fresh_process(tmp_path: Path) -> None:
    for name, (make, inputs, options) in CASES.items():
        model = make().eval()
        randomize(model)
        result = halved(model, inputs, **options)
        result.save(tmp_path / name)
        result.to_source(tmp_path / name / "network.py")
        (output,) = outputs(result.model, inputs)
        save_file({"input": inputs, "output": output}, tmp_path / name / "data.safetensors")
    command = [sys.executable, "-c", CHECK, *CASES]
    env = {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=tmp_path, env=env, check=True, timeout=170)


def network_of(result: PruningResult, path: Path) -> nn.Module:
    """The network that generated source makes, with the weights of the result."""
    result.to_source(path)
    space: dict[str, Any] = {"__name__": "generated"}
    exec(path.read_text(), space)
    network: nn.Module = space[type(result.model).__name__]()
    network.load_state_dict(
        {**result.model.state_dict(), **dict(result.model.named_buffers())}, strict=True
    )
    return network


def test_widths_are_written_out(tmp_path) -> None:
    result = halved(ShortcutNet().eval(), torch.rand(2, 1, 6, 6))
    network_of(result, tmp_path / "net.py")
    text = (tmp_path / "net.py").read_text()
    assert "self.stem = nn.Conv2d(1, 4, 3, padding=1, bias=False)" in text
    assert "self.head = nn.Linear(16, 3)" in text
    assert "getattr" not in text
    assert "import rbpfx" not in text and "from rbpfx" not in text


def test_numbered_modules_are_lists(tmp_path) -> None:
    result = halved(Custom().eval(), PAIR)
    network_of(result, tmp_path / "net.py")
    text = (tmp_path / "net.py").read_text()
    assert "self.layers[0](add)" in text and "getattr" not in text


def test_constants_are_written_out(tmp_path) -> None:
    images = torch.rand(2, 1, 6, 6)
    result = halved(ShortcutNet().eval(), images, unit="feature")
    network = network_of(result, tmp_path / "net.py").eval()
    assert torch.equal(network(images), outputs(result.model, images)[0])
    fresh: dict[str, Any] = {"__name__": "generated"}
    exec((tmp_path / "net.py").read_text(), fresh)
    buffers = dict(fresh[type(result.model).__name__]().named_buffers())
    constants = {n: b for n, b in result.model.named_buffers() if n.startswith("kept_positions")}
    assert constants and all(torch.equal(buffers[n], b) for n, b in constants.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_dtypes(dtype, tmp_path) -> None:
    result = halved(Custom().eval(), PAIR)
    result.model.to(dtype)
    network = network_of(result, tmp_path / "net.py").eval()
    inputs = {"pair": [x.to(dtype) for x in PAIR["pair"]], "gain": 2.0}
    assert torch.equal(outputs(network, inputs)[0], outputs(result.model, inputs)[0])


def test_train_mode(tmp_path) -> None:
    result = halved(ShortcutNet(), torch.rand(2, 1, 6, 6))
    network = network_of(result, tmp_path / "net.py")
    images = torch.rand(4, 1, 6, 6)
    assert torch.equal(network(images), result.model.train()(images))


def test_ties(tmp_path) -> None:
    result = halved(Tied().eval(), torch.randint(11, (2, 5)))
    network = network_of(result, tmp_path / "net.py")
    assert network.head.weight is network.embedding.weight


def test_a_layer_kept_whole_is_imported(tmp_path) -> None:
    result = halved(Custom().eval(), PAIR, leaf_modules=[Doubling])
    network = network_of(result, tmp_path / "net.py").eval()
    assert isinstance(network.doubling, Doubling)
    assert torch.equal(outputs(network, PAIR)[0], outputs(result.model, PAIR)[0])


class Closed(nn.Module):
    """Its attributes do not tell how it was made."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self._gain = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self._gain


def test_what_cannot_be_written(tmp_path) -> None:
    class Local(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    def around(layer: nn.Module) -> PruningResult:
        model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 6), layer, nn.Linear(6, 2)).eval()
        return halved(model, torch.rand(2, 4), leaf_modules=[type(layer)])

    with pytest.raises(SaveError, match="module '2' of class Closed cannot be written as source"):
        around(Closed(2.0)).to_source(tmp_path / "net.py")
    changed = Doubling(6)
    changed.added = 3
    with pytest.raises(SaveError, match=r"of class Doubling .*'added' is None instead of 3"):
        around(changed).to_source(tmp_path / "net.py")
    with pytest.raises(SaveError, match=r"uses 'Local' of .*cannot be imported from there"):
        around(Local()).to_source(tmp_path / "net.py")
    assert not list(tmp_path.iterdir())
    settings = {"weights": None, "weights_backbone": None, "num_classes": 5}
    detector = get_model("ssdlite320_mobilenet_v3_large", **settings).eval()
    with pytest.raises(SaveError, match="SSD runs Python code of its own"):
        halved(detector, ([torch.rand(3, 96, 96)],)).to_source(tmp_path / "net.py")


def test_an_unwritable_place(tmp_path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(SaveError, match="cannot be written to"):
        halved(ShortcutNet().eval(), torch.rand(2, 1, 6, 6)).to_source(tmp_path / "folder")


class Causal(nn.Module):
    """Attention to the past, written by hand, with a mask of infinities."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner = nn.Embedding(11, 8), nn.Linear(8, 16)
        self.project, self.head = nn.Linear(16, 24), nn.Linear(8, 11)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(self.inner(self.embedding(tokens)).relu()).chunk(3, -1)
        future = torch.ones(tokens.size(1), tokens.size(1)).triu(1) > 0
        weights = (q @ k.transpose(-2, -1)).masked_fill(future, float("-inf")).softmax(-1)
        return self.head(weights @ v)


class Unbounded(nn.Module):
    """Infinities and NaN as arguments, as settings of a layer, and in a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)
        self.clip = nn.Hardtanh(0.0, float("inf"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(self.clip(self.first(x)))
        y = y.nan_to_num(nan=float("inf"), neginf=float("-inf"))
        return torch.where(y > 1e9, float("nan"), y + torch.tensor([0.0, float("-inf"), 1.0]))


class Slopes(nn.Module):
    """PReLUs: one slope for all channels, twice the same, and a slope each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 8)
        self.third, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.one, self.each = nn.PReLU(), nn.PReLU(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.one(self.second(self.one(self.first(x))))
        return self.head(self.each(self.third(y)))


class Ragged(nn.Module):
    """A GroupNorm whose groups keep different numbers of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 2, 1)
        self.norm = nn.GroupNorm(4, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(x)).relu())


class Recurrent(nn.Module):
    """A recurrent layer that stays whole."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Linear(4, 8), kind(8, 6, **options)
        width = self.rnn.proj_size or self.rnn.hidden_size
        self.head = nn.Linear(width * (1 + self.rnn.bidirectional), 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(self.embed(x))[0])


SEQUENCE = torch.rand(5, 2, 4)
WRITTEN: dict[str, tuple[Callable[[], nn.Module], torch.Tensor, dict[str, Any]]] = {
    "causal": (Causal, torch.randint(11, (2, 5)), {}),
    "unbounded": (Unbounded, torch.rand(2, 4), {}),
    "slopes": (Slopes, torch.rand(2, 4), {}),
    "ragged": (Ragged, torch.rand(2, 3, 4, 4), {"normalization": "exact"}),
    "lstm": (lambda: Recurrent(nn.LSTM, bidirectional=True, batch_first=True), SEQUENCE, {}),
    "lstm_projected": (
        lambda: Recurrent(nn.LSTM, num_layers=2, dropout=0.5, proj_size=3),
        SEQUENCE,
        {},
    ),
    "gru": (lambda: Recurrent(nn.GRU, num_layers=2, bias=False), SEQUENCE, {}),
    "rnn": (lambda: Recurrent(nn.RNN, nonlinearity="relu"), SEQUENCE, {}),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_source_runs(name: str, tmp_path: Path) -> None:
    make, inputs, options = WRITTEN[name]
    result = halved(make().eval(), inputs, **options)
    network = network_of(result, tmp_path / "net.py").eval()
    (output,) = outputs(network, inputs)
    assert torch.equal(output.nan_to_num(7.0), outputs(result.model, inputs)[0].nan_to_num(7.0))


def test_constants_that_are_not_finite_are_written_out(tmp_path: Path) -> None:
    result = halved(Unbounded().eval(), torch.rand(2, 4))
    result.to_source(tmp_path / "net.py")
    space: dict[str, Any] = {"__name__": "generated"}
    exec((tmp_path / "net.py").read_text(), space)
    (constant,) = (b for b in space["Unbounded"]().buffers())
    assert constant.tolist() == [0.0, float("-inf"), 1.0]


def test_groups_of_unequal_sizes(tmp_path: Path) -> None:
    x = torch.rand(2, 3, 4, 4)
    model = Ragged().eval()
    randomize(model)
    gm = trace(model, x)
    analysis = analyze(gm, normalization="exact")
    pruned = rewrite(gm, analysis, PruningPlan({"conv": [0, 1, 2, 3, 6, 9, 10]}))
    norm = pruned.get_submodule("norm")
    assert norm.num_channels == 7 and norm.num_groups == 4
    space: dict[str, Any] = {"__name__": "generated"}
    exec(source_of(pruned), space)
    network = space["Ragged"]().eval()
    network.load_state_dict(pruned.state_dict())
    assert torch.equal(network(x), pruned.eval()(x))
    assert network.norm.num_groups == 4 and network.norm.group_sizes == norm.group_sizes
