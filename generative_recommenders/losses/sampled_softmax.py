"""Sampled softmax over the positive and R negatives (arXiv 2306.04039).

    s = sim(o_t, n(E[.])) / temperature;   a negative equal to the positive gets -5e4;   loss_t = logsumexp(s+, s-) - s+

n is the L2 norm where `item_l2_norm`. With `logq_correction` the sampler's log-probability of an item is subtracted
from its logits. The published code has no correction and sends ids through float32 on the way; ids stay int64 here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from generative_recommenders.losses.negatives import NegativesSampler
from generative_recommenders.losses.objective import Objective, TokenLosses
from generative_recommenders.losses.pairs import drawn_items, pair_scores, positive_losses
from generative_recommenders.nn.dropout import Draws
from generative_recommenders.similarity.dot import DotProduct, Features, Similarity
from ops.sampled_softmax import sampled_softmax_loss

_COLLISION_LOGIT = -5e4


class SampledSoftmaxLoss(Objective):
    """Per-token losses; the dot product runs in one fused op, any other similarity on gathered features."""

    def __init__(
        self,
        sampler: NegativesSampler,
        num_negatives: int,
        temperature: float,
        item_l2_norm: bool,
        l2_norm_eps: float,
        logq_correction: bool,
        learned_temperature: bool = False,
    ) -> None:
        super().__init__(temperature, learned_temperature)
        self.sampler = sampler
        self.num_negatives = num_negatives
        self.item_l2_norm = item_l2_norm
        self.l2_norm_eps = l2_norm_eps
        self.logq_correction = logq_correction

    def forward(
        self, queries: Features, positives_T: Tensor, table_VD: Tensor, similarity: Similarity, draws: Draws
    ) -> TokenLosses:
        negatives_TR = self.sampler.sample(positives_T, self.num_negatives, draws)
        log_q = self.sampler.log_q(positives_T.numel(), table_VD.shape[0]) if self.logq_correction else None
        if isinstance(similarity, DotProduct):
            losses_T = sampled_softmax_loss(
                self.temperature.corrected(queries[0]),
                table_VD,
                positives_T,
                negatives_TR,
                temperature=self.temperature.start,
                l2_norm=self.item_l2_norm,
                eps=self.l2_norm_eps,
                item_log_q=log_q,
            )
            return TokenLosses(losses_T, torch.ones_like(losses_T), self.temperature.reported())
        ids = torch.cat([positives_T[:, None], negatives_TR], dim=1)
        norm = self.l2_norm_eps if self.item_l2_norm else None
        items, places = drawn_items(ids, table_VD, similarity, draws, norm)
        logits = pair_scores(queries, items, places, similarity, draws)
        logits = self.temperature.corrected(logits) / self.temperature.start
        if log_q is not None:
            logits = logits - log_q[ids]
        collides = ids == positives_T[:, None]
        collides[:, 0] = False
        losses_T = -logits.masked_fill(collides, _COLLISION_LOGIT).log_softmax(dim=1)[:, 0]
        auxiliary = positive_losses(queries, items, places[:, :1], similarity, draws)
        return TokenLosses(losses_T, torch.ones_like(losses_T), auxiliary | self.temperature.reported())
