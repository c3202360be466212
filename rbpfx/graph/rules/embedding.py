"""Embeddings: rows of a table, picked by tokens. The table brings its columns to life."""

from __future__ import annotations

from torch import fx, nn
from torch.nn import functional as F

from rbpfx.graph.calls import module_of
from rbpfx.graph.operands import Labels
from rbpfx.graph.propagation import Propagation
from rbpfx.graph.provenance import Block, Label
from rbpfx.graph.rules.base import (
    Rule,
    argument,
    register,
    setting,
    shape_of,
    value_of,
)
from rbpfx.graph.slicing import Slicing


class Embedding(Rule):
    """Embedding and EmbeddingBag; the rows, which are tokens, stay.

    Args:
        max_norm_position: Where the functional call has `max_norm`.
    """

    def __init__(self, max_norm_position: int) -> None:
        self.max_norm_position = max_norm_position

    def propagate(self, node: fx.Node, state: Propagation) -> Labels:
        """Produce the last axis. A bound on the norm of rows mixes it, so it stays then."""
        weight = state.operand(node, 1, "weight")
        assert weight is not None
        table = None if node.op == "call_module" else argument(node, 1, "weight")
        for source in node.all_input_nodes:
            if source is not table:
                state.pin(state.labels.get(source), f"tokens or their weights ({node.name!r})")
        state.identities.pin(weight.axis(0), "rows of an embedding")
        columns = state.produce(node, weight, 1)
        if value_of(setting(node, state.gm, self.max_norm_position, "max_norm", None)) is not None:
            state.identities.pin(columns, "columns of an embedding with max_norm")
        shape = shape_of(node)
        return Label(shape, (Block((len(shape) - 1,), columns),) if shape[-1] > 1 else ())

    def rewrite(self, node: fx.Node, state: Slicing) -> None:
        """Name the new width."""
        module = module_of(state.twin(node), state.gm)
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            module.embedding_dim = module.weight.shape[1]


register(Embedding(3), nn.Embedding, F.embedding)
register(Embedding(3), nn.EmbeddingBag, F.embedding_bag)
