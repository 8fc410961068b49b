"""Cross-entropy over the whole catalogue.

The candidates are the catalogue's items (not padding row 0, not ids that do not exist), `item_l2_norm` and the
similarity module are honored, and logits exist only a block at a time: memory does not grow with tokens x items.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from generative_recommenders.losses.objective import Objective, TokenLosses
from generative_recommenders.losses.pairs import in_blocks, positive_losses
from generative_recommenders.nn.dropout import Draws
from generative_recommenders.nn.outputs import l2_normalize
from generative_recommenders.similarity.dot import DotProduct, Features, Similarity
from ops.linear_cross_entropy import linear_cross_entropy

# Logits a block of the generic path may hold: 64 MB in fp32.
_BLOCK_LOGITS = 1 << 24


class FullSoftmaxLoss(Objective):
    """-log softmax(sim(o_t, n(E)) / temperature)[y_t] over the catalogue.

    In training over `candidates`, where they are given: ids of the catalogue in ascending order, every positive among
    them. In evaluation over the catalogue in any case, since targets may be any item.
    """

    catalog_X: Tensor
    candidates_X: Tensor

    def __init__(
        self,
        catalog_X: Tensor,
        temperature: float,
        item_l2_norm: bool,
        l2_norm_eps: float,
        candidates: Tensor | None = None,
        learned_temperature: bool = False,
    ) -> None:
        super().__init__(temperature, learned_temperature)
        self.register_buffer("catalog_X", catalog_X, persistent=False)
        self.register_buffer("candidates_X", catalog_X if candidates is None else candidates, persistent=False)
        self.item_l2_norm = item_l2_norm
        self.l2_norm_eps = l2_norm_eps

    def forward(
        self, queries: Features, positives_T: Tensor, table_VD: Tensor, similarity: Similarity, draws: Draws
    ) -> TokenLosses:
        ids_X = self.candidates_X if self.training else self.catalog_X
        if isinstance(similarity, DotProduct):
            losses_T = linear_cross_entropy(
                self.temperature.corrected(queries[0]),
                table_VD,
                ids_X,
                positives_T,
                temperature=self.temperature.start,
                l2_norm=self.item_l2_norm,
                eps=self.l2_norm_eps,
            )
            return TokenLosses(losses_T, torch.ones_like(losses_T), self.temperature.reported())
        return self._blocks(queries, positives_T, table_VD, ids_X, similarity, draws)

    def _blocks(
        self,
        queries: Features,
        positives_T: Tensor,
        table_VD: Tensor,
        ids_X: Tensor,
        similarity: Similarity,
        draws: Draws,
    ) -> TokenLosses:
        """Any similarity: blocks of tokens against all of `ids_X`, recomputed in backward."""
        embeddings = table_VD[ids_X]
        embeddings = l2_normalize(embeddings, self.l2_norm_eps) if self.item_l2_norm else embeddings
        items = similarity.project_items(embeddings, ids_X, draws)
        places_T = torch.searchsorted(ids_X, positives_T)
        count = len(queries)

        def block(places: Tensor, keys: Tensor, *features: Tensor) -> Tensor:
            logits = similarity.score(features[:count], features[count:], Draws(draws.seed, keys))
            logits = self.temperature.corrected(logits) / self.temperature.start
            return nn.functional.cross_entropy(logits, places, reduction="none")

        size = max(1, _BLOCK_LOGITS // ids_X.numel())
        losses_T = in_blocks(block, size, (places_T, draws.keys_T, *queries), items)
        auxiliary = positive_losses(queries, items, places_T[:, None], similarity, draws)
        return TokenLosses(losses_T, torch.ones_like(losses_T), auxiliary | self.temperature.reported())
