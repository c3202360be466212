"""Interrupted and resumed, `prune` ends as if nothing had happened; and what it saves is safe."""

from __future__ import annotations

import errno
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import rbpfx
from rbpfx import (
    CheckpointError,
    DivergenceError,
    FineTune,
    InputError,
    Progress,
    PruningResult,
    Recursion,
    Target,
    Training,
)
from rbpfx.checkpoints import store as store_module
from tests.toy import ShortcutNet, Times, nan_after, stripes, trained

BATCHES = stripes()
STEPS = 12 + 6
"""Of the noise training and of the fine-tuning."""
MORE_STEPS = (2, 5, 11, 15, 18)
"""Where runs of the slow suite crash as well."""
OPTIONS: list[dict[str, Any]] = [
    {"method": "sbp"},
    {"method": "bmrs-u", "target": None, "recursion": Recursion(2, decisions="epoch")},
    {"method": "mackay", "recursion": Recursion(2, window=1)},
    {"method": "auto-balanced"},
    {"method": "taylor", "recursion": Recursion(2)},
    {"method": "magnitude", "recursion": None},
    {"target": None},
    {"distill": True, "training": Training(accumulate=2)},
    {"recovery": FineTune(1, optimizer=lambda w: torch.optim.AdamW(w, 1e-3))},
    {"training": Training(precision="bfloat16", clip_norm=1.0)},
]


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Images with augmentation, drawn from torch's generator in this process."""

    def __init__(self) -> None:
        self.images = torch.cat([images for images, _ in BATCHES])
        self.labels = torch.cat([labels for _, labels in BATCHES])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index]
        return image + 0.1 * torch.randn_like(image), self.labels[index]


class Crash(Exception):
    """Stands for whatever ends a process."""


class At:
    """A callback that does something at one step, counted over both trainings."""

    def __init__(self, step: int, act: Callable[[], object]) -> None:
        self.step, self.act, self.done = step, act, 0

    def __call__(self, progress: Progress) -> None:
        self.done += 1
        if self.done == self.step:
            self.act()


def crash() -> None:
    raise Crash


def whole_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    torch.manual_seed(0)
    return trained(ShortcutNet(), BATCHES).eval()


def prune(dense: nn.Module, directory: Path | None, **options: Any) -> PruningResult:
    settings: dict[str, Any] = {
        "target": Target(macs=0.5),
        "recursion": Recursion(epochs=2),
        "recovery": FineTune(epochs=1),
        "progress": False,
        "checkpoint_dir": directory,
        "checkpoint_interval": 0,
        **options,
    }
    return rbpfx.prune(dense, settings.pop("loader", BATCHES), **settings)


def same(a: PruningResult, b: PruningResult) -> bool:
    ours, others = a.model.state_dict(), b.model.state_dict()
    return (
        a.plan == b.plan
        and ours.keys() == others.keys()
        and all(torch.equal(ours[name], others[name]) for name in ours)
        and a.report.history == b.report.history
        and a.report.curves == b.report.curves
        and not a.report.interrupted
        and not b.report.interrupted
    )


@pytest.fixture(scope="module")
def whole(dense: nn.Module) -> PruningResult:
    """The result of a run that nothing interrupts, and that saves nothing."""
    return prune(dense, None)


def files(directory: Path, stage: str) -> list[Path]:
    return sorted(directory.glob(f"{stage}-*.safetensors"))


class TestResume:
    def test_saving_changes_nothing(self, dense, whole, tmp_path: Path) -> None:
        assert same(prune(dense, tmp_path), whole)
        assert [len(files(tmp_path, stage)) for stage in ("noise", "cut", "fine-tuning")] == [
            2,
            1,
            2,
        ]

    @pytest.mark.parametrize(
        "step",
        [1, 6, 12, 13, 17, *(pytest.param(step, marks=pytest.mark.slow) for step in MORE_STEPS)],
    )
    def test_after_a_crash_at_any_step(self, dense, whole, tmp_path: Path, step: int) -> None:
        with pytest.raises(Crash):
            prune(dense, tmp_path, callback=At(step, crash))
        seen: list[Progress] = []
        assert same(prune(dense, tmp_path, callback=seen.append), whole)
        # The step of the crash itself is lost, and the one before, whose outcome nobody had seen.
        assert len(seen) in range(STEPS - step, STEPS - step + 3)

    def test_after_many_crashes(self, dense, whole, tmp_path: Path) -> None:
        for _ in range(4):
            with pytest.raises(Crash):
                prune(dense, tmp_path, callback=At(4, crash))
        assert same(prune(dense, tmp_path), whole)

    def test_a_finished_run_is_there_at_once(self, dense, tmp_path: Path) -> None:
        first = prune(dense, tmp_path)
        seen: list[Progress] = []
        assert same(prune(dense, tmp_path, callback=seen.append), first)
        assert not seen

    def test_without_intervals_from_the_last_milestone(self, dense, whole, tmp_path) -> None:
        with pytest.raises(Crash):
            prune(dense, tmp_path, callback=At(10, crash), checkpoint_interval=1e9)
        seen: list[Progress] = []
        assert same(prune(dense, tmp_path, callback=seen.append), whole)
        assert seen[0].step == 7  # an epoch has six

    @pytest.mark.parametrize("share", [0.0, 1e9])
    def test_a_hardened_group_is_written_if_there_is_time(
        self, dense, whole, tmp_path, monkeypatch, share: float
    ) -> None:
        written = []
        write = store_module.Store.write

        def noted(store: Any, stage: str, step: int, state: Any) -> None:
            written.append((stage, step))
            write(store, stage, step, state)

        monkeypatch.setattr(store_module, "SHARE", share)
        monkeypatch.setattr(store_module.Store, "write", noted)
        assert same(prune(dense, tmp_path, checkpoint_interval=1e9), whole)
        hardened = {entry["step"] for entry in whole.report.history}
        assert hardened - {0, 6, 12}
        expected = {0, 6, 12} | (hardened if share else set())
        assert {step for stage, step in written if stage == "noise"} == expected

    @pytest.mark.parametrize(
        ("options", "step"),
        [
            pytest.param(
                options,
                step,
                id=f"{'-'.join(options)}-{step}",
                marks=[] if turn % 3 == place else pytest.mark.slow,
            )
            for turn, options in enumerate(OPTIONS)
            for place, step in enumerate((3, 9, 14))
        ],
    )
    def test_whatever_is_trained(self, dense, tmp_path, options: dict[str, Any], step: int) -> None:
        wanted = prune(dense, None, **options)
        at = At(step, crash)
        try:
            prune(dense, tmp_path, callback=at, **options)
        except Crash:
            pass
        else:
            assert at.done < step
        assert same(prune(dense, tmp_path, **options), wanted)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_shuffled_and_augmented(self, dense, tmp_path: Path, workers: int) -> None:
        loader = DataLoader(Noisy(), 16, shuffle=True, num_workers=workers)
        wanted = prune(dense, None, loader=loader)
        for step in (9, 5):
            with pytest.raises(Crash):
                prune(dense, tmp_path, loader=loader, callback=At(step, crash))
        assert same(prune(dense, tmp_path, loader=loader), wanted)


class TestDamage:
    @pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "gone"])
    @pytest.mark.parametrize("step", [8, pytest.param(15, marks=pytest.mark.slow)])
    def test_the_one_before_is_taken(
        self, dense, whole, tmp_path: Path, caplog, damage: str, step: int
    ) -> None:
        with pytest.raises(Crash):
            prune(dense, tmp_path, callback=At(step, crash))
        last = files(tmp_path, "noise" if step < 12 else "fine-tuning")[-1]
        content = bytearray(last.read_bytes())
        if damage == "gone":
            last.unlink()
        elif damage == "flipped":
            content[len(content) // 2] ^= 1
            last.write_bytes(content)
        else:
            last.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
        with caplog.at_level(logging.WARNING):
            assert same(prune(dense, tmp_path), whole)
        assert ("is damaged" in caplog.text) == (damage != "gone")

    def test_if_all_are_damaged_it_starts_again(self, dense, whole, tmp_path: Path) -> None:
        with pytest.raises(Crash):
            prune(dense, tmp_path, callback=At(15, crash))
        for path in tmp_path.glob("*.safetensors"):
            path.write_bytes(path.read_bytes()[:-1])
        assert same(prune(dense, tmp_path), whole)

    def test_what_a_killed_process_left_is_removed(self, dense, whole, tmp_path: Path) -> None:
        (tmp_path / f"{store_module.ASIDE}xyz").mkdir(parents=True)
        (tmp_path / f"{store_module.ASIDE}xyz" / "checkpoint").write_bytes(b"half")
        assert same(prune(dense, tmp_path), whole)
        assert not list(tmp_path.glob(f"{store_module.ASIDE}*"))

    def test_training_survives_a_full_disk(
        self, dense, whole, tmp_path, monkeypatch, caplog
    ) -> None:
        written = []
        save_file = store_module.save_file

        def full(*args: Any, **options: Any) -> None:
            written.append(1)
            if len(written) % 3:
                raise OSError(errno.ENOSPC, "No space left on device")
            save_file(*args, **options)

        written += [1, 1]  # the first one must succeed
        monkeypatch.setattr(store_module, "save_file", full)
        with pytest.raises(Crash), caplog.at_level(logging.WARNING):
            prune(dense, tmp_path, callback=At(16, crash))
        assert "No space left" in caplog.text
        monkeypatch.undo()
        assert same(prune(dense, tmp_path), whole)

    def test_a_disk_that_is_full_from_the_start(self, dense, tmp_path, monkeypatch) -> None:
        def full(*args: Any, **options: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(store_module, "save_file", full)
        seen: list[Progress] = []
        with pytest.raises(CheckpointError, match="No space left"):
            prune(dense, tmp_path, callback=seen.append)
        assert not seen


class TestRefusal:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"target": Target(macs=0.4)}, "target was Target.macs=0.5. and is Target.macs=0.4."),
            ({"recursion": Recursion(epochs=3)}, "recursion was .*epochs=2"),
            ({"seed": 1}, "seed was 0 and is 1"),
            ({"method": "sbp"}, "method was RBP"),
            ({"leaf_modules": ["bn1"]}, r"leaf_modules was \[\] and is \['bn1'\]"),
            ({"loss_fn": nn.MultiMarginLoss()}, "loss_fn was None and is MultiMarginLoss"),
            ({"forward": whole_loss}, r"forward was None and is tests\.test_checkpoints\.whole"),
        ],
    )
    def test_checkpoints_of_another_call(
        self, dense, tmp_path: Path, options: dict[str, Any], words: str
    ) -> None:
        with pytest.raises(Crash):
            prune(dense, tmp_path, callback=At(8, crash))
        with pytest.raises(CheckpointError, match=words):
            prune(dense, tmp_path, **options)

    def test_of_another_model(self, dense, tmp_path: Path) -> None:
        with pytest.raises(Crash):
            prune(dense, tmp_path, callback=At(8, crash))
        torch.manual_seed(1)
        with pytest.raises(CheckpointError, match="model was"):
            prune(trained(ShortcutNet(), BATCHES), tmp_path)

    def test_of_an_optimizer_whose_code_has_changed(self, dense, tmp_path: Path) -> None:
        groups = [1]

        def build(weights: Any) -> torch.optim.Optimizer:
            weights = list(weights)
            parts = [weights[i :: groups[-1]] for i in range(groups[-1])]
            return torch.optim.SGD([{"params": part} for part in parts], 0.01)

        recovery = FineTune(1, optimizer=build)
        with pytest.raises(Crash):
            prune(dense, tmp_path, recovery=recovery, callback=At(15, crash))
        groups.append(2)
        with pytest.raises(CheckpointError, match=r"step \d+ of the fine-tuning does not fit: .*"):
            prune(dense, tmp_path, recovery=recovery)

    def test_of_another_format(self, dense, tmp_path: Path, monkeypatch) -> None:
        with monkeypatch.context() as patch, pytest.raises(Crash):
            patch.setattr(store_module, "FORMAT", 99)
            prune(dense, tmp_path, callback=At(8, crash))
        with pytest.raises(CheckpointError, match="has format 99, and this rbpfx reads 1"):
            prune(dense, tmp_path)

    def test_two_at_a_time(self, dense, tmp_path: Path) -> None:
        def again() -> None:
            with pytest.raises(CheckpointError, match="another process is working"):
                prune(dense, tmp_path)

        at = At(3, again)
        prune(dense, tmp_path, callback=at)
        assert at.done > 3

    def test_no_directory(self, dense, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(CheckpointError, match="cannot be written"):
            prune(dense, tmp_path / "file" / "inside")

    def test_a_negative_interval(self, dense, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="checkpoint_interval=-1"):
            prune(dense, tmp_path, checkpoint_interval=-1)

    def test_a_state_that_cannot_be_saved(self, dense, tmp_path: Path) -> None:
        class Odd(torch.optim.SGD):
            def state_dict(self) -> dict[str, Any]:
                return {**super().state_dict(), "odd": object()}

        recovery = FineTune(1, optimizer=lambda weights: Odd(weights, 0.1))
        with pytest.raises(CheckpointError, match=r"the object at state.*\['odd'\]"):
            prune(dense, tmp_path, recovery=recovery)
        assert not prune(dense, None, recovery=recovery).report.interrupted


class TestCtrlC:
    @pytest.mark.parametrize("step", [1, 7, 11])
    def test_once_in_the_noise_training(self, dense, whole, tmp_path: Path, step: int) -> None:
        before = signal.getsignal(signal.SIGINT)
        seen = At(step, press_ctrl_c)
        result = prune(dense, tmp_path, callback=seen)
        assert seen.done == step
        assert result.report.interrupted == f"after step {step} of 12 of the noise training"
        assert "NOT FINISHED: training ended after step" in str(result.report)
        assert result.report.pruned.macs <= 0.5 * result.report.dense.macs
        assert result.model(BATCHES[0][0]).shape == (16, 3)
        assert signal.getsignal(signal.SIGINT) is before
        assert same(prune(dense, tmp_path), whole)

    def test_once_in_the_fine_tuning(self, dense, whole, tmp_path: Path) -> None:
        result = prune(dense, tmp_path, callback=At(15, press_ctrl_c))
        assert result.report.interrupted == "after step 3 of 6 of the fine-tuning"
        assert result.plan == whole.plan
        assert same(prune(dense, tmp_path), whole)

    @pytest.mark.parametrize("step", [5, 14])
    def test_twice(self, dense, whole, tmp_path: Path, step: int) -> None:
        def press_twice() -> None:
            press_ctrl_c()
            press_ctrl_c()

        with pytest.raises(KeyboardInterrupt):
            prune(dense, tmp_path, callback=At(step, press_twice))
        assert same(prune(dense, tmp_path), whole)

    def test_sigterm_saves_and_exits(self, dense, whole, tmp_path: Path) -> None:
        before = signal.getsignal(signal.SIGTERM)
        at = At(8, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit) as caught:
            prune(dense, tmp_path, callback=at, checkpoint_interval=1e9)
        assert caught.value.code == 143
        assert signal.getsignal(signal.SIGTERM) is before
        seen: list[Progress] = []
        assert same(prune(dense, tmp_path, callback=seen.append), whole)
        assert len(seen) == STEPS - 8

    def test_without_checkpoints_it_is_what_it_always_was(self, dense) -> None:
        with pytest.raises(KeyboardInterrupt):
            prune(dense, None, callback=At(5, press_ctrl_c))


class TestFaults:
    @pytest.mark.parametrize("step", [4, 11, 16])
    def test_a_fault_that_passes_is_survived(self, dense, tmp_path: Path, step: int) -> None:
        """Alike with checkpoints and without."""
        wanted = prune(dense, None, loss_fn=Times({step: float("nan")}))
        assert not wanted.report.interrupted
        assert all(torch.isfinite(t).all() for t in wanted.model.state_dict().values())
        assert same(
            prune(
                dense, tmp_path / "a", loss_fn=Times({step: float("nan")}), checkpoint_interval=1e9
            ),
            wanted,
        )

    def test_the_result_so_far_comes_with_the_error(self, dense) -> None:
        with pytest.raises(DivergenceError) as caught:
            prune(dense, None, loss_fn=nan_after(9))
        result = caught.value.result
        assert result.report.interrupted.startswith("by a fault")
        assert result.report.pruned.macs <= 0.5 * result.report.dense.macs
        assert torch.isfinite(result.model(BATCHES[0][0])).all()
