"""Items to codes, the token embedding and the heads over codes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from generative_recommenders.errors import UserError
from generative_recommenders.generative.heads import CodeHeads
from generative_recommenders.generative.tokens import IdTable, TokenEmbedding, hashed_users
from generative_recommenders.tokenizers.semantic_ids import SemanticIds
from tests import batches

SIZES = (3, 5, 2)


def ids_of(items: Sequence[int], sizes: tuple[int, ...] = SIZES, seed: int = 0) -> SemanticIds:
    draw = torch.Generator().manual_seed(seed)
    codes = torch.stack([torch.randint(size, (len(items),), generator=draw) for size in sizes], 1)
    return SemanticIds.of(list(items), codes, sizes)


def test_codes_of_items_are_those_of_the_table_and_unknown_items_have_none() -> None:
    ids = ids_of([4, 9, 2, 31])
    table = IdTable(ids)
    asked = torch.tensor([[2, 31], [9, 4]])
    assert torch.equal(table.codes_of_items(asked).flatten(0, 1), ids.codes_of(asked.flatten()))
    assert table.codes_of_items(torch.tensor([0, 3, 32, -1, 10**12])).unique().tolist() == [-1]
    assert table.rows_of(torch.tensor([2, 4, 9, 31, 5])).tolist() == [0, 1, 2, 3, -1]
    assert (table.levels, table.modalities, table.fingerprints) == (3, (3,), (ids.fingerprint,))
    assert not table.state_dict()


def test_tables_side_by_side_hold_the_items_that_all_have() -> None:
    first, second = ids_of([4, 9, 2]), ids_of([2, 4, 7], (6, 4), seed=1)
    table = IdTable(first, second)
    assert table.sizes == (3, 5, 2, 6, 4) and table.modalities == (3, 2)
    asked = torch.tensor([4, 2])
    assert torch.equal(table.codes_of_items(asked), torch.cat([first.codes_of(asked), second.codes_of(asked)], 1))
    assert table.rows_of(torch.tensor([9, 7])).tolist() == [-1, -1]
    with pytest.raises(UserError, match="without an item in common"):
        IdTable(first, ids_of([1, 3]))
    with pytest.raises(UserError, match="got no table"):
        IdTable()


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    known=st.sets(st.integers(1, 12), min_size=1),
    seed=st.integers(0, 1000),
)
def test_unknown_events_leave_and_the_rest_closes_up(lengths: list[int], known: set[int], seed: int) -> None:
    batch = batches.batch(lengths, num_items=12, seed=seed)
    batch.events["kind"] = batch.item_ids_T * 10
    found = IdTable(ids_of(sorted(known))).known_only(batch)
    assert torch.equal(found.target_ids_B, batch.target_ids_B)
    for row in range(len(lengths)):
        before = batch.item_ids_T[batch.offsets[row] : batch.offsets[row + 1]].tolist()
        times = batch.timestamps_T[batch.offsets[row] : batch.offsets[row + 1]].tolist()
        kept = [(item, time) for item, time in zip(before, times, strict=True) if item in known]
        own = slice(int(found.offsets[row]), int(found.offsets[row + 1]))
        assert found.item_ids_T[own].tolist() == [item for item, _ in kept]
        assert found.timestamps_T[own].tolist() == [time for _, time in kept]
        assert found.events["kind"][own].tolist() == [item * 10 for item, _ in kept]
        following = [*kept[1:], (int(batch.target_ids_B[row]), int(batch.target_timestamps_B[row]))][: len(kept)]
        assert found.next_item_ids_T[own].tolist() == [item for item, _ in following]
        assert found.next_timestamps_T[own].tolist() == [time for _, time in following]


def test_a_batch_of_known_items_is_left_as_it_is() -> None:
    batch = batches.batch([3, 0, 2], num_items=5)
    assert IdTable(ids_of(range(1, 6))).known_only(batch) is batch


def test_histories_are_user_codes_and_separators() -> None:
    table = IdTable(ids_of(range(1, 8)))
    embedding = TokenEmbedding(SIZES, 4, users=10, separator=True)
    batch = batches.batch([2, 0, 1], num_items=7)
    x_SD, offsets = embedding.histories(table, batch)
    assert offsets.tolist() == [0, 9, 10, 15]
    assert torch.equal(x_SD[[0, 9, 10]], embedding.of_users(batch.user_ids_B))
    assert torch.equal(x_SD[[4, 8, 14]], embedding.separator.expand(3, 4))
    codes = table.codes_of_items(batch.item_ids_T)
    # Rows of the one table: levels of 3, 5 and 2 codes begin at 0, 3 and 8.
    for event, start in enumerate((1, 5, 11)):
        assert torch.equal(x_SD[start : start + 3], embedding.table[codes[event] + torch.tensor([0, 3, 8])])
    assert torch.equal(embedding.level(1, codes[:, 1]), embedding.items(codes)[:, 1])
    plain = TokenEmbedding(SIZES, 4)
    assert plain.histories(table, batch)[1].tolist() == [0, 6, 6, 9]
    with pytest.raises(ValueError, match="no rows for users"):
        plain.of_users(batch.user_ids_B)


def test_an_unknown_user_is_the_mean_of_all_rows_and_no_one_in_particular() -> None:
    embedding = TokenEmbedding(SIZES, 4, users=10)
    assert embedding.users is not None
    found = embedding.of_users(torch.tensor([3, -1]))
    torch.testing.assert_close(found[1], embedding.users.mean(0))
    assert torch.equal(found[0], embedding.users[hashed_users(torch.tensor([3]), 10)][0])


def test_users_hash_evenly_and_always_alike() -> None:
    rows = hashed_users(torch.arange(20_000), 50)
    counts = torch.bincount(rows, minlength=50)
    assert rows.max() < 50 and counts.min() > 300 and counts.max() < 500
    assert torch.equal(rows[[7, 5]].view(2, 1), hashed_users(torch.tensor([[7], [5]]), 50))
    assert rows[:6].tolist() == [41, 18, 14, 9, 17, 20]


@pytest.mark.parametrize("width", [3, 8, 20])
def test_codebooks_start_the_table_and_keep_their_geometry(width: int) -> None:
    draw = torch.Generator().manual_seed(2)
    # Few directions carry all, so that a narrower table can hold them.
    basis = torch.randn(3, width, generator=draw)
    codebooks = [(torch.randn(n, 3, generator=draw) @ basis) * 0.5**level for level, n in enumerate((30, 50))]
    embedding = TokenEmbedding((30, 50, 4), 8, std=0.3)
    last = embedding.table[80:].clone()
    embedding.from_codebooks(codebooks)
    assert torch.equal(embedding.table[80:], last)
    for codebook, rows in zip(codebooks, embedding.table.detach().split([30, 50, 4]), strict=False):
        assert rows.square().mean().sqrt().item() == pytest.approx(0.3, rel=1e-4)
        distances, before = torch.pdist(rows), torch.pdist(codebook)
        torch.testing.assert_close(distances / distances.mean(), before / before.mean(), rtol=1e-3, atol=1e-4)
    again = TokenEmbedding((30, 50, 4), 8, std=0.3)
    again.from_codebooks(codebooks)
    assert torch.equal(again.table[:80], embedding.table[:80])


def test_codebooks_of_another_tokenizer_are_refused() -> None:
    embedding = TokenEmbedding(SIZES, 8)
    with pytest.raises(UserError, match=r"got shape \(4, 2\) at level 1, expected \(5, width\)"):
        embedding.from_codebooks([torch.zeros(3, 2), torch.zeros(4, 2)])
    with pytest.raises(UserError, match="got 4 levels, expected at most 3"):
        embedding.from_codebooks([torch.zeros(3, 2)] * 4)


def test_codebooks_of_sub_vectors_may_have_their_own_widths() -> None:
    embedding = TokenEmbedding(SIZES, 8, std=1.0)
    embedding.from_codebooks([torch.randn(3, 2), torch.randn(5, 12), torch.zeros(2, 4)])
    assert bool(embedding.table.isfinite().all()) and bool((embedding.table[8:] == 0).all())


@pytest.mark.parametrize("kind", ["shared", "levels", "hidden", "tied"])
def test_heads_score_a_level_by_its_own_codes(kind: str) -> None:
    embedding = TokenEmbedding(SIZES, 6)
    heads = CodeHeads(
        SIZES,
        6,
        shared=kind != "levels",
        hidden=7 if kind == "hidden" else 0,
        tied=embedding if kind == "tied" else None,
    )
    states_nLD, codes_nL = torch.randn(4, 3, 6), torch.tensor([[0, 4, 1], [2, 0, 0], [1, 1, 1], [-1, -1, -1]])
    losses_nL = heads.losses(states_nLD, codes_nL)
    assert [heads.logits(level, states_nLD).shape[-1] for level in range(3)] == list(SIZES)
    assert losses_nL[3].tolist() == [0.0, 0.0, 0.0] and bool((losses_nL[:3] > 0).all())
    log_probs_nL = heads.log_probs(states_nLD[:3], codes_nL[:3])
    torch.testing.assert_close(log_probs_nL, -losses_nL[:3])
    if kind in ("shared", "levels"):
        full = states_nLD[:, 1] @ torch.cat(list(heads.matrices)).T
        torch.testing.assert_close(heads.logits(1, states_nLD[:, 1]), full[:, 3:8])
    if kind == "tied":
        assert not list(heads.parameters())
        expected = states_nLD[:, 2] @ embedding.table[8:].T / 6**0.5
        torch.testing.assert_close(heads.logits(2, states_nLD[:, 2]), expected)
    with pytest.raises(ValueError, match="tied table"):
        CodeHeads(SIZES, 6, shared=False, tied=embedding)


def test_smoothing_spreads_over_the_level_alone() -> None:
    heads = CodeHeads(SIZES, 6)
    states_nLD, codes_nL = torch.randn(2, 3, 6), torch.tensor([[0, 4, 1], [2, 0, 0]])
    found = heads.losses(states_nLD, codes_nL, label_smoothing=0.2)
    for level, size in enumerate(SIZES):
        log_probs = heads.logits(level, states_nLD[:, level]).log_softmax(-1)
        wanted = torch.full((2, size), 0.2 / size)
        wanted[torch.arange(2), codes_nL[:, level]] += 0.8
        torch.testing.assert_close(found[:, level], -(wanted * log_probs).sum(-1))
