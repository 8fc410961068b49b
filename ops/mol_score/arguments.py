"""What Mixture-of-Logits scoring takes, for callers and, flattened, for operators."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ops.rows import compute_dtype

COMBINATIONS = ("glu_silu", "glu_silu_ln", "none")
# How many operands have gradients: they come first.
DIFFERENTIABLE = 8


@dataclass(frozen=True)
class MoLQueries:
    """components: (B, P_Q, D_P), of unit norm where the caller wants cosines; gate: (B, P), the queries' part g_q."""

    components: Tensor
    gate: Tensor | None = None


@dataclass(frozen=True)
class MoLItems:
    """Items that all queries share, components (X, P_X, D_P) and gate (X, P), or each query's own, (B, R, ...) both."""

    components: Tensor
    gate: Tensor | None = None


@dataclass(frozen=True)
class MoLGate:
    """The pairs' part of the gate, g_qx = SiLU(l w1 + b1) w2 + b2, or l w2 + b2 without w1, and how the parts combine.

    w1: (P, H), b1: (H,), w2: (H, P), without w1 (P, P), b2: (P,). Without w2 pairs have no part of their own.
    combination: "glu_silu", "glu_silu_ln" or "none", see `mol_score`.
    """

    w1: Tensor | None = None
    b1: Tensor | None = None
    w2: Tensor | None = None
    b2: Tensor | None = None
    combination: str = "glu_silu"


@dataclass(frozen=True)
class MoLDropout:
    """Dropout while training, of the logits on their way into the gate and of the mixture weights pi.

    Which elements are dropped is a function of the seed, the query's key and the item's place: the same in any block
    and on any device. row_keys: int64 (B,), what names a query, by default its place.
    """

    seed: int
    gate_rate: float = 0.0
    mixture_rate: float = 0.0
    row_keys: Tensor | None = None


class Operands(NamedTuple):
    """All tensors, in the order of the operators' arguments. The last has no gradient, and is there if dropout is."""

    q: Tensor
    x: Tensor
    q_gate: Tensor | None
    x_gate: Tensor | None
    w1: Tensor | None
    b1: Tensor | None
    w2: Tensor | None
    b2: Tensor | None
    row_keys: Tensor | None

    @classmethod
    def of(cls, tensors: Iterable[Tensor | None]) -> Operands:
        q, x, *rest = tensors
        assert q is not None and x is not None
        return cls(q, x, *rest)

    @property
    def shared(self) -> bool:
        """Whether all queries score the same items."""
        return self.x.dim() == 3

    @property
    def compute_dtype(self) -> torch.dtype:
        """Half precisions are computed in float32."""
        return compute_dtype(*self[:DIFFERENTIABLE])

    @property
    def pairs(self) -> tuple[int, int]:
        """(B, X) or (B, R)."""
        return self.q.shape[0], self.x.shape[0 if self.shared else 1]

    @property
    def num_logits(self) -> int:
        """P = P_Q * P_X."""
        return self.q.shape[1] * self.x.shape[-2]

    def to(self, dtype: torch.dtype) -> Operands:
        """The differentiable ones in a dtype."""
        return Operands.of([*(None if t is None else t.to(dtype) for t in self[:DIFFERENTIABLE]), self.row_keys])

    def block(self, rows: slice, items: slice) -> Operands:
        """The operands of a block of pairs."""
        place = items if self.shared else (rows, items)
        q_gate, row_keys = (None if t is None else t[rows] for t in (self.q_gate, self.row_keys))
        x_gate = None if self.x_gate is None else self.x_gate[place]
        return self._replace(q=self.q[rows], x=self.x[place], q_gate=q_gate, x_gate=x_gate, row_keys=row_keys)


class Settings(NamedTuple):
    """All that is not a tensor. `measure`: whether the sums over pairs of pi and of its entropy are wanted."""

    combination: str = "glu_silu"
    measure: bool = False
    seed: int = 0
    temperature: float = 1.0
    gate_rate: float = 0.0
    mixture_rate: float = 0.0


class Drop(NamedTuple):
    """Dropout as kernels take it: thresholds of `ops.random`, None where nothing is dropped, and scales of the rest.

    The halves of the seed, which no kernel should be compiled anew for, are put in there.
    """

    row_keys: Tensor | None
    gate_threshold: int | None
    gate_scale: float
    mixture_threshold: int | None
    mixture_scale: float
    low_seed: Any = None
    high_seed: Any = None
