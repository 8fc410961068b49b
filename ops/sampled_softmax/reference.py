"""Sampled softmax in plain PyTorch: gathers the negatives' rows, a (T, R, D) tensor, and lets autograd do the rest."""

from __future__ import annotations

import torch
import torch.nn.functional as F

SAME_AS_POSITIVE = -5e4


def sampled_softmax_loss(
    queries_TD: torch.Tensor,
    table_VD: torch.Tensor,
    positive_ids_T: torch.Tensor,
    negative_ids_TR: torch.Tensor,
    temperature: float,
    l2_norm: bool,
    eps: float,
    item_log_q: torch.Tensor | None,
) -> torch.Tensor:
    dtype = torch.promote_types(torch.promote_types(queries_TD.dtype, table_VD.dtype), torch.float32)
    queries_TD = queries_TD.to(dtype)

    def logits(ids: torch.Tensor) -> torch.Tensor:
        rows = F.embedding(ids, table_VD).to(dtype)
        if l2_norm:
            rows = rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min(eps)
        scores = torch.einsum("td,trd->tr", queries_TD, rows) / temperature
        return scores if item_log_q is None else scores - item_log_q[ids].to(dtype)

    positive_T1 = logits(positive_ids_T[:, None])
    negative_TR = logits(negative_ids_TR)
    negative_TR = negative_TR.masked_fill(negative_ids_TR == positive_ids_T[:, None], SAME_AS_POSITIVE)
    return torch.cat([positive_T1, negative_TR], dim=1).logsumexp(dim=1) - positive_T1[:, 0]
