"""Fractal expansion: the matrix, its pattern, the blocks and their statistics."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from generative_recommenders.data import fractal_plan, sources
from generative_recommenders.data.errors import DataError
from generative_recommenders.data.fractal import (
    Expansion,
    Settings,
    _resized,
    index_ratings,
    reduce_ratings,
    top_singular,
)
from generative_recommenders.data.fractal_input import read_events
from generative_recommenders.data.fractal_report import (
    Activity,
    statistics_table,
)
from generative_recommenders.data.preprocess import prepare
from tests.fractal_ratings import dense_ratings, rating_lines, small_ratings, small_settings, write_csv


@pytest.mark.parametrize(("shape", "rank"), [((60, 40), 8), ((40, 60), 8), ((300, 200), 16), ((6, 5), 5), ((4, 9), 1)])
def test_singular_values_and_vectors_equal_numpy(shape: tuple[int, int], rank: int) -> None:
    generator = np.random.default_rng(1)
    # Rows and columns of unequal weight, as ratings have, and an empty row.
    scale = np.outer(generator.lognormal(size=shape[0]), generator.lognormal(size=shape[1]))
    dense = generator.standard_normal(shape) * scale * (generator.random(shape) < 0.5)
    dense[1] = 0
    starts = np.concatenate(([0], np.cumsum((dense != 0).sum(axis=1))))
    entries = dense != 0
    left, values, right = top_singular(starts, np.nonzero(entries)[1].astype(np.int32), dense[entries], shape[1], rank)
    U, expected, V = np.linalg.svd(dense, full_matrices=False)
    np.testing.assert_allclose(
        values[: np.count_nonzero(expected > 1e-9)], expected[:rank][expected[:rank] > 1e-9], 1e-4
    )
    wanted = (U[:, :rank] * expected[:rank]) @ V[:rank]
    np.testing.assert_allclose((left * values) @ right.T, wanted, atol=1e-3 * expected[0])


def test_without_a_resize_the_pattern_is_the_scaled_matrix() -> None:
    """As many rows and columns as users and items: all singular values are kept and nothing is averaged."""
    ratings = small_ratings(users=7, items=7)
    dense = dense_ratings(ratings)
    centered = np.where(dense > 0, dense - dense[dense > 0].mean(), 0)
    left, values, right = np.linalg.svd(centered / np.abs(centered).max())
    wanted = (left * values) @ right
    wanted = (wanted - wanted.min()) / (wanted.max() - wanted.min())
    np.testing.assert_allclose(reduce_ratings(ratings, 7, 7), wanted, atol=2e-5)


def test_resized_vectors_are_averages_made_orthonormal() -> None:
    vectors = np.linalg.qr(np.random.default_rng(0).standard_normal((40, 3)))[0]
    result = _resized(vectors, 10)
    np.testing.assert_allclose(result.T @ result, np.eye(3), atol=1e-12)
    # The triangle of half width 4 at output 5 is centered on 22 of 0.5, 1.5, ..: what it averages, by hand.
    weights = np.maximum(0, 1 - np.abs(np.arange(40) + 0.5 - 4 * (np.arange(10)[:, None] + 0.5)) / 4)
    weights /= weights.sum(axis=1, keepdims=True)
    small = weights @ vectors
    squares, rotation = np.linalg.eigh(small.T @ small)
    np.testing.assert_allclose(result, small @ (rotation * squares**-0.5) @ rotation.T, atol=1e-9)


def test_equal_ratings_and_one_block() -> None:
    table = pa.table(
        {"user_id": [1, 1, 1], "item_id": [1, 2, 3], "rating": np.ones(3, np.float32), "timestamp": [1, 2, 3]}
    )
    assert reduce_ratings(index_ratings(table, "here"), 1, 1).tolist() == [[1.0]]
    assert reduce_ratings(small_ratings(), 1, 1).tolist() == [[1.0]]
    with pytest.raises(DataError, match="smaller at most 1"):
        reduce_ratings(index_ratings(table, "here"), 2, 2)


def test_index_leaves_out_users_of_two_times_and_items_only_they_rated() -> None:
    columns = {
        "user_id": [9, 5, 5, 5, 5, 9, 9, 4, 4, 4],
        "item_id": [30, 10, 20, 30, 40, 20, 10, 99, 98, 97],
        "rating": np.array([1, 2, 3, 4, 5, 1, 2, 0.5, 0.5, 0.5], np.float32),
        "timestamp": [3, 4, 1, 2, 2, 1, 2, 8, 8, 7],
    }
    ratings = index_ratings(pa.table(columns), "here")
    assert ratings.starts_U1.tolist() == [0, 4, 7]
    # 10, 20, 30, 40 are 0..3; by time, ties in the order of the table.
    assert ratings.items_E.tolist() == [1, 2, 3, 0, 1, 0, 2]
    assert ratings.values_V[ratings.codes_E].tolist() == [3, 4, 5, 2, 1, 2, 1]
    assert ratings.values_V.tolist() == [1, 2, 3, 4, 5]
    assert (ratings.places_E / 65536).round(3).tolist() == [0.125, 0.375, 0.625, 0.875, 0.167, 0.5, 0.833]
    with pytest.raises(DataError, match="more than 2 distinct times"):
        index_ratings(pa.table(columns).slice(7), "here")


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**40), st.floats(0.01, 1), st.integers(0, 1), st.integers(0, 2))
def test_a_block_is_the_ratings_thinned_and_shuffled(seed: int, rate: float, i: int, j: int) -> None:
    ratings = small_ratings()
    expansion = Expansion(ratings, small_settings(random_seed=seed, element_sample_rate=rate), np.ones((2, 3)))
    block = expansion.block(i, j)
    size = expansion.block_events[i, j]
    assert size == max(1, round(min(rate, 0.995) * ratings.num_events))
    rows = block.rows(0, ratings.num_users)
    counts = rows["counts"].astype(int)
    assert counts.sum() == size and counts.tolist() == block.counts().tolist()
    owners = np.repeat(np.arange(ratings.num_users), counts)
    shuffled = np.zeros((ratings.num_users, ratings.num_items))
    shuffled[owners, rows["columns"]] = ratings.values_V[rows["codes"]]
    assert (shuffled > 0).sum(axis=0).tolist() == block.item_counts().tolist()
    assert sorted(block.row_order_U) == list(range(ratings.num_users))
    assert sorted(block.columns_I) == list(range(ratings.num_items))
    straight = np.zeros_like(shuffled)
    straight[block.row_order_U] = shuffled[:, block.columns_I]
    kept = straight > 0
    assert kept.sum() == size
    assert (straight[kept] == dense_ratings(ratings)[kept]).all()
    # A range of rows is that range of all rows, and the oldest of a row comes first.
    part = block.rows(3, 8)
    for name in ("columns", "places", "codes"):
        assert part[name].tolist() == rows[name][counts[:3].sum() : counts[:8].sum()].tolist()
    assert all((np.diff(rows["places"].astype(int)[owners == row]) > 0).all() for row in range(ratings.num_users))


def test_blocks_do_not_depend_on_what_was_made_before_and_differ() -> None:
    ratings = small_ratings()

    def content(expansion: Expansion, i: int, j: int) -> tuple[bytes, ...]:
        return tuple(part.tobytes() for part in expansion.block(i, j).rows(0, ratings.num_users).values())

    pattern = np.full((2, 3), 0.5)
    first, second = (Expansion(ratings, small_settings(), pattern) for _ in range(2))
    forward = {(i, j): content(first, i, j) for i in range(2) for j in range(3)}
    backward = {(i, j): content(second, i, j) for i in (1, 0) for j in (2, 1, 0)}
    assert forward == backward
    assert len(set(forward.values())) == 6
    other = Expansion(ratings, small_settings(random_seed=1), pattern)
    assert all(content(other, i, j) != forward[i, j] for i, j in forward)


def test_block_rate_empties_blocks_and_element_rate_thins_them() -> None:
    ratings = small_ratings()
    cast = Settings(0, 40, 50, 1.0, 0.3)
    events = Expansion(ratings, cast, np.full((40, 50), 0.5)).block_events
    assert set(np.unique(events)) == {0, round(0.5 * ratings.num_events)}
    # 2000 draws of 0.3: four standard deviations are 0.04.
    assert abs((events > 0).mean() - 0.3) < 0.041
    thin = Expansion(ratings, small_settings(element_sample_rate=0.25), np.array([[0, 0.5, 1], [1, 1, 1]])).block_events
    assert thin[0].tolist() == [1, round(0.125 * ratings.num_events), round(0.25 * ratings.num_events)]


def test_rows_expected_where_many_users_are_empty() -> None:
    ratings = small_ratings(users=300, items=9)
    expansion = Expansion(ratings, small_settings(element_sample_rate=0.05), np.ones((2, 3)))
    expected = fractal_plan.plan(expansion).rows_R
    for i in range(2):
        lengths = sum(expansion.block(i, j).counts() for j in range(3))
        # Of about 180 users, four standard deviations are below 40.
        assert abs(np.count_nonzero(lengths) - expected[i]) < 40
        assert expected[i] < 250


def test_every_form_of_input_is_the_same_matrix(tmp_path: Path) -> None:
    lines = rating_lines()
    csv = write_csv(tmp_path / "ratings.csv", lines)
    dat = tmp_path / "ratings.dat"
    dat.write_text("".join(f"{u}::{i}::{r}::{t}\n" for u, i, r, t in lines))
    mixed = tmp_path / "mixed.csv"
    order = np.random.default_rng(0).permutation(len(lines))
    rows = [f"x,{lines[k][3]},{lines[k][0]},{lines[k][2]},{lines[k][1]}\n" for k in order]
    mixed.write_text("tag,timestamp,userId,rating,movieId\n" + "".join(rows))
    events = tmp_path / "events.csv"
    events.write_text("user_id,item_id,rating,timestamp\n" + "".join(f"{u},{i},{r},{t}\n" for u, i, r, t in lines))
    folder = prepare(sources.get("custom"), raw=events, data_dir=tmp_path).path
    fingerprints = []
    for path in (csv, dat, mixed, folder, folder / "ratings.csv"):
        table, raw = read_events(path)
        fingerprints.append(index_ratings(table, "here").fingerprint)
        assert raw.checksums
    assert len(set(fingerprints)) == 1


def test_statistics_by_hand() -> None:
    activity = Activity(6)
    activity.add_users(np.array([0, 1, 4, 1]))
    activity.add_items(np.array([2, 2, 2, 5, 5, 0]))
    assert (activity.users, activity.items, activity.events, activity.users_shorter_than(3)) == (3, 3, 6, 2)
    rows = statistics_table({"source": activity}).to_pylist()
    users = [row for row in rows if row["curve"] == "user_activity"]
    assert [(row["rank"], row["count"], row["relative_count"]) for row in users] == [
        (1, 4, 2),
        (2, 1, 0.5),
        (3, 1, 0.5),
    ]
    items = [row for row in rows if row["curve"] == "item_popularity"]
    assert [(row["rank"], row["count"]) for row in items] == [(1, 3), (2, 2), (3, 1)]
    assert [row["rank_fraction"] for row in items] == [1 / 3, 2 / 3, 1]


def test_a_block_keeps_neither_everything_nor_nothing() -> None:
    ratings = small_ratings(users=60, items=50)
    expansion = Expansion(ratings, small_settings(), pattern=np.array([[0.0, 1.0, 0.5], [1.0, 0.0, 0.25]]))
    wanted = np.maximum(1, np.rint(np.array([[0.001, 0.995, 0.5], [0.995, 0.001, 0.25]]) * ratings.num_events))
    np.testing.assert_array_equal(expansion.block_events, wanted)
    assert expansion.block_events.max() < ratings.num_events
