"""Embeddings computed elsewhere, brought into the order of a catalogue and checked.

Which item a row belongs to:

    x.npy                           row k is the item with `item_id` k + 1; as many rows as the largest id
    x.npy and x.raw_ids.txt         line k of the list is the raw id of row k, in any order
    x.parquet with `item_id`        the ids of items.parquet, in any order
    x.parquet with `raw_id`         the ids of the source, in any order; goes before `item_id`
    FOLDER/index.safetensors        of `--mode=export`, vectors that a model has learned, by the raw ids in FOLDER

Raw ids are those of items.parquet's `raw_id`: MovieLens movie ids, ASINs. A list of them may also be named explicitly.
For embeddings in the order of MovieLens' movies.dat, that list is `cut -d: -f1 movies.dat`. Rows of items that the
catalogue does not have are passed over, except in a bare `.npy`, whose rows nothing else identifies.

What an exported model was trained on, its vectors know: it must not have had what is held out of the dataset. Vectors
of items that it had no events of are noise.

Where items were numbered anew for explicit splits, `item_id` above is the `source_item_id` of items.parquet, so that a
file made for the dataset without splits fits the one with them.
"""

import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from safetensors import SafetensorError
from safetensors.torch import load_file

from generative_recommenders.data.dataset import read_catalog
from generative_recommenders.data.errors import DataError

logger = logging.getLogger(__name__)

COLUMN = "embedding"
KEYS_SUFFIX = ".raw_ids.txt"
ITEMS_FILE = "items.parquet"


def read_embedding_file(
    path: Path, item_ids_N: np.ndarray, raw_ids: list[str], *, keys: Path | None = None
) -> np.ndarray:
    """float32 (N, D), row i for `item_ids_N[i]`.

    Args:
        path: `.npy`, `.parquet` or `.safetensors`, see the module's docstring.
        item_ids_N: int64, distinct.
        raw_ids: N raw ids in the same order.
        keys: text file with a raw id a line, for an `.npy`; by default the one beside it, if it is there.
    Raises:
        DataError: the file is missing, damaged or of another kind, has the wrong number of rows, repeats or lacks an
            item, or holds a number that is not finite.
    """
    if path.suffix == ".npy":
        values = _read_npy(path)
        beside = path.with_name(path.name.removesuffix(".npy") + KEYS_SUFFIX)
        keys = beside if keys is None and beside.exists() else keys
        if keys is None:
            _check_row_count(path, len(values), item_ids_N)
            rows = item_ids_N - 1
        else:
            rows = _rows_of(pa.array(raw_ids, pa.string()), _read_keys(keys, path, len(values)), str(keys), "raw_id")
    elif path.suffix in (".parquet", ".safetensors"):
        if keys is not None:
            raise DataError(f"keys: got {keys} beside {path.name}, expected none; such a file has its own ids")
        found, name, values = _read_parquet(path) if path.suffix == ".parquet" else _read_export(path)
        wanted = pa.array(raw_ids, pa.string()) if name == "raw_id" else pa.array(item_ids_N, pa.int64())
        rows = _rows_of(wanted, found, str(path), name)
    else:
        raise DataError(f"path: got {path}, expected an .npy or .parquet file of embeddings, or an export; convert it")
    with np.errstate(over="ignore"):
        chosen = np.asarray(values[rows], dtype=np.float32)
    return _finite(chosen, item_ids_N, str(path))


def embedding_column(items: pa.Table, where: str) -> np.ndarray:
    """float32 (N, D): the column `embedding` of an items table.

    Raises:
        DataError: there is none, its rows differ in length or are missing, or a number is not finite.
    """
    if COLUMN not in items.column_names:
        raise DataError(f"{where}: has no column {COLUMN!r}; take another encoder than 'prepared'")
    return _finite(_matrix(items[COLUMN], where).astype(np.float32), items["item_id"].to_numpy(), where)


def _read_npy(path: Path) -> np.ndarray:
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = (str(error).splitlines() or ["empty"])[0]
        raise DataError(f"{path}: cannot be read ({reason:.120}); name an .npy file of numbers") from error
    if not isinstance(values, np.ndarray) or values.ndim != 2 or not values.size or values.dtype.kind != "f":
        what = f"{values.dtype} {values.shape}" if isinstance(values, np.ndarray) else type(values).__name__
        raise DataError(f"{path}: got {what}, expected floating-point numbers (items, width); convert it")
    return values


def _read_keys(keys: Path, path: Path, rows: int) -> pa.Array:
    try:
        lines = keys.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{keys}: cannot be read ({error!s:.120}); name a text file, a raw id a line") from error
    if len(lines) != rows:
        raise DataError(f"{keys}: got {len(lines):,} lines for the {rows:,} rows of {path.name}, expected as many")
    return pc.utf8_trim_whitespace(pa.array(lines, pa.string()))


def _read_parquet(path: Path) -> tuple[pa.Array, str, np.ndarray]:
    """Ids, the name of their column, and the embeddings."""
    try:
        present = pq.read_schema(path).names
        name = next((name for name in ("raw_id", "item_id") if name in present), None)
        if name is None or COLUMN not in present:
            raise DataError(
                f"{path}: got the columns {', '.join(present[:20])}, expected {COLUMN} and item_id or raw_id"
            )
        table = pq.read_table(path, columns=[name, COLUMN])
        ids = table[name].cast(pa.string() if name == "raw_id" else pa.int64()).combine_chunks()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read ({str(error).splitlines()[0]:.120}); export it again") from error
    if not len(ids):
        raise DataError(f"{path}: got no rows, expected one an item; export it again")
    if ids.null_count:
        raise DataError(f"{path}, column {name}: got {ids.null_count} empty cells, expected an id in each")
    return ids, name, _matrix(table[COLUMN], str(path))


def _read_export(path: Path) -> tuple[pa.Array, str, np.ndarray]:
    """Raw ids, the name `raw_id`, and the embeddings of an exported model."""
    try:
        tensors = load_file(path)
        ids_X, values_XD = tensors["item_ids"].long().numpy(), tensors["embeddings"].float().numpy()
    except KeyError as error:
        raise DataError(
            f"{path}: has no tensor {error}, expected item_ids and embeddings, as --mode=export writes them of a model "
            "with an embedding an item"
        ) from error
    except (SafetensorError, OSError) as error:
        reason = (str(error).splitlines() or ["empty"])[0]
        raise DataError(f"{path}: cannot be read ({reason:.120}); export it again") from error
    if values_XD.ndim != 2 or values_XD.shape[:1] != ids_X.shape or not values_XD.size:
        raise DataError(
            f"{path}: got items {ids_X.shape} and embeddings {values_XD.shape}, expected a row an item; export it again"
        )
    catalog = read_catalog(path.with_name(ITEMS_FILE))
    # Items that were added to the semantic IDs since are not among them.
    places = pc.index_in(pa.array(ids_X), pa.array(catalog.item_ids.numpy()))
    kept = places.is_valid().to_numpy(zero_copy_only=False)
    return pa.array(catalog.raw_ids, pa.string()).take(places.drop_null()), "raw_id", values_XD[kept]


def _matrix(column: pa.ChunkedArray, where: str) -> np.ndarray:
    """The lists of a column as rows of one array."""
    kind = column.type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not lists or not pa.types.is_floating(kind.value_type):
        raise DataError(f"{where}, column {COLUMN}: got type {kind}, expected lists of floating-point numbers")
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    if lengths.min() != lengths.max() or not lengths[0]:
        odd = int(np.argmax(lengths != lengths[0]))
        raise DataError(
            f"{where}, column {COLUMN}, row {odd + 1}: got {lengths[odd]} numbers, row 1 has {lengths[0]}; "
            "expected as many, 1 or more, in all"
        )
    return pc.list_flatten(column).to_numpy().reshape(len(lengths), -1)


def _check_row_count(path: Path, rows: int, item_ids_N: np.ndarray) -> None:
    largest = int(item_ids_N.max())
    if rows == largest:
        return
    advice = "compute it for this dataset"
    if rows == len(item_ids_N):
        advice = f"list the raw ids of its rows, one a line, in {path.name.removesuffix('.npy')}{KEYS_SUFFIX} beside it"
    raise DataError(
        f"{path}: got {rows:,} rows, expected {largest:,}, the largest item id (row k is item k + 1); {advice}"
    )


def _rows_of(wanted: pa.Array, found: pa.Array, where: str, name: str) -> np.ndarray:
    """Where each wanted id is among those found."""
    counts = pc.value_counts(found)
    if len(counts) < len(found):
        repeated = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"].as_py()
        raise DataError(f"{where}: got {name} {repeated!r} twice, expected one row an item; remove one")
    places = pc.index_in(wanted, found)
    if places.null_count:
        first = wanted[int(np.argmax(places.is_null().to_numpy(zero_copy_only=False)))].as_py()
        raise DataError(
            f"{where}: lacks {places.null_count:,} of {len(wanted):,} items, the first with {name} {first!r}; "
            "expected all of items.parquet; compute the missing ones"
        )
    if len(found) > len(wanted):
        logger.info("%s: %d rows are of items that the catalogue does not have", where, len(found) - len(wanted))
    return places.to_numpy()


def _finite(values_ND: np.ndarray, item_ids_N: np.ndarray, where: str) -> np.ndarray:
    bad = ~np.isfinite(values_ND).all(axis=1)
    if bad.any():
        raise DataError(
            f"{where}: got NaN or infinity for {int(bad.sum()):,} items, the first with item_id "
            f"{item_ids_N[int(np.argmax(bad))]}; expected finite numbers; compute them again"
        )
    return values_ND
