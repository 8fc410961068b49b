"""What `norm_mul_dropout` computes, apart from its tensors."""

from __future__ import annotations

from typing import NamedTuple

ACTIVATIONS = ("none", "silu", "sigmoid")
# Width of the result in units of D.
SEGMENTS = {"product": 1, "concat_normed": 3, "concat_raw": 3}


class Form(NamedTuple):
    """Arguments of the same names in `ops.norm_mul_dropout`; rate 0 is no dropout."""

    eps: float
    num_groups: int
    u_activation: str
    output: str
    dropout_rate: float
    dropout_seed: int

    @property
    def segments(self) -> int:
        return SEGMENTS[self.output]
