"""The task: losses, accuracy, and what the model is called with."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from rbpfx import InputError
from rbpfx.graph.examples import count_examples
from rbpfx.training.task import (
    AUXILIARY_WEIGHT,
    Task,
    classification_loss,
    distillation_loss,
    main_output,
    require_scalar,
    split_pair,
    to_device,
)

Outputs = namedtuple("Outputs", ["logits", "aux"])
Pair = namedtuple("Pair", ["image", "label"])
SCORES, HEAD = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 2, 1, 1, 0])


class TestLoss:
    def test_cross_entropy_by_default(self) -> None:
        loss = Task().loss(nn.Identity(), (SCORES, LABELS))
        assert torch.equal(loss, F.cross_entropy(SCORES, LABELS))

    @pytest.mark.parametrize("output", [(SCORES, HEAD), [SCORES, HEAD], Outputs(SCORES, HEAD)])
    def test_auxiliary_heads_weigh_less(self, output: object) -> None:
        wanted = F.cross_entropy(SCORES, LABELS) + AUXILIARY_WEIGHT * F.cross_entropy(HEAD, LABELS)
        assert torch.equal(classification_loss(output, LABELS), wanted)

    @pytest.mark.parametrize("other", [None, torch.randn(5, 8), "text"])
    def test_what_is_no_head_is_left_out(self, other: object) -> None:
        loss = classification_loss((SCORES, other), LABELS)
        assert torch.equal(loss, F.cross_entropy(SCORES, LABELS))

    def test_soft_targets(self) -> None:
        soft = HEAD.softmax(1)
        assert torch.equal(classification_loss(SCORES, soft), F.cross_entropy(SCORES, soft))

    @pytest.mark.parametrize(
        ("output", "target"),
        [(torch.zeros(4), torch.zeros(4)), (torch.zeros(4, 3), torch.zeros(4, 1))],
    )
    def test_what_is_no_classifier_is_refused(self, output: Tensor, target: Tensor) -> None:
        with pytest.raises(InputError, match=r"the default loss is cross-entropy.*pass loss_fn"):
            classification_loss(output, target)

    @pytest.mark.parametrize("loss_fn", [None, nn.CrossEntropyLoss()])
    @pytest.mark.parametrize("label", [9, -1])
    def test_a_target_that_is_no_class(self, loss_fn: object, label: int) -> None:
        batch = (SCORES, torch.full_like(LABELS, label))
        with pytest.raises(InputError, match=f"Target {label} is out of .*go from 0 to 2; only"):
            Task(loss_fn).loss(nn.Identity(), batch)

    def test_an_error_in_a_loss_of_ones_own_stays(self) -> None:
        with pytest.raises(IndexError):
            Task(lambda output, target: output[99]).loss(nn.Identity(), (SCORES, LABELS))

    def test_a_loss_function(self) -> None:
        loss = Task(F.mse_loss).loss(nn.Identity(), (SCORES, HEAD))
        assert torch.equal(loss, F.mse_loss(SCORES, HEAD))

    def test_a_hook_gets_model_and_batch(self) -> None:
        task = Task(forward=lambda model, batch: model(batch["x"]).sum())
        assert task.loss(nn.Identity(), {"x": torch.ones(3)}) == 3

    def test_half_of_the_loss_is_distilled(self) -> None:
        student, teacher = nn.Linear(3, 3), nn.Linear(3, 3)
        loss = Task().loss(student, (SCORES, LABELS), teacher)
        output, wanted = student(SCORES), teacher(SCORES)
        halves = F.cross_entropy(output, LABELS), distillation_loss(output, wanted)
        assert torch.allclose(loss, sum(halves) / 2)
        loss.backward()
        assert teacher.weight.grad is None

    @pytest.mark.parametrize("temperature", [1.0, 4.0])
    def test_distillation_by_the_formula(self, temperature: float) -> None:
        student, teacher = SCORES.double(), HEAD.double()
        p = torch.exp(teacher / temperature)
        p = p / p.sum(1, keepdim=True)
        q = torch.exp(student / temperature)
        q = q / q.sum(1, keepdim=True)
        wanted = temperature**2 * (p * (p / q).log()).sum(1).mean()
        assert torch.allclose(distillation_loss(student, teacher, temperature), wanted)
        assert distillation_loss(student, student).abs() < 1e-12


class TestAccuracy:
    def test_top_1(self) -> None:
        scores = F.one_hot(LABELS, 3).float()
        wrong = (LABELS + 1) % 3
        assert Task().accuracy(nn.Identity(), [(scores, LABELS)]) == 1
        assert Task().accuracy(nn.Identity(), [(scores, LABELS), (scores[:3], wrong[:3])]) == 5 / 8

    def test_soft_targets(self) -> None:
        assert Task().accuracy(nn.Identity(), [(SCORES, SCORES.softmax(1))]) == 1

    def test_a_target_for_every_pixel(self) -> None:
        scores = torch.randn(2, 3, 4, 4)
        assert Task().accuracy(nn.Identity(), [(scores, scores.argmax(1))]) == 1

    @pytest.mark.parametrize(
        ("loss_fn", "ignored"),
        [
            (None, -100),
            (F.cross_entropy, -100),
            (nn.CrossEntropyLoss(), -100),
            (nn.CrossEntropyLoss(ignore_index=255), 255),
            (nn.CrossEntropyLoss(ignore_index=0), 0),
        ],
    )
    def test_what_the_loss_ignores_does_not_count(self, loss_fn: object, ignored: int) -> None:
        scores = F.one_hot(LABELS, 3).float()
        target = LABELS.clone()
        target[3] = ignored
        counts = target != ignored
        wrong = torch.where(counts & (LABELS == 2), 1, target)  # one of them
        assert Task(loss_fn).accuracy(nn.Identity(), [(scores, wrong)]) == 1 - 1 / counts.sum()
        nothing = torch.full_like(LABELS, ignored)
        with pytest.raises(InputError, match=f"all 5 targets .* are ignore_index={ignored}"):
            Task(loss_fn).accuracy(nn.Identity(), [(scores, nothing)])

    def test_targets_of_another_shape(self) -> None:
        message = r"each of \(5,\) predictions, but .*shape \(5, 1\)"
        with pytest.raises(InputError, match=message):
            Task().accuracy(nn.Identity(), [(SCORES, LABELS[:, None])])

    def test_modes_are_restored(self) -> None:
        model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(3)).train()
        model[1].eval()
        Task().accuracy(model, [(SCORES, LABELS)])
        assert [m.training for m in model.modules()] == [True, True, False]

    def test_no_batch(self) -> None:
        with pytest.raises(InputError, match="validation loader yields no batch"):
            Task().accuracy(nn.Identity(), [])

    @pytest.mark.parametrize(
        ("options", "known"),
        [
            ({}, True),
            ({"loss_fn": F.cross_entropy}, True),
            ({"loss_fn": nn.CrossEntropyLoss(label_smoothing=0.1)}, True),
            ({"loss_fn": F.mse_loss}, False),
            ({"forward": lambda model, batch: model(batch)}, False),
        ],
    )
    def test_when_accuracy_means_something(self, options: dict, known: bool) -> None:
        assert Task(**options).is_classification == known


class TestOutputs:
    @pytest.mark.parametrize(
        "output",
        [
            SCORES,
            (SCORES, HEAD),
            [SCORES],
            Outputs(SCORES, HEAD),
            {"out": SCORES, "aux": HEAD},
            OrderedDict(aux=HEAD, logits=SCORES),
            {"scores": SCORES},
            SimpleNamespace(logits=SCORES),
        ],
    )
    def test_the_scores_are_found(self, output: object) -> None:
        assert main_output(output) is SCORES

    @pytest.mark.parametrize("output", [(), None, ("text",), 1.0])
    def test_or_their_absence_is_reported(self, output: object) -> None:
        with pytest.raises(InputError, match="cannot find class scores"):
            main_output(output)


class TestBatches:
    @pytest.mark.parametrize("batch", [(1, 2), [1, 2], Pair(1, 2)])
    def test_pairs(self, batch: object) -> None:
        assert split_pair(batch) == (1, 2)

    @pytest.mark.parametrize(
        ("batch", "kind"),
        [([1, 2, 3], "list of 3"), ({"x": 1, "y": 2}, "dict of 2"), (torch.zeros(2), "Tensor of")],
    )
    def test_anything_else_is_named(self, batch: object, kind: str) -> None:
        with pytest.raises(InputError, match=f"yields a {kind}"):
            split_pair(batch)

    @pytest.mark.parametrize(
        "batch",
        [
            torch.zeros(7, 2),
            (torch.zeros(7, 2), torch.zeros(3)),
            {"names": ["a", "b"], "x": {"image": torch.zeros(7)}},
            UserDict(x=torch.zeros(7)),
            [torch.tensor(3.0), torch.zeros(7)],
        ],
    )
    def test_size(self, batch: object) -> None:
        assert count_examples(batch) == 7

    @pytest.mark.parametrize("batch", [torch.tensor(1.0), [], {}, "text", None, ["a", "b"]])
    def test_size_without_a_tensor(self, batch: object) -> None:
        assert count_examples(batch) == 1

    def test_a_list_of_images_counts_its_images(self) -> None:
        images = [torch.zeros(3, 8, 9), torch.zeros(3, 7, 7)]
        assert count_examples((images, [{"labels": torch.zeros(4)}] * 2)) == 2

    def test_examples(self) -> None:
        count = Task().examples_in
        data = TensorDataset(torch.zeros(10, 2))
        assert count(DataLoader(data, 4)) == 10
        assert count([(torch.zeros(4, 2), 0), (torch.zeros(3, 2), 0)]) == 7
        some = SubsetRandomSampler([1, 5, 7])
        assert count(DataLoader(data, 2, sampler=some)) == 3
        assert count(DataLoader(data, 2, sampler=WeightedRandomSampler([1.0] * 10, 20))) == 20
        assert count(DataLoader(data, batch_sampler=BatchSampler(some, 2, False))) == 3
        assert count(DataLoader(data, batch_sampler=[[0, 1], [2]])) == 3
        assert count(DataLoader([torch.zeros(4, 2), torch.zeros(5, 2)], batch_size=None)) == 9

    def test_a_loader_that_does_not_say_is_gone_through_once(self) -> None:
        passes = []

        class Silent:
            def __iter__(self) -> Iterator[Tensor]:
                passes.append(1)
                return iter([torch.zeros(4, 2), torch.zeros(3, 2)])

        task, loader = Task(), Silent()
        assert [task.batches_in(loader), task.examples_in(loader), task.batches_in(loader)] == [
            2,
            7,
            2,
        ]
        assert len(passes) == 1

    def test_moved_batches_keep_their_form(self) -> None:
        batch = {"a": Pair(torch.zeros(2), [torch.ones(1), "text"]), "b": (1, None)}
        moved = to_device(batch, torch.device("meta"))
        assert isinstance(moved["a"], Pair)
        assert moved["a"].image.device.type == moved["a"].label[0].device.type == "meta"
        assert moved["a"].label[1] == "text"
        assert moved["b"] == (1, None)


class Mixed(nn.Module):
    def forward(self, x: Tensor, scale: float = 1.0, shift: Tensor | None = None) -> Tensor:
        return x * scale + (0 if shift is None else shift)


@pytest.mark.parametrize(
    ("loss", "remedy"),
    [
        (torch.zeros(2), "average over the batch"),
        (1.5, r"without \.item\(\)"),
        ({"loss": torch.tensor(1.0)}, "return the loss tensor alone"),
        (None, "return the loss tensor alone"),
    ],
)
def test_a_loss_is_a_scalar_tensor(loss: object, remedy: str) -> None:
    require_scalar(torch.tensor(1.0))
    with pytest.raises(InputError, match=f"must be a scalar tensor, not .*{remedy}"):
        require_scalar(loss)


class TestExampleInputs:
    def test_the_first_of_a_pair(self) -> None:
        assert Task().example_inputs(Mixed(), (SCORES, LABELS)) is SCORES

    @pytest.mark.parametrize(
        ("call", "wanted"),
        [
            (lambda m, b: m(b, 2.0), (SCORES, 2.0)),
            (lambda m, b: m(x=b, scale=2.0), {"x": SCORES, "scale": 2.0}),
            (lambda m, b: m(b, shift=b), {"x": SCORES, "shift": SCORES}),
            (lambda m, b: m(b) + m(b, 2.0), (SCORES,)),
        ],
    )
    def test_the_call_of_a_hook_is_recorded(self, call: object, wanted: object) -> None:
        model = Mixed().train()
        assert Task(forward=call).example_inputs(model, SCORES) == wanted
        assert model.training
        assert not model._forward_pre_hooks

    def test_a_hook_without_a_call(self) -> None:
        with pytest.raises(
            InputError, match="never calls the model it is given; call its argument"
        ):
            Task(forward=lambda m, b: b.sum()).example_inputs(Mixed(), SCORES)

    def test_loss_and_hook_exclude_each_other(self) -> None:
        with pytest.raises(InputError, match="not both"):
            Task(F.mse_loss, lambda m, b: m(b))
