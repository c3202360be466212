"""rbpfx: structured pruning of PyTorch networks as a compiler over torch.fx graphs."""

from rbpfx.deployment.deploy import deploy
from rbpfx.deployment.export import export
from rbpfx.errors import (
    CaptureError,
    CheckpointError,
    DistributedError,
    DivergenceError,
    ExportError,
    GuardError,
    InputError,
    LoadError,
    NothingToPruneError,
    PlanError,
    RbpfxError,
    RuleError,
    SaveError,
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
from rbpfx.latency import Comparison, Latency, compare_latency, measure_latency
from rbpfx.latency.meter import PlanMeter
from rbpfx.methods import (
    BMRSN,
    BMRSU,
    METHODS,
    RBP,
    SBP,
    AutoBalanced,
    BatchNormScale,
    Gate,
    MacKay,
    Magnitude,
    Method,
    NoiseGate,
    Random,
    Taylor,
    insert_noise,
    noise_gates,
)
from rbpfx.plan import PruningPlan
from rbpfx.prune import prune
from rbpfx.rebinding import rebind
from rbpfx.report import Figures, Report
from rbpfx.result import Front, PruningResult
from rbpfx.saving.load import load
from rbpfx.selection import Selection
from rbpfx.target import Reached, Target
from rbpfx.training.finetune import FineTune
from rbpfx.training.recursion import Progress
from rbpfx.training.schedule import Recursion
from rbpfx.training.settings import Training
from rbpfx.training.strategy import Distributed, Sharded, Strategy

__version__ = "0.1.0"

__all__ = [
    "BMRSN",
    "BMRSU",
    "METHODS",
    "RBP",
    "SBP",
    "Analysis",
    "AutoBalanced",
    "BatchNormScale",
    "CaptureError",
    "ChannelGroup",
    "CheckpointError",
    "Comparison",
    "Distributed",
    "DistributedError",
    "DivergenceError",
    "ExportError",
    "Figures",
    "FineTune",
    "Front",
    "FrozenAxis",
    "Gate",
    "GuardError",
    "InputError",
    "Latency",
    "LoadError",
    "MacKay",
    "Magnitude",
    "Method",
    "NoiseGate",
    "NothingToPruneError",
    "PlanError",
    "PlanMeter",
    "Progress",
    "PruningPlan",
    "PruningResult",
    "Random",
    "RbpfxError",
    "Reached",
    "Recursion",
    "Report",
    "Rule",
    "RuleError",
    "SaveError",
    "Selection",
    "Sharded",
    "Strategy",
    "Target",
    "TargetError",
    "Taylor",
    "Training",
    "VerificationError",
    "__version__",
    "analyze",
    "apply_mask",
    "compare_latency",
    "count_macs",
    "count_parameters",
    "deploy",
    "export",
    "insert_noise",
    "load",
    "measure_latency",
    "noise_gates",
    "prune",
    "rebind",
    "register_rule",
    "rewrite",
    "trace",
    "verify",
]
