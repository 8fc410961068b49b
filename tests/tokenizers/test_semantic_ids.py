"""The table against plain dictionaries; what is kept, and what it refuses."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from generative_recommenders.data.errors import DataError
from generative_recommenders.tokenizers.code_keys import CodeKeys
from generative_recommenders.tokenizers.semantic_ids import FACTS_FILE, TENSORS_FILE, SemanticIds

# Small ones collide often; the others do not fit one 63-bit number, the last two at every level.
SIZES = [(1,), (2, 3), (1, 4, 1), (2, 2, 2, 2), (2**31, 2**31, 3), (2**31,) * 4, (2**31, 1, 2**31, 2, 2**31)]


@st.composite
def tables(draw: st.DrawFn) -> SemanticIds:
    sizes = draw(st.sampled_from(SIZES))
    items = draw(st.lists(st.integers(1, 2**62), min_size=1, max_size=25, unique=True))
    code = [st.one_of(st.integers(0, size - 1), st.integers(max(0, size - 2), size - 1)) for size in sizes]
    few = draw(st.lists(st.tuples(*code), min_size=1, max_size=6))
    rows = draw(st.lists(st.sampled_from(few), min_size=len(items), max_size=len(items)))
    raw_ids = draw(st.none() | st.lists(st.text(max_size=5), min_size=len(items), max_size=len(items), unique=True))
    active = draw(st.lists(st.booleans(), min_size=len(items), max_size=len(items)))
    return SemanticIds.of(
        items,
        torch.tensor(rows, dtype=torch.int64).reshape(len(items), len(sizes)),
        sizes,
        raw_ids=raw_ids,
        active_N=torch.tensor(active),
        policy=draw(st.sampled_from(["none", "dedup"])),
        dataset_fingerprint=draw(st.text(max_size=4)),
        ancestors=("a", "b"),
    )


def holders(table: SemanticIds) -> dict[tuple[int, ...], list[int]]:
    found: dict[tuple[int, ...], list[int]] = {}
    for item, codes, active in zip(
        table.item_ids_N.tolist(), table.codes_NL.tolist(), table.active_N.tolist(), strict=True
    ):
        if active:
            found.setdefault(tuple(codes), []).append(item)
    return found


def listed(table: SemanticIds, codes_nL: Tensor) -> list[list[int]]:
    offsets, items = table.items_of(codes_nL)
    return [items[first:last].tolist() for first, last in itertools.pairwise(offsets.tolist())]


@settings(deadline=None)
@given(tables(), st.randoms(use_true_random=False))
def test_codes_and_items_equal_dictionaries(table: SemanticIds, random) -> None:
    items = [random.choice(table.item_ids_N.tolist()) for _ in range(7)]
    by_item = dict(zip(table.item_ids_N.tolist(), table.codes_NL.tolist(), strict=True))
    assert table.codes_of(items).tolist() == [by_item[item] for item in items]
    asked = [random.choice(table.codes_NL.tolist()) for _ in range(5)]
    # Parts of tuples that exist, put together anew, and codes outside their levels.
    asked += [[random.choice(column) for column in table.codes_NL.T.tolist()] for _ in range(5)]
    asked += [[-1] * table.levels, list(table.sizes), [*table.codes_NL[0].tolist()[:-1], table.sizes[-1]]]
    expected = [holders(table).get(tuple(codes), []) for codes in asked]
    assert listed(table, torch.tensor(asked)) == expected
    assert sorted(table.group_sizes().tolist()) == sorted(map(len, holders(table).values()))


@settings(max_examples=40, deadline=None)
@given(tables())
def test_saving_a_loaded_table_gives_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, table: SemanticIds
) -> None:
    first, second = (tmp_path_factory.mktemp("table") / "ids" for _ in range(2))
    table.save(first)
    loaded = SemanticIds.load(first)
    loaded.save(second)
    for name in (FACTS_FILE, TENSORS_FILE):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    for field in dataclasses.fields(SemanticIds):
        kept, found = getattr(table, field.name), getattr(loaded, field.name)
        if isinstance(kept, Tensor):
            assert kept.dtype == found.dtype and torch.equal(kept, found)
        elif isinstance(kept, np.ndarray):
            assert kept.tolist() == found.tolist()
        else:
            assert kept == found
    assert loaded.fingerprint == table.fingerprint


@settings(deadline=None)
@given(tables(), st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter(table: SemanticIds, random) -> None:
    order = list(range(len(table)))
    random.shuffle(order)
    raw_ids = None if table.raw_ids is None else table.raw_ids[order]
    other = SemanticIds.of(
        table.item_ids_N[order],
        table.codes_NL[order],
        table.sizes,
        raw_ids=raw_ids,
        active_N=table.active_N[order],
        dataset_fingerprint=table.dataset_fingerprint,
    )
    assert other.fingerprint == table.fingerprint
    assert torch.equal(other.active_N, table.active_N)
    assert (other.raw_ids is None) == (table.raw_ids is None)
    assert table.raw_ids is None or other.raw_ids.tolist() == table.raw_ids.tolist()


@pytest.mark.parametrize("sizes", SIZES)
def test_keys_order_tuples_as_their_codes_do(sizes: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    columns = [torch.randint(max(0, size - 3), size, (50,), generator=generator) for size in sizes]
    codes_NL = torch.stack(columns, dim=1)
    keys = CodeKeys(codes_NL, sizes).of(codes_NL).tolist()
    rows = [tuple(row) for row in codes_NL.tolist()]
    assert min(keys) >= 0
    assert sorted(range(50), key=lambda i: (keys[i], i)) == sorted(range(50), key=lambda i: (rows[i], i))
    if math.prod(sizes) < 2**63:
        assert max(keys) < math.prod(sizes)


def small(**facts: object) -> SemanticIds:
    codes_NL = torch.tensor([[0, 1], [2, 0], [0, 1]])
    return SemanticIds(codes_NL, torch.tensor([2, 5, 9]), (3, 2), **facts)  # type: ignore[arg-type]


def test_the_fingerprint_covers_what_a_model_depends_on() -> None:
    table = small()
    different = [
        small(dataset_fingerprint="beauty:1"),
        small(tokenizer_fingerprint="beauty:1"),
        SemanticIds(table.codes_NL, table.item_ids_N, (3, 3)),
        SemanticIds(table.codes_NL, table.item_ids_N + 1, (3, 2)),
        SemanticIds(table.codes_NL.roll(1, 0), table.item_ids_N, (3, 2)),
    ]
    assert len({t.fingerprint for t in (table, *different)}) == 6
    masked = small(active_N=torch.tensor([True, False, True]), version=4, embeddings_fingerprint="e")
    assert masked.fingerprint == table.fingerprint


def test_another_dataset_or_table_is_refused_naming_both() -> None:
    table = small(dataset_fingerprint="beauty:198502")
    table.check_for("beauty:198502")
    with pytest.raises(DataError, match=r"beauty:198502.*sports:296337"):
        table.check_for("sports:296337")
    with pytest.raises(DataError, match=r"dataset unknown.*sports:296337"):
        small().check_for("sports:296337")
    table.check_fingerprint(table.fingerprint)
    dataclasses.replace(table, ancestors=("f00",)).check_fingerprint("f00")
    with pytest.raises(DataError, match=rf"{table.fingerprint}.*f00"):
        table.check_fingerprint("f00")


def test_a_removed_item_keeps_its_codes_and_is_not_found() -> None:
    table = small(active_N=torch.tensor([False, True, True]), raw_ids=np.array(["x", "y", "z"]), ancestors=("f",))
    assert table.codes_of([2]).tolist() == [[0, 1]]
    assert listed(table, torch.tensor([[0, 1]])) == [[9]]
    assert table.summary() == "2 distinct of 2 items, 1 removed, codes 3 x 2, largest group 1"
    kept = table.without_removed()
    assert kept.item_ids_N.tolist() == [5, 9] and kept.codes_NL.tolist() == [[2, 0], [0, 1]]
    assert kept.raw_ids is not None and kept.raw_ids.tolist() == ["y", "z"]
    assert kept.ancestors == ()
    assert small().summary() == "2 distinct of 3 items, codes 3 x 2, largest group 2"


def test_one_item_and_one_level() -> None:
    table = SemanticIds(torch.tensor([[0]]), torch.tensor([7]), (1,))
    assert table.codes_of(torch.tensor([7, 7])).tolist() == [[0], [0]]
    assert listed(table, torch.tensor([[0], [1]])) == [[7], []]
    offsets, items = table.items_of(torch.empty(0, 1, dtype=torch.int64))
    assert offsets.tolist() == [0] and items.numel() == 0
    assert table.codes_of([]).shape == (0, 1)


@pytest.mark.parametrize(
    ("ids", "codes", "sizes", "message"),
    [
        ([1, 2, 2], [[0], [1], [0]], (2,), r"not ascending.*item 2 is there 2 times"),
        ([0, 1], [[0], [1]], (2,), "from 1 on"),
        ([3, 1], [[0], [1]], (2,), "SemanticIds.of"),
        ([1, 2], [[0], [2]], (2,), "code 2 at level 0 of item 2, expected 0 to 1"),
        ([1, 2], [[0, 0], [0, -1]], (2, 2), "code -1 at level 1 of item 2"),
        ([1, 2], [[0, 0]], (2, 2), r"shape \(1, 2\) for 2 items"),
        ([1, 2], [[0, 0], [1, 1]], (2,), r"shape \(2, 2\) for 2 items and 1 levels"),
        ([1], [[0.0]], (2,), "expected integers"),
        ([1], [[0]], (0,), "sizes from 1"),
        ([], [], (2,), "one at least"),
    ],
)
def test_what_is_no_table_is_refused(ids: list, codes: list, sizes: tuple, message: str) -> None:
    with pytest.raises(DataError, match=message):
        SemanticIds(torch.tensor(codes), torch.tensor(ids), sizes)


@pytest.mark.parametrize(
    ("raw_ids", "message"),
    [(["a"], r"shape \(1,\)"), (["a", "a", "b"], "got 'a' for several items"), ([1, 2, 3], "no string")],
)
def test_raw_ids_are_one_string_an_item(raw_ids: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        SemanticIds.of([1, 2, 3], torch.zeros(3, 1, dtype=torch.int64), (2,), raw_ids=raw_ids)


def test_unknown_items_and_wrong_levels_are_named() -> None:
    with pytest.raises(DataError, match=r"item 3, which has none \(2 such\)"):
        small().codes_of([2, 3, 10])
    with pytest.raises(DataError, match=r"shape \(1, 3\), expected \(tuples, 2\)"):
        small().items_of(torch.zeros(1, 3, dtype=torch.int64))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_damage_and_edits_are_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "ids"
    small(dataset_fingerprint="d").save(folder)
    for changes, message in [
        ({"format": 2}, "got format 2, expected 1"),
        ({"sizes": [4, 2]}, "was edited"),
        ({"dataset_fingerprint": "e"}, "was edited"),
        ({"sizes": None}, "cannot be read"),
    ]:
        small(dataset_fingerprint="d").save(folder)
        edit(folder / FACTS_FILE, **changes)
        with pytest.raises(DataError, match=message):
            SemanticIds.load(folder)
    small().save(folder)
    content = bytearray((folder / TENSORS_FILE).read_bytes())
    content[-1] ^= 1
    (folder / TENSORS_FILE).write_bytes(content)
    with pytest.raises(DataError, match="another checksum"):
        SemanticIds.load(folder)
    (folder / TENSORS_FILE).unlink()
    with pytest.raises(DataError, match=r"codes.safetensors: no such file"):
        SemanticIds.load(folder)
    (folder / FACTS_FILE).write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        SemanticIds.load(folder)


def test_saving_takes_the_place_of_a_table_and_of_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(DataError, match="place in use"):
        small().save(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "precious"
    small(version=1).save(tmp_path / "ids")
    small(version=2).save(tmp_path / "ids")
    assert SemanticIds.load(tmp_path / "ids").version == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ids", "mine.txt"]


def test_a_failed_write_leaves_the_old_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(version=1).save(tmp_path / "ids")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "no space")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(DataError, match="No space"):
            small(version=2).save(tmp_path / "ids")
    assert SemanticIds.load(tmp_path / "ids").version == 1
    assert [path.name for path in tmp_path.iterdir()] == ["ids"]
