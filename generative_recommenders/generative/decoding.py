"""What a search over semantic IDs asks of a model: a prefill, the logits of one level for all beams, teacher forcing.

Letters: B requests, M beams now, M_j beams after level j, K candidates, L levels, C codes of a level.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar, runtime_checkable

from torch import Tensor

from generative_recommenders.batch import SequenceBatch

C = TypeVar("C", bound="Context")


@runtime_checkable
class Context(Protocol):
    """What all beams of a request share, made once by the prefill, and an append-only store of the beams' own rows."""

    def select(self: C, rows: Tensor) -> C:
        """The context of the given requests, int64 (b,), in that order, with nothing stored for beams yet.

        Whatever this context has stored for beams is left out, so a search can be repeated for some of its requests.
        """
        ...

    def branch(self: C, rows: Tensor | None = None) -> C:
        """The context with what is stored so far, of the given requests or of all; what either stores next is its own.

        Of all requests it costs nothing, as both share the tensors.
        """
        ...


class GenerativeModel(Protocol[C]):
    """A model of p(code at level l | history, codes before); all levels have a vocabulary of their own."""

    sizes: tuple[int, ...]

    def begin(self, batch: SequenceBatch) -> C:
        """Prefill: the histories of all B requests, computed once."""
        ...

    def logits(self, context: C, level: int, tokens_BM: Tensor | None, ancestors: Sequence[Tensor]) -> Tensor:
        """Logits of `level` for every beam, (B, M, C_level); called once a level, in order.

        Level 0: `tokens_BM` is None, `ancestors` is empty and M is 1. Level l > 0: `tokens_BM`, int64, are the codes
        chosen at level l - 1, and `ancestors[j]`, int64 (B, M), for j = 0 ... l - 1, says which of the M_j rows that
        were stored with the codes of level j a beam descends from; `ancestors[l - 1]` counts from 0 to M - 1. Stored
        rows are never moved. A beam that has ended holds any legal code; its logits are not used.
        """
        ...

    def teacher_forced(self, batch: SequenceBatch, codes_BKL: Tensor) -> Tensor:
        """Log-probability of each code given those before it, over all codes of its level: (B, K, L)."""
        ...
