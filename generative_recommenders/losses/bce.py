"""Binary cross-entropy of one positive and one sampled negative a token (Kang and McAuley).

    loss_t = (BCE(s+, 1) + BCE(s-, 0)) / 2,   weight 0 where the negative equals the positive

The published class calls a method that no longer exists; this one runs. Logits are not scaled, hence temperature 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from generative_recommenders.losses.negatives import NegativesSampler
from generative_recommenders.losses.objective import Objective, TokenLosses
from generative_recommenders.losses.pairs import drawn_items, pair_scores, positive_losses
from generative_recommenders.nn.dropout import Draws
from generative_recommenders.similarity.dot import Features, Similarity


class BCELoss(Objective):
    def __init__(self, sampler: NegativesSampler, item_l2_norm: bool, l2_norm_eps: float) -> None:
        super().__init__()
        self.sampler = sampler
        self.item_l2_norm = item_l2_norm
        self.l2_norm_eps = l2_norm_eps

    def forward(
        self, queries: Features, positives_T: Tensor, table_VD: Tensor, similarity: Similarity, draws: Draws
    ) -> TokenLosses:
        negatives_T = self.sampler.sample(positives_T, 1, draws)[:, 0]
        ids = torch.stack([positives_T, negatives_T], dim=1)
        norm = self.l2_norm_eps if self.item_l2_norm else None
        items, places = drawn_items(ids, table_VD, similarity, draws, norm)
        positive, negative = pair_scores(queries, items, places, similarity, draws).unbind(dim=1)
        auxiliary = positive_losses(queries, items, places[:, :1], similarity, draws)
        losses_T = 0.5 * (F.softplus(-positive) + F.softplus(negative))
        return TokenLosses(losses_T, (negatives_T != positives_T).to(losses_T.dtype), auxiliary)
