"""A level of the search in plain PyTorch: a dense (B, M, C) matrix of scores, masked and sorted."""

from __future__ import annotations

import torch
from torch import Tensor

from ops.rows import compute_dtype

NOTHING = float("-inf")


def trie_step(
    logits_BMC: Tensor,
    states_BM: Tensor,
    scores_BM: Tensor,
    offsets_S: Tensor,
    tokens_E: Tensor,
    allowed: Tensor | None,
    k: int,
    normalization: str,
    most_children: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(logits_BMC, scores_BM)
    logits_BMC, scores_BM = logits_BMC.to(dtype), scores_BM.to(dtype)
    batch, _, codes = logits_BMC.shape
    next_BMC = next_states(states_BM, scores_BM, offsets_S, tokens_E, allowed, codes)
    legal_BMC = next_BMC >= 0
    if normalization == "vocabulary":
        logits_BMC = logits_BMC.log_softmax(dim=2)
    elif normalization == "legal":
        logits_BMC = logits_BMC.masked_fill(~legal_BMC, NOTHING).log_softmax(dim=2)
    total_BMC = torch.where(legal_BMC, logits_BMC + scores_BM[:, :, None], NOTHING)
    flat_BX = total_BMC.nan_to_num(NOTHING, torch.inf, NOTHING).flatten(1)
    # One more than k, and something to take from where there are fewer children.
    flat_BX = torch.cat([flat_BX, flat_BX.new_full((batch, k + 1), NOTHING)], dim=1)
    best_BX, place_BX = flat_BX.sort(dim=1, descending=True, stable=True)
    scores_BK, place_BK = best_BX[:, :k], place_BX[:, :k]
    valid_BK = scores_BK > NOTHING
    inside_BK = torch.where(valid_BK, place_BK, 0)
    next_BX = torch.cat([next_BMC.flatten(1), next_BMC.new_full((batch, 1), -1)], dim=1)
    found = (inside_BK // max(codes, 1), inside_BK % max(codes, 1), next_BX.gather(1, inside_BK))
    parents_BK, tokens_BK, states_BK = (torch.where(valid_BK, x, -1) for x in found)
    return scores_BK, parents_BK, tokens_BK, states_BK, valid_BK.sum(dim=1), best_BX[:, k]


def next_states(
    states_BM: Tensor, scores_BM: Tensor, offsets_S: Tensor, tokens_E: Tensor, allowed: Tensor | None, codes: int
) -> Tensor:
    """State that each code leads to, int64 (B, M, C), or -1."""
    if states_BM.device.type == "cpu" and states_BM.numel() and int(states_BM.max()) >= len(offsets_S) - 1:
        raise IndexError(f"trie_step: got state {int(states_BM.max())}, expected at most {len(offsets_S) - 2}")
    alive_BM = (states_BM >= 0) & (states_BM < len(offsets_S) - 1) & (scores_BM > NOTHING)
    state_BM = torch.where(alive_BM, states_BM, 0)
    first_BM, last_BM = (offsets_S.long()[state_BM + i] if len(offsets_S) > 1 else state_BM for i in (0, 1))
    edge_BMC = first_BM[:, :, None] + torch.arange(codes, device=states_BM.device)
    legal_BMC = alive_BM[:, :, None] & (edge_BMC < last_BM[:, :, None])
    edge_BMC = torch.where(legal_BMC, edge_BMC, 0)
    # Codes behind the last one take what is not there.
    next_BMC = edge_BMC.new_full((*states_BM.shape, codes + 1), -1)
    if len(tokens_E) == 0:
        return next_BMC[:, :, :codes]
    if allowed is not None:
        rows = torch.arange(len(states_BM), device=states_BM.device)[:, None, None]
        legal_BMC &= allowed[edge_BMC] if allowed.dim() == 1 else allowed[rows, edge_BMC]
    token_BMC = torch.where(legal_BMC, tokens_E.long()[edge_BMC], codes)
    return next_BMC.scatter_(2, token_BMC, edge_BMC)[:, :, :codes]
