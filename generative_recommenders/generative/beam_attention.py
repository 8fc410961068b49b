"""Softmax attention of the beams of a request: one shared context, and each beam's own few ancestors.

The beams of a request have the history in common and differ in the codes decoded so far, at most L - 1 of them. So the
beams are the query rows of one attention over the context, whose keys are read once instead of once a beam, and the
ancestors are a second, tiny attention over gathered rows; the log-sum-exp of both parts merges them exactly. Keys and
values of beams are appended level by level and never moved: which rows a beam descends from is an index that the search
keeps. NVIDIA's SID-GR decodes this way with kernels of its own; this form is plain PyTorch and runs on any device.

Letters: B requests, M beams now, M_j beams of step j, S context tokens of a request, H heads, K width of a key.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class ContextGroup:
    """Requests of similar length in one rectangle: `rows_b` are their places among the B requests.

    key_bHKS, value_bHSK: keys are kept transposed, as the product wants them. valid_bS: which tokens exist.
    """

    rows_b: Tensor
    key_bHKS: Tensor
    value_bHSK: Tensor
    valid_bS: Tensor


@dataclass(frozen=True)
class ContextKV:
    """Keys and values of one layer's context, of `size` requests; made once, by the prefill."""

    groups: tuple[ContextGroup, ...]
    size: int

    @classmethod
    def padded(cls, key_BSHK: Tensor, value_BSHK: Tensor, lengths_B: Tensor) -> ContextKV:
        """One rectangle of static shape; the first `lengths_B[b]` tokens of row b are its context."""
        size, length = key_BSHK.shape[:2]
        places = torch.arange(length, device=key_BSHK.device)
        group = ContextGroup(
            torch.arange(size, device=key_BSHK.device),
            key_BSHK.permute(0, 2, 3, 1).contiguous(),
            value_BSHK.transpose(1, 2).contiguous(),
            places < lengths_B[:, None],
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
    query_BHMK = query_BMHK.transpose(1, 2)
    parts = [_context_part(query_BHMK, context, scale, context_bias)]
    if ancestors:
        parts.append(_ancestor_part(query_BHMK, beams, ancestors, scale, ancestor_bias))
    return _merged(parts).transpose(1, 2).to(query_BMHK.dtype)


def _context_part(
    query_BHMK: Tensor, context: ContextKV, scale: float, biases: Sequence[Tensor] | None
) -> tuple[Tensor, Tensor]:
    out_BHMK = torch.zeros(query_BHMK.shape, dtype=torch.float32, device=query_BHMK.device)
    lse_BHM = torch.full(query_BHMK.shape[:-1], -math.inf, device=query_BHMK.device)
    for number, group in enumerate(context.groups):
        logits = torch.matmul(query_BHMK[group.rows_b], group.key_bHKS).float() * scale
        if biases is not None:
            logits = logits + biases[number]
        logits = logits.masked_fill(~group.valid_bS[:, None, None, :], -math.inf)
        lse = torch.logsumexp(logits, -1)
        # exp(-inf - -inf) of a row without a token would be NaN.
        weights = (logits - lse.clamp(min=torch.finfo(lse.dtype).min)[..., None]).exp()
        out = torch.matmul(weights.to(group.value_bHSK.dtype), group.value_bHSK).float()
        out_BHMK = out_BHMK.index_copy(0, group.rows_b, out)
        lse_BHM = lse_BHM.index_copy(0, group.rows_b, lse)
    return out_BHMK, lse_BHM


def _ancestor_part(
    query_BHMK: Tensor, beams: BeamKV, ancestors: Sequence[Tensor], scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    key_BHMJK = _gathered(beams.keys, ancestors)
    value_BHMJK = _gathered(beams.values, ancestors)
    logits_BHMJ = torch.matmul(key_BHMJK, query_BHMK[..., None])[..., 0].float() * scale
    if bias is not None:
        logits_BHMJ = logits_BHMJ + bias
    lse_BHM = torch.logsumexp(logits_BHMJ, -1)
    weights = (logits_BHMJ - lse_BHM[..., None]).exp().to(value_BHMJK.dtype)
    return torch.matmul(weights[..., None, :], value_BHMJK)[..., 0, :].float(), lse_BHM


def _gathered(steps: Sequence[Tensor], ancestors: Sequence[Tensor]) -> Tensor:
    """Rows of the beams' ancestors, (B, H, M, steps, K)."""
    rows = [
        step.gather(1, index[..., None, None].expand(-1, -1, *step.shape[2:]))
        for step, index in zip(steps, ancestors, strict=True)
    ]
    return torch.stack(rows, dim=-2).transpose(1, 2)


def _merged(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Softmaxes over disjoint keys into the softmax over all of them, (B, H, M, K)."""
    lse = torch.stack([lse_BHM for _, lse_BHM in parts])
    highest = lse.amax(0).clamp(min=torch.finfo(lse.dtype).min)
    shares = (lse - highest).exp()
    total = shares.sum(0).clamp(min=torch.finfo(lse.dtype).tiny)
    summed_BHMK = (shares[..., None] * torch.stack([out_BHMK for out_BHMK, _ in parts])).sum(0)
    return summed_BHMK / total[..., None]
