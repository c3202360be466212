"""The one call: capture, analyse, add noise, train, decide, rewrite, verify, fine-tune, report."""

from __future__ import annotations

import gc
import logging
import os
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager

import torch
from torch import nn

from rbpfx.arguments import as_number, check_arguments, known_leaves, usable_device
from rbpfx.bars import stages
from rbpfx.checkpoints import Checkpoints, Store, fingerprint
from rbpfx.emission import Emission
from rbpfx.errors import (
    DivergenceError,
    InputError,
    TargetError,
)
from rbpfx.graph.capture import LeafModule, evaluating, trace
from rbpfx.graph.copying import copy_model
from rbpfx.graph.examples import first_examples
from rbpfx.graph.groups import analyze
from rbpfx.latency.meter import PlanMeter
from rbpfx.methods import Method, find_method, insert_noise
from rbpfx.preparation import (
    check_capture,
    example_inputs,
    require_free_batch,
    require_groups,
    trainable_copy,
)
from rbpfx.progress import Bar, patient
from rbpfx.result import PruningResult
from rbpfx.saving.origin import Origin
from rbpfx.selection import Selection
from rbpfx.surroundings import generators_kept, seeded, usual_modes
from rbpfx.target import AUTO, Target
from rbpfx.training.finetune import FineTune
from rbpfx.training.interruption import Interruption, interruptible
from rbpfx.training.recursion import Progress, RecursiveTraining
from rbpfx.training.scale import measure_scale
from rbpfx.training.schedule import Recursion
from rbpfx.training.settings import Training
from rbpfx.training.strategy import Strategy
from rbpfx.training.task import ForwardHook, Loader, LossFunction, Task
from rbpfx.wording import in_words

logger = logging.getLogger(__name__)

Metric = Callable[[nn.Module, Loader], float]


@usual_modes()
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
    checkpoint_dir: str | os.PathLike[str] | None = None,
    checkpoint_interval: float = 300.0,
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
        checkpoint_dir: Where training is saved: at the end of every epoch, at intervals, and at
            hardened groups as long as saving takes little of the time. The same call goes on
            from there, whatever ended the process; on the CPU it ends with the very network that
            it would have ended with. Ctrl-C then stops at the next step, saves, and returns the
            result so far; a second one ends it now. SIGTERM saves and exits.
        checkpoint_interval: Seconds between two checkpoints at most, but for the time of a step.

    Returns:
        The smaller network, the plan and the report.

    Raises:
        CheckpointError: `checkpoint_dir` cannot be written, or belongs to another call.
        InputError: An argument is of the wrong kind, or loader, loss and model do not fit
            together.
        CaptureError: Nothing of the model can be traced, or the graph differs from it.
        NothingToPruneError: No channel of the model may be removed.
        TargetError: The target cannot be reached, or the method only ranks and there is none.
        DivergenceError: The loss stopped being finite, and lower learning rates did not help; the
            result so far is `error.result`.
        VerificationError: Slicing changed the function. The result is not used.
        DistributedError: The processes differ, or one does not answer.
        RbpfxError: No method has that name, or a setting has no such value.

    Examples:
        >>> result = prune(model, loader, target=Target(macs=0.5))  # doctest: +SKIP
        >>> print(result.report)  # doctest: +SKIP
    """
    started = time.perf_counter()
    gc.collect()  # networks of earlier calls: graphs refer to themselves
    check_arguments(
        model,
        loader,
        val_loader=val_loader,
        loss_fn=loss_fn,
        forward=forward,
        metric=metric,
        callback=callback,
        target=target,
        recursion=recursion,
        recovery=recovery,
        training=training,
        distill=distill,
        seed=seed,
        checkpoint_dir=checkpoint_dir,
        checkpoint_interval=checkpoint_interval,
    )
    leaf_modules, seed = known_leaves(model, leaf_modules), int(seed)
    method = find_method(method)
    if not method.decides and (target is None or not (target.cost or target.widths)):
        raise TargetError(
            f"method={method.name!r} ranks units but does not say how many go; give a target, for "
            "example target=rbpfx.Target(macs=0.5)"
        )
    recovery = recovery or FineTune()
    device = usable_device(device, model)
    task = Task(loss_fn, forward, device)
    if distill and forward is not None:
        raise InputError("distill=True needs class scores; it does not go with forward=...")
    training = training or Training()
    strategy = training.spread
    progress = progress and strategy.rank == 0
    if distill and training.train_step is not None:
        raise InputError("distill=True does not go with a train_step of your own; distil in it")
    evaluate = _evaluation(task, metric, val_loader, progress, strategy)

    settings = recursion or method.recursion()
    trains = method.trains or recursion is not None
    options = {"unit": unit, "attention": attention, "normalization": normalization}
    words = {
        "target": in_words(target),
        "recursion": in_words(settings if trains else None),
        "recovery": in_words(recovery),
        "training": in_words(training),
        "distill": in_words(distill),
        "seed": in_words(seed),
        **options,
    }

    def draws() -> AbstractContextManager[None]:
        return seeded(seed, device)

    identity = {"method": in_words(method), "processes": str(strategy.processes), **words}
    if checkpoint_dir is not None:
        identity |= {
            "model": fingerprint(model),
            "leaf_modules": in_words(leaf_modules),
            "loss_fn": in_words(loss_fn),
            "forward": in_words(forward),
        }
    with (
        _saved(checkpoint_dir, checkpoint_interval, strategy, identity) as (
            checkpoints,
            interruption,
        ),
        draws(),
    ):
        with stages(type(model).__name__, 4, visible=progress) as begin:
            begin("first batch")
            dense = trainable_copy(model).to(device)
            strategy.synchronize(dense)
            inputs, batch = example_inputs(dense, loader, task, distill)
            begin("capture")
            # A copy: the graph takes the trained weights, while `dense` stays the baseline.
            gm = trace(copy_model(dense, {}), inputs, leaf_modules=leaf_modules)
            begin("check")
            check_capture(dense, gm, inputs)
            require_free_batch(dense, gm, inputs)
            task.scale = measure_scale(dense, loader, task, training, batch)
            begin("analysis")
            analysis = analyze(gm, unit=unit, attention=attention, normalization=normalization)
            require_groups(analysis)
        logger.info("captured %s: %r", type(model).__name__, analysis)

        def meter(target: Target | None) -> PlanMeter | None:
            if target is None or (target.cost != "latency" and target.round_to != AUTO):
                return None
            examples = first_examples(inputs, target.batch_size or batch)
            return PlanMeter(
                gm, analysis, examples, progress, target.deployed, first=strategy.first
            )

        selection = Selection(analysis, target, meter(target))
        accuracy = evaluate(dense)

        noisy = insert_noise(gm, analysis, method, groups=[g.name for g in selection.groups])
        teacher = dense.eval() if distill else None
        gates = RecursiveTraining(noisy, selection, method, task, settings, teacher, training)
        interrupted, failure = "", None
        if trains:
            watched = (lambda: evaluate(noisy)) if strategy.processes == 1 else None
            with Bar("noise", progress, watched, gates.curves) as bar:
                listeners = [*([bar.noise] if progress else []), *([callback] if callback else [])]
                tell = _all_of(listeners) if listeners else None
                try:
                    interrupted = gates.run(loader, tell, checkpoints("noise"), interruption)
                except DivergenceError as error:
                    interrupted, failure = f"by a fault: {error}", error
            gates.decisions.harden_all()
        else:
            gates.decide(patient(loader, "scores", progress))
        _take_weights(gm, noisy)
        emission = Emission(
            origin=Origin.of(model, gm, inputs, leaf_modules, **options),
            original=dense,
            gm=gm,
            analysis=analysis,
            method=method,
            target=target,
            scores=gates.decisions.scores,
            needed=gates.decisions.needed,
            multipliers=gates.decisions.multipliers,
            history=gates.history,
            curves=gates.curves.series,
            histograms=gates.histograms,
            settings=words,
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
            seeded=draws,
        )
        return emission.emit(
            selection,
            started=started,
            source=weakref.ref(model),
            checkpoints=_nowhere if interrupted else checkpoints,
            interruption=interruption,
            interrupted=interrupted,
            failure=failure,
        )


Where = Callable[[str], Checkpoints | None]


def _nowhere(stage: str) -> None:
    """No checkpoints of any stage."""


@contextmanager
def _saved(
    directory: str | os.PathLike[str] | None,
    interval: float,
    strategy: Strategy,
    identity: dict[str, str],
) -> Iterator[tuple[Where, Interruption]]:
    """Where the stages are saved, and whether to stop; nowhere and never without a directory."""
    if directory is None:
        yield _nowhere, Interruption()
        return
    if not interval >= 0:
        raise InputError(f"checkpoint_interval={interval} must be a number of seconds, from 0")
    with ExitStack() as stack:

        def opened() -> None:
            store = stack.enter_context(closing(Store(directory, identity)))
            stores.append(store)

        stores: list[Store] = []
        strategy.first(opened)
        interruption = stack.enter_context(interruptible())
        store = stores[0] if stores else None  # the first process reads and writes for all
        yield lambda stage: Checkpoints(store, stage, interval, strategy), interruption


def _all_of(listeners: list[Callable[[Progress], None]]) -> Callable[[Progress], None]:
    """One listener that tells all others."""

    def tell(progress: Progress) -> None:
        for listener in listeners:
            listener(progress)

    return tell


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"


def _take_weights(gm: nn.Module, noisy: nn.Module) -> None:
    """Copy the trained weights back into the graph without noise."""
    trained = noisy.state_dict()
    gm.load_state_dict({name: trained[name] for name in gm.state_dict()})


def _evaluation(
    task: Task,
    metric: Metric | None,
    val_loader: Loader | None,
    progress: bool,
    strategy: Strategy,
) -> Callable[[nn.Module], float | None]:
    """What is reported of a network, the mean over all processes.

    It draws no random numbers that training would miss.
    """
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
        with generators_kept(task.device), evaluating(network), torch.no_grad():
            value = as_number(metric(network, val_loader))
            return float(strategy.mean(torch.tensor(value, dtype=torch.float64, device="cpu")))

    return evaluate


__all__ = ["PruningResult", "prune"]
