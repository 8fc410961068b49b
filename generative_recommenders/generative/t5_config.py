"""Bindings that the encoder-decoder models share: the sizes of the T5 and what its loss weighs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from generative_recommenders.errors import UserError
from generative_recommenders.generative.t5 import T5Shape
from generative_recommenders.generative.t5_attention import RelativePositionBias

_AT_LEAST_ONE = "num_encoder_layers num_decoder_layers dim num_heads dkv ffn_hidden_dim".split()
_SHARES = "dropout_rate label_smoothing".split()


@dataclass(frozen=True)
class T5Config:
    """Sizes with TIGER's values; `prefix` is the configurable's name, for messages.

    num_encoder_layers, num_decoder_layers, dim, num_heads, dkv (width of a head), ffn_hidden_dim, ffn_activation_fn,
    relative_attention_num_buckets, relative_attention_max_distance: the T5. dropout_rate: in all of T5's places.
    level_weights: one weight a level, none given is 1 each. label_smoothing: share of a target spread over the codes of
    its level. activation_checkpoint: recompute the layers in backward. bf16: bfloat16 autocast of encoder and decoder.

    Raises:
        UserError: a value outside its range.
    """

    prefix: ClassVar[str]

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
    level_weights: tuple[float, ...] = ()
    label_smoothing: float = 0.0
    activation_checkpoint: bool = False
    bf16: bool = False

    def __post_init__(self) -> None:
        for name in _AT_LEAST_ONE:
            self._expect(name, getattr(self, name) >= 1, "at least 1")
        for name in _SHARES:
            self._expect(name, 0.0 <= getattr(self, name) < 1.0, f"0 <= {name} < 1")
        self._expect("ffn_activation_fn", self.ffn_activation_fn in ("relu", "gated-gelu"), "'relu' or 'gated-gelu'")
        weights = self.level_weights
        positive = not weights or (min(weights) >= 0.0 and sum(weights) > 0.0)
        self._expect("level_weights", positive, "weights from 0, not all 0")
        buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        self._expect("relative_attention_num_buckets", buckets >= 4 and buckets % 2 == 0, "an even number from 4 on")
        self._expect("relative_attention_max_distance", distance > buckets // 2, "more than half of the buckets")

    def _expect(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise UserError(f"{self.prefix}.{name}: got {getattr(self, name)!r}, expected {expected}")

    def shape(self) -> T5Shape:
        """What a layer is built from."""
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
        """A table of T5's buckets, for a stack of layers."""
        return RelativePositionBias(
            self.num_heads,
            bidirectional=bidirectional,
            num_buckets=self.relative_attention_num_buckets,
            max_distance=self.relative_attention_max_distance,
            std=self.dim**-0.5,
        )

    def describe_sizes(self) -> str:
        """For a run's name."""
        return (
            f"e{self.num_encoder_layers}-d{self.num_decoder_layers}-dim{self.dim}-h{self.num_heads}x{self.dkv}"
            f"-ffn{self.ffn_hidden_dim}-{self.ffn_activation_fn}-do{self.dropout_rate:g}"
        )

    def describe_loss(self) -> str:
        """For a run's name; empty with plain weights and targets."""
        weights = f"-w{','.join(f'{w:g}' for w in self.level_weights)}" if self.level_weights else ""
        return weights + (f"-ls{self.label_smoothing:g}" if self.label_smoothing else "")
