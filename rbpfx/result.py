"""What `prune` returns: the network, the plan and the report, and networks for other targets."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tabulate import tabulate
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from rbpfx.deployment.deploy import deploy, types_of
from rbpfx.errors import RbpfxError
from rbpfx.graph.capture import ExampleInputs
from rbpfx.graph.groups import Analysis
from rbpfx.plan import PruningPlan
from rbpfx.report import Report
from rbpfx.saving.origin import Origin
from rbpfx.saving.save import save
from rbpfx.saving.source import write_source
from rbpfx.target import Target
from rbpfx.training.finetune import FineTune

if TYPE_CHECKING:
    from rbpfx.emission import Emission


@dataclass
class PruningResult:
    """What `prune` returns.

    Attributes:
        model: The smaller network, a `torch.fx.GraphModule` with the submodule names of the
            original, in the mode and on the device it was in. If the forward of the original
            cannot be traced, a module of its class with `GraphModule`s in it.
        plan: Which units of every group stay.
        report: Figures before and after; `str(report)` is a table.
        dense: The captured network in its original size, with the weights that the training of
            the gates left: `rewrite(dense, analysis, plan)` is the cut before fine-tuning, but
            for multipliers that were folded in.
        analysis: Its analysis; None once the result was pickled or copied.
        source: A weak reference to the model that was given to `prune`, for `rbpfx.rebind`.
        origin: What has to be known of that model to rebuild the network from files.
    """

    model: nn.Module
    plan: PruningPlan
    report: Report
    dense: nn.Module = field(repr=False)
    analysis: Analysis = field(repr=False)
    source: weakref.ref[nn.Module] | None = field(default=None, repr=False)
    emission: Emission | None = field(default=None, repr=False)
    origin: Origin | None = field(default=None, repr=False)

    def deploy(self, **options: Any) -> nn.Module:
        """The form of the network to run: equal to it in eval mode, and faster.

        Args:
            options: Those of `rbpfx.deploy`: `dtype`, `compile`, and others.

        Raises:
            RbpfxError: The result was pickled or copied, and the example inputs are gone; use
                `rbpfx.deploy(result.model, example_inputs)`.
            VerificationError: The deployed network differs.
        """
        if self.emission is None:
            raise RbpfxError(
                "this result has been pickled or loaded and no longer holds example inputs; call "
                "rbpfx.deploy(result.model, example_inputs)"
            )
        return deploy(self.model, self._example_inputs(self.emission.inputs), **options)

    def _example_inputs(self, inputs: ExampleInputs) -> ExampleInputs:
        """Example inputs in the type that the network was converted to meanwhile, if it was."""
        before, after = types_of(self.dense), types_of(self.model)
        if before == after or len(before) + len(after) > 2:
            return inputs
        (was,), (is_now,) = before, after
        converted: ExampleInputs = tree_map_only(
            Tensor, lambda tensor: tensor.to(is_now) if tensor.dtype == was else tensor, inputs
        )
        return converted

    def save(
        self,
        directory: str | os.PathLike[str],
        *,
        source: str | None = None,
        program: bool = False,
    ) -> None:
        """Save the network as it is now, for `rbpfx.load` in another process or on another machine.

        Writes `plan.json` (how to rebuild it, and the figures of the report) and
        `weights.safetensors` (all tensors, in their dtypes); no pickle. An earlier save in the
        directory is replaced when the new one is complete, never in part.

        Args:
            directory: Where to write; made if it does not exist.
            source: Where the original comes from, so that `rbpfx.load(directory)` needs no model:
                for example "torchvision:resnet18?num_classes=10" or "timm:resnet18". By default
                it is found out for models of torchvision and timm, where it is certain.
            program: Whether to write `network.pt2` too, an exported program of the network in
                eval mode, for models without a name. Read the caveat on `rbpfx.load(trusted=...)`.

        Raises:
            SaveError: The result cannot be described, `source` is another architecture, or the
                directory cannot be written.
        """
        save(self, directory, source=source, program=program)

    def to_source(self, path: str | os.PathLike[str]) -> None:
        """Write the network as readable Python, with its widths written out.

        The module holds one class, named as that of the original, which needs neither rbpfx nor
        arguments. `weights.safetensors` fits it: pass `safetensors.torch.load_file(...)` to its
        `load_state_dict` or, with tied parameters, use `safetensors.torch.load_model`.

        Args:
            path: The file to write, for example "network.py".

        Raises:
            SaveError: A part of the network cannot be written as source; names it.
        """
        write_source(self.model, path)

    def sweep(
        self, targets: float | Target | Iterable[float | Target], recovery: FineTune | None = None
    ) -> Front:
        """Networks for other targets from the same noise training; nothing is trained but these.

        Sweep downwards: the weights have learnt to do without the units that the training closed,
        so that networks above its target gain little.

        Args:
            targets: Targets, or numbers that take the place of the budget in this result's
                target (shares of the MACs if it had none). One alone will do.
            recovery: How each is fine-tuned; as in `prune` by default. `FineTune(epochs=0)` for
                networks right after the cut.

        Returns:
            One result for each target, in the order given; printed, it is a table.

        Raises:
            TargetError: A target cannot be reached, or has no budget.
            InputError: A target prunes groups that were excluded when the gates were trained.
            VerificationError: Slicing changed the function.
            DivergenceError: The loss of a fine-tuning stopped being finite.
            RbpfxError: The result was pickled or copied: the gates and the loader are gone.
        """
        if self.emission is None:
            raise RbpfxError(
                "this result has been pickled or copied and no longer holds the gates and the "
                "loader; sweep the result that prune returned"
            )
        emission = self.emission
        if not isinstance(targets, Iterable):
            targets = [targets]
        chosen = [emission.target_of(target) for target in targets]
        selections = [emission.selection(target) for target in chosen]  # all errors first
        return Front(emission.emit(s, recovery, source=self.source) for s in selections)

    def _repr_html_(self) -> str:
        return self.report._repr_html_()

    def __getstate__(self) -> dict[str, Any]:
        """For pickling and copying: without the analysis, the loader, the teacher and the original.

        The analysis names nodes of the very graph it was made of; a copy would name no other's.
        """
        return {**self.__dict__, "analysis": None, "source": None, "emission": None}


class Front(list[PruningResult]):
    """Results for several targets, cheapest first or in any order; `str` is a table."""

    def __str__(self) -> str:
        return self._table("simple")

    def _repr_html_(self) -> str:
        return self._table("html")

    def _table(self, style: str) -> str:
        rows = []
        for result in self:
            dense, pruned = result.report.dense, result.report.pruned
            batch = max(pruned.latency)
            rows.append(
                (
                    result.report.target.short() if result.report.target else "",
                    f"{pruned.macs / dense.macs:.1%}",
                    f"{pruned.parameters / dense.parameters:.1%}",
                    f"{pruned.latency[batch] / dense.latency[batch]:.1%}",
                    "" if pruned.accuracy is None else f"{pruned.accuracy:.4g}",
                )
            )
        metric = self[0].report.metric if self else "accuracy"
        headers = ["target", "MACs kept", "parameters kept", "time kept", metric]
        return str(tabulate(rows, headers=headers, disable_numparse=True, tablefmt=style))


__all__ = ["Front", "PruningResult"]
