"""The compiler: capture, analysis, gates, rewriting, verification. Knows nothing of training."""

import rbpfx.graph.rules  # noqa: F401  (registers the operator rules)
