"""Foreign files of semantic IDs: round trips of every format, what one looks like, and what is refused."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from generative_recommenders.data.errors import DataError
from generative_recommenders.tokenizers.exporters import EXPORTERS, export_semantic_ids
from generative_recommenders.tokenizers.importers import IMPORTERS, import_semantic_ids, level_names
from generative_recommenders.tokenizers.semantic_ids import SemanticIds

LETTER = Path(__file__).resolve().parents[3] / "shared/data/amazon-2014/beauty/semantic_ids_letter.u8.npy"
NAMES = {
    "lc-rec": "Beauty.index.json",
    "lc-rec-upper": "Beauty.index_vitemb.json",
    "torch-rechub": "semantic_ids.json",
    "grid": "merged_predictions_tensor.pt",
    "nvidia": "item-sid-mapping.pt",
    "npy": "codes.npy",
    "specgr": "Beauty.semantic_id",
    "csv": "codes.csv",
}


def small(item_ids: tuple[int, ...] = (1, 2, 3), raw_ids: list[str] | None = None) -> SemanticIds:
    codes_NL = torch.tensor([[7, 1], [0, 0], [7, 1]])
    return SemanticIds.of(list(item_ids), codes_NL, (9, 2), raw_ids=raw_ids, dataset_fingerprint="toy")


def read(path: Path, **options: object) -> SemanticIds:
    options = {"item_ids": [1, 2, 3], "dataset_fingerprint": "toy"} | options
    return import_semantic_ids(path, **options)  # type: ignore[arg-type]


@st.composite
def tables(draw: st.DrawFn) -> SemanticIds:
    sizes = draw(st.lists(st.integers(1, 300), min_size=1, max_size=30))
    items = draw(st.lists(st.integers(1, 2**40), min_size=1, max_size=12, unique=True))
    seed = draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    codes = [torch.randint(0, size, (len(items),), generator=generator) for size in sizes]
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
    raw_ids = draw(st.none() | st.lists(text, min_size=len(items), max_size=len(items), unique=True))
    return SemanticIds.of(
        items, torch.stack(codes, dim=1), sizes, raw_ids=raw_ids, policy="imported", dataset_fingerprint="d"
    )


def test_registries_hold_the_same_formats() -> None:
    assert list(IMPORTERS) == list(EXPORTERS) == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("orientation", ["levels_first", "items_first"])
@settings(max_examples=25, deadline=None)
@given(table=tables())
def test_what_is_exported_comes_back(
    tmp_path_factory: pytest.TempPathFactory, name: str, orientation: str, table: SemanticIds
) -> None:
    path = tmp_path_factory.mktemp("export") / NAMES[name]
    export_semantic_ids(table, path, name, orientation=orientation)
    # Raw ids may look like item ids, so that the keys have to be named.
    keys = {"torch-rechub": "item_id", "csv": None}.get(name, "position")
    back = import_semantic_ids(
        path,
        format=name,
        item_ids=table.item_ids_N,
        raw_ids=table.raw_ids,
        sizes=table.sizes,
        dataset_fingerprint="d",
        keys=keys,
        orientation=orientation,
    )
    assert back.fingerprint == table.fingerprint
    assert torch.equal(back.codes_NL, table.codes_NL) and torch.equal(back.item_ids_N, table.item_ids_N)
    assert table.raw_ids is None or (back.raw_ids is not None and back.raw_ids.tolist() == table.raw_ids.tolist())
    first = path.read_bytes()
    export_semantic_ids(back, path, name, orientation=orientation)
    assert name in ("grid", "nvidia") or path.read_bytes() == first
    assert [x.name for x in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("name", NAMES)
def test_formats_are_guessed_from_names_and_sizes_from_codes(tmp_path: Path, name: str) -> None:
    orientation = "items_first" if name == "npy" else None
    table = small()
    if name == "specgr":
        table = SemanticIds.of([1, 2, 3], torch.tensor([[8, 0, 8, 1], [0, 8, 0, 0], [8, 0, 8, 1]]), (9,) * 4)
    export_semantic_ids(table, tmp_path / NAMES[name], orientation=orientation)
    found = read(tmp_path / NAMES[name], orientation=orientation)
    assert torch.equal(found.codes_NL, table.codes_NL)
    assert found.sizes == tuple((table.codes_NL.max(dim=0).values + 1).tolist())
    assert found.policy == "imported" and found.dataset_fingerprint == "toy"


def test_layouts(tmp_path: Path) -> None:
    table = small((4, 7, 9), raw_ids=["x", 'a "b"', "z,"])
    for name, file in NAMES.items():
        export_semantic_ids(table, tmp_path / file, name, orientation="levels_first" if name == "npy" else None)
    tokens = [["<a_7>", "<b_1>"], ["<a_0>", "<b_0>"], ["<a_7>", "<b_1>"]]
    assert json.loads((tmp_path / NAMES["lc-rec"]).read_text()) == dict(zip("012", tokens, strict=True))
    assert json.loads((tmp_path / NAMES["torch-rechub"]).read_text()) == dict(zip("479", tokens, strict=True))
    assert json.loads((tmp_path / NAMES["lc-rec-upper"]).read_text())["0"] == ["<A_7>", "<B_1>"]
    for name in ("grid", "nvidia"):
        tensor = torch.load(tmp_path / NAMES[name], weights_only=True)
        assert tensor.tolist() == [[7, 0, 7], [1, 0, 1]] and tensor.dtype == torch.int64
    assert np.load(tmp_path / NAMES["npy"]).tolist() == [[7, 0, 7], [1, 0, 1]]
    raw = np.fromfile(tmp_path / NAMES["specgr"], np.int64).reshape(4, 2)
    assert raw.tolist() == [[0, 0], [8, 11], [1, 10], [8, 11]]
    assert (tmp_path / NAMES["csv"]).read_text().splitlines()[:2] == [
        '"item_id","raw_id","level_0","level_1"',
        '4,"x",7,1',
    ]


def test_levels_beyond_the_alphabet() -> None:
    names = level_names(703)
    assert names[:2] == ["a", "b"] and names[25:28] == ["z", "aa", "ab"] and names[-1] == "aaa"


def write_json(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


TOKENS = {"1": ["<a_7>", "<b_1>"], "2": ["<a_0>", "<b_0>"], "3": ["<a_7>", "<b_1>"]}


def test_keys_are_item_ids_positions_or_raw_ids(tmp_path: Path) -> None:
    by_item = write_json(tmp_path / "a.index.json", TOKENS)
    by_place = write_json(tmp_path / "b.index.json", {str(int(key) - 1): codes for key, codes in TOKENS.items()})
    by_raw = write_json(tmp_path / "c.index.json", dict(zip(("x", "y", "z"), TOKENS.values(), strict=True)))
    upper = {key: [token.upper() for token in codes] for key, codes in TOKENS.items()}
    by_item_upper = write_json(tmp_path / "d.index.json", upper)
    for path in (by_item, by_place, by_raw, by_item_upper):
        assert read(path, raw_ids=["x", "y", "z"]).codes_NL.tolist() == [[7, 1], [0, 0], [7, 1]]
    # Rows of the caller may come in any order.
    turned = read(by_raw, item_ids=[3, 1, 2], raw_ids=["z", "x", "y"])
    assert turned.codes_NL.tolist() == [[7, 1], [0, 0], [7, 1]]
    assert turned.raw_ids is not None and turned.raw_ids.tolist() == ["x", "y", "z"]


def test_keys_that_fit_in_two_ways_are_not_guessed(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.index.json", TOKENS)
    raw_ids = ["2", "1", "3"]
    with pytest.raises(DataError, match="read as item_id and as raw_id"):
        read(path, raw_ids=raw_ids)
    assert read(path, raw_ids=raw_ids, keys="item_id").codes_NL.tolist() == [[7, 1], [0, 0], [7, 1]]
    assert read(path, raw_ids=raw_ids, keys="raw_id").codes_NL.tolist() == [[0, 0], [7, 1], [7, 1]]
    assert read(path, raw_ids=["1", "2", "3"]).codes_NL.tolist() == [[7, 1], [0, 0], [7, 1]]
    padded = write_json(tmp_path / "b.index.json", {"0": ["<a_0>", "<b_0>"]} | TOKENS)
    with pytest.raises(DataError, match="read as item_id and as position"):
        read(padded)


def test_items_beyond_the_catalogue_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_json(tmp_path / "a.index.json", TOKENS)
    with caplog.at_level(logging.INFO):
        assert read(path, item_ids=[1, 3]).item_ids_N.tolist() == [1, 3]
    assert "1 of 3 items are not in the catalogue" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (TOKENS | {"2": ["<a_0>"]}, "item 2: got 1 tokens, expected 2 as most items have"),
        (TOKENS | {"3": ["<a_7>", "<b_1>", "<c_1>"]}, "item 3: got 3 tokens, expected 2"),
        ({k: v for k, v in TOKENS.items() if k != "3"}, "item 3 is missing"),
        ({"x1": ["<a_1>"], "x2": ["<a_1>"]}, "item 1 is missing.*3 of 3 items are missing, first key 'x1'"),
        (TOKENS | {"2": ["<a_0>", "<a_0>"]}, "item 2: got '<a_0>' at level 1, expected '<b_NUMBER>'"),
        (TOKENS | {"2": ["<A_0>", "<B_0>"]}, "item 2: got '<A_0>' at level 0"),
        (TOKENS | {"2": ["<a_0>", "<b_-1>"]}, "item 2: got '<b_-1>'"),
        (TOKENS | {"2": ["<a_0>", "<b_1>\n"]}, "item 2: got '<b_1>"),
        (TOKENS | {"2": ["<a_0>", "<b_9999999999>"]}, "item 2: got '<b_9999999999>'"),
        (TOKENS | {"2": ["<a_0>", 5]}, "item 2: got 5 at level 1"),
        (TOKENS | {"2": "<a_0><b_0>"}, "item 2: got '<a_0><b_0>', expected a list"),
        (TOKENS | {"2": None}, "item 2: got None, expected a list"),
        ({k: [] for k in TOKENS}, "item 1: got 0 tokens, expected some"),
        ([], "expected an object"),
        ({}, "expected an object"),
    ],
)
def test_a_bad_index_is_refused_naming_the_item(tmp_path: Path, content: object, message: str) -> None:
    path = write_json(tmp_path / "a.index.json", content)
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_an_item_twice_in_a_json_file(tmp_path: Path) -> None:
    path = tmp_path / "a.index.json"
    path.write_text('{"1": ["<a_0>"], "2": ["<a_1>"], "1": ["<a_2>"]}')
    with pytest.raises(DataError, match="item 1 is there twice"):
        read(path, item_ids=[1, 2])


def test_codes_beyond_the_sizes_name_the_item(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.index.json", TOKENS)
    assert read(path, sizes=(8, 2)).sizes == (8, 2)
    with pytest.raises(DataError, match="code 7 at level 0 of item 1, expected 0 to 6"):
        read(path, sizes=(7, 2))
    with pytest.raises(DataError, match="got 2 levels, expected 3"):
        read(path, sizes=(8, 2, 2))


def not_a_tensor(path: Path) -> None:
    torch.save({"codes": 1}, path)


def unsafe(path: Path) -> None:
    torch.save(Path("x"), path)


def floats(path: Path) -> None:
    torch.save(torch.zeros(2, 3), path)


def wide(path: Path) -> None:
    torch.save(torch.zeros(3, 2, dtype=torch.int64), path)


def other_dataset(path: Path) -> None:
    torch.save(torch.zeros(2, 4, dtype=torch.int64), path)


def cut(path: Path) -> None:
    torch.save(torch.zeros(2, 3, dtype=torch.int64), path)
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (not_a_tensor, "got dict, expected a tensor of integers"),
        (unsafe, "cannot be read as a tensor"),
        (cut, "cannot be read as a tensor"),
        (floats, "got torch.float32"),
        (wide, "got shape .3, 2., expected .levels, items. with 3 items; pass orientation='items_first'"),
        (other_dataset, "got shape .2, 4., expected .levels, items. with 3 items; use a file for this dataset"),
    ],
)
def test_bad_tensors(tmp_path: Path, write: Callable[[Path], None], message: str) -> None:
    write(tmp_path / "codes.pt")
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / "codes.pt")
    assert "\n" not in str(caught.value)


def test_npy_needs_an_orientation_and_integers(tmp_path: Path) -> None:
    path = tmp_path / "codes.npy"
    square = np.array([[0, 1, 2], [3, 4, 5], [6, 7, 8]], dtype=np.uint8)
    np.save(path, square)
    with pytest.raises(DataError, match="pass orientation='items_first' or 'levels_first'"):
        read(path)
    assert read(path, orientation="items_first").codes_NL.tolist() == square.tolist()
    assert read(path, orientation="levels_first").codes_NL.tolist() == square.T.tolist()
    np.save(path, square.astype(np.float32))
    with pytest.raises(DataError, match="got float32, expected integers"):
        read(path, orientation="items_first")
    np.save(path, np.array([Path("x")]), allow_pickle=True)
    with pytest.raises(DataError, match=r"cannot be read as \.npy"):
        read(path, orientation="items_first")
    np.save(path, np.array([[-1], [0], [0]]))
    with pytest.raises(DataError, match="code -1 at level 0 of item 1"):
        read(path, orientation="items_first")


def test_specgr_files_of_other_shapes(tmp_path: Path) -> None:
    path = tmp_path / "a.semantic_id"
    export_semantic_ids(small(), path)
    assert read(path, sizes=(9, 2)).codes_NL.tolist() == [[7, 1], [0, 0], [7, 1]]
    with pytest.raises(DataError, match=r"got 64 bytes, expected 128 of int64 \(3 items \+ 1, 4\); pass the sizes"):
        read(path)
    values = np.zeros((4, 4), np.int64)
    values[1:] = [1, 257, 513, 769]
    values.tofile(path)
    with pytest.raises(DataError, match=r"193 to 256 codes.*pass sizes=\(256,\) \* 4"):
        read(path)
    assert read(path, sizes=(256,) * 4).codes_NL.tolist() == [[0] * 4] * 3
    values[1, 1] += 1
    values.tofile(path)
    with pytest.raises(DataError, match="code 1 at level 1 of item 1"):
        read(path, sizes=(256, 1, 256, 256))
    values[0] = 1
    values.tofile(path)
    with pytest.raises(DataError, match="in row 0, expected zeros"):
        read(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("item_id,level_0\n1,5\n2,6\n", "item 3 is missing"),
        ("item_id,level_0\n1,5\n2,6\n3\n", "cannot be read as csv.*Expected 2 columns, got 1: 3"),
        ("item_id,level_0\n1,5\n2,\n3,1\n", "item 2: got None in level_0, expected an integer"),
        ("item_id,level_0\n1,5\n2,x\n3,1\n", "in level_0, expected an integer"),
        ("item_id,level_0\n1,5\n2,6\n2,6\n3,1\n", "item 2 is there twice"),
        ("item_id,level_1\n1,5\n2,6\n3,1\n", "got columns item_id, level_1, expected item_id, level_0"),
        ("id,level_0\n1,5\n2,6\n3,1\n", "got columns id, level_0"),
        ("item_id,level_0\nx,5\n", "cannot be read as csv"),
        ("", "cannot be read as csv"),
    ],
)
def test_bad_csv(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.csv")


def test_csv_by_raw_id_in_any_order(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("raw_id,level_1,level_0\nz,1,5\nx,0,6\ny,0,7\n")
    assert read(tmp_path / "a.csv", raw_ids=["x", "y", "z"]).codes_NL.tolist() == [[6, 0], [7, 0], [5, 1]]


def test_arguments_are_checked(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.index.json", TOKENS)
    unknown = tmp_path / "codes.bin"
    unknown.write_bytes(b"")
    with pytest.raises(DataError, match="no such file"):
        read(tmp_path / "nothing.json")
    with pytest.raises(DataError, match="which says no format, expected one of lc-rec"):
        read(unknown)
    with pytest.raises(DataError, match="got format 'lcrec'"):
        read(path, format="lcrec")
    with pytest.raises(DataError, match="keys: got 'id'"):
        read(path, keys="id")
    with pytest.raises(DataError, match="pass raw_ids"):
        read(path, keys="raw_id")
    with pytest.raises(DataError, match="orientation: got 'up'"):
        read(path, orientation="up")
    with pytest.raises(DataError, match="item 1 is there 2 times"):
        read(path, item_ids=[1, 1, 2])
    with pytest.raises(DataError, match="orientation: got 'up'"):
        export_semantic_ids(small(), path, orientation="up")
    with pytest.raises(DataError, match="got no orientation"):
        export_semantic_ids(small(), tmp_path / "a.npy")
    masked = SemanticIds(torch.tensor([[0], [1]]), torch.tensor([1, 2]), (2,), active_N=torch.tensor([True, False]))
    with pytest.raises(DataError, match=r"1 removed items.*without_removed"):
        export_semantic_ids(masked, path)
    assert json.loads(path.read_text()) == TOKENS
    small().save(tmp_path / "own")
    with pytest.raises(DataError, match=r"is a table of this project; try SemanticIds.load"):
        read(tmp_path / "own" / "semantic_ids.json")


@pytest.mark.skipif(not LETTER.exists(), reason="the published IDs are not here")
def test_published_letter_ids_of_beauty(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        table = read(LETTER, item_ids=np.arange(1, 12_102), orientation="items_first")
    assert "12,088 distinct of 12,101 items" in caplog.text
    assert table.sizes == (256,) * 4
    published = np.load(LETTER)
    assert table.codes_of([1, 12_101]).tolist() == published[[0, -1]].tolist()
    offsets, items = table.items_of(torch.from_numpy(published.astype(np.int64)))
    owner = torch.repeat_interleave(torch.arange(1, 12_102), offsets.diff())
    assert set(range(1, 12_102)) <= set(items[items == owner].tolist())
    assert int((offsets.diff() > 1).sum()) == 12_101 - int((table.group_sizes() == 1).sum())
