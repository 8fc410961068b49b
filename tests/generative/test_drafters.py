"""Drafters against brute force, and what they make of odd histories."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.config import load
from generative_recommenders.data.errors import DataError
from generative_recommenders.data.text_embeddings import Embeddings
from generative_recommenders.generative.drafters import MixedDrafter, RetrievalDrafter, SemanticKNN, newest_events
from generative_recommenders.retrieval.assemble import Plan, build_model
from generative_recommenders.retrieval.text_items import Whitening
from tests.batches import batch, rows_of
from tests.test_main_mol import MOL

ITEMS, DIM = 30, 6
LENGTHS = [3, 1, 7, 0, 5]
# Ids with gaps, not up to the largest.
CATALOG = torch.tensor([i for i in range(1, ITEMS + 1) if i % 7])


def vectors(seed: int = 0) -> Tensor:
    """Row 0 and that of item 4 are zeros: nothing is known of them."""
    made = torch.randn(ITEMS + 1, DIM, generator=torch.Generator().manual_seed(seed)) * 3
    made[[0, 4]] = 0
    return made


def naive_knn(vectors_VD: Tensor, known: list[bool], history: list[int], last_n: int) -> list[float]:
    unit = [v / v.norm() if v.norm() > 0 else v for v in vectors_VD]
    newest = history[-last_n:] if last_n else history
    read = [unit[i] for i in newest if bool(vectors_VD[i].any())]
    mean = sum(read) / len(read) if read else torch.zeros(DIM)
    return [float(mean @ unit[i]) if known[i] else -math.inf for i in range(len(unit))]


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    last_n=st.integers(0, 4),
    seed=st.integers(0, 1_000),
)
def test_semantic_knn_is_the_mean_of_unit_vectors(lengths: list[int], last_n: int, seed: int) -> None:
    known = torch.rand(ITEMS + 1, generator=torch.Generator().manual_seed(seed)) < 0.8
    asked = batch(lengths, ITEMS, seed)
    found = SemanticKNN(vectors(seed), known, last_n).scores(asked)
    assert found.dtype == torch.float32
    for row, (first, end) in enumerate(zip(asked.offsets.tolist(), asked.offsets[1:].tolist(), strict=False)):
        expected = naive_knn(vectors(seed), known.tolist(), asked.item_ids_T[first:end].tolist(), last_n)
        torch.testing.assert_close(found[row], torch.tensor(expected), atol=1e-5, rtol=1e-4)


class Fixed:
    def __init__(self, scores_BV: Tensor) -> None:
        self.scores_BV = scores_BV

    def scores(self, batch: SequenceBatch) -> Tensor:
        return self.scores_BV


@pytest.mark.parametrize("size", [ITEMS - 4, ITEMS + 1, ITEMS + 3])
def test_texts_are_added_to_what_a_drafter_knows(size: int) -> None:
    """Which knows fewer, as many or more ids than there are texts, and some not at all."""
    known = torch.arange(ITEMS + 1) % 5 != 2
    texts, asked = SemanticKNN(vectors(), known), batch(LENGTHS, ITEMS, seed=2)
    base_BV = torch.randn(len(LENGTHS), size, generator=torch.Generator().manual_seed(1))
    base_BV[:, 3::4] = -math.inf
    kept_BV = base_BV.clone()
    found = MixedDrafter(Fixed(base_BV), texts, 0.7).scores(asked)
    assert torch.equal(base_BV, kept_BV)
    near = texts.scores(asked)
    for item in range(size):
        share = 0.7 * near[:, item] if item <= ITEMS and known[item] else 0.0
        torch.testing.assert_close(found[:, item], base_BV[:, item] + share)


def test_events_of_items_added_since_do_not_count() -> None:
    texts = SemanticKNN(vectors(), torch.ones(ITEMS + 1, dtype=torch.bool))
    asked = batch([3, 2], ITEMS, seed=5)
    grown = replace(
        asked, item_ids_T=torch.where(torch.tensor([False, True, False, True, True]), ITEMS + 9, asked.item_ids_T)
    )
    one = rows_of(asked, [0])
    kept = replace(one, item_ids_T=one.item_ids_T[[0, 2]], offsets=torch.tensor([0, 2]))
    torch.testing.assert_close(texts.scores(grown)[0], texts.scores(kept)[0])
    assert bool((texts.scores(grown)[1] == 0).all())


def test_semantic_knn_of_embeddings_knows_the_items_that_have_one() -> None:
    embeddings = Embeddings(CATALOG, vectors()[CATALOG], "")
    found = SemanticKNN.of(embeddings).scores(batch(LENGTHS, 6))
    assert found.shape == (len(LENGTHS), int(CATALOG[-1]) + 1)
    finite = found.isfinite()
    assert finite.nonzero()[:, 1].unique().tolist() == CATALOG.tolist()
    assert bool((finite == finite[:1]).all())


@pytest.mark.parametrize("whiten", [False, True])
def test_items_that_come_later_are_seen_as_they_would_have_been_from_the_start(tmp_path: Path, whiten: bool) -> None:
    early, everything = CATALOG[:-2], Embeddings(CATALOG, vectors()[CATALOG], "")
    whitening = Whitening.fit(vectors()[early]) if whiten else None
    whole = SemanticKNN.of(everything, last_n=3, whitening=whitening)
    part = SemanticKNN.of(Embeddings(early, vectors()[early], ""), last_n=3, whitening=whitening)
    part.save(tmp_path / "texts.safetensors")
    loaded = SemanticKNN.load(tmp_path / "texts.safetensors")
    # One of them replaces a vector that is there.
    late = CATALOG[-3:].flip(0)
    grown = loaded.with_items(late, vectors()[late])
    grown.save(tmp_path / "grown.safetensors")
    asked = batch(LENGTHS, ITEMS, seed=4)
    for found in (grown, SemanticKNN.load(tmp_path / "grown.safetensors")):
        torch.testing.assert_close(found.scores(asked), whole.scores(asked))
    assert loaded.scores(asked).shape[1] == int(early[-1]) + 1
    for scale in (math.nan, 1e30):
        with pytest.raises(DataError, match="not finite"):
            loaded.with_items(late, vectors()[late] * scale)
    if whitening is not None:
        part.whitening = Whitening(whitening.mean_E[1:], whitening.map_EE)
        part.save(tmp_path / "damaged.safetensors")
        with pytest.raises(DataError, match=f"not one of vectors of width {DIM}"):
            SemanticKNN.load(tmp_path / "damaged.safetensors")


def drafter(*bindings: str, window: int | None = None) -> RetrievalDrafter:
    small = [
        "train_fn.max_sequence_length = 8",
        "train_fn.item_embedding_dim = 8",
        "train_fn.item_l2_norm = True",
        "sasrec_encoder.ffn_hidden_dim = 8",
    ]
    plan = Plan.of(load([], ["main.experiment = @train_fn", *small, *bindings]))
    text = torch.randn(len(CATALOG), 5, generator=torch.Generator().manual_seed(3))
    model = build_model(plan, CATALOG, text_XE=text if plan.text_items else None)
    return RetrievalDrafter(model, window)


KINDS = {
    "dot": (),
    "mol": (*MOL, "train_fn.loss_weights = {}"),
    "text": ("train_fn.item_encoder = 'text'",),
}


def known_batch(lengths: list[int], seed: int = 0) -> SequenceBatch:
    """Histories of items of the catalogue."""
    made = batch(lengths, len(CATALOG), seed)
    return replace(made, item_ids_T=CATALOG[made.item_ids_T - 1], target_ids_B=CATALOG[made.target_ids_B - 1])


@pytest.mark.parametrize("kind", KINDS)
def test_scores_rank_as_the_model_does(kind: str) -> None:
    draft = drafter(*KINDS[kind])
    assert not draft.model.training
    asked = known_batch([3, 1, 7, 5])
    found = draft.scores(asked)
    assert found.shape == (4, int(CATALOG[-1]) + 1)
    absent = torch.ones(found.shape[1], dtype=torch.bool).index_fill_(0, CATALOG, False)
    assert bool(found[:, absent].isneginf().all()) and bool(found[:, CATALOG].isfinite().all())
    scores, ids = draft.model.top_k()(draft.model.search_queries(asked), len(CATALOG))
    torch.testing.assert_close(found.gather(1, ids), scores, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_one_by_one_and_without_events(kind: str) -> None:
    draft = drafter(*KINDS[kind])
    asked = known_batch(LENGTHS)
    found = draft.scores(asked)
    for row in range(len(LENGTHS)):
        torch.testing.assert_close(draft.scores(rows_of(asked, [row]))[0], found[row], atol=1e-4, rtol=1e-4)
    assert bool((found[LENGTHS.index(0), CATALOG] == 0).all())


def test_the_window_is_what_the_model_sees() -> None:
    asked = known_batch([3, 1, 7, 5])
    found = drafter(window=4).scores(asked)
    torch.testing.assert_close(found, drafter().scores(newest_events(asked, 4)))
    rows = [0, 1]
    torch.testing.assert_close(found[rows], drafter().scores(asked)[rows])
    assert not torch.allclose(found[2, CATALOG], drafter().scores(asked)[2, CATALOG])


@pytest.mark.parametrize("window", [1, 3, 9, None])
def test_newest_events(window: int | None) -> None:
    asked = batch(LENGTHS, ITEMS)
    asked = replace(asked, events={"kind": torch.arange(len(asked.item_ids_T))})
    cut = newest_events(asked, window)
    tokens = [
        token
        for first, end in zip(asked.offsets.tolist(), asked.offsets[1:].tolist(), strict=False)
        for token in list(range(first, end))[-window if window else None :]
    ]
    assert cut.lengths_B.tolist() == [min(n, window or n) for n in LENGTHS]
    assert cut.events["kind"].tolist() == tokens
    for name in ("item_ids_T", "ratings_T", "timestamps_T", "next_item_ids_T", "next_timestamps_T"):
        assert torch.equal(getattr(cut, name), getattr(asked, name)[tokens]), name
