"""Drafters: scorers of all items that propose what a generative model is to verify (SpecGR, arXiv 2410.02939).

`SemanticKNN` knows the items' texts alone, `RetrievalDrafter` is a trained retrieval model; a generative model's own
encoder drafts too (`draft_head`). A drafter that represents items by their texts scores those that no training event
has like any other. The public code masks ids beyond a limit; here a drafter scores what it knows, and what may be
drafted is the caller's choice.

Letters: V largest item id + 1, X items of a catalogue, D width of a vector.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.data.errors import DataError
from generative_recommenders.data.text_embeddings import Embeddings
from generative_recommenders.retrieval.model import RetrievalModel
from generative_recommenders.retrieval.text_items import Whitening
from ops.row_sums import row_sums

# Of a checkpoint, the vectors that a drafter goes by, where one goes by texts.
TEXTS_FILE = "texts.safetensors"


class Drafter(Protocol):
    def scores(self, batch: SequenceBatch) -> Tensor:
        """(B, V) float32, column = item id, -inf for ids it does not know."""


class SemanticKNN:
    """Score of an item = its vector . mean of the vectors of the history, all of length 1.

    vectors_VD: row = item id; a row of zeros stands for nothing. known_V: bool, the items that are scored; a history
    may hold others, which count if they have a vector. A history of which nothing has one scores all items 0. last_n:
    newest events that count, 0 for all. whitening: what the vectors have gone through already, for those to come.
    """

    def __init__(
        self, vectors_VD: Tensor, known_V: Tensor, last_n: int = 0, whitening: Whitening | None = None
    ) -> None:
        assert vectors_VD.dim() == 2 and known_V.shape == vectors_VD.shape[:1], (vectors_VD.shape, known_V.shape)
        assert last_n >= 0, last_n
        self.vectors_VD = F.normalize(vectors_VD.float(), dim=1)
        self.has_vector_V = self.vectors_VD.any(dim=1)
        self.known_V = known_V
        self.last_n = last_n
        self.whitening = whitening

    @classmethod
    def of(
        cls,
        embeddings: Embeddings,
        device: torch.device | str = "cpu",
        last_n: int = 0,
        whitening: Whitening | None = None,
    ) -> SemanticKNN:
        """Over all items that have an embedding, which the whitening is applied to."""
        if whitening is not None:
            embeddings = replace(embeddings, values_ND=whitening(embeddings.values_ND))
        size = int(embeddings.item_ids_N[-1]) + 1
        vectors_VD = embeddings.values_ND.new_zeros(size, embeddings.values_ND.shape[1])
        vectors_VD[embeddings.item_ids_N] = embeddings.values_ND
        known_V = torch.zeros(size, dtype=torch.bool)
        known_V[embeddings.item_ids_N] = True
        return cls(vectors_VD.to(device), known_V.to(device), last_n, whitening)

    def with_items(self, item_ids_n: Tensor, vectors_nD: Tensor) -> SemanticKNN:
        """The same with these items' vectors, (n, D) as their encoder gives them, in place of older ones.

        Raises:
            DataError: a vector is not finite, or so long that its length is not.
        """
        device = self.vectors_VD.device
        new_nD = vectors_nD.float().cpu()
        new_nD = (new_nD if self.whitening is None else self.whitening(new_nD)).to(device)
        if not bool(new_nD.norm(dim=1).isfinite().all()):
            raise DataError("text vectors: got values that are not finite, expected those of the checkpoint's encoder")
        ids_n = item_ids_n.to(device)
        grown = max(0, max(item_ids_n.tolist(), default=0) + 1 - len(self.known_V))
        vectors_VD, known_V = F.pad(self.vectors_VD, (0, 0, 0, grown)), F.pad(self.known_V, (0, grown))
        return SemanticKNN(
            vectors_VD.index_copy(0, ids_n, new_nD), known_V.index_fill(0, ids_n, True), self.last_n, self.whitening
        )

    def save(self, path: Path) -> None:
        """What a recommender needs to score by texts, in one file."""
        aside = path.with_name(f".{path.name}")
        tensors = {"vectors": self.vectors_VD.cpu().contiguous(), "known": self.known_V.cpu().contiguous()}
        if self.whitening is not None:
            tensors |= {name: tensor.contiguous() for name, tensor in self.whitening._asdict().items()}
        save_file(tensors, aside, {"last_n": str(self.last_n)})
        aside.replace(path)

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> SemanticKNN:
        """Raises DataError where the file is missing, damaged or another one."""
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                last_n = int((file.metadata() or {})["last_n"])
                texts = cls(file.get_tensor("vectors"), file.get_tensor("known"), last_n)
                if set(Whitening._fields) & set(file.keys()):
                    whitening = Whitening(*(file.get_tensor(name).cpu() for name in Whitening._fields))
                    width = texts.vectors_VD.shape[1]
                    if [tuple(tensor.shape) for tensor in whitening] != [(width,), (width, width)]:
                        raise ValueError(f"its whitening is not one of vectors of width {width}")
                    texts.whitening = whitening
                return texts
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise DataError(f"{path}: no text vectors can be read ({error})") from error

    @torch.no_grad()
    def scores(self, batch: SequenceBatch) -> Tensor:
        """(B, V) float32, column = item id, -inf for ids it does not know."""
        # Items that were added since have no vector here.
        known_T = batch.item_ids_T < len(self.has_vector_V)
        ids_T, rows_T = torch.where(known_T, batch.item_ids_T, 0), batch.rows_T()
        counts_T = known_T & self.has_vector_V[ids_T]
        if self.last_n:
            counts_T = counts_T & (batch.positions_T() >= batch.lengths_B[rows_T] - self.last_n)
        sums_BD = row_sums(rows_T[counts_T], self.vectors_VD[ids_T[counts_T]], num_rows=batch.size)
        means_BD = sums_BD / torch.bincount(rows_T[counts_T], minlength=batch.size).clamp(min=1)[:, None]
        return (means_BD @ self.vectors_VD.T).masked_fill_(~self.known_V, -math.inf)


class MixedDrafter:
    """Scores of one drafter and, `weight` times, the similarity of texts.

    A drafter that has learned from events knows what goes together, texts know what is new. Items whose texts are not
    known get nothing added, as if they were near to nothing, and what the drafter does not know stays unknown.
    """

    def __init__(self, base: Drafter, texts: SemanticKNN, weight: float) -> None:
        self.base, self.texts, self.weight = base, texts, weight

    def scores(self, batch: SequenceBatch) -> Tensor:
        """(B, V) float32, column = item id, -inf for ids that `base` does not know."""
        return self.added_to(self.base.scores(batch), batch)

    def added_to(self, scores_BV: Tensor, batch: SequenceBatch) -> Tensor:
        """The scores of `base`, which are at hand, with those of the texts."""
        texts_BV = self.texts.scores(batch)
        count = min(texts_BV.shape[1], scores_BV.shape[1])
        texts_BV = torch.where(texts_BV.isneginf(), 0.0, texts_BV)[:, :count]
        mixed_BV = scores_BV.clone()
        mixed_BV[:, :count] += self.weight * texts_BV
        return mixed_BV


class RetrievalDrafter:
    """Scores of a trained retrieval model, with any similarity, for all items of its catalogue.

    The items' side is that of the weights at construction, and the model is put into evaluation. window: newest events
    that the model sees, at most as many as it was trained with; None for all. A row without events scores all items 0.
    """

    def __init__(self, model: RetrievalModel, window: int | None = None) -> None:
        assert window is None or window >= 1, window
        self.model = model.eval()
        self.window = window
        with torch.no_grad():
            self.items = model.item_features()

    @torch.no_grad()
    def scores(self, batch: SequenceBatch) -> Tensor:
        """(B, V) float32, column = item id, -inf for ids it does not know."""
        catalog_X, similarity = self.model.catalog_X, self.model.similarity
        filled_B = batch.lengths_B > 0
        scores_BX = torch.zeros(batch.size, len(catalog_X), device=catalog_X.device)
        if bool(filled_B.any()):
            asked = newest_events(batch, self.window)
            asked = asked if bool(filled_B.all()) else _without_empty_rows(asked, filled_B)
            queries, _ = similarity.project_queries(self.model.last_queries(asked), asked.user_ids_B, None)
            scores_BX[filled_B] = similarity.score(queries, self.items, None).float()
        scores_BV = scores_BX.new_full((batch.size, int(catalog_X[-1]) + 1), -math.inf)
        return scores_BV.index_copy_(1, catalog_X, scores_BX)


def newest_events(batch: SequenceBatch, window: int | None) -> SequenceBatch:
    """The batch with at most the `window` newest events of each row."""
    if window is None or not bool((batch.lengths_B > window).any()):
        return batch
    kept_T = batch.positions_T() >= batch.lengths_B[batch.rows_T()] - window
    lengths_B = batch.lengths_B.clamp(max=window)
    return replace(
        batch,
        item_ids_T=batch.item_ids_T[kept_T],
        ratings_T=batch.ratings_T[kept_T],
        timestamps_T=batch.timestamps_T[kept_T],
        next_item_ids_T=batch.next_item_ids_T[kept_T],
        next_timestamps_T=batch.next_timestamps_T[kept_T],
        offsets=F.pad(lengths_B.cumsum(0), (1, 0)),
        events={name: column[kept_T] for name, column in batch.events.items()},
    )


def _without_empty_rows(batch: SequenceBatch, filled_B: Tensor) -> SequenceBatch:
    return replace(
        batch,
        offsets=F.pad(batch.offsets[1:][filled_B], (1, 0)),
        user_ids_B=batch.user_ids_B[filled_B],
        target_ids_B=batch.target_ids_B[filled_B],
        target_ratings_B=batch.target_ratings_B[filled_B],
        target_timestamps_B=batch.target_timestamps_B[filled_B],
        row_numbers_B=batch.row_numbers_B[filled_B],
    )
