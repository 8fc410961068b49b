"""The vectors of a dataset's item texts, as the bindings of an experiment name their source."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from generative_recommenders.data.errors import DataError
from generative_recommenders.data.text_embeddings import Embeddings, embed_items
from generative_recommenders.distributed.runtime import Runtime


class TextSource(Protocol):
    """Bindings that `train_tokenizer` and `text_item_encoder` share; see `train_tokenizer`."""

    @property
    def encoder(self) -> str: ...
    @property
    def embeddings_path(self) -> str | None: ...
    @property
    def embeddings_keys(self) -> str | None: ...
    @property
    def embedding_dim(self) -> int | None: ...
    @property
    def template(self) -> str | None: ...
    @property
    def item_table(self) -> str | None: ...


def item_embeddings(source: TextSource, dataset_folder: Path, runtime: Runtime) -> Embeddings:
    """Vectors of all items; all ranks must call it together.

    Rank 0 encodes and keeps them; the others read what it kept, or learn why there is nothing.

    Raises:
        DataError: they cannot be had, on every rank.
    """
    found, refusal = None, ""
    if runtime.is_main:
        try:
            found = embeddings_of(source, dataset_folder)
        except DataError as error:
            refusal = str(error)
    refusal = runtime.from_main(refusal)
    if refusal:
        raise DataError(refusal)
    return found or embeddings_of(source, dataset_folder)


def embeddings_of(source: TextSource, dataset_folder: Path) -> Embeddings:
    """Vectors of all items, for one rank. Raises DataError where they cannot be had."""
    return embed_items(
        dataset_folder,
        encoder=source.encoder,
        dimension=source.embedding_dim,
        path=None if source.embeddings_path is None else Path(source.embeddings_path),
        keys=None if source.embeddings_keys is None else Path(source.embeddings_keys),
        template=source.template,
        item_table=None if source.item_table is None else Path(source.item_table),
    )
