"""Bindings `parallel_tiger.*`: sizes, biases, training mode and decoding of Parallel TIGER."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from generative_recommenders.config import configurable
from generative_recommenders.errors import UserError
from generative_recommenders.generative.parallel_biases import CodebookBias, HistoryItemBias, RecencyBias, summed
from generative_recommenders.generative.t5 import T5Shape
from generative_recommenders.generative.t5_attention import PositionBias, RelativePositionBias

_AT_LEAST_ONE = "num_encoder_layers num_decoder_layers dim num_heads dkv ffn_hidden_dim".split()
_SHARES = "dropout_rate label_smoothing".split()
_CHOICES = {
    "ffn_activation_fn": ("relu", "gated-gelu"),
    "encoder_aggregation": ("flatten", "sum", "mean", "concat"),
    "training_mode": ("standard", "masked"),
    "loss_normalization": ("per_sample", "per_batch", "unnormalized"),
    "decoding": ("exact", "beam", "autoregressive"),
    "modality_merge": ("joint", "mixture", "published"),
}

Decoding = Literal["exact", "beam", "autoregressive"]
ModalityMerge = Literal["joint", "mixture", "published"]


@configurable("parallel_tiger")
@dataclass(frozen=True)
class ParallelTigerConfig:
    """Bindings `parallel_tiger.*`.

    num_encoder_layers, num_decoder_layers, dim, num_heads, dkv (width of a head), ffn_hidden_dim, ffn_activation_fn,
    relative_attention_num_buckets, relative_attention_max_distance (in items), dropout_rate: the T5, as for `tiger`.

    encoder_aggregation: what the encoder reads of an item: its codes as tokens one after the other ("flatten"), or one
    token that is their "sum", their "mean", or a learned matrix of them laid side by side ("concat").

    has_relative_encoder_item_bias and so on: position tables in the encoder, in the decoder's self-attention (_sa) and
    in its cross-attention (_ca), by distance of items and by distance within the ID. Distance of items in the decoder's
    self-attention is always 0 and distance within the ID says nothing to an encoder that aggregates: there the switches
    are taken, as published configurations set them, and change nothing.

    use_multi_head: a matrix behind a layer of its own for each position, instead of one matrix for all.

    training_mode: "standard" predicts all positions from queries alone. "masked" draws how many positions of a sample
    are predicted, 1 to n alike, and which; the others are given to the decoder, so that it learns every conditional.
    loss_normalization, of "masked": a sample's cross-entropies are divided by their number ("per_sample"), by that of
    the whole batch ("per_batch"), or summed ("unnormalized"); except for "per_batch", samples are then averaged.
    level_weights: one weight a position, none given is 1 each; they multiply cross-entropies and divide nothing.
    label_smoothing: share of a target spread over the codes of its level.

    decoding: "exact" scores every item from the one pass; "beam" searches the trie with the same scores;
    "autoregressive" goes left to right, each position given those before, which takes training_mode "masked".
    modality_merge, of several IDs an item: see `parallel_decoding`; "beam" and "autoregressive" take "joint" alone.

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
    encoder_aggregation: Literal["flatten", "sum", "mean", "concat"] = "sum"
    has_relative_encoder_item_bias: bool = True
    has_relative_encoder_codebook_bias: bool = True
    has_relative_decoder_item_bias_sa: bool = True
    has_relative_decoder_codebook_bias_sa: bool = True
    has_relative_decoder_item_bias_ca: bool = False
    has_relative_decoder_codebook_bias_ca: bool = False
    use_multi_head: bool = False
    training_mode: Literal["standard", "masked"] = "standard"
    loss_normalization: Literal["per_sample", "per_batch", "unnormalized"] = "per_sample"
    level_weights: tuple[float, ...] = ()
    label_smoothing: float = 0.0
    decoding: Decoding = "exact"
    modality_merge: ModalityMerge = "joint"
    activation_checkpoint: bool = False
    bf16: bool = False

    def __post_init__(self) -> None:
        for name in _AT_LEAST_ONE:
            self._expect(name, getattr(self, name) >= 1, "at least 1")
        for name in _SHARES:
            self._expect(name, 0.0 <= getattr(self, name) < 1.0, f"0 <= {name} < 1")
        for name, choices in _CHOICES.items():
            self._expect(name, getattr(self, name) in choices, " or ".join(map(repr, choices)))
        weights = self.level_weights
        self._expect("level_weights", not weights or (min(weights) >= 0.0 and sum(weights) > 0.0), "weights from 0")
        buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        self._expect("relative_attention_num_buckets", buckets >= 4 and buckets % 2 == 0, "an even number from 4 on")
        self._expect("relative_attention_max_distance", distance > buckets // 2, "more than half of the buckets")
        self._expect(
            "loss_normalization",
            self.training_mode == "masked" or self.loss_normalization == "per_sample",
            "'per_sample' with parallel_tiger.training_mode = 'standard'",
        )
        self._expect(
            "decoding",
            self.training_mode == "masked" or self.decoding != "autoregressive",
            "'exact' or 'beam' with parallel_tiger.training_mode = 'standard', which never sees codes of the next item",
        )
        self._expect(
            "modality_merge",
            self.decoding == "exact" or self.modality_merge == "joint",
            f"'joint' with parallel_tiger.decoding = {self.decoding!r}",
        )

    def _expect(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise UserError(f"parallel_tiger.{name}: got {getattr(self, name)!r}, expected {expected}")

    def describe(self) -> str:
        """For a run's name: all that changes the weights a training ends with."""
        switches = (
            self.has_relative_encoder_item_bias,
            self.has_relative_encoder_codebook_bias,
            self.has_relative_decoder_codebook_bias_sa,
            self.has_relative_decoder_item_bias_ca,
            self.has_relative_decoder_codebook_bias_ca,
        )
        masked = f"masked-{self.loss_normalization}" if self.training_mode == "masked" else "standard"
        weights = f"-w{','.join(f'{w:g}' for w in self.level_weights)}" if self.level_weights else ""
        smoothing = f"-ls{self.label_smoothing:g}" if self.label_smoothing else ""
        return (
            f"ParallelTIGER-e{self.num_encoder_layers}-d{self.num_decoder_layers}-dim{self.dim}"
            f"-h{self.num_heads}x{self.dkv}-ffn{self.ffn_hidden_dim}-{self.ffn_activation_fn}-do{self.dropout_rate:g}"
            f"-{self.encoder_aggregation}-b{''.join(str(int(switch)) for switch in switches)}"
            f"-{'multi' if self.use_multi_head else 'one'}-{masked}{weights}{smoothing}"
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

    @property
    def flat(self) -> bool:
        """Whether the encoder has a token for each code instead of one for each item."""
        return self.encoder_aggregation == "flatten"

    def encoder_bias(self, levels: int) -> PositionBias | None:
        return summed(
            HistoryItemBias(self._buckets(True), self._tokens(levels)) if self.has_relative_encoder_item_bias else None,
            self._codebook(levels) if self.has_relative_encoder_codebook_bias and self.flat else None,
        )

    def self_bias(self, levels: int) -> PositionBias | None:
        """Among the queries."""
        return self._codebook(levels) if self.has_relative_decoder_codebook_bias_sa else None

    def cross_bias(self, levels: int) -> PositionBias | None:
        return summed(
            RecencyBias(self._buckets(False), self._tokens(levels)) if self.has_relative_decoder_item_bias_ca else None,
            self._codebook(levels) if self.has_relative_decoder_codebook_bias_ca and self.flat else None,
        )

    def _tokens(self, levels: int) -> int:
        return levels if self.flat else 1

    def _codebook(self, levels: int) -> CodebookBias:
        return CodebookBias(self.num_heads, levels, std=self.dim**-0.5)

    def _buckets(self, bidirectional: bool) -> RelativePositionBias:
        return RelativePositionBias(
            self.num_heads,
            bidirectional=bidirectional,
            num_buckets=self.relative_attention_num_buckets,
            max_distance=self.relative_attention_max_distance,
            std=self.dim**-0.5,
        )
