"""Cross-entropy over the whole catalogue.

The candidates are the catalogue's items (not padding row 0, not ids that do not exist), `item_l2_norm` and the
similarity module are honored, and logits exist only a block at a time: memory does not grow with tokens x items.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from generative_recommenders.losses.objective import Objective, TokenLosses
from generative_recommenders.nn.dropout import Draws
from generative_recommenders.nn.outputs import l2_normalize
from generative_recommenders.similarity.dot import DotProduct
from ops.linear_cross_entropy import linear_cross_entropy

# Logits a block of the generic path may hold: 64 MB in fp32.
_BLOCK_LOGITS = 1 << 24


class FullSoftmaxLoss(Objective):
    """-log softmax(sim(o_t, n(E)) / temperature)[y_t] over the catalogue."""

    catalog_X: Tensor

    def __init__(self, catalog_X: Tensor, temperature: float, item_l2_norm: bool, l2_norm_eps: float) -> None:
        super().__init__()
        self.register_buffer("catalog_X", catalog_X, persistent=False)
        self.temperature = temperature
        self.item_l2_norm = item_l2_norm
        self.l2_norm_eps = l2_norm_eps

    def forward(
        self, queries_TD: Tensor, positives_T: Tensor, table_VD: Tensor, similarity: nn.Module, draws: Draws
    ) -> TokenLosses:
        if isinstance(similarity, DotProduct):
            losses_T = linear_cross_entropy(
                queries_TD,
                table_VD,
                self.catalog_X,
                positives_T,
                temperature=self.temperature,
                l2_norm=self.item_l2_norm,
                eps=self.l2_norm_eps,
            )
            return TokenLosses(losses_T, torch.ones_like(losses_T), {})
        return self._blocks(queries_TD, positives_T, table_VD, similarity)

    def _blocks(self, queries_TD: Tensor, positives_T: Tensor, table_VD: Tensor, similarity: nn.Module) -> TokenLosses:
        """Any similarity: blocks of tokens against the whole catalogue, recomputed in backward."""
        items = table_VD[self.catalog_X]
        items = l2_normalize(items, self.l2_norm_eps) if self.item_l2_norm else items
        places_T = torch.searchsorted(self.catalog_X, positives_T)

        def block(queries: Tensor, places: Tensor, items: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            logits, auxiliary = similarity(queries, items)
            return nn.functional.cross_entropy(logits / self.temperature, places, reduction="none"), auxiliary

        size = max(1, _BLOCK_LOGITS // self.catalog_X.numel())
        losses, weighted = [], list[tuple[int, dict[str, Tensor]]]()
        for queries, places in zip(queries_TD.split(size), places_T.split(size), strict=True):
            value, auxiliary = checkpoint(block, queries, places, items, use_reentrant=False)
            losses.append(value)
            weighted.append((queries.shape[0], auxiliary))
        total = max(1, queries_TD.shape[0])
        names = weighted[0][1] if weighted else {}
        mean = {name: torch.stack([n * a[name] for n, a in weighted]).sum() / total for name in names}
        losses_T = torch.cat(losses)
        return TokenLosses(losses_T, torch.ones_like(losses_T), mean)
