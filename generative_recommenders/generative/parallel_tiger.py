"""Parallel TIGER: the codes of the next item from a T5 encoder and a decoder of learned queries, in one pass.

    decoder input: one learned vector q_l for each position of the ID        logits of c_l = head(state of position l)
    masked training: positions that are given hold the embedding of their code instead of q_l; loss on the others

After the public code of Parallel TIGER: the codes of TIGER (arXiv 2305.05065), the query decoder of SETRec (arXiv
2502.10833), full attention among the positions. Trained on masked positions it is a model of every conditional p(c_l |
any other codes, history), so it decodes in one pass or left to right with the same weights. Differences: histories are
jagged and newest item first (`parallel_biases`); a position's softmax is over its own codes; an item may have several
IDs, all of whose positions are queries side by side. How items are found from the logits is in `parallel_decoding`.

Letters: n positions of the ID, those of all its modalities (L in shapes); R decoder rows, a multiple of B.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.distributed.runtime import all_reduce_sum, world_size
from generative_recommenders.errors import UserError
from generative_recommenders.generative.draft_head import DraftingModel, DraftSamples, HistoryStates
from generative_recommenders.generative.heads import CodeHeads
from generative_recommenders.generative.parallel_config import ParallelTigerConfig
from generative_recommenders.generative.t5 import Decoder, Encoder, Memory
from generative_recommenders.generative.tokens import IdTable, TokenEmbedding, token_draws
from generative_recommenders.nn.dropout import Draws
from ops.random import fold, lane_bits, token_hash

# Behind the streams of any dropout.
_MASK_STREAM = 1 << 24


@dataclass(frozen=True)
class LevelContext:
    """Logits of every position, (B, C_l) each: what a search needs, as they do not depend on codes before."""

    logits: tuple[Tensor, ...]

    def select(self, rows: Tensor) -> LevelContext:
        return LevelContext(tuple(logits_BC[rows] for logits_BC in self.logits))

    def branch(self, rows: Tensor | None = None) -> LevelContext:
        return self if rows is None else self.select(rows)


class ParallelTiger(DraftingModel):
    """`forward(batch, seed)` is the training loss, `level_logits` the one pass that decoding needs.

    `begin`, `logits` and `teacher_forced` serve a beam search with the logits of that pass; for the conditionals see
    `conditional_logits` and `parallel_decoding.LeftToRight`. Events whose items have no ID are left out of the
    histories; rows whose target has none carry no loss.

    Raises:
        UserError: level_weights of another number of positions.
    """

    weights_L: Tensor

    def __init__(self, config: ParallelTigerConfig, table: IdTable) -> None:
        super().__init__()
        levels = table.levels
        if config.level_weights and len(config.level_weights) != levels:
            raise UserError(
                f"parallel_tiger.level_weights: got {len(config.level_weights)} weights, expected {levels}, one a "
                f"position of the semantic IDs {table.sizes}"
            )
        self.config = config
        self.table = table
        self.sizes = table.sizes
        # As in `tiger`: embeddings start with variance 1, what reads them is normalized first.
        self.tokens = TokenEmbedding(self.sizes, config.dim, std=1.0)
        self.queries_LD = nn.Parameter(torch.empty(levels, config.dim).normal_())
        self.concat = nn.Linear(levels * config.dim, config.dim) if config.encoder_aggregation == "concat" else None
        shape = config.shape()
        self.encoder = Encoder(shape, config.num_encoder_layers, config.encoder_bias(levels))
        self.decoder = Decoder(
            shape, config.num_decoder_layers, config.self_bias(levels), config.cross_bias(levels), causal=False
        )
        multi = config.use_multi_head
        self.heads = CodeHeads(self.sizes, config.dim, shared=not multi, hidden=config.dim if multi else 0)
        self.register_buffer("weights_L", torch.tensor(config.level_weights or [1.0] * levels), persistent=False)

    def history_states(self, batch: SequenceBatch, seed: int | None = None) -> HistoryStates:
        memory = self.encode(self.table.known_only(batch), seed)
        return HistoryStates(memory.states_SD, memory.rectangles.offsets)

    def generative_loss(self, batch: SequenceBatch, seed: int) -> tuple[Tensor, dict[str, Tensor], DraftSamples]:
        """`tokens` counts the codes that were predicted; see `DraftingModel`."""
        batch = self.table.known_only(batch)
        codes_BL = self.table.codes_of_items(batch.target_ids_B)
        learned_B1 = codes_BL[:, :1] >= 0
        hidden_BL = self.hidden_positions(batch, seed)
        labels_BL = torch.where(hidden_BL, codes_BL, -1)
        steps = torch.arange(batch.size + 1, device=codes_BL.device) * len(self.sizes)
        draws = token_draws(batch, steps, codes_BL.numel(), seed)
        memory = self.encode(batch, seed)
        states_BLD = self.states(memory, codes_BL.clamp(min=0), ~hidden_BL, draws)
        losses_BL = self.heads.losses(states_BLD, labels_BL, self.config.label_smoothing)
        counts_L = all_reduce_sum((labels_BL >= 0).sum(0).float())
        weight = all_reduce_sum(learned_B1.sum().float())
        weighted_BL = losses_BL * self.weights_L
        if self.config.loss_normalization == "per_sample":
            weighted_BL = weighted_BL / hidden_BL.sum(1, keepdim=True)
        elif self.config.loss_normalization == "per_batch":
            weight = counts_L.sum()
        loss = weighted_BL.sum() / weight.clamp(min=1.0) * world_size()
        main = all_reduce_sum(loss.detach()) / world_size()
        scalars = {"main_loss": main, "ar_loss": main, "tokens": counts_L.sum(), "loss_weight": weight}
        sums_L = all_reduce_sum(losses_BL.detach().sum(0))
        for level, value in enumerate((sums_L / counts_L.clamp(min=1.0)).unbind()):
            scalars[f"level_{level + 1}_loss"] = value
        states = HistoryStates(memory.states_SD, memory.rectangles.offsets)
        return loss, scalars, DraftSamples(states, batch.target_ids_B)

    def hidden_positions(self, batch: SequenceBatch, seed: int) -> Tensor:
        """Which positions are predicted, bool (B, n), a function of (seed, row number): 1 to n of them, any alike.

        All of them with training_mode "standard".
        """
        levels, rows_B = len(self.sizes), batch.row_numbers_B
        if self.config.training_mode == "standard":
            return torch.ones(rows_B.numel(), levels, dtype=torch.bool, device=rows_B.device)
        lanes = torch.arange(levels + 1, device=rows_B.device)
        bits_BX = lane_bits(token_hash(fold(seed, _MASK_STREAM), rows_B)[:, None], lanes)
        # The last lane says how many, 32 random bits scaled to 1 .. n; the order of the others says which.
        counts_B1 = (bits_BX[:, -1:] * levels >> 32) + 1
        places_BL = bits_BX[:, :-1].argsort(dim=1, stable=True).argsort(dim=1)
        return places_BL < counts_B1

    def encode(self, batch: SequenceBatch, seed: int | None = None) -> Memory:
        """Encoder states of histories without unknown items, newest item first; dropout only where there is a seed."""
        rows_T = batch.rows_T()
        # Place of each token in the reversed row.
        mirrored_T = batch.offsets[rows_T] + batch.offsets[rows_T + 1] - 1
        mirrored_T = mirrored_T - torch.arange(rows_T.numel(), device=rows_T.device)
        x_TLD = self.tokens.items(self.table.codes_of_items(batch.item_ids_T[mirrored_T]))
        x_SD, offsets = self._aggregated(x_TLD), batch.offsets
        if self.config.flat:
            offsets = offsets * len(self.sizes)
        draws = None if seed is None else token_draws(batch, offsets, x_SD.shape[0], seed)
        with self._autocast(x_SD.device):
            memory: Memory = self.encoder(x_SD, offsets, draws)
        return memory

    def _aggregated(self, x_TLD: Tensor) -> Tensor:
        how = self.config.encoder_aggregation
        if how == "flatten":
            return x_TLD.flatten(0, 1)
        if self.concat is not None:
            joined: Tensor = self.concat(x_TLD.flatten(1))
            return joined
        return x_TLD.sum(1) if how == "sum" else x_TLD.mean(1)

    def states(
        self,
        memory: Memory,
        codes_RL: Tensor | None = None,
        given_RL: Tensor | None = None,
        draws: Draws | None = None,
    ) -> Tensor:
        """Decoder states (R, n, D) float32 of every position, where `given_RL` positions show their codes.

        Without codes one row a request, of queries alone. Rows of one request lie side by side.
        """
        if codes_RL is None or given_RL is None:
            x_RLD = self.queries_LD.expand(memory.size, -1, -1)
        else:
            x_RLD = torch.where(given_RL[..., None], self.tokens.items(codes_RL), self.queries_LD)
        with self._autocast(x_RLD.device):
            states_RLD: Tensor = self.decoder(x_RLD, memory, draws)
        return states_RLD.float()

    def level_logits(self, batch: SequenceBatch) -> list[Tensor]:
        """Logits of every position given the history alone, (B, C_l) each."""
        return self._level_logits(self.encode(self.table.known_only(batch)))

    def _level_logits(self, memory: Memory) -> list[Tensor]:
        states_BLD = self.states(memory)
        return [self.heads.logits(level, states_BLD[:, level]) for level in range(len(self.sizes))]

    def conditional_logits(self, batch: SequenceBatch, codes_BL: Tensor, given_BL: Tensor) -> list[Tensor]:
        """Logits of every position given the history and the codes where `given_BL`, bool, says so: (B, C_l) each.

        Those of given positions mean nothing. What training_mode "masked" learns; others may hold any code.
        """
        memory = self.encode(self.table.known_only(batch))
        states_BLD = self.states(memory, torch.where(given_BL, codes_BL, 0), given_BL)
        return [self.heads.logits(level, states_BLD[:, level]) for level in range(len(self.sizes))]

    def begin(self, batch: SequenceBatch) -> LevelContext:
        """The one pass; see `decoding.GenerativeModel`."""
        return LevelContext(tuple(self.level_logits(batch)))

    def begin_with_states(self, batch: SequenceBatch) -> tuple[LevelContext, HistoryStates]:
        """`begin` and `history_states` of one pass of the encoder."""
        memory = self.encode(self.table.known_only(batch))
        states = HistoryStates(memory.states_SD, memory.rectangles.offsets)
        return LevelContext(tuple(self._level_logits(memory))), states

    def logits(
        self, context: LevelContext, level: int, tokens_BM: Tensor | None, ancestors: Sequence[Tensor]
    ) -> Tensor:
        """Logits of `level`, the same for every beam of a request: (B, M, C_level), of which no copies are made."""
        beams = 1 if tokens_BM is None else tokens_BM.shape[1]
        return context.logits[level][:, None].expand(-1, beams, -1)

    def teacher_forced(self, batch: SequenceBatch, codes_BKL: Tensor) -> Tensor:
        """Log-probability of each code, whatever the others are, over all codes of its level: (B, K, L)."""
        columns = [
            logits_BC.float().log_softmax(-1).gather(1, codes_BKL[..., level])
            for level, logits_BC in enumerate(self.level_logits(batch))
        ]
        return torch.stack(columns, -1)

    def _autocast(self, device: torch.device) -> AbstractContextManager[object]:
        return torch.autocast(device.type, dtype=torch.bfloat16) if self.config.bf16 else nullcontext()
