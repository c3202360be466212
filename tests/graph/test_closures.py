"""What a copy calls is its own, also through functions among its attributes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rbpfx
from rbpfx.errors import CaptureError
from rbpfx.graph.copying import copy_model

IMAGES = torch.rand(8, 3, 6, 6)


class Calling(nn.Module):
    """Convolution and BatchNorm, called through an attribute only."""

    def __init__(self, attribute: Callable[[Calling], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 2)
        self.call = attribute(self)

    def layers(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x))
        return y

    def forward(self, x: Tensor) -> Tensor:
        call = self.call[0] if isinstance(self.call, (list, tuple)) else self.call
        y: Tensor = self.head(call(x).relu().mean((2, 3)))
        return y


class Helper:
    """No module, but it holds one."""

    def __init__(self, model: Calling) -> None:
        self.layers = [model.conv, model.norm]

    def __call__(self, x: Tensor) -> Tensor:
        return functools.reduce(lambda y, layer: layer(y), self.layers, x)


def through_helper(model: Calling) -> Any:
    helper = Helper(model)
    return lambda x: helper(x)


def by_default(model: Calling) -> Any:
    def call(x: Tensor, conv: nn.Module = model.conv, *, norm: nn.Module = model.norm) -> Tensor:
        y: Tensor = norm(conv(x))
        return y

    return call


def wrapped(model: Calling) -> Any:
    inner = by_default(model)

    @functools.wraps(inner)
    def call(x: Tensor) -> Tensor:
        y: Tensor = call.__wrapped__(x)  # type: ignore[attr-defined]
        return y

    return call


def from_table(model: Calling) -> Any:
    table = {"both": [lambda x: model.norm(model.conv(x))]}
    return lambda x: table["both"][0](x)


def run(layers: list[nn.Module], x: Tensor) -> Tensor:
    return functools.reduce(lambda y, layer: layer(y), layers, x)


ATTRIBUTES: dict[str, Callable[[Calling], Any]] = {
    "closure over modules": lambda m: (lambda conv, norm: lambda x: norm(conv(x)))(m.conv, m.norm),
    "closure over self": lambda m: lambda x: m.layers(x),
    "defaults": by_default,
    "bound method": lambda m: m.layers,
    "closure over bound methods": lambda m: (lambda f: lambda x: f(x))(m.layers),
    "partial": lambda m: functools.partial(run, [m.conv, m.norm]),
    "partial of a lambda": lambda m: functools.partial(lambda scale, x: m.layers(x) * scale, 2.0),
    "in a tuple": lambda m: (lambda x: m.layers(x), 1),
    "in a list": lambda m: [lambda x: m.layers(x)],
    "object": lambda m: Helper(m),
    "closure over an object": through_helper,
    "wrapped": wrapped,
    "closure over containers": from_table,
}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("attribute", ATTRIBUTES.values(), ids=ATTRIBUTES)
def test_a_copy_runs_its_own_modules(attribute: Callable[[Calling], Any]) -> None:
    model = Calling(attribute)
    before = state_of(model)
    for twin in (copy_model(model, {}), copy_model(copy_model(nn.Sequential(model), {}), {})):
        twin(IMAGES).sum().backward()
        assert unchanged(model, before)
        assert all(p.grad is None for p in model.parameters())
        assert all(p.grad is not None for p in twin.parameters())
        own = next(m for m in twin.modules() if isinstance(m, nn.BatchNorm2d))
        assert own.num_batches_tracked == 1


@pytest.mark.parametrize("attribute", ATTRIBUTES.values(), ids=ATTRIBUTES)
def test_networks_that_call_through_attributes_are_pruned(
    attribute: Callable[[Calling], Any],
) -> None:
    torch.manual_seed(0)
    model = Calling(attribute).train()
    before = state_of(model)
    gm = rbpfx.trace(model, IMAGES)
    analysis = rbpfx.analyze(gm)
    plan = rbpfx.PruningPlan({"conv": range(4)})
    pruned = rbpfx.rewrite(gm, analysis, plan)
    assert pruned.get_parameter("conv.weight").shape[0] == 4
    masked = rbpfx.apply_mask(gm, analysis, plan)
    assert rbpfx.verify(masked, pruned, IMAGES, train=True) < 1e-12
    assert unchanged(model, before)


def test_functions_share_variables_and_themselves() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = self.layer = nn.Linear(2, 2)
            count = 0

            def step(x: Tensor, times: int = 2) -> Tensor:
                nonlocal count
                count += 1
                return step(layer(x), times - 1) if times else x

            self.step = self.same = step
            self.count = lambda: (layer, count)[1]

    model = Counting()
    twin = copy_model(model, {})
    assert twin.step is twin.same is not model.step
    twin.step(torch.rand(1, 2))
    assert (twin.count(), model.count()) == (3, 0)


def test_functions_without_modules_stay_the_same_object() -> None:
    scale = torch.ones(2)
    model = nn.Sequential(nn.ReLU())
    model.function, model.partial = (lambda x: x * scale), functools.partial(F.relu, inplace=True)
    model.table = {"gelu": F.gelu, "scaled": model.function}
    twin = copy_model(model, {})
    assert twin.function is twin.table["scaled"] is model.function
    assert twin.table["gelu"] is F.gelu and twin.table is not model.table
    assert twin.partial.func is F.relu


def test_the_originals_containers_are_left_alone() -> None:
    model = Calling(from_table)
    table = model.call.__closure__[0].cell_contents
    function = table["both"][0]
    copy_model(model, {})
    assert table["both"] == [function]
    assert model.call.__closure__[0].cell_contents is table


def test_a_tensor_in_a_closure_is_that_of_the_copy() -> None:
    model = nn.Linear(2, 2)
    weight = model.weight
    model.read, model.multiply = (lambda: weight), weight.mul
    replaced = nn.Parameter(torch.zeros(2, 2))
    twin = copy_model(model, {id(weight): replaced})
    assert twin.read() is twin.weight is replaced
    assert not twin.multiply(torch.ones(2, 2)).any()
    assert copy_model(model, {id(weight): weight}).read is model.read


def test_a_module_that_is_none_of_the_models() -> None:
    outside = nn.Sequential(nn.BatchNorm1d(2))
    outside.call = lambda x: outside[0](x)
    model = nn.Linear(2, 2)
    model.call = lambda x: outside.call(x)
    copy_model(model, {}).call(torch.rand(3, 2))
    assert outside[0].num_batches_tracked == 0


def test_hooks_note_in_the_copy_what_the_copy_does() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.seen = nn.Module()
    model[0].register_forward_hook(lambda *_: setattr(model.seen, "called", True))
    twin = copy_model(model, {})
    twin[0](torch.rand(1, 2))
    assert twin.seen.called and not hasattr(model.seen, "called")


def test_what_a_hook_reports_to_is_not_copied() -> None:
    class Trainer:
        def __init__(self, model: nn.Module) -> None:
            self.model, self.calls = model, 0

        def __deepcopy__(self, memo: Any) -> Trainer:
            raise AssertionError

        def note(self) -> None:
            self.calls += 1

    model = nn.Linear(2, 2)
    trainer = Trainer(model)
    model.register_forward_hook(lambda *_: trainer.note())
    copy_model(model, {})(torch.rand(1, 2))
    assert trainer.calls == 1


class Locked:
    """Cannot be copied."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __reduce__(self) -> Any:
        raise TypeError("it has a lock")


def test_what_cannot_be_bound_again_is_named() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)))
    layer, locked = model[0][0], Locked(model)
    model[0].cached = functools.lru_cache(lambda x: layer(x))
    with pytest.raises(CaptureError, match=r"attribute '0.cached' is a cached function .* method"):
        copy_model(model, {})
    model[0].cached = lambda x: locked.model(x)
    with pytest.raises(CaptureError, match=r"'0.cached' is a function around a Locked \(it has"):
        copy_model(model, {})
    with pytest.raises(CaptureError, match=r"'0.cached'"):
        rbpfx.trace(model, torch.rand(1, 2))


class NewGELU(nn.Module):
    """As in minGPT."""

    def forward(self, x: Tensor) -> Tensor:
        inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
        return 0.5 * x * (1.0 + torch.tanh(inner))


class CausalSelfAttention(nn.Module):
    """As in minGPT."""

    def __init__(self, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        self.attn_dropout = nn.Dropout(0.1)
        self.resid_dropout = nn.Dropout(0.1)
        mask = torch.tril(torch.ones(length, length)).view(1, 1, length, length)
        self.register_buffer("bias", mask)
        self.n_head = heads
        self.n_embd = width

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        att = self.attn_dropout(F.softmax(att, dim=-1))
        y = (att @ v).transpose(1, 2).contiguous().view(B, T, C)
        result: Tensor = self.resid_dropout(self.c_proj(y))
        return result


class Block(nn.Module):
    """As in minGPT, with a BatchNorm in its MLP."""

    def __init__(self, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = CausalSelfAttention(width, heads, length)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict(
            {
                "c_fc": nn.Linear(width, 4 * width),
                "c_proj": nn.Linear(4 * width, width),
                "act": NewGELU(),
                "dropout": nn.Dropout(0.1),
                "norm": nn.BatchNorm1d(length),
            }
        )
        m = self.mlp
        self.mlpf = lambda x: m.dropout(m.c_proj(m.norm(m.act(m.c_fc(x)))))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlpf(self.ln_2(x))
        return x


class GPT(nn.Module):
    """Two such blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(11, 16), nn.Embedding(6, 16)
        self.h = nn.ModuleList(Block(16, 4, 6) for _ in range(2))
        self.lm_head = nn.Linear(16, 11, bias=False)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.wte(idx) + self.wpe(torch.arange(idx.size(1)))
        for block in self.h:
            x = block(x)
        logits: Tensor = self.lm_head(x)
        return logits.transpose(1, 2)


@pytest.mark.parametrize("whole", [(), ("h.1",)], ids=["captured", "kept whole"])
def test_mingpt(whole: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model = GPT().train()
    before = state_of(model)
    loader = [(tokens, tokens.roll(-1, 1)) for tokens in torch.randint(11, (2, 8, 6))]
    result = rbpfx.prune(
        model,
        loader,
        target=rbpfx.Target(macs=0.9),
        recursion=rbpfx.Recursion(epochs=1),
        recovery=rbpfx.FineTune(epochs=1),
        leaf_modules=whole,
        progress=False,
    )
    assert result.report.verification_error < 1e-9
    assert unchanged(model, before)
    assert all(p.grad is None for p in model.parameters())
    assert any(kept < width for width, kept in result.report.widths.values())
    if whole:
        kept = result.model.get_submodule("h.1")
        assert kept.mlpf.__closure__[0].cell_contents is kept.mlp
        assert kept.mlp.norm.num_batches_tracked > 0
