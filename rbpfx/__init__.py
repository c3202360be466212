"""rbpfx: structured pruning of PyTorch networks as a compiler over torch.fx graphs."""

from rbpfx.errors import (
    CaptureError,
    DivergenceError,
    InputError,
    NothingToPruneError,
    PlanError,
    RbpfxError,
    RuleError,
    TargetError,
    VerificationError,
)
from rbpfx.graph.capture import trace
from rbpfx.graph.cost import count_macs, count_parameters
from rbpfx.graph.gates import apply_mask
from rbpfx.graph.groups import Analysis, ChannelGroup, FrozenAxis, analyze
from rbpfx.graph.rules.base import Rule, register_rule
from rbpfx.graph.slicing import rewrite
from rbpfx.graph.verification import verify
from rbpfx.latency import Latency, measure_latency
from rbpfx.methods import RBP, Method, NoiseGate, insert_noise, noise_gates
from rbpfx.plan import PruningPlan
from rbpfx.prune import PruningResult, prune
from rbpfx.report import Figures, Report
from rbpfx.target import Target
from rbpfx.training.finetune import FineTune
from rbpfx.training.recursion import Progress
from rbpfx.training.schedule import Recursion

__version__ = "0.1.0"

__all__ = [
    "RBP",
    "Analysis",
    "CaptureError",
    "ChannelGroup",
    "DivergenceError",
    "Figures",
    "FineTune",
    "FrozenAxis",
    "InputError",
    "Latency",
    "Method",
    "NoiseGate",
    "NothingToPruneError",
    "PlanError",
    "Progress",
    "PruningPlan",
    "PruningResult",
    "RbpfxError",
    "Recursion",
    "Report",
    "Rule",
    "RuleError",
    "Target",
    "TargetError",
    "VerificationError",
    "__version__",
    "analyze",
    "apply_mask",
    "count_macs",
    "count_parameters",
    "insert_noise",
    "measure_latency",
    "noise_gates",
    "prune",
    "register_rule",
    "rewrite",
    "trace",
    "verify",
]
