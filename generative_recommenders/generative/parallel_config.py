"""Bindings `parallel_tiger.*`: sizes, biases, training mode and decoding of Parallel TIGER."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from generative_recommenders.config import configurable
from generative_recommenders.generative.parallel_biases import CodebookBias, HistoryItemBias, RecencyBias, summed
from generative_recommenders.generative.t5_attention import PositionBias
from generative_recommenders.generative.t5_config import T5Config

_CHOICES = {
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
class ParallelTigerConfig(T5Config):
    """Bindings `parallel_tiger.*`: those of `T5Config`, distances being in items, and:

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
    level_weights multiply cross-entropies and divide nothing.

    decoding: "exact" scores every item from the one pass; "beam" searches the trie with the same scores;
    "autoregressive" goes left to right, each position given those before, which takes training_mode "masked".
    modality_merge, of several IDs an item: see `parallel_decoding`; "beam" and "autoregressive" take "joint" alone.
    """

    prefix: ClassVar[str] = "parallel_tiger"

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
    decoding: Decoding = "exact"
    modality_merge: ModalityMerge = "joint"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in _CHOICES.items():
            self._expect(name, getattr(self, name) in choices, " or ".join(map(repr, choices)))
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
        return (
            f"ParallelTIGER-{self.describe_sizes()}"
            f"-{self.encoder_aggregation}-b{''.join(str(int(switch)) for switch in switches)}"
            f"-{'multi' if self.use_multi_head else 'one'}-{masked}{self.describe_loss()}"
        )

    @property
    def flat(self) -> bool:
        """Whether the encoder has a token for each code instead of one for each item."""
        return self.encoder_aggregation == "flatten"

    def encoder_bias(self, levels: int) -> PositionBias | None:
        return summed(
            HistoryItemBias(self.position_bias(True), self._tokens(levels))
            if self.has_relative_encoder_item_bias
            else None,
            self._codebook(levels) if self.has_relative_encoder_codebook_bias and self.flat else None,
        )

    def self_bias(self, levels: int) -> PositionBias | None:
        """Among the queries."""
        return self._codebook(levels) if self.has_relative_decoder_codebook_bias_sa else None

    def cross_bias(self, levels: int) -> PositionBias | None:
        return summed(
            RecencyBias(self.position_bias(False), self._tokens(levels))
            if self.has_relative_decoder_item_bias_ca
            else None,
            self._codebook(levels) if self.has_relative_decoder_codebook_bias_ca and self.flat else None,
        )

    def _tokens(self, levels: int) -> int:
        return levels if self.flat else 1

    def _codebook(self, levels: int) -> CodebookBias:
        return CodebookBias(self.num_heads, levels, std=self.dim**-0.5)
