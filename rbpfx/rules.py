"""What an author of operator rules needs: the protocol, its vocabulary, and rules to reuse.

See docs/writing-a-rule.md. A rule is registered with `rbpfx.register_rule` and tested with
`rbpfx.testing.check_rule`.
"""

from rbpfx.graph.operands import Labels
from rbpfx.graph.propagation import Propagation
from rbpfx.graph.provenance import Block, Label
from rbpfx.graph.rules.base import Rule, register_rule
from rbpfx.graph.rules.combine import Combine
from rbpfx.graph.rules.elementwise import Elementwise
from rbpfx.graph.rules.generic import PerChannel, Pinned
from rbpfx.graph.rules.spatial import Spatial
from rbpfx.graph.slicing import Slicing

__all__ = [
    "Block",
    "Combine",
    "Elementwise",
    "Label",
    "Labels",
    "PerChannel",
    "Pinned",
    "Propagation",
    "Rule",
    "Slicing",
    "Spatial",
    "register_rule",
]
