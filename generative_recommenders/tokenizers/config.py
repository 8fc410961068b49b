"""Bindings of the semantic-ID experiment (`main.experiment = @train_tokenizer`): from item texts to a table of IDs."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from generative_recommenders.config import configurable
from generative_recommenders.tokenizers.collisions import POLICIES


@configurable("train_tokenizer")
@dataclass(frozen=True)
class TokenizerConfig:
    """Bindings `train_tokenizer.*`.

    Data: dataset_name. name: what the IDs are called, their folder is `<data_dir>/<dataset_name>/semantic_ids/<name>`.

    Embeddings of the items (see `data.text_embeddings`): encoder, "hashed" (TF-IDF of hashed n-grams and a truncated
    SVD, which needs nothing), "minilm", a folder or hub name of another sentence-transformers model, "file" or
    "prepared" (a column of `items.parquet`); embeddings_path, the `.npy` or parquet of "file", or the index of an
    exported model for IDs with a collaborative signal, or the folder of "minilm"; embeddings_keys, raw ids of the rows
    of an `.npy`, one a line; embedding_dim, None is the encoder's own; template, over the columns of `items.parquet`,
    None is the dataset's; item_table, a parquet with further columns.

    Tokenizer: tokenizer, `@rq_kmeans`, `@rq_kmeans_plus`, `@r_vq`, `@rq_vae`, `@pq`, `@opq`, `@lsh` or `@random_codes`,
    each with bindings of its own. fit_on: "train" fits it on the items with events in the training split, "all" on the
    whole catalogue.

    Collisions: collision_policy, one of `tokenizers.collisions.POLICIES`; "dedup" adds a level of at least dedup_width
    codes, nearest is how many codes a reassignment tries. collapse_threshold: share of a level's codes that must be
    used.

    random_seed; resume: "auto" leaves IDs of this very config as they are and refuses to replace others, "never" makes
    them again, and replaces what has the name.
    """

    dataset_name: str = "amzn14-beauty"
    name: str = "rqkmeans"
    encoder: str = "hashed"
    embeddings_path: str | None = None
    embeddings_keys: str | None = None
    embedding_dim: int | None = None
    template: str | None = None
    item_table: str | None = None
    tokenizer: str = field(default="rq_kmeans", metadata={"reference": True})
    fit_on: Literal["train", "all"] = "train"
    collision_policy: str = "dedup"
    dedup_width: int = 0
    nearest: int = 10
    collapse_threshold: float = 0.2
    random_seed: int = 42
    resume: Literal["auto", "never"] = "auto"

    def __post_init__(self) -> None:
        named = re.fullmatch(r"[A-Za-z0-9][\w.+-]{0,99}", self.name) is not None
        self._expect("name", named, "letters, digits and . _ + -, beginning with a letter or digit")
        self._expect("collision_policy", self.collision_policy in POLICIES, f"one of {', '.join(POLICIES)}")
        self._expect("embedding_dim", self.embedding_dim is None or self.embedding_dim >= 1, "at least 1, or None")
        self._expect("dedup_width", self.dedup_width >= 0, "at least 0")
        self._expect("nearest", self.nearest >= 1, "at least 1")
        self._expect("collapse_threshold", 0 <= self.collapse_threshold <= 1, "0 to 1")
        self._expect("random_seed", 0 <= self.random_seed < 2**63, "0 to 2^63 - 1")
        self._expect(
            "embeddings_path", self.encoder != "file" or self.embeddings_path is not None, "a file with encoder 'file'"
        )

    def _expect(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"train_tokenizer.{name}: got {getattr(self, name)!r}, expected {expected}")
