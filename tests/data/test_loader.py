"""Splits, collation and the loader: what a batch holds, and that order, workers and ranks change nothing else."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.data.collate import Split, Thinning
from generative_recommenders.data.loader import Loader
from tests.batches import dataset

lengths_strategy = st.lists(st.integers(1, 25), min_size=1, max_size=12).filter(lambda x: max(x) >= 4)


def rows(batch: SequenceBatch) -> list[dict[str, list[int] | int]]:
    """A batch as plain rows, independent of how it is laid out."""
    out = []
    for b in range(batch.size):
        part = slice(int(batch.offsets[b]), int(batch.offsets[b + 1]))
        out.append(
            {
                "user": int(batch.user_ids_B[b]),
                "ids": batch.item_ids_T[part].tolist(),
                "times": batch.timestamps_T[part].tolist(),
                "ratings": batch.ratings_T[part].tolist(),
                "next": batch.next_item_ids_T[part].tolist(),
                "next_times": batch.next_timestamps_T[part].tolist(),
                "target": int(batch.target_ids_B[b]),
                "number": int(batch.row_numbers_B[b]),
            }
        )
    return out


@settings(max_examples=60, deadline=None)
@given(lengths_strategy, st.integers(1, 30), st.integers(0, 2))
def test_batch_equals_slicing_each_user(lengths: list[int], window: int, held_out: int) -> None:
    data = dataset(lengths)
    split = Split(data, window, held_out)
    users = [u for u, n in enumerate(lengths) if n >= held_out + 2]
    assert len(split) == len(users) and split.num_skipped == len(lengths) - len(users)
    members = torch.arange(len(split))
    if not len(split):
        return
    for row, user in zip(rows(split.batch(members, members)), users, strict=True):
        first, last = int(data.offsets[user]), int(data.offsets[user + 1]) - held_out
        ids, times = data.item_ids_E[first:last].tolist(), data.timestamps_E[first:last].tolist()
        assert row["ids"] == ids[:-1][-window:]
        assert row["next"] == ids[1:][-window:]
        assert row["times"] == times[:-1][-window:]
        assert row["next_times"] == times[1:][-window:]
        assert row["ratings"] == data.ratings_E[first:last].tolist()[:-1][-window:]
        assert row["target"] == ids[-1]


@settings(max_examples=40, deadline=None)
@given(lengths_strategy, st.integers(1, 5), st.integers(1, 4), st.integers(0, 3))
def test_ranks_share_every_batch(lengths: list[int], batch_size: int, world_size: int, epoch: int) -> None:
    split = Split(dataset(lengths), 10, 0)
    loaders = [Loader(split, batch_size, seed=4, rank=r, world_size=world_size) for r in range(world_size)]
    one = Loader(split, batch_size * world_size, seed=4)
    seen: list[int] = []
    for parts, whole in zip(
        zip(*(loader.epoch(epoch) for loader in loaders), strict=True), one.epoch(epoch), strict=True
    ):
        assert [r for part in parts for r in rows(part)] == rows(whole)
        seen += whole.user_ids_B.tolist()
    assert sorted(seen) == split.dataset.user_ids_U[split.rows].tolist()


@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_change_nothing(num_workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("generative_recommenders.data.loader.os.cpu_count", lambda: 16)
    split = Split(dataset([5, 9, 3, 12, 7, 4, 6]), 6, 1, Thinning(0.7, 1.5, 3))
    plain = [rows(b) for b in Loader(split, 2, seed=1).epoch(2)]
    assert [rows(b) for b in Loader(split, 2, seed=1, num_workers=num_workers).epoch(2)] == plain
    assert [rows(b) for b in Loader(split, 2, seed=1).epoch(3)] != plain
    assert [rows(b) for b in Loader(split, 2, seed=2).epoch(2)] != plain


def test_an_epoch_can_be_taken_up_anywhere() -> None:
    split = Split(dataset([5, 9, 3, 12, 7, 4, 6]), 6, 1)
    loader = Loader(split, 2, seed=1)
    whole = [rows(b) for b in loader.epoch(1)]
    for start in range(len(whole) + 1):
        assert [rows(b) for b in loader.epoch(1, start)] == whole[start:]
    assert len(whole) == len(loader)


def test_drop_last() -> None:
    split = Split(dataset([5] * 7), 6, 0)
    assert [b.size for b in Loader(split, 3, drop_last=True).epoch(0)] == [3, 3]
    assert [b.size for b in Loader(split, 3).epoch(0)] == [3, 3, 1]


def test_positional_sampling_keeps_about_that_share() -> None:
    split = Split(dataset([400] * 20), 1000, 0, Thinning(0.3, None, 0))
    members = torch.arange(20)
    batch = split.batch(members, members, epoch=1)
    share = (batch.item_ids_T.numel() + 20) / (400 * 20)
    assert 0.27 < share < 0.33
    # Kept events stay in order, and every next event is the following kept one.
    assert bool((batch.next_timestamps_T >= batch.timestamps_T).all())
    inner = torch.ones(batch.item_ids_T.numel(), dtype=torch.bool)
    inner[batch.offsets[1:] - 1] = False
    at = inner.nonzero().flatten()
    assert torch.equal(batch.next_item_ids_T[at], batch.item_ids_T[at + 1])
    assert not torch.equal(split.batch(members, members, epoch=2).lengths_B, batch.lengths_B)


def test_nobody_is_thinned_away() -> None:
    split = Split(dataset([2, 3, 2, 2]), 5, 0, Thinning(1e-6, None, 0))
    batch = split.batch(torch.arange(4), torch.arange(4))
    assert batch.lengths_B.tolist() == [1, 1, 1, 1]


def test_stochastic_length_shortens_long_histories_at_the_stated_rate() -> None:
    window, alpha, length = 100, 1.6, 90
    split = Split(dataset([length + 1] * 2000), window, 0, Thinning(1.0, alpha, 0))
    members = torch.arange(2000)
    lengths = split.batch(members, members).lengths_B
    short = int(window ** (alpha / 2))
    assert set(lengths.tolist()) == {short, length}
    expected = 1 - window**alpha / length**2
    assert abs((lengths == short).double().mean().item() - expected) < 0.03
    untouched = Split(dataset([short] * 50), window, 0, Thinning(1.0, alpha, 0))
    assert set(untouched.batch(torch.arange(50), torch.arange(50)).lengths_B.tolist()) == {short - 1}


def test_large_ids_survive() -> None:
    data = dataset([4, 5], first_item=440_000_001)
    batch = Split(data, 10, 0).batch(torch.arange(2), torch.arange(2))
    assert torch.equal(batch.item_ids_T, torch.cat([data.item_ids_E[:3], data.item_ids_E[4:8]]))
    assert batch.item_ids_T.dtype == torch.int64


def test_batch_moves_as_a_whole() -> None:
    batch = Split(dataset([4, 5]), 10, 0).batch(torch.arange(2), torch.arange(2)).to("cpu")
    assert {f.name for f in dataclasses.fields(batch)} == set(vars(batch))
    assert batch.rows_T().tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert batch.positions_T().tolist() == [0, 1, 2, 0, 1, 2, 3]
