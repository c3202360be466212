"""A process that prunes often, or long, does not grow."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

import rbpfx
from rbpfx import CaptureError, FineTune, Recursion, Target
from rbpfx.training.recursion import Progress
from tests.resources.common import X, held, prune, toy
from tests.toy import ShortcutNet

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 1000
RAMP = Recursion(epochs=STEPS / 6 + 0.2, front=0.0, weight_lr=1e-3)  # hardens after step 1000


def whole_life(folder: Path) -> None:
    """Prune, and do with the result whatever can be done with one."""
    model = toy()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    result = prune(model, distill=True, target=Target(macs=0.5))
    result.report.write(folder / "report.html")
    result.deploy()(X)
    result.sweep([0.6])
    result.save(folder / "saved")
    result.to_source(folder / "net.py")
    rbpfx.load(folder / "saved", ShortcutNet)(X)
    rbpfx.rebind(optimizer, result)


def test_many_prunes_leave_nothing_behind(tmp_path: Path) -> None:
    for _ in range(2):  # what is made once may stay
        whole_life(tmp_path)
    before = held()
    for _ in range(8):
        whole_life(tmp_path)
    assert held() == before


@pytest.mark.parametrize("phase", ["noise", "fine-tuning"])
def test_a_thousand_steps_leave_nothing_behind(phase: str) -> None:
    seen: dict[int, dict[str, int]] = {}

    def look(progress: Progress) -> None:
        if progress.phase == phase and progress.step in (STEPS // 10, STEPS):
            seen[progress.step] = held()

    options: dict[str, Any] = {"recursion": RAMP, "recovery": FineTune(epochs=0)}
    if phase == "fine-tuning":
        options = {"recursion": Recursion(epochs=1), "recovery": FineTune(epochs=STEPS / 6)}
    prune(callback=look, target=Target(macs=0.7), **options)
    assert seen[STEPS] == seen[STEPS // 10]


def test_nothing_stays_of_a_prune_that_was_ended() -> None:
    def end(progress: Progress) -> None:
        raise KeyboardInterrupt

    def interrupted() -> None:
        with pytest.raises(KeyboardInterrupt):
            prune(callback=end)

    interrupted()
    before = held()
    interrupted()
    assert held() == before


def test_the_model_is_left_as_it_was() -> None:
    model = toy().eval()
    model.conv1.train()
    model.conv2.weight.requires_grad_(False)

    def state() -> list[Any]:
        return [
            {
                "name": name,
                "attributes": sorted(vars(module)),
                "training": module.training,
                "trained": [p.requires_grad for p in module.parameters()],
                "hooks": {k: len(v) for k, v in vars(module).items() if k.endswith("hooks")},
            }
            for name, module in model.named_modules()
        ]

    before, weights = state(), {k: v.clone() for k, v in model.state_dict().items()}
    prune(model)
    assert state() == before
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_no_patch_stays_whether_a_capture_succeeds_or_fails() -> None:
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    def patched() -> list[Any]:
        places = (nn.Module, torch.autograd.Function, torch)
        return [dict(vars(place)) for place in places]

    before = patched()
    rbpfx.trace(toy(), X)
    assert patched() == before
    with pytest.raises(CaptureError):
        rbpfx.trace(Branching(), X)
    assert patched() == before


@pytest.mark.slow
def test_memory_does_not_grow_by_a_copy_of_the_model() -> None:
    status = Path("/proc/self/statm")
    if not status.is_file():
        pytest.skip("the system does not tell how much memory is used")
    batches = [(torch.randn(4, 3, 32, 32), torch.randint(1000, (4,)))]
    model = resnet18()

    def resident() -> int:
        return int(status.read_text().split()[1]) * 4096

    def once() -> None:
        options: dict[str, Any] = {"method": "magnitude", "target": Target(macs=0.5)}
        prune(model, loader=batches, val_loader=None, recursion=None, **options).deploy()
        gc.collect()  # networks are in cycles with their graphs

    for _ in range(2):
        once()
    before = resident()
    for _ in range(6):
        once()
    copy = sum(p.nbytes for p in model.parameters())
    assert resident() - before < 2 * copy  # the allocator keeps more or less of what is free
