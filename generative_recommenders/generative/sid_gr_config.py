"""Bindings `sid_gr.*`: the decoder-only model over flattened semantic IDs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from generative_recommenders.config import configurable
from generative_recommenders.errors import UserError

Backbone = Literal["transformer", "sasrec", "hstu"]


@configurable("sid_gr")
@dataclass(frozen=True)
class SIDGRConfig:
    """Bindings `sid_gr.*`.

    backbone: "transformer" (pre-norm softmax attention and GELU layer), "sasrec" (the block of `encoders.sasrec`) or
    "hstu" (the layer of `encoders.hstu`, whose bias knows positions and elapsed time). dim, num_blocks, num_heads are
    those of any of them; head_dim is dim / num_heads unless given, which "sasrec" does not take. ffn_hidden_dim: width
    of the feed-forward layer, which "hstu" does not have. dropout_rate: of the input and within the layers; "sasrec"
    drops attention probabilities too, as its encoder does.

    loss_on: which items of a sequence, the target included, are learned: "last" is the target alone, a number that many
    at its end, "all" the first one too, which is predicted from nothing. A BOS token stands before exactly these items
    while training and before the items at the same places while decoding.

    shared_heads: one output matrix for all levels instead of one a level; probabilities are over a level's own codes
    in both. item_positions: a learned vector for an item's place in the window, oldest first. level_embeddings: one for
    a code's level. time_bias: "hstu" knows when items happened; off, all times are equal.
    item_embeddings (ours): the last code of an item in a history has a learned vector of the item added to it, so that
    what is learned of one item need not go through codes that others share. It starts at 0 and stays there for items
    that no training event has; what is generated is made of codes alone either way.
    items_at_bos (ours): a BOS token has the sum of the code embeddings of the item before it added to its own, and that
    item's vector where there is one; the oldest item that is read has none before it. The state that predicts an item
    then starts from the one before, as a retrieval model's does, instead of having to find it by attention.
    scale_inputs (ours): embeddings of tokens, items, levels and places are multiplied by sqrt(dim), as those of items
    are in the retrieval models, so that a token is not small beside what layers add to it.

    activation_checkpoint: layers are computed again in backward. bf16: autocast of the backbone.
    """

    backbone: Backbone = "hstu"
    dim: int = 128
    num_blocks: int = 4
    num_heads: int = 4
    head_dim: int | None = None
    ffn_hidden_dim: int = 512
    dropout_rate: float = 0.2
    loss_on: Literal["last", "all"] | int = "all"
    shared_heads: bool = True
    item_positions: bool = True
    level_embeddings: bool = True
    time_bias: bool = True
    item_embeddings: bool = False
    items_at_bos: bool = False
    scale_inputs: bool = False
    activation_checkpoint: bool = False
    bf16: bool = False

    def __post_init__(self) -> None:
        backbones = ("transformer", "sasrec", "hstu")
        self._expect("backbone", self.backbone in backbones, "'transformer', 'sasrec' or 'hstu'")
        for name in ("dim", "num_blocks", "num_heads", "ffn_hidden_dim"):
            self._expect(name, getattr(self, name) >= 1, "at least 1")
        self._expect("dropout_rate", 0.0 <= self.dropout_rate < 1.0, "0 <= rate < 1")
        counted = isinstance(self.loss_on, int) and not isinstance(self.loss_on, bool)
        learned = self.loss_on in ("last", "all") or (counted and self.loss_on >= 1)  # type: ignore[operator]
        self._expect("loss_on", learned, "'last', 'all' or a number of items from 1")
        if self.head_dim is None or self.backbone == "sasrec":
            self._expect("num_heads", self.dim % self.num_heads == 0, f"a divisor of sid_gr.dim {self.dim}")
        if self.head_dim is not None:
            self._expect("head_dim", self.head_dim >= 1, "at least 1")
            of_sasrec = self.backbone != "sasrec" or self.head_dim * self.num_heads == self.dim
            self._expect("head_dim", of_sasrec, "dim / num_heads with backbone 'sasrec'; leave it out")

    @property
    def head_width(self) -> int:
        """Width of a head's queries, keys and values."""
        return self.head_dim or self.dim // self.num_heads

    @property
    def loss_items(self) -> int | None:
        """How many items at the end of a sequence are learned, None for all."""
        if isinstance(self.loss_on, int):
            return self.loss_on
        return 1 if self.loss_on == "last" else None

    def describe(self) -> str:
        """For a run's name."""
        heads = "shared" if self.shared_heads else "per-level"
        switches = {"items": self.item_embeddings, "bos": self.items_at_bos, "scaled": self.scale_inputs}
        inputs = "".join(f"-{name}" for name, on in switches.items() if on)
        return (
            f"SIDGR-{self.backbone}-d{self.dim}-b{self.num_blocks}-h{self.num_heads}-dr{self.dropout_rate}"
            f"-{self.loss_on}-{heads}{inputs}"
        )

    def _expect(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise UserError(f"sid_gr.{name}: got {getattr(self, name)!r}, expected {expected}")
