"""`--shuffle_ties` permutes events of equal time within a user and nothing else."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from generative_recommenders.data import sources
from generative_recommenders.data.preprocess import prepare


def rows(folder: Path) -> list[list[tuple[int, int, float]]]:
    table = pq.read_table(folder / "sequences.parquet").to_pydict()
    columns = zip(table["timestamps"], table["item_ids"], table["ratings"], strict=True)
    return [list(zip(*row, strict=True)) for row in columns]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "events.csv"
    events = [(user, item, 100 * (item // 5), item % 5) for user in range(20) for item in range(30)]
    path.write_text("user_id,item_id,timestamp,rating\n" + "".join(f"{u},{i},{t},{r}\n" for u, i, t, r in events))
    return path


def test_only_ties_move(tmp_path: Path, raw: Path) -> None:
    source = sources.get("custom")
    plain = rows(prepare(source, raw=raw, data_dir=tmp_path, name="plain").path)
    shuffled = rows(prepare(source, raw=raw, data_dir=tmp_path, name="shuffled", shuffle_ties=1).path)
    assert shuffled != plain
    for one, other in zip(plain, shuffled, strict=True):
        assert sorted(one) == sorted(other)
        assert [time for time, _, _ in one] == [time for time, _, _ in other]
    assert len({tuple(item for _, item, _ in row[:5]) for row in shuffled}) > 1, "users are shuffled independently"


def test_the_seed_is_part_of_what_was_prepared(tmp_path: Path, raw: Path) -> None:
    source = sources.get("custom")
    first = prepare(source, raw=raw, data_dir=tmp_path, shuffle_ties=1)
    kept = rows(first.path)
    assert not prepare(source, raw=raw, data_dir=tmp_path, shuffle_ties=1).written
    assert prepare(source, raw=raw, data_dir=tmp_path, shuffle_ties=2).written
    assert rows(first.path) != kept
    assert prepare(source, raw=raw, data_dir=tmp_path, shuffle_ties=1, force=True).written
    assert rows(first.path) == kept
    assert prepare(source, raw=raw, data_dir=tmp_path).written
