"""TIGER: "Recommender Systems with Generative Retrieval" (arXiv 2305.05065): the codes of the next item from a T5.

    encoder input: [user] c_1 .. c_L [sep] of each item, oldest first          decoder input: BOS c_1 .. c_{L-1}
    loss of a row = sum over levels of w_l * cross-entropy of c_l over the codes of level l

Every history is one sample with one target; `data.windows` makes a sample of each prefix. Differences from the paper:
a level's softmax is over its own codes instead of one vocabulary that holds the other levels and users too; heads a
level (as GRID has them), one matrix, or the embedding itself, by choice; separators by choice; histories
are jagged, without padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.config import configurable
from generative_recommenders.distributed.runtime import all_reduce_sum, world_size
from generative_recommenders.errors import UserError
from generative_recommenders.generative.draft_head import DraftingModel, DraftSamples, HistoryStates
from generative_recommenders.generative.heads import CodeHeads
from generative_recommenders.generative.t5 import Decoder, DecoderState, Encoder, Memory
from generative_recommenders.generative.t5_config import T5Config
from generative_recommenders.generative.tokens import IdTable, TokenEmbedding, token_draws
from generative_recommenders.nn.dropout import Draws

# Decoder tokens of all candidates that teacher forcing handles at a time.
_CHUNK_TOKENS = 1 << 16


@configurable("tiger")
@dataclass(frozen=True)
class TigerConfig(T5Config):
    """Bindings `tiger.*`, with the paper's sizes; those of `T5Config`, and:

    user_tokens: rows that users share by hash, put before their histories; 0 is none. separator: a learned token after
    each item. shared_heads: one matrix for all levels instead of one a level; tie_embeddings: the token embedding is
    that matrix; head_hidden_dim: width of a layer before it, 0 is none. loss_reduction: over levels, "sum" or "mean";
    the mean is weighted.
    """

    prefix: ClassVar[str] = "tiger"

    user_tokens: int = 2000
    separator: bool = False
    shared_heads: bool = False
    tie_embeddings: bool = False
    head_hidden_dim: int = 0
    loss_reduction: Literal["sum", "mean"] = "sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("user_tokens", "head_hidden_dim"):
            self._expect(name, getattr(self, name) >= 0, "at least 0; 0 is none")
        own_heads = not self.shared_heads or self.head_hidden_dim > 0
        self._expect(
            "tie_embeddings",
            not (self.tie_embeddings and own_heads),
            "False with heads of their own; try tiger.shared_heads = True and tiger.head_hidden_dim = 0",
        )

    def describe(self) -> str:
        """For a run's name."""
        heads = "tied" if self.tie_embeddings else "shared" if self.shared_heads else "level"
        mlp = f"-hh{self.head_hidden_dim}" if self.head_hidden_dim else ""
        return (
            f"TIGER-{self.describe_sizes()}-u{self.user_tokens}{'-sep' if self.separator else ''}"
            f"-{heads}{mlp}-{self.loss_reduction}{self.describe_loss()}"
        )


class Tiger(DraftingModel):
    """`forward(batch, seed)` is the training loss; `begin` and `logits` serve the search, `teacher_forced` checks it.

    Events whose items have no ID are left out of the histories; rows whose target has none carry no loss.
    """

    weights_L: Tensor

    def __init__(self, config: TigerConfig, table: IdTable) -> None:
        super().__init__()
        if len(table.modalities) != 1:
            raise UserError(f"tiger: got {len(table.modalities)} tables of semantic IDs, expected 1")
        if config.level_weights and len(config.level_weights) != table.levels:
            raise UserError(
                f"tiger.level_weights: got {len(config.level_weights)} weights, expected {table.levels}, one a level "
                f"of the semantic IDs {table.sizes}"
            )
        self.config = config
        self.table = table
        self.sizes = table.sizes
        # T5's embeddings start with variance 1: what reads them is normalized first.
        self.tokens = TokenEmbedding(
            self.sizes, config.dim, users=config.user_tokens, separator=config.separator, bos=True, std=1.0
        )
        shape = config.shape()
        self.encoder = Encoder(shape, config.num_encoder_layers, config.position_bias(True))
        self.decoder = Decoder(shape, config.num_decoder_layers, config.position_bias(False))
        self.heads = CodeHeads(
            self.sizes,
            config.dim,
            shared=config.shared_heads,
            hidden=config.head_hidden_dim,
            tied=self.tokens if config.tie_embeddings else None,
        )
        weights = torch.tensor(config.level_weights or [1.0] * table.levels)
        if config.loss_reduction == "mean":
            weights = weights / weights.sum()
        self.register_buffer("weights_L", weights, persistent=False)

    def _autocast(self, device: torch.device) -> AbstractContextManager[object]:
        return torch.autocast(device.type, dtype=torch.bfloat16) if self.config.bf16 else nullcontext()

    def _encode(self, batch: SequenceBatch, seed: int | None) -> Memory:
        """Encoder states of histories without unknown items; dropout only where there is a seed."""
        x_SD, offsets = self.tokens.histories(self.table, batch)
        draws = None if seed is None else token_draws(batch, offsets, x_SD.shape[0], seed)
        with self._autocast(x_SD.device):
            memory: Memory = self.encoder(x_SD, offsets, draws)
        return memory

    def _decode(self, memory: Memory, codes_RL: Tensor, draws: Draws | None) -> Tensor:
        """States (R, L, D), of which the one at l predicts the code of level l and has seen those before it."""
        bos = self.tokens.bos
        assert bos is not None
        before_RLD = self.tokens.items(codes_RL)[:, :-1]
        x_RLD = torch.cat([bos.expand(codes_RL.shape[0], 1, -1), before_RLD], 1)
        with self._autocast(x_RLD.device):
            states_RLD: Tensor = self.decoder(x_RLD, memory, draws)
        return states_RLD.float()

    def history_states(self, batch: SequenceBatch, seed: int | None = None) -> HistoryStates:
        memory = self._encode(self.table.known_only(batch), seed)
        return HistoryStates(memory.states_SD, memory.rectangles.offsets)

    def generative_loss(self, batch: SequenceBatch, seed: int) -> tuple[Tensor, dict[str, Tensor], DraftSamples]:
        """The mean over targets; see `DraftingModel`."""
        batch = self.table.known_only(batch)
        codes_BL = self.table.codes_of_items(batch.target_ids_B)
        rows = batch.size
        steps = torch.arange(rows + 1, device=codes_BL.device) * len(self.sizes)
        draws = token_draws(batch, steps, rows * len(self.sizes), seed)
        memory = self._encode(batch, seed)
        states_BLD = self._decode(memory, codes_BL.clamp(min=0), draws)
        losses_BL = self.heads.losses(states_BLD, codes_BL, self.config.label_smoothing)
        learned = all_reduce_sum((codes_BL[:, 0] >= 0).sum().float())
        total = learned.clamp(min=1.0)
        levels_L = losses_BL.sum(0) / total * world_size()
        loss = (levels_L * self.weights_L).sum()
        # What is reported is the global batch's value, the same on every rank.
        reported_L = all_reduce_sum(levels_L.detach()) / world_size()
        main = (reported_L * self.weights_L).sum()
        by_level = {f"level_{level + 1}_loss": value for level, value in enumerate(reported_L)}
        states = HistoryStates(memory.states_SD, memory.rectangles.offsets)
        scalars = {"main_loss": main, "ar_loss": main, **by_level, "tokens": learned}
        return loss, scalars, DraftSamples(states, batch.target_ids_B)

    def begin(self, batch: SequenceBatch, length: int | None = None) -> DecoderState:
        """Prefill: the encoder once, and keys and values of its states for every decoder layer.

        With `length` the context is one rectangle of so many tokens a request: shapes that do not depend on the batch.
        """
        return self._begin(self._encode(self.table.known_only(batch), None), length)

    def begin_with_states(self, batch: SequenceBatch) -> tuple[DecoderState, HistoryStates]:
        """`begin` and `history_states` of one pass of the encoder."""
        memory = self._encode(self.table.known_only(batch), None)
        return self._begin(memory, None), HistoryStates(memory.states_SD, memory.rectangles.offsets)

    def _begin(self, memory: Memory, length: int | None) -> DecoderState:
        with self._autocast(memory.states_SD.device):
            return self.decoder.begin(memory, length)

    def logits(
        self, context: DecoderState, level: int, tokens_BM: Tensor | None, ancestors: Sequence[Tensor]
    ) -> Tensor:
        """Logits of `level` for every beam, (B, M, C_level); see `decoding.GenerativeModel`."""
        bos = self.tokens.bos
        assert bos is not None
        x_BMD = bos.expand(context.size, 1, -1) if tokens_BM is None else self.tokens.level(level - 1, tokens_BM)
        # The first stored row is that of BOS, which all beams descend from.
        first_BM = torch.zeros(x_BMD.shape[:2], dtype=torch.int64, device=x_BMD.device)
        with self._autocast(x_BMD.device):
            states_BMD = self.decoder.step(x_BMD, context, [first_BM, *ancestors])
        return self.heads.logits(level, states_BMD.float())

    def teacher_forced(self, batch: SequenceBatch, codes_BKL: Tensor) -> Tensor:
        """Log-probability of each code given those before it, over all codes of its level: (B, K, L)."""
        memory = self._encode(self.table.known_only(batch), None)
        rows, _, levels = codes_BKL.shape
        size = max(1, _CHUNK_TOKENS // max(rows * levels, 1))
        parts = []
        for codes in codes_BKL.split(size, 1):
            states_RLD = self._decode(memory, codes.flatten(0, 1), None)
            parts.append(self.heads.log_probs(states_RLD, codes.flatten(0, 1)).view(codes.shape))
        return torch.cat(parts, 1)
