"""Binary cross-entropy of one positive and one sampled negative a token (Kang and McAuley).

    loss_t = (BCE(s+, 1) + BCE(s-, 0)) / 2,   weight 0 where the negative equals the positive

The published class calls a method that no longer exists; this one runs. Logits are not scaled, hence temperature 1.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from generative_recommenders.losses.negatives import NegativesSampler
from generative_recommenders.losses.objective import Objective, TokenLosses
from generative_recommenders.nn.dropout import Draws
from generative_recommenders.nn.outputs import l2_normalize


class BCELoss(Objective):
    def __init__(self, sampler: NegativesSampler, item_l2_norm: bool, l2_norm_eps: float) -> None:
        super().__init__()
        self.sampler = sampler
        self.item_l2_norm = item_l2_norm
        self.l2_norm_eps = l2_norm_eps

    def forward(
        self, queries_TD: Tensor, positives_T: Tensor, table_VD: Tensor, similarity: nn.Module, draws: Draws
    ) -> TokenLosses:
        negatives_T = self.sampler.sample(positives_T, 1, draws)[:, 0]
        positive, auxiliary = self._score(queries_TD, positives_T, table_VD, similarity)
        negative, _ = self._score(queries_TD, negatives_T, table_VD, similarity)
        losses_T = 0.5 * (F.softplus(-positive) + F.softplus(negative))
        return TokenLosses(losses_T, (negatives_T != positives_T).to(losses_T.dtype), auxiliary)

    def _score(
        self, queries_TD: Tensor, ids_T: Tensor, table_VD: Tensor, similarity: nn.Module
    ) -> tuple[Tensor, dict[str, Tensor]]:
        items = F.embedding(ids_T, table_VD)
        items = l2_normalize(items, self.l2_norm_eps) if self.item_l2_norm else items
        scores, auxiliary = similarity(queries_TD, items[:, None])
        return scores[:, 0], auxiliary
