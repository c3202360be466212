"""Strategies: how a training is spread over processes.

Every process calls `prune` with the same model and its own share of the data. Weights, gates and
decisions are the same in all of them: gradients are averaged, figures that decide something are
averaged or taken from the first process, and decisions are compared. Noise is drawn for the
examples of all processes alike and every one uses the rows of its own, so that the draws are those
that one process with all examples would make.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from rbpfx.errors import DistributedError, RbpfxError
from rbpfx.graph.device import device_of

T = TypeVar("T")

_BROKEN = re.compile("gloo|nccl|connection|process ?group|socket|timed out", re.IGNORECASE)


class Strategy:
    """One process does it all. Subclasses spread the work; each method is one thing to take over.

    To hand the work to a library that runs the processes itself, override what it does:

        class Fabric(rbpfx.Distributed):
            def wrap(self, model):
                return fabric.setup_module(model, move_to_device=False)

            def backward(self, loss):
                fabric.backward(loss)

    Attributes:
        rank: The number of this process.
        processes: How many there are.
    """

    rank = 0
    processes = 1

    def __repr__(self) -> str:
        return f"{type(self).__name__}(processes={self.processes})"

    def wrap(self, model: nn.Module) -> nn.Module:
        """What is called in training instead of a model, so that gradients are averaged."""
        return model

    def unsynchronized(self, network: nn.Module) -> AbstractContextManager[Any]:
        """Where gradients are only added up: all batches of a step but the last one."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients."""
        loss.backward()

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes, of the same shape, dtype and device."""
        return values

    def gather(self, value: T) -> list[T]:
        """What every process has, in their order."""
        return [value]

    def first(self, work: Callable[[], T]) -> T:
        """Let the first process do something; all get its outcome.

        Raises:
            RbpfxError: What the work raises, in all processes.
        """
        return work()

    def synchronize(self, model: nn.Module) -> None:
        """Give the model the parameters and buffers that it has in the first process."""

    def distribute(self, model: nn.Module) -> nn.Module:
        """What is fine-tuned instead of a model: itself, or a copy in parts."""
        return model

    def state(self, model: nn.Module) -> dict[str, Any]:
        """The whole state of what `distribute` returned."""
        return model.state_dict()

    def load_state(self, model: nn.Module, state: dict[str, Any]) -> None:
        """Return it to a state."""
        model.load_state_dict(state)

    def optimizer_state(self, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state of an optimiser of its parameters."""
        return optimizer.state_dict()

    def load_optimizer_state(
        self, model: nn.Module, optimizer: Optimizer, state: dict[str, Any]
    ) -> None:
        """Return the optimiser to a state."""
        optimizer.load_state_dict(state)

    def require_same(self, what: str, value: object) -> None:
        """All processes have the same.

        Raises:
            DistributedError: They have not.
        """
        values = self.gather(value)
        if any(other != values[0] for other in values):
            listed = ", ".join(f"{v!r} in process {rank}" for rank, v in enumerate(values))
            raise DistributedError(f"{what} differs between the processes: {listed}")


class Distributed(Strategy):
    """The processes of `torch.distributed`, as `torchrun` starts them.

    Gradients are averaged by `DistributedDataParallel`. Running statistics of BatchNorm are those
    of the first process in the end. `prune` uses this by itself if the default process group has
    several processes.

    Raises:
        RbpfxError: `torch.distributed` is not initialised.
    """

    def __init__(self) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RbpfxError(
                "torch.distributed is not initialised; start the script with torchrun and call "
                "torch.distributed.init_process_group() before prune"
            )
        self.rank = dist.get_rank()
        self.processes = dist.get_world_size()

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model in `DistributedDataParallel`; gates that wait have no gradient."""
        from torch.nn.parallel import DistributedDataParallel

        if not any(p.requires_grad for p in model.parameters()):
            return model
        device = device_of(model)
        devices = [device] if device.type == "cuda" else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch 2.15 renames an argument
            return DistributedDataParallel(
                model,
                device_ids=devices,
                find_unused_parameters=True,
                broadcast_buffers=False,  # what a gate measures is averaged when it decides
            )

    def unsynchronized(self, network: nn.Module) -> AbstractContextManager[Any]:
        """`no_sync` of the network."""
        no_sync = getattr(network, "no_sync", nullcontext)
        context: AbstractContextManager[Any] = no_sync()
        return context

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients and average them.

        Raises:
            DistributedError: Another process does not answer.
        """
        with _talking():
            loss.backward()

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes.

        Raises:
            DistributedError: Another process does not answer.
        """
        total = values.to(_exchange_device(values.device), copy=True)
        with _talking():
            dist.all_reduce(total)
        return (total / self.processes).to(values)

    def gather(self, value: T) -> list[T]:
        """What every process has.

        Raises:
            DistributedError: Another process does not answer.
        """
        values: list[Any] = [None] * self.processes
        with _talking():
            dist.all_gather_object(values, value)
        return values

    def first(self, work: Callable[[], T]) -> T:
        """Let the first process do something; all get its outcome.

        Raises:
            RbpfxError: What the work raises, in all processes.
            DistributedError: Another process does not answer.
        """
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = work()
            except RbpfxError as raised:
                outcome[1] = raised
        with _talking():
            dist.broadcast_object_list(outcome)
        value, error = outcome
        if error is not None:
            raise error
        result: T = value
        return result

    def synchronize(self, model: nn.Module) -> None:
        """Broadcast parameters and buffers from the first process.

        Raises:
            DistributedError: Another process does not answer.
        """
        with torch.no_grad(), _talking():
            for tensor in [*model.parameters(), *model.buffers()]:
                exchanged = tensor.detach().to(_exchange_device(tensor.device)).contiguous()
                dist.broadcast(exchanged, 0)
                tensor.copy_(exchanged)


class Sharded(Distributed):
    """Weights, gradients and optimiser states in parts (FSDP2), while fine-tuning.

    The noise is trained as by `Distributed`: decisions read the weights, whole. A layer is
    gathered when it is called; what the graph reads without calling a layer is gathered at the
    start of the forward pass.
    """

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model itself if it is in parts, which average their gradients by themselves."""
        from torch.distributed.fsdp import FSDPModule

        return model if isinstance(model, FSDPModule) else super().wrap(model)

    def distribute(self, model: nn.Module) -> nn.Module:
        """A copy of the model in parts.

        Raises:
            DistributedError: The processes talk over a gloo that cannot average gradients.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        from rbpfx.graph.copying import copy_model

        if not any(p.requires_grad for p in model.parameters()):
            return model
        _require_averages(device_of(model))
        copy = copy_model(model, {})
        mesh = init_device_mesh(device_of(model).type, (self.processes,))
        for layer in _called_layers(copy):
            fully_shard(layer, mesh=mesh)
        fully_shard(copy, mesh=mesh)
        return copy

    def state(self, model: nn.Module) -> dict[str, Any]:
        """The state, put together."""
        return _put_together(model.state_dict())

    def load_state(self, model: nn.Module, state: dict[str, Any]) -> None:
        """Every process takes its parts."""
        own = model.state_dict()
        model.load_state_dict({name: _part(tensor, own[name]) for name, tensor in state.items()})

    def optimizer_state(self, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        """The state, put together."""
        return _put_together(optimizer.state_dict())

    def load_optimizer_state(
        self, model: nn.Module, optimizer: Optimizer, state: dict[str, Any]
    ) -> None:
        """Every process takes its parts."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        parts = {
            index: {name: _part(value, parameters[index]) for name, value in entries.items()}
            for index, entries in state["state"].items()
        }
        optimizer.load_state_dict({**state, "state": parts})


def default_strategy() -> Strategy:
    """`Distributed` if the default process group has several processes."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return Distributed()
    return Strategy()


def _called_layers(model: nn.Module) -> list[nn.Module]:
    """Layers with parameters that the graphs of a network call, and never read otherwise."""
    from rbpfx.graph.parts import captured_parts

    called: dict[nn.Module, None] = {}
    read: set[nn.Module] = set()
    for part in captured_parts(model).values():
        for node in part.graph.nodes:
            if node.op == "call_module":
                called[part.get_submodule(node.target)] = None
            elif node.op == "get_attr":
                read.add(part.get_submodule(str(node.target).rpartition(".")[0]))
    return [m for m in called if m not in read and any(True for _ in m.parameters())]


def _require_averages(device: torch.device) -> None:
    """A gloo of torch 2.8 sums where it is asked for the mean, and training would not notice."""
    mean = torch.empty(1, device=device)
    ones = torch.ones(dist.get_world_size(), device=device)
    with _talking():
        dist.reduce_scatter_tensor(mean, ones, op=dist.ReduceOp.AVG)
    if mean.item() != 1:
        raise DistributedError(
            f"the {dist.get_backend()} of torch {torch.__version__} adds gradients up where FSDP2 "
            "asks for their mean; take a newer torch, or rbpfx.Distributed()"
        )


def _put_together(state: dict[str, Any]) -> dict[str, Any]:
    """A nested state with whole tensors in place of those in parts."""
    from torch.distributed.tensor import DTensor

    with _talking():
        whole: dict[str, Any] = tree_map_only(DTensor, lambda t: t.full_tensor(), state)
    return whole


def _part(value: Any, like: Tensor) -> Any:
    """Of a whole tensor the part that belongs here, if `like` is in parts and of its shape."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor) or getattr(value, "shape", None) != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def _exchange_device(device: torch.device) -> torch.device:
    """Where tensors have to be to be exchanged."""
    if dist.get_backend() == "nccl" and device.type != "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return device


@contextmanager
def _talking() -> Iterator[None]:
    """Say in words that another process does not answer."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not _BROKEN.search(str(error)):
            raise
        raise DistributedError(
            "another process of this training has ended or does not answer; its own message tells "
            "why. The same call with the same checkpoint_dir goes on from the last checkpoint. "
            f"({error})"
        ) from error


__all__ = ["Distributed", "Sharded", "Strategy", "default_strategy"]
