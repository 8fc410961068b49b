"""Softmax attention of the beams of a request: one shared context, and each beam's own few ancestors.

The beams of a request have the history in common and differ in the codes decoded so far, at most L - 1 of them. So the
beams are the query rows of one attention over the context, whose keys are read once instead of once a beam, and the
ancestors are a few more logits of gathered rows; one softmax runs over both. Keys and values of beams are appended
level by level and never moved: which rows a beam descends from is an index that the search keeps. NVIDIA's SID-GR
decodes this way with kernels of its own; this form is plain PyTorch and runs on any device.

Letters: B requests, M beams now, M_j beams of step j, S context tokens of a request, H heads, K width of a key.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class ContextGroup:
    """Requests of similar length in one rectangle: `rows_b` are their places among the B requests.

    key_bHKS, value_bHSK: keys are kept transposed, as the product wants them. valid_bS: which tokens exist; a row
    without any holds zeros for values.
    """

    rows_b: Tensor
    key_bHKS: Tensor
    value_bHSK: Tensor
    valid_bS: Tensor

    @cached_property
    def hidden_b11S(self) -> Tensor:
        """What is added to logits: 0 for a token, the lowest number where there is none.

        Not -inf: a row without any token and without ancestors then averages values that are zeros.
        """
        zeros_bS = torch.zeros(self.valid_bS.shape, device=self.valid_bS.device)
        return zeros_bS.masked_fill(~self.valid_bS, torch.finfo(zeros_bS.dtype).min)[:, None, None]


@dataclass(frozen=True)
class ContextKV:
    """Keys and values of one layer's context, of `size` requests; made once, by the prefill."""

    groups: tuple[ContextGroup, ...]
    size: int

    @classmethod
    def padded(cls, key_BSHK: Tensor, value_BSHK: Tensor, lengths_B: Tensor) -> ContextKV:
        """One rectangle of static shape; the first `lengths_B[b]` tokens of row b are its context."""
        size, length = key_BSHK.shape[:2]
        valid_BS = torch.arange(length, device=key_BSHK.device) < lengths_B[:, None]
        group = ContextGroup(
            torch.arange(size, device=key_BSHK.device),
            key_BSHK.permute(0, 2, 3, 1).contiguous(),
            value_BSHK.masked_fill(~valid_BS[..., None, None], 0).transpose(1, 2).contiguous(),
            valid_BS,
        )
        return cls((group,), size)

    @classmethod
    def jagged(cls, key_THK: Tensor, value_THK: Tensor, offsets: Tensor, *, groups: int = 4) -> ContextKV:
        """Rows laid end to end, in at most `groups` rectangles of rows of similar length.

        Reads the lengths on the host, once a prefill. Groups of fewer rows waste less padding and cost more calls.
        """
        size, lengths = offsets.numel() - 1, offsets.diff()
        order = torch.argsort(lengths, stable=True)
        host = lengths[order].tolist()
        made = []
        for first, last in _spans(host, groups):
            rows_b = order[first:last]
            places = torch.arange(host[last - 1], device=offsets.device)
            valid_bS = places < lengths[rows_b, None]
            cells = torch.where(valid_bS, offsets[rows_b, None] + places, 0)
            made.append(
                ContextGroup(
                    rows_b,
                    key_THK[cells].permute(0, 2, 3, 1).contiguous(),
                    value_THK[cells].transpose(1, 2).contiguous(),
                    valid_bS,
                )
            )
        return cls(tuple(made), size)

    def select(self, rows: Tensor) -> ContextKV:
        """The context of the given requests, in that order; a request may be wanted more than once."""
        selected = []
        for group in self.groups:
            inside, wanted = (group.rows_b[:, None] == rows).nonzero(as_tuple=True)
            selected.append(
                ContextGroup(wanted, group.key_bHKS[inside], group.value_bHSK[inside], group.valid_bS[inside])
            )
        return ContextKV(tuple(selected), rows.numel())


def _spans(lengths: Sequence[int], groups: int) -> list[tuple[int, int]]:
    """Cut ascending lengths into runs of which each covers an equal share of the longest; rows of length 0 in none."""
    longest = lengths[-1] if lengths else 0
    spans, first = [], next((i for i, n in enumerate(lengths) if n > 0), len(lengths))
    for part in range(1, groups + 1):
        limit = math.ceil(longest * part / groups)
        last = next((i for i in range(first, len(lengths)) if lengths[i] > limit), len(lengths))
        if last > first:
            spans.append((first, last))
        first = last
    return spans


@dataclass
class BeamKV:
    """Keys and values of one layer's decoded codes: step j holds those of M_j beams, (B, M_j, H, K) each."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def append(self, key_BMHK: Tensor, value_BMHK: Tensor) -> None:
        self.keys.append(key_BMHK)
        self.values.append(value_BMHK)

    def branch(self, rows: Tensor | None = None) -> BeamKV:
        """The same rows in a store of its own, of the given requests or of all."""
        if rows is None:
            return BeamKV([*self.keys], [*self.values])
        return BeamKV([key[rows] for key in self.keys], [value[rows] for value in self.values])


def beam_attention(
    query_BMHK: Tensor,
    context: ContextKV,
    beams: BeamKV,
    ancestors: Sequence[Tensor],
    *,
    scale: float | None = None,
    context_bias: Sequence[Tensor] | None = None,
    ancestor_bias: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q k^T + bias) v over a beam's context and its ancestor rows: (B, M, H, K) of the query's dtype.

    Args:
        ancestors: (B, M) int64 for each step in `beams`: the row of step j that beam m descends from. That of the step
            just appended is the beam's own row.
        scale: 1/sqrt(K) unless given.
        context_bias: for each group of the context something that broadcasts to (b, H, M, S); steps share it.
        ancestor_bias: broadcasts to (B, H, M, steps).

    A beam with neither context nor ancestors gets zeros. Logits and sums are kept in float32.
    """
    if len(ancestors) != len(beams.keys):
        raise ValueError(f"ancestors: got {len(ancestors)} steps, expected {len(beams.keys)}, those appended so far")
    scale = 1.0 / math.sqrt(query_BMHK.shape[-1]) if scale is None else scale
    logits_BMHJ, values = _ancestors(query_BMHK, beams, ancestors, scale, ancestor_bias)
    if not context.groups:
        return _of_ancestors(query_BMHK, logits_BMHJ, values)
    pieces = [
        _group_part(
            query_BMHK[group.rows_b],
            group,
            scale,
            None if context_bias is None else context_bias[number],
            logits_BMHJ[group.rows_b],
            [value[group.rows_b] for value in values],
        )
        for number, group in enumerate(context.groups)
    ]
    found, rows = torch.cat(pieces).to(query_BMHK.dtype), torch.cat([group.rows_b for group in context.groups])
    if rows.numel() == query_BMHK.shape[0]:
        return torch.empty_like(query_BMHK).index_copy_(0, rows, found)
    return _of_ancestors(query_BMHK, logits_BMHJ, values).index_copy_(0, rows, found)


def _group_part(
    query_bMHK: Tensor,
    group: ContextGroup,
    scale: float,
    bias: Tensor | None,
    ancestor_logits_bMHJ: Tensor,
    ancestor_values: Sequence[Tensor],
) -> Tensor:
    """Requests of one group: one softmax over the tokens of the context and the ancestors, (b, M, H, K) float32."""
    logits_bHMS = torch.matmul(query_bMHK.transpose(1, 2), group.key_bHKS).float()
    if scale != 1.0:
        logits_bHMS = logits_bHMS * scale
    hidden_b11S = group.hidden_b11S
    logits_bHMS = logits_bHMS + (hidden_b11S if bias is None else hidden_b11S + bias)
    length = logits_bHMS.shape[-1]
    if ancestor_values:
        logits_bHMS = torch.cat([logits_bHMS, ancestor_logits_bMHJ.transpose(1, 2)], -1)
    weights = logits_bHMS.softmax(-1)
    out_bMHK = torch.matmul(weights[..., :length].to(group.value_bHSK.dtype), group.value_bHSK).transpose(1, 2).float()
    return _plus_values(out_bMHK, weights[..., length:].transpose(1, 2), ancestor_values)


def _of_ancestors(query_BMHK: Tensor, logits_BMHJ: Tensor, values: Sequence[Tensor]) -> Tensor:
    """Beams without any context; zeros where there are no ancestors either."""
    nothing = torch.zeros(query_BMHK.shape, dtype=torch.float32, device=query_BMHK.device)
    return _plus_values(nothing, logits_BMHJ.softmax(-1), values).to(query_BMHK.dtype)


def _plus_values(out_BMHK: Tensor, weights_BMHJ: Tensor, values: Sequence[Tensor]) -> Tensor:
    for step, value in enumerate(values):
        out_BMHK = out_BMHK + weights_BMHJ[..., step : step + 1] * value.float()
    return out_BMHK


def _ancestors(
    query_BMHK: Tensor, beams: BeamKV, ancestors: Sequence[Tensor], scale: float, bias: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Logits of the ancestors, (B, M, H, steps) float32, and their values, (B, M or 1, H, K) each."""
    if not ancestors:
        return query_BMHK.new_empty(*query_BMHK.shape[:-1], 0, dtype=torch.float32), []
    keys, values = (
        # The last step is the beams themselves.
        [*(_rows(step, index) for step, index in zip(steps[:-1], ancestors, strict=False)), steps[-1]]
        for steps in (beams.keys, beams.values)
    )
    logits_BMHJ = torch.stack([(query_BMHK * key).sum(-1, dtype=torch.float32) for key in keys], -1)
    if scale != 1.0:
        logits_BMHJ = logits_BMHJ * scale
    return logits_BMHJ if bias is None else logits_BMHJ + bias.transpose(-3, -2), values


def _rows(step_BmHK: Tensor, index_BM: Tensor) -> Tensor:
    """Row index_BM[b, m] of request b: (B, M, H, K), or (B, 1, H, K) where there is one row and all beams share it."""
    size, rows = step_BmHK.shape[:2]
    if rows == 1:
        return step_BmHK
    first_B1 = torch.arange(0, size * rows, rows, device=index_BM.device)[:, None]
    # Whole rows are copied; `gather` would look up every number.
    return step_BmHK.flatten(0, 1).index_select(0, (index_BM + first_B1).flatten()).unflatten(0, index_BM.shape)
