"""Explicit splits by time and by newest items: every row against a loop over users, and the counts of real data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from generative_recommenders.data import sources, split_files
from generative_recommenders.data.dataset import PreparedDataset
from generative_recommenders.data.errors import DataError
from generative_recommenders.data.preprocess import prepare, sequences_table
from generative_recommenders.data.sources import RawEvents
from generative_recommenders.data.split_files import DividedData, ordered_events
from generative_recommenders.data.temporal import (
    SPLITS,
    ColdSplit,
    OrderedEvents,
    PublishedSplit,
    SplitRule,
    TimeSplit,
)
from generative_recommenders.errors import UserError
from generative_recommenders.retrieval.assemble import Splits
from generative_recommenders.retrieval.config import RetrievalConfig
from preprocess_public_data import parser, split_rule

ROOT = Path(__file__).resolve().parents[2]
DAY = 86_400
# user, item, day
Event = tuple[int, int, int]
EVENTS = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(0, 6)), min_size=4, max_size=50)
SHORT = st.sampled_from([2, 200])
Told = dict[str, list[tuple[int, list[int]]]]


def raw_events(rows: list[Event]) -> RawEvents:
    """Ratings are places in `rows`; every other item id, so that ids are not places."""
    users, items, days = (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))
    ids = np.arange(2, 21, 2)
    catalogue = pa.table({"item_id": ids, "raw_id": [f"i{i // 2}" for i in ids]})
    return RawEvents(users, 2 * items, np.arange(len(rows), dtype=np.float32), DAY * days, catalogue)


def by_user(rows: list[Event]) -> dict[int, list[int]]:
    """Places in `rows` of each user's events, oldest first."""
    return {
        user: sorted((n for n, r in enumerate(rows) if r[0] == user), key=lambda n: rows[n][2]) for user, *_ in rows
    }


def divided(rows: list[Event], rule: SplitRule) -> DividedData:
    events = raw_events(rows)
    sequences = sequences_table(events)
    ordered = ordered_events(sequences)
    return DividedData.of("toy", sequences, events.items, ordered, rule.divide(ordered))


def check(rows: list[Event], rule: SplitRule, expected: Told, appears: list[int], folder: Path) -> None:
    """Rows as places in `rows`; `appears`, of each event the split that it makes its item appear in."""
    if not all(expected.values()):
        with pytest.raises(DataError, match="row with a history and a target"):
            divided(rows, rule)
        return
    found = divided(rows, rule)
    found.write(folder)
    first = {item: min(a for a, r in zip(appears, rows, strict=True) if r[1] == item) for _, item, _ in rows}
    order = sorted(range(1, 11), key=lambda item: (first.get(item, 3), item))
    assert found.items["raw_id"].to_pylist() == [f"i{item}" for item in order]
    assert found.items["item_id"].to_pylist() == list(range(1, 11))
    assert found.items["source_item_id"].to_pylist() == [2 * item for item in order]
    assert found.items["first_split"].to_pylist() == [first.get(item, 3) for item in order]
    number = {item: place for place, item in enumerate(order, start=1)}
    for split in SPLITS:
        table = pq.read_table(folder / f"sequences_{split}.parquet").to_pylist()
        told = sorted((row["user_id"], [int(place) for place in row["ratings"]]) for row in table)
        assert told == sorted(expected[split])
        for row in table:
            places = [int(place) for place in row["ratings"]]
            assert row["item_ids"] == [number[rows[place][1]] for place in places]
            assert row["timestamps"] == [DAY * rows[place][2] for place in places]
    facts = found.facts()["splits"]
    assert [facts[split]["sequences"] for split in SPLITS] == [len(expected[split]) for split in SPLITS]
    for split in SPLITS:
        ends = [first[rows[places[-1]][1]] for _, places in expected[split]]
        assert facts[split]["sequences_ending_in_unseen_item"] == sum(end > 0 for end in ends)


def in_time(rows: list[Event], splits: list[int], max_history: int) -> Told:
    expected: Told = {split: [] for split in SPLITS}
    for user, places in by_user(rows).items():
        own = [place for place in places if splits[place] == 0]
        if len(own) >= 2:
            expected["train"].append((user, own))
        for n, place in enumerate(places):
            if splits[place] and n:
                expected[SPLITS[splits[place]]].append((user, [*places[max(0, n - max_history) : n], place]))
    return expected


@settings(max_examples=60, deadline=None)
@given(rows=EVENTS, max_history=SHORT, by_day=st.booleans(), block=st.sampled_from([20, 4_000_000]))
def test_rows_of_a_split_by_time_equal_a_loop(
    rows: list[Event], max_history: int, by_day: bool, block: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    days = sorted(day for *_, day in rows)
    if by_day:
        # An event of the day itself is later.
        rule, bounds = TimeSplit(("1970-01-03", "1970-01-05"), max_history), [2, 4]
        splits = [sum(day >= bound for bound in bounds) for *_, day in rows]
    else:
        # An event at the quantile is not.
        rule, bounds = TimeSplit(("0.5", "0.8"), max_history), [days[int((len(days) - 1) * q)] for q in (0.5, 0.8)]
        splits = [sum(day > bound for bound in bounds) for *_, day in rows]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split_files, "_BLOCK_EVENTS", block)
        check(rows, rule, in_time(rows, splits, max_history), splits, tmp_path_factory.mktemp("rows"))


@settings(max_examples=60, deadline=None)
@given(rows=EVENTS, max_history=SHORT, share=st.sampled_from([0.2, 0.5]))
def test_rows_of_a_cold_split_equal_a_loop(
    rows: list[Event], max_history: int, share: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    first_day = {item: min(day for _, i, day in rows if i == item) for _, item, _ in rows}
    cold = set(sorted(first_day, key=lambda i: (first_day[i], i))[-max(1, round(share * len(first_day))) :])
    rule = ColdSplit(share, max_history)
    if cold == set(first_day):
        with pytest.raises(DataError, match="holds out every item"):
            divided(rows, rule)
        return
    expected: Told = {split: [] for split in SPLITS}
    splits = [2 if item in cold else 0 for _, item, _ in rows]
    for user, places in by_user(rows).items():
        warm = [place for place in places if rows[place][1] not in cold]
        if warm:
            splits[warm[-1]] = 1
        if len(warm) >= 2:
            expected["valid"].append((user, warm[-max_history - 1 :]))
        if len(warm) >= 3:
            expected["train"].append((user, warm[:-1]))
        for n, place in enumerate(places):
            before = [p for p in places[:n] if p in warm][-max_history:]
            if place not in warm and before:
                expected["test"].append((user, [*before, place]))
    check(rows, rule, expected, splits, tmp_path_factory.mktemp("rows"))


@settings(max_examples=60, deadline=None)
@given(rows=EVENTS)
def test_items_of_published_splits_appear_where_a_row_tells_them(
    rows: list[Event], tmp_path_factory: pytest.TempPathFactory
) -> None:
    splits = [(day >= 3) + (day >= 5) for *_, day in rows]
    expected = in_time(rows, splits, 200)
    appears = [
        min((n for n, split in enumerate(SPLITS) if any(place in told for _, told in expected[split])), default=3)
        for place in range(len(rows))
    ]
    order = ordered_events(sequences_table(raw_events(rows))).ratings.astype(int)
    rule = PublishedSplit(np.array(splits, dtype=np.int8)[order])
    check(rows, rule, expected, appears, tmp_path_factory.mktemp("rows"))


def test_published_splits_go_forward_within_a_user() -> None:
    events = OrderedEvents(np.array([1, 1, 2]), np.array([1, 2, 1]), np.ones(3, np.float32), np.arange(3))
    with pytest.raises(DataError, match="got an event of train after one of valid for the same user"):
        PublishedSplit(np.array([1, 0, 0], dtype=np.int8)).divide(events)


@pytest.mark.parametrize(
    ("cutoffs", "told"),
    [
        (("0.9",), "expected two shares"),
        (("0.5", "2014-01-01"), "expected two shares"),
        (("0.5", "0.9", "0.95"), "expected two shares"),
        (("0.9", "0.8"), "expected the earlier one first"),
        (("2014-02-01", "2014-02-01"), "expected the earlier one first"),
        (("0.9", "1.5"), "expected shares between 0 and 1"),
        (("nan", "0.5"), "expected shares between 0 and 1"),
        (("2014-13-01", "2014-12-01"), "expected two shares"),
    ],
)
def test_cutoffs_that_are_none(cutoffs: tuple[str, str], told: str) -> None:
    with pytest.raises(DataError, match=told):
        TimeSplit(cutoffs)


def test_what_is_written_is_left_alone_until_the_rule_changes(tmp_path: Path) -> None:
    source = sources.get("synthetic").with_options(synthetic_users=60, synthetic_items=100)
    rule = TimeSplit(("0.6", "0.8"))
    first = prepare(source, data_dir=tmp_path, split=rule)
    assert first.written and first.path.name == "synthetic-temporal"
    assert not prepare(source, data_dir=tmp_path, split=rule).written
    assert prepare(source, data_dir=tmp_path, split=TimeSplit(("0.6", "0.8"), 10)).written
    assert prepare(source, data_dir=tmp_path, split=TimeSplit(("0.6", "0.9"), 10)).written
    assert prepare(source, data_dir=tmp_path, split=ColdSplit(0.05)).path.name == "synthetic-cold-5"
    assert prepare(source, data_dir=tmp_path, name="synthetic-temporal").written
    with pytest.raises(DataError, match="--csv: got it with --split"):
        prepare(source, data_dir=tmp_path, split=rule, csv=True)


def test_places_are_no_times(tmp_path: Path) -> None:
    (tmp_path / "sequential_data.txt").write_text("1 5 6 7\n2 5 6 7\n")
    with pytest.raises(DataError, match="has no times"):
        prepare(sources.get("custom"), raw=tmp_path, data_dir=tmp_path / "out", split=TimeSplit())
    assert not (tmp_path / "out" / "custom-temporal").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--cutoffs=0.8,0.9"], "--cutoffs: got 0.8,0.9 without --split=temporal"),
        (["--split=temporal", "--cold_share=0.1"], "--cold_share: got 0.1 without --split=cold"),
        (["--split=cold", "--cold_share=2"], "--cold_share: got 2.0, expected a share"),
        (["--split=cold", "--max_history=0"], "--max_history: got 0"),
        (["--max_history=5"], "--max_history: got 5 without --split"),
    ],
)
def test_options_that_do_not_fit(arguments: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        split_rule(vars(parser().parse_args(arguments)))


def test_rules_of_the_command_line() -> None:
    def rule(*arguments: str) -> SplitRule | None:
        return split_rule(vars(parser().parse_args(arguments)))

    assert rule() is None
    assert rule("--split=temporal") == TimeSplit(("0.85", "0.9"), 200)
    assert rule("--split=temporal", "--cutoffs=2014-05-13,2014-06-01") == TimeSplit(("2014-05-13", "2014-06-01"))
    assert rule("--split=cold", "--max_history=20") == ColdSplit(0.02, 20)


def test_the_command_and_its_one_line_of_error(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "preprocess_public_data.py", "--dataset=synthetic", f"--data_dir={tmp_path}"]
        command += ["--synthetic_users=60", "--synthetic_items=100", "--split=temporal"]
        return subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)

    done = run("--cutoffs=0.6,0.8")
    assert done.returncode == 0 and "sequences: train " in done.stdout, done.stderr
    assert PreparedDataset.load(tmp_path, "synthetic-temporal").explicit
    refused = run("--cutoffs=0.8,0.6")
    assert refused.returncode == 2 and refused.stderr.startswith("error: --cutoffs: got '0.8,0.6'")
    assert refused.stderr.count("\n") == 1


def test_a_dataset_that_is_not_there_says_how_to_make_it(tmp_path: Path) -> None:
    for name, told in (("temporal", "--split=temporal"), ("cold-5", "--split=cold --cold_share=0.05")):
        with pytest.raises(DataError, match=f"--dataset=amzn14-beauty {told}"):
            PreparedDataset.load(tmp_path, f"amzn14-beauty-{name}")


def real(shared_dir: Path, tmp_path: Path, name: str, folder: str, rule: SplitRule) -> dict[str, Any]:
    done = prepare(sources.get(name), raw=shared_dir / "data" / folder, data_dir=tmp_path, split=rule)
    return json.loads((done.path / "dataset.json").read_text())


@pytest.mark.parametrize(
    ("dataset", "items", "events", "on_them"), [("beauty", 140, 19_828, 3_165), ("sports", 95, 29_474, 1_077)]
)
def test_published_counts_after_the_90_percent_quantile(
    shared_dir: Path, tmp_path: Path, dataset: str, items: int, events: int, on_them: int
) -> None:
    facts = real(shared_dir, tmp_path, f"amzn14-{dataset}", f"amazon-2014/{dataset}", TimeSplit())
    test = facts["splits"]["test"]
    assert (test["items_first_seen"], test["events"], test["events_on_items_first_seen"]) == (items, events, on_them)
    assert facts["split"] == "explicit" and facts["split_rule"]["temporal"]["cutoffs"] == ["0.85", "0.9"]
    data = PreparedDataset.load(tmp_path, f"amzn14-{dataset}-temporal")
    # Of test rows, those whose user had no event before are missing; all others train, or have a row of their own.
    splits = Splits.of(RetrievalConfig(eval_split="valid"), data)
    assert [len(splits.named(name)) for name in SPLITS] == [facts["splits"][name]["sequences"] for name in SPLITS]
    trained = data.trained_items()
    unseen = data.unseen_items().tolist()
    assert unseen == (~trained[1:]).nonzero().flatten().add(1).tolist()
    assert set(range(facts["counts"]["items_in_train"] + 1, len(data.catalog) + 1)) <= set(unseen)


@pytest.mark.parametrize(("share", "items"), [(0.02, 242), (0.05, 605)])
def test_newest_items_of_beauty(shared_dir: Path, tmp_path: Path, share: float, items: int) -> None:
    facts = real(shared_dir, tmp_path, "amzn14-beauty", "amazon-2014/beauty", ColdSplit(share))
    assert facts["name"] == f"amzn14-beauty-cold-{100 * share:g}" and facts["split_rule"]["cold"]["items"] == items
    data = PreparedDataset.load(tmp_path, facts["name"])
    first, last = data.split_rows["test"]
    ends = data.offsets[first + 1 : last + 1] - 1
    cold = len(data.catalog) - items
    assert bool((data.item_ids_E[ends] > cold).all())
    assert int((data.item_ids_E > cold).sum()) == last - first
    # Whatever is held out came no earlier than everything else.
    events = pq.read_table(shared_dir / "data" / "amazon-2014" / "beauty" / "interactions.parquet").to_pandas()
    born = events.groupby("item_id")["timestamp"].min()
    source = pq.read_table(data.folder / "items.parquet")["source_item_id"].to_numpy()
    assert born[source[cold:]].min() >= born[source[:cold]].max()


def test_online_retail_by_date(shared_dir: Path, tmp_path: Path) -> None:
    rule = TimeSplit(("2011-09-01", "2011-11-01"), max_history=5)
    facts = real(shared_dir, tmp_path, "online-retail", "online-retail", rule)
    assert facts["counts"]["events"] == 788_247 and facts["cancelled_lines_dropped"] == 17_641
    assert facts["split_rule"]["temporal"]["test_from"] == "2011-11-01T00:00:00+00:00"
    events = pq.read_table(shared_dir / "data" / "online-retail" / "sessions.parquet").to_pandas()
    events = events[events["event_type_list"].map(lambda kinds: kinds[0] == 1)]
    later = events["timestamp"] >= 1_320_105_600
    assert facts["splits"]["test"]["events"] == int(events.loc[later, "item_id_list"].map(len).sum())
    data = PreparedDataset.load(tmp_path, "online-retail-temporal")
    first, last = data.split_rows["test"]
    assert int(data.lengths_U[first:last].max()) == 6
    assert data.catalog.titles[0] is not None
