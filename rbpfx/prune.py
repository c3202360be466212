"""The one call: capture, analyse, add noise, train, decide, rewrite, verify, fine-tune, report."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from math import isfinite

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rbpfx.circumstances import in_words
from rbpfx.errors import CaptureError, InputError, NothingToPruneError, RbpfxError, TargetError
from rbpfx.graph.capture import ExampleInputs, LeafModule, call_with, evaluating, trace
from rbpfx.graph.copying import copy_model
from rbpfx.graph.device import device_of
from rbpfx.graph.groups import Analysis, analyze
from rbpfx.graph.verification import difference
from rbpfx.latency import first_examples
from rbpfx.latency.meter import PlanMeter
from rbpfx.methods import Method, find_method, insert_noise
from rbpfx.progress import Bar, patient
from rbpfx.result import Emission, PruningResult
from rbpfx.saving.origin import Origin
from rbpfx.selection import Selection
from rbpfx.target import AUTO, Target
from rbpfx.training.finetune import FineTune
from rbpfx.training.recursion import Progress, RecursiveTraining
from rbpfx.training.schedule import Recursion
from rbpfx.training.settings import Training
from rbpfx.training.task import ForwardHook, Loader, LossFunction, Task, batch_size

logger = logging.getLogger(__name__)

CAPTURE_TOLERANCE = 1e-4

Metric = Callable[[nn.Module, Loader], float]


def prune(
    model: nn.Module,
    loader: Loader,
    *,
    method: str | Method = "rbp",
    target: Target | None = None,
    loss_fn: LossFunction | None = None,
    forward: ForwardHook | None = None,
    val_loader: Loader | None = None,
    metric: Metric | None = None,
    unit: str = "channel",
    attention: str = "heads",
    normalization: str = "freeze",
    recursion: Recursion | None = None,
    recovery: FineTune | None = None,
    distill: bool = False,
    training: Training | None = None,
    leaf_modules: Iterable[LeafModule] = (),
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: bool = True,
    callback: Callable[[Progress], None] | None = None,
) -> PruningResult:
    """Make a trained network smaller and faster; how much is left is decided by the data.

    Args:
        model: A trained network. It is left untouched.
        loader: Training batches: (input, target) pairs, or anything that `forward` understands.
            Anything that can be gone through repeatedly, for example a `DataLoader`.
        method: A method's name (`rbpfx.METHODS`), or a method.
        target: What the result may cost, and bounds on its widths; None lets the method decide.
        loss_fn: Called as `loss_fn(output, target)`; cross-entropy by default.
        forward: Called as `forward(model, batch)`, returns the loss; replaces `loss_fn`.
        val_loader: Batches on which accuracy is reported (nothing is decided on them).
        metric: Called as `metric(model, val_loader)`, in eval mode, in place of top-1 accuracy;
            needed with `val_loader` if the loss is not cross-entropy.
        unit: "channel", or "feature" to prune flattened features one by one as well.
        attention: "heads" to prune whole heads, or "positions" to make all heads narrower.
        normalization: What becomes of channels that a LayerNorm, RMSNorm or GroupNorm mixes:
            "freeze" keeps them; "exact" lets them go and counts them as zeros; "sliced" lets them
            go and normalises the rest, which changes the function: the report then says by how
            much instead of proving that nothing changed.
        recursion: How the gates are trained; by default as the method wants it. A reference
            ranking cuts at once by default; with a recursion, group after group is cut while the
            weights train on.
        recovery: How the result is fine-tuned.
        distill: Learn half from the outputs of the dense network (classifiers only).
        training: How a training step is carried out, of gates and of weights: mixed precision,
            channels_last, torch.compile, gradient accumulation, a step of your own.
        leaf_modules: Module classes or names that are not traced into.
        device: Where to work and to leave the result; by default where the model is.
        seed: Seed of torch's random numbers. Its generators are left as they were.
        progress: Whether to show a progress bar.
        callback: Called after every step of both trainings; what it raises ends them. For example
            a `rbpfx.reporting.TensorBoardLogger`.

    Returns:
        The smaller network, the plan and the report.

    Raises:
        InputError: Loader, loss and model do not fit together.
        CaptureError: Nothing of the model can be traced, or the graph differs from it.
        NothingToPruneError: No channel of the model may be removed.
        TargetError: The target cannot be reached.
        DivergenceError: The loss stopped being finite.
        VerificationError: Slicing changed the function. The result is not used.

    Examples:
        >>> result = prune(model, loader, target=Target(macs=0.5))  # doctest: +SKIP
        >>> print(result.report)  # doctest: +SKIP
    """
    started = time.perf_counter()
    method = find_method(method)
    if not method.decides and (target is None or not (target.cost or target.widths)):
        raise TargetError(
            f"method={method.name!r} ranks units but does not say how many go; give a target, for "
            "example target=rbpfx.Target(macs=0.5)"
        )
    recovery = recovery or FineTune()
    device = torch.device(device) if device is not None else device_of(model)
    task = Task(loss_fn, forward, device)
    if distill and forward is not None:
        raise InputError("distill=True needs class scores; it does not go with forward=...")
    training = training or Training()
    if distill and training.train_step is not None:
        raise InputError("distill=True does not go with a train_step of your own; distil in it")
    _require_repeatable(loader, val_loader)
    evaluate = _evaluation(task, metric, val_loader, progress)

    def seeded() -> AbstractContextManager[None]:
        return _seeded(seed, device)

    with seeded():
        dense = _copied(model).to(device)
        inputs, batch = _example_inputs(dense, loader, task)
        # A copy: the graph takes the trained weights, while `dense` stays the baseline.
        gm = trace(copy_model(dense, {}), inputs, leaf_modules=leaf_modules)
        _check_capture(dense, gm, inputs)
        analysis = analyze(gm, unit=unit, attention=attention, normalization=normalization)
        _require_groups(analysis)
        logger.info("captured %s: %r", type(model).__name__, analysis)

        def meter(target: Target | None) -> PlanMeter | None:
            if target is None or (target.cost != "latency" and target.round_to != AUTO):
                return None
            examples = first_examples(inputs, target.batch_size or batch)
            return PlanMeter(gm, analysis, examples, progress, target.deployed)

        selection = Selection(analysis, target, meter(target))
        accuracy = evaluate(dense)

        noisy = insert_noise(gm, analysis, method, groups=[g.name for g in selection.groups])
        teacher = dense.eval() if distill else None
        settings = recursion or method.recursion()
        gates = RecursiveTraining(noisy, selection, method, task, settings, teacher, training)
        if method.trains or recursion is not None:
            with Bar("noise", progress, lambda: evaluate(noisy), gates.curves) as bar:
                listeners = [*([bar.noise] if progress else []), *([callback] if callback else [])]
                gates.run(loader, _all_of(listeners) if listeners else None)
        else:
            gates.decide(patient(loader, "scores", progress))
        _take_weights(gm, noisy)
    options = {"unit": unit, "attention": attention, "normalization": normalization}
    emission = Emission(
        origin=Origin.of(model, gm, inputs, leaf_modules, **options),
        original=dense,
        gm=gm,
        analysis=analysis,
        method=method,
        target=target,
        scores=gates.scores,
        needed=gates.needed,
        multipliers=gates.multipliers,
        history=gates.history,
        curves=gates.curves.series,
        histograms=gates.histograms,
        settings={
            "target": in_words(target),
            "recursion": in_words(settings if method.trains or recursion is not None else None),
            "recovery": in_words(recovery),
            "training": in_words(training),
            "distill": in_words(distill),
            "seed": in_words(seed),
            **options,
        },
        callback=callback,
        task=task,
        loader=loader,
        inputs=inputs,
        batch=batch,
        evaluate=evaluate,
        accuracy=accuracy,
        recovery=recovery,
        training=training,
        distill=distill,
        meter=meter,
        progress=progress,
        metric="accuracy" if metric is None else getattr(metric, "__name__", "metric"),
        device=_describe(device),
        seeded=seeded,
    )
    return emission.emit(selection, started=started, source=weakref.ref(model))


def _all_of(listeners: list[Callable[[Progress], None]]) -> Callable[[Progress], None]:
    """One listener that tells all others."""

    def tell(progress: Progress) -> None:
        for listener in listeners:
            listener(progress)

    return tell


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed all draws inside; the generators outside go on as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # Not torch.manual_seed, which seeds the generators of all other devices as well.
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _require_repeatable(loader: Loader, val_loader: Loader | None) -> None:
    for name, batches in (("loader", loader), ("val_loader", val_loader)):
        if isinstance(batches, Iterator):
            raise InputError(
                f"the {name} is a {type(batches).__name__}, which can be gone through only once; "
                "pass a DataLoader or a list"
            )


def _copied(model: nn.Module) -> nn.Module:
    """A copy of the model, which has to be one that can be trained."""
    low = {p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize < 4}
    if low:
        raise InputError(
            f"the model has parameters of {', '.join(sorted(map(str, low)))}, too coarse to train "
            "noise on; pass model.float() and convert the result back"
        )
    try:
        return copy_model(model, {})
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied ({error}). rbpfx works on a copy so that "
            "your model stays as it is; detach tensors that the model caches in its attributes."
        ) from error


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"


def _example_inputs(model: nn.Module, loader: Loader, task: Task) -> tuple[ExampleInputs, int]:
    """Inputs of the first batch and its size, after one full trial of the task on it."""
    batch = next(iter(loader), None)
    if batch is None:
        raise InputError("the loader yields no batch")
    inputs: ExampleInputs | None = None
    try:
        inputs = task.example_inputs(model, batch)
        with evaluating(model), torch.no_grad():
            loss = task.loss(model, batch)
    except RbpfxError:
        raise
    except Exception as error:
        leaves = tree_leaves(batch if inputs is None else inputs)
        shapes = [tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)]
        raise InputError(
            f"the model and the loss do not run on the loader's first batch (tensors of shape "
            f"{shapes}): {error}"
        ) from error
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        raise InputError(f"the loss must be a scalar tensor, not {loss!r}; average over the batch")
    if not isfinite(float(loss)):
        raise InputError(
            f"the loss of the model is {float(loss)} before anything was pruned; check its "
            "parameters and the loader's first batch for NaN"
        )
    return inputs, batch_size(batch)


def _check_capture(model: nn.Module, gm: nn.Module, inputs: ExampleInputs) -> None:
    """The graph must compute what the model computes, the second time too."""
    with evaluating(model, gm), torch.no_grad():
        error = max(difference(call_with(model, inputs), call_with(gm, inputs)) for _ in range(2))
    if not error <= CAPTURE_TOLERANCE:
        raise CaptureError(
            f"the captured graph differs from the model by {error:.1e} of its output: the model's "
            "Python code depends on something that tracing fixes. Keep that module whole with "
            "leaf_modules=[...]."
        )


def _require_groups(analysis: Analysis) -> None:
    if not analysis.groups:
        reasons = "\n".join(f"  {axis.name}: {axis.reason}" for axis in analysis.frozen)
        raise NothingToPruneError(
            "the model has no channel that may be removed:\n" + (reasons or "  no layer was found")
        )


def _take_weights(gm: nn.Module, noisy: nn.Module) -> None:
    """Copy the trained weights back into the graph without noise."""
    trained = noisy.state_dict()
    gm.load_state_dict({name: trained[name] for name in gm.state_dict()})


def _evaluation(
    task: Task, metric: Metric | None, val_loader: Loader | None, progress: bool
) -> Callable[[nn.Module], float | None]:
    """What is reported of a network; it draws no random numbers that training would miss."""
    if val_loader is None:
        if metric is not None:
            raise InputError("metric=... is computed on val_loader=...; give both")
        return lambda network: None
    if metric is None:
        if not task.is_classification:
            raise InputError(
                "with a loss of your own, give metric=... to say what is measured on val_loader"
            )

        def metric(network: nn.Module, batches: Loader) -> float:
            return task.accuracy(network, patient(batches, "accuracy", progress))

    def evaluate(network: nn.Module) -> float:
        with torch.random.fork_rng(devices=[]), evaluating(network), torch.no_grad():
            return float(metric(network, val_loader))

    return evaluate


__all__ = ["PruningResult", "prune"]
