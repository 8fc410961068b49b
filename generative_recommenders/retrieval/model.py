"""The retrieval model: embeddings, encoder, query normalization, similarity and objective as one task."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.distributed.runtime import all_reduce_sum, world_size
from generative_recommenders.encoders.hstu import HSTU
from generative_recommenders.encoders.sasrec import SASRec
from generative_recommenders.indexing.approximate import top_k_by_name
from generative_recommenders.indexing.exact import MIPSBruteForceTopK, TopK
from generative_recommenders.losses.objective import Objective, TokenLosses
from generative_recommenders.nn.dropout import Draws
from generative_recommenders.nn.embeddings import ItemEmbedding, ItemVectors
from generative_recommenders.nn.outputs import l2_normalize
from generative_recommenders.nn.text_items import TextItems
from generative_recommenders.similarity.dot import Features, Similarity
from generative_recommenders.similarity.mol import MoL
from ops.mol_score import MoLItems, MoLQueries


class RetrievalModel(nn.Module):
    """`forward(batch, seed)` is the training loss; `last_queries` and `top_k` serve evaluation and recommending."""

    catalog_X: Tensor

    def __init__(
        self,
        items: ItemEmbedding | TextItems,
        encoder: HSTU | SASRec,
        output: nn.Module,
        similarity: Similarity,
        objective: Objective,
        catalog_X: Tensor,
        *,
        item_l2_norm: bool,
        l2_norm_eps: float,
        top_k_method: str,
        encoder_bf16: bool = False,
        loss_checkpoint: bool = False,
        loss_weights: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.items = items
        self.encoder = encoder
        self.output = output
        self.similarity = similarity
        self.objective = objective
        self.register_buffer("catalog_X", catalog_X, persistent=False)
        self.item_l2_norm = item_l2_norm
        self.l2_norm_eps = l2_norm_eps
        self.top_k_method = top_k_method
        self.encoder_bf16 = encoder_bf16
        self.loss_checkpoint = loss_checkpoint
        self.loss_weights = dict(loss_weights or {})

    @property
    def flexible_buffers(self) -> frozenset[str]:
        """Tensors whose shape is the checkpoint's."""
        names = self.items.shaped_by_checkpoint if isinstance(self.items, TextItems) else ()
        return frozenset(f"items.{name}" for name in names)

    def queries(self, batch: SequenceBatch, draws: Draws | None = None, vectors: ItemVectors | None = None) -> Tensor:
        """Post-processed states after every event, (T, D); `vectors` are the items' of this step, where at hand."""
        vectors = self.items.at(draws) if vectors is None else vectors
        tokens = self.encoder.input.tokens(batch)
        if draws is not None and tokens is not batch:
            draws = Draws.of(tokens, draws.seed)
        with self._autocast(batch):
            states_TD = self.encoder(self.encoder.input(tokens, vectors, draws), tokens, draws)
        states_TD = self.encoder.input.of_events(states_TD)
        return self.output(states_TD.float() if self.encoder_bf16 else states_TD)

    @torch.no_grad()
    def last_queries(self, batch: SequenceBatch) -> Tensor:
        """Post-processed states after each row's last event, (B, D), without gradient; every row must hold an event."""
        tokens, vectors = self.encoder.input.tokens(batch), self.items.at(None)
        with self._autocast(batch):
            states_BD = self.encoder.last_states(self.encoder.input(tokens, vectors, None), tokens)
        return self.output(states_BD.float() if self.encoder_bf16 else states_BD)

    def _autocast(self, batch: SequenceBatch) -> AbstractContextManager[object]:
        if not self.encoder_bf16:
            return nullcontext()
        return torch.autocast(batch.offsets.device.type, dtype=torch.bfloat16)

    def forward(self, batch: SequenceBatch, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        """This rank's part of the global mean loss, and global scalars by name, without gradient.

        The value is scaled so that averaging gradients over ranks, as DistributedDataParallel does, gives the
        gradient of the mean over the global batch, however unequal the ranks' shares are.
        """
        draws = Draws.of(batch, seed)
        vectors = self.items.at(draws)
        queries, auxiliary = self.similarity.project_queries(
            self.queries(batch, draws, vectors), batch.user_ids_B[batch.rows_T()], draws
        )
        tokens = self._token_losses(queries, batch.next_item_ids_T, vectors.table, draws)
        weights_T = tokens.weights_T * (batch.next_item_ids_T != 0)
        total = all_reduce_sum(weights_T.sum()).clamp(min=1.0)
        main = (tokens.losses_T * weights_T).sum() / total * world_size()
        auxiliary = auxiliary | tokens.auxiliary
        loss = main
        for name, weight in self.loss_weights.items():
            loss = loss + weight * auxiliary[name]
        local = {"main_loss": main, "ar_loss": loss, **auxiliary}
        # What is reported is the global batch's value, the same on every rank.
        scalars = {name: all_reduce_sum(value.detach()) / world_size() for name, value in local.items()}
        return loss, scalars | {"tokens": total}

    def _token_losses(self, queries: Features, positives_T: Tensor, table_VD: Tensor, draws: Draws) -> TokenLosses:
        arguments = (queries, positives_T, table_VD, self.similarity, draws)
        if self.loss_checkpoint:
            result: TokenLosses = checkpoint(self.objective, *arguments, use_reentrant=False)
            return result
        losses: TokenLosses = self.objective(*arguments)
        return losses

    @torch.no_grad()
    def target_losses(self, batch: SequenceBatch, seed: int) -> TokenLosses:
        """Losses (B,) of the rows' targets after their last events, without auxiliary terms worth reading.

        What the objective draws is keyed by seed, user and length, hence the same in every batch.
        """
        draws = Draws.of_users(batch, seed)
        queries, _ = self.similarity.project_queries(self.last_queries(batch), batch.user_ids_B, None)
        table_VD = self.items.at(None).table
        losses: TokenLosses = self.objective(queries, batch.target_ids_B, table_VD, self.similarity, draws)
        return losses

    @torch.no_grad()
    def search_queries(self, batch: SequenceBatch) -> Tensor | MoLQueries:
        """What `top_k` searches with: the similarity's form of `last_queries`, one a row."""
        queries, _ = self.similarity.project_queries(self.last_queries(batch), batch.user_ids_B, None)
        return MoLQueries(*queries) if isinstance(self.similarity, MoL) else queries[0]

    def item_features(self) -> Features:
        """The item side of the similarity for the whole catalogue, (X, ...), as evaluation uses it."""
        embeddings = self.items.at(None).table[self.catalog_X]
        if self.item_l2_norm:
            embeddings = l2_normalize(embeddings, self.l2_norm_eps)
        return self.similarity.project_items(embeddings, self.catalog_X, None)

    @torch.no_grad()
    def top_k(self, max_rows: int | None = None) -> TopK[Any]:
        """Retrieval over the catalogue with the present weights."""
        if isinstance(self.similarity, MoL):
            items = MoLItems(*self.item_features())
            gate, temperature = self.similarity.pair_gate(), self.similarity.config.temperature
            return top_k_by_name(self.top_k_method)(items, gate, temperature, self.catalog_X, max_rows)
        table = self.items.at(None).table.detach()
        if self.item_l2_norm:
            table = l2_normalize(table, self.l2_norm_eps)
        return MIPSBruteForceTopK(table, self.catalog_X, max_rows)
