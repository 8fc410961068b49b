"""Tensor operations the models are built on: each has a reference in plain PyTorch and faster back-ends that equal it.

Nothing here knows about recommenders; `generative_recommenders` imports `ops`, never the other way round.
"""

from ops.dispatch import backend, explain

__all__ = ["backend", "explain"]
