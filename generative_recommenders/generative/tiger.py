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
from typing import Literal

import torch
from torch import Tensor, nn

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.config import configurable
from generative_recommenders.distributed.runtime import all_reduce_sum, world_size
from generative_recommenders.errors import UserError
from generative_recommenders.generative.heads import CodeHeads
from generative_recommenders.generative.t5 import Decoder, DecoderState, Encoder, Memory, T5Shape
from generative_recommenders.generative.t5_attention import RelativePositionBias
from generative_recommenders.generative.tokens import IdTable, TokenEmbedding, token_draws
from generative_recommenders.nn.dropout import Draws

# Decoder tokens of all candidates that teacher forcing handles at a time.
_CHUNK_TOKENS = 1 << 16
_AT_LEAST_ONE = "num_encoder_layers num_decoder_layers dim num_heads dkv ffn_hidden_dim".split()
_SHARES = "dropout_rate label_smoothing".split()


@configurable("tiger")
@dataclass(frozen=True)
class TigerConfig:
    """Bindings `tiger.*`, with the paper's sizes.

    num_encoder_layers, num_decoder_layers, dim, num_heads, dkv (width of a head), ffn_hidden_dim, ffn_activation_fn,
    relative_attention_num_buckets, relative_attention_max_distance: the T5. dropout_rate: in all of T5's places.

    user_tokens: rows that users share by hash, put before their histories; 0 is none. separator: a learned token after
    each item. shared_heads: one matrix for all levels instead of one a level; tie_embeddings: the token embedding is
    that matrix; head_hidden_dim: width of a layer before it, 0 is none.

    loss_reduction: over levels, "sum" or "mean"; level_weights: one weight a level, none given is 1 each; the mean is
    weighted. label_smoothing: share of the target spread over the codes of its level.

    activation_checkpoint: recompute the layers in backward. bf16: bfloat16 autocast of encoder and decoder.
    """

    num_encoder_layers: int = 4
    num_decoder_layers: int = 4
    dim: int = 128
    num_heads: int = 6
    dkv: int = 64
    ffn_hidden_dim: int = 1024
    ffn_activation_fn: Literal["relu", "gated-gelu"] = "relu"
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    user_tokens: int = 2000
    separator: bool = False
    shared_heads: bool = False
    tie_embeddings: bool = False
    head_hidden_dim: int = 0
    loss_reduction: Literal["sum", "mean"] = "sum"
    level_weights: tuple[float, ...] = ()
    label_smoothing: float = 0.0
    activation_checkpoint: bool = False
    bf16: bool = False

    def __post_init__(self) -> None:
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"tiger.{name}: got {getattr(self, name)}, expected at least 1")
        for name in ("user_tokens", "head_hidden_dim"):
            if getattr(self, name) < 0:
                raise ValueError(f"tiger.{name}: got {getattr(self, name)}, expected at least 0; 0 is none")
        for name in _SHARES:
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"tiger.{name}: got {getattr(self, name)}, expected 0 <= {name} < 1")
        if self.level_weights and (min(self.level_weights) < 0.0 or sum(self.level_weights) <= 0.0):
            raise ValueError(f"tiger.level_weights: got {self.level_weights}, expected none negative and not all 0")
        if self.tie_embeddings and (not self.shared_heads or self.head_hidden_dim):
            raise ValueError(
                "tiger.tie_embeddings: got True with heads of their own; try tiger.shared_heads = True and "
                "tiger.head_hidden_dim = 0"
            )
        buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets < 4 or buckets % 2 or distance <= buckets // 2:
            raise ValueError(
                f"tiger.relative_attention_num_buckets: got {buckets} up to distance {distance}, expected an even "
                "number from 4 on and a tiger.relative_attention_max_distance above half of it"
            )

    def build(self, table: IdTable) -> Tiger:
        """Raises UserError where the levels of `table` do not fit."""
        return Tiger(self, table)

    def describe(self) -> str:
        heads = "tied" if self.tie_embeddings else "shared" if self.shared_heads else "level"
        mlp = f"-hh{self.head_hidden_dim}" if self.head_hidden_dim else ""
        weights = f"-w{','.join(f'{w:g}' for w in self.level_weights)}" if self.level_weights else ""
        smoothing = f"-ls{self.label_smoothing:g}" if self.label_smoothing else ""
        return (
            f"TIGER-e{self.num_encoder_layers}-d{self.num_decoder_layers}-dim{self.dim}-h{self.num_heads}x{self.dkv}"
            f"-ffn{self.ffn_hidden_dim}-{self.ffn_activation_fn}-do{self.dropout_rate:g}-u{self.user_tokens}"
            f"{'-sep' if self.separator else ''}-{heads}{mlp}-{self.loss_reduction}{weights}{smoothing}"
        )

    def shape(self) -> T5Shape:
        return T5Shape(
            dim=self.dim,
            num_heads=self.num_heads,
            dkv=self.dkv,
            ffn_hidden_dim=self.ffn_hidden_dim,
            dropout_rate=self.dropout_rate,
            activation=self.ffn_activation_fn,
            activation_checkpoint=self.activation_checkpoint,
        )

    def position_bias(self, bidirectional: bool) -> RelativePositionBias:
        return RelativePositionBias(
            self.num_heads,
            bidirectional=bidirectional,
            num_buckets=self.relative_attention_num_buckets,
            max_distance=self.relative_attention_max_distance,
            std=self.dim**-0.5,
        )


class Tiger(nn.Module):
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

    def forward(self, batch: SequenceBatch, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        """This rank's part of the global mean loss over targets, and global scalars by name, without gradient.

        The value is scaled so that averaging gradients over ranks gives the gradient of the mean over the global batch.
        """
        batch = self.table.known_only(batch)
        codes_BL = self.table.codes_of_items(batch.target_ids_B)
        rows = batch.size
        steps = torch.arange(rows + 1, device=codes_BL.device) * len(self.sizes)
        draws = token_draws(batch, steps, rows * len(self.sizes), seed)
        states_BLD = self._decode(self._encode(batch, seed), codes_BL.clamp(min=0), draws)
        losses_BL = self.heads.losses(states_BLD, codes_BL, self.config.label_smoothing)
        total = all_reduce_sum((codes_BL[:, 0] >= 0).sum().float()).clamp(min=1.0)
        levels_L = losses_BL.sum(0) / total * world_size()
        loss = (levels_L * self.weights_L).sum()
        # What is reported is the global batch's value, the same on every rank.
        reported_L = all_reduce_sum(levels_L.detach()) / world_size()
        main = (reported_L * self.weights_L).sum()
        by_level = {f"level_{level}_loss": value for level, value in enumerate(reported_L)}
        return loss, {"main_loss": main, "ar_loss": main, **by_level, "tokens": total}

    def begin(self, batch: SequenceBatch, length: int | None = None) -> DecoderState:
        """Prefill: the encoder once, and keys and values of its states for every decoder layer.

        With `length` the context is one rectangle of so many tokens a request: shapes that do not depend on the batch.
        """
        memory = self._encode(self.table.known_only(batch), None)
        with self._autocast(batch.offsets.device):
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
