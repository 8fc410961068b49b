"""Triton form of a level of the search: packed keys of all children, padded to the widest state, and PyTorch's top-k.

A key holds a child's score and place in 64 bits, so one top-k of integers also settles ties. Shapes are known on the
host, so nothing waits for the device and a step can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ops import triton_runtime
from ops.tuning import Table

_TABLE = Table("trie_step")
# `ops.rank.kernels.HIDDEN`: the key of no child.
_HIDDEN = -(1 << 63)
_LOW_WORD = 0xFFFFFFFF
# Places are 32-bit in the kernel.
_MAX_CHILDREN = 1 << 31


def refuses(*args: Any, **kwargs: Any) -> str | None:
    if len(args) > 8 and args[1].shape[1] * args[8] >= _MAX_CHILDREN:
        return f"{args[1].shape[1]} beams of up to {args[8]} children, expected under {_MAX_CHILDREN} together"
    return triton_runtime.refuses(*args, **kwargs)


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
    from ops.trie_step import kernels

    logits_BMC = logits_BMC if logits_BMC.stride(2) == 1 else logits_BMC.contiguous()
    batch, beams, codes = logits_BMC.shape
    # Without nodes there still is a place to point at.
    widest = max(most_children, 1)
    states_BM, offsets_S, tokens_E = states_BM.contiguous(), offsets_S.contiguous(), tokens_E.contiguous()
    keys_BX = torch.empty(batch, beams * widest, dtype=torch.int64, device=logits_BMC.device)
    per_request = allowed is not None and allowed.dim() == 2
    triton_runtime.launch(
        kernels.child_keys,
        lambda config: (batch * beams,),
        *(logits_BMC, states_BM, scores_BM.contiguous(), offsets_S, tokens_E),
        # A boolean is a byte.
        None if allowed is None else allowed.contiguous().view(torch.uint8),
        *(keys_BX, *logits_BMC.stride()[:2], len(tokens_E) if per_request else 0),
        *(beams, codes, len(offsets_S) - 1, widest),
        table=_TABLE,
        key={"codes": triton_runtime.power_of_two(codes if normalization == "vocabulary" else widest)},
        NORMALIZATION=normalization,
    )
    more = min(k + 1, beams * widest)
    best_BX = F.pad(keys_BX.topk(more, dim=1).values, (0, k + 1 - more), value=_HIDDEN)
    scores_BX, valid_BX = _scores(best_BX)
    # Copies: results of an operator share no memory.
    scores_BK, pruned_B, valid_BK = scores_BX[:, :k].clone(), scores_BX[:, k].clone(), valid_BX[:, :k]
    if beams == 0 or len(tokens_E) == 0:
        none_BK = torch.full((batch, k), -1, device=keys_BX.device)
        return scores_BK, none_BK, none_BK.clone(), none_BK.clone(), valid_BK.sum(dim=1), pruned_B
    # In range also where kernels are compiled and not run, and keys hold anything.
    place_BK = torch.where(valid_BK, _LOW_WORD - (best_BX[:, :k] & _LOW_WORD), 0).clamp_max(beams * widest - 1)
    parents_BK = place_BK // widest
    from_BK = states_BM.gather(1, parents_BK).clamp(0, len(offsets_S) - 2)
    node_BK = torch.where(valid_BK, offsets_S[from_BK] + place_BK % widest, 0).clamp(0, len(tokens_E) - 1)
    found = (parents_BK, tokens_E[node_BK].long(), node_BK)
    parents_BK, tokens_BK, states_BK = (torch.where(valid_BK, x, -1) for x in found)
    return scores_BK, parents_BK, tokens_BK, states_BK, valid_BK.sum(dim=1), pruned_B


def _scores(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of `ops.rank.kernels.packed` keys, -inf where there is no child, and whether there is one."""
    ordered = keys >> 32
    valid = ordered > -(1 << 31)
    bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(torch.int32)
    return torch.where(valid, bits.view(torch.float32), float("-inf")), valid
