"""Every error rbpfx raises on purpose: one base class, one narrow child per cause."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rbpfx.result import PruningResult


class RbpfxError(Exception):
    """Base class of all errors that rbpfx raises on purpose."""


class CaptureError(RbpfxError):
    """The model could not be turned into a graph that computes the same function."""


class InputError(RbpfxError):
    """The example inputs, the loader or the loss do not fit the model."""


class GuardError(InputError):
    """An input breaks an assumption on which the network was captured."""


class RuleError(RbpfxError):
    """An operator rule met, or produced, something that it cannot describe."""


class PlanError(RbpfxError):
    """A pruning plan does not fit the network it is applied to."""


class TargetError(RbpfxError):
    """A target cannot be reached by this network."""


class NothingToPruneError(RbpfxError):
    """The network has no channel that may be removed; the message says why, axis by axis."""


class VerificationError(RbpfxError):
    """A network is not used, as it differs from the one that it should equal.

    That is the masked one for a sliced network, the original for a deployed or exported one.
    """


class SaveError(RbpfxError):
    """A pruned network cannot be saved, or written as source."""


class ExportError(RbpfxError):
    """A network could not be written in the format that was asked for."""


class LoadError(RbpfxError):
    """A saved network is damaged, or does not belong to the model it is loaded into."""


class CheckpointError(RbpfxError):
    """A checkpoint cannot be written, or belongs to another call of `prune`."""


class DistributedError(RbpfxError):
    """The processes of a training do not work together: one has ended, or they differ."""


class DivergenceError(RbpfxError):
    """The loss stopped being a finite number during training, or grew beyond all bounds.

    Attributes:
        stage: Name of the group (or phase) that was being trained.
        step: Optimiser step, counted from the start of the training, at which it was noticed.
        model: The network, at its last good state.
        result: What `prune` would have returned if training had ended there; None if there is no
            such result.
    """

    def __init__(self, message: str, *, stage: str, step: int, model: object) -> None:
        super().__init__(message)
        self.stage = stage
        self.step = step
        self.model = model
        self.result: PruningResult | None = None
