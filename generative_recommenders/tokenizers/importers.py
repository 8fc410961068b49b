"""Semantic IDs that other projects made: read, matched with the items of a catalogue, and checked.

| format | file | layout |
| --- | --- | --- |
| lc-rec, lc-rec-upper | `*.index.json` | {key: ["<a_12>", "<b_3>", ...]}, keys count from 0; capitals too (MQL4GRec) |
| torch-rechub | `semantic_ids.json` | the same, keys are item ids from 1 |
| grid, nvidia | `merged_predictions_tensor.pt`, `item-sid-mapping.pt` | integer tensor (levels, items) |
| npy | `*.npy` | integers, (items, levels) or (levels, items): `orientation` must say which |
| specgr | `*.semantic_id` | raw int64 (items + 1, levels) of code + level * size + 1, row 0 is padding |
| csv | `*.csv` | columns `item_id` or `raw_id` or both, and `level_0`, `level_1`, ... |

Where a file has no ids, row k belongs to the k-th item by ascending item id. A further format is a reader here, a
writer in `exporters` and one line in the registry of each.
"""

from __future__ import annotations

import fnmatch
import itertools
import json
import logging
import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import torch
from torch import Tensor

from generative_recommenders.data.errors import DataError
from generative_recommenders.tokenizers.raw_ids import as_raw_ids
from generative_recommenders.tokenizers.semantic_ids import SemanticIds

logger = logging.getLogger(__name__)

IMPORTED = "imported"
LEVELS_FIRST, ITEMS_FIRST = "levels_first", "items_first"
KEYS = ("item_id", "position", "raw_id")
# SpecGR's files do not say how many levels they have.
SPECGR_LEVELS = 4
_TOKEN = r"^<(?P<letters>[A-Za-z]+)_(?P<code>[0-9]{1,9})>$"


@dataclass(frozen=True)
class Wanted:
    """What the caller knows of the file and its items; ids by ascending item id."""

    item_ids_N: np.ndarray
    raw_ids: np.ndarray | None
    sizes: tuple[int, ...] | None
    keys: str | None
    orientation: str | None


Reader = Callable[[Path, Wanted], np.ndarray]


def import_semantic_ids(
    path: str | Path,
    *,
    format: str | None = None,  # noqa: A002
    item_ids: Tensor | np.ndarray | Sequence[int],
    raw_ids: np.ndarray | Sequence[str] | None = None,
    sizes: Sequence[int] | None = None,
    dataset_fingerprint: str,
    keys: str | None = None,
    orientation: str | None = None,
) -> SemanticIds:
    """The table that a file holds for the items of a catalogue; items of the file beyond these are left out.

    Args:
        format: one of `IMPORTERS`; guessed from the name of the file if None.
        item_ids: ids of the catalogue, any order, with `raw_ids` in the same order.
        sizes: codes a level; the largest code of each level plus one if None.
        keys: what the keys of a json file are, "item_id", "position" (counted from 0) or "raw_id"; if None, whichever
            finds all items.
        orientation: of tensors, "levels_first" or "items_first"; if None, the one of the format.
    Raises:
        DataError: the file cannot be read as the format, lacks an item, has tuples of different lengths, or fits the
            items in more than one way; the message names the item.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file, expected semantic IDs; check the path")
    name = format_of(path, format, tuple(IMPORTERS))
    _check_choice("keys", keys, KEYS)
    _check_choice("orientation", orientation, (LEVELS_FIRST, ITEMS_FIRST))
    if keys == "raw_id" and raw_ids is None:
        raise DataError("keys: got 'raw_id' without raw ids, expected both; pass raw_ids")
    ids_N = np.asarray(item_ids, dtype=np.int64)
    order = np.argsort(ids_N, kind="stable")
    raw = None if raw_ids is None else as_raw_ids(raw_ids, len(ids_N))[order]
    wanted = Wanted(ids_N[order], raw, None if sizes is None else tuple(sizes), keys, orientation)
    # Codes of one byte would overflow when they are counted.
    codes_NL = IMPORTERS[name](path, wanted).astype(np.int64)
    if wanted.sizes is not None and len(wanted.sizes) != codes_NL.shape[1]:
        raise DataError(f"{path}: got {codes_NL.shape[1]} levels, expected {len(wanted.sizes)} as sizes have")
    found = wanted.sizes or tuple((codes_NL.max(axis=0) + 1).clip(1).tolist())
    table = SemanticIds.of(
        wanted.item_ids_N,
        torch.from_numpy(codes_NL),
        found,
        raw_ids=raw,
        policy=IMPORTED,
        dataset_fingerprint=dataset_fingerprint,
    )
    logger.info("%s (%s): %s", path, name, table.summary())
    return table


def format_of(path: Path, name: str | None, known: Sequence[str]) -> str:
    """The format called `name`, or the one that the file's name suggests.

    Raises:
        DataError: there is none.
    """
    if name is None:
        name = next((to for pattern, to in _NAMES if fnmatch.fnmatch(path.name, pattern)), None)
    if name is None or name not in known:
        got = f"format {name!r}" if name else f"the name {path.name!r}, which says no format"
        raise DataError(f"{path}: got {got}, expected one of {', '.join(known)}; pass format=")
    return name


def level_names(levels: int) -> list[str]:
    """Letters of levels: a, b, ... z, aa, ab, ..."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = (map("".join, itertools.product(letters, repeat=length)) for length in itertools.count(1))
    return list(itertools.islice(itertools.chain.from_iterable(words), levels))


def _check_choice(name: str, value: str | None, choices: Sequence[str]) -> None:
    if value is not None and value not in choices:
        raise DataError(f"{name}: got {value!r}, expected one of {', '.join(choices)}")


def _read_index(path: Path, wanted: Wanted) -> np.ndarray:
    content = _json(path)
    names, tuples = list(content), list(content.values())
    if set(map(type, tuples)) != {list}:
        bad = next(name for name, value in content.items() if not isinstance(value, list))
        raise DataError(f"{path}: item {bad}: got {_short(content[bad])}, expected a list of tokens such as '<a_12>'")
    lengths = np.fromiter(map(len, tuples), np.int64, len(tuples))
    usual = Counter(lengths.tolist()).most_common(1)[0][0]
    ragged = np.flatnonzero(lengths != usual)
    if ragged.size or usual == 0:
        row = int(ragged[0]) if ragged.size else 0
        raise DataError(
            f"{path}: item {names[row]}: got {lengths[row]} tokens, expected {usual or 'some'} as most items have "
            f"({ragged.size} of {len(names)} differ); make the file again"
        )
    codes_NL = _codes_of_tokens(path, names, list(itertools.chain.from_iterable(tuples)), usual)
    return codes_NL[_rows_of_keys(path, names, wanted)]


def _json(path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise DataError(f"{path}: item {twice} is there twice, expected every item once; make the file again")
        return found

    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except DataError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}); get the file again") from error
    if not isinstance(content, dict) or not content:
        raise DataError(f"{path}: got {_short(content)}, expected an object of items and their tokens")
    if {"format", "checksums"} <= content.keys():
        raise DataError(f"{path}: is a table of this project; try SemanticIds.load({str(path.parent)!r})")
    return content


def _codes_of_tokens(path: Path, names: list[str], tokens: list[Any], levels: int) -> np.ndarray:
    """Codes (items, levels) of all items' tokens, end to end."""
    if set(map(type, tokens)) != {str}:
        place = next(i for i, token in enumerate(tokens) if not isinstance(token, str))
        raise _bad_token(path, names, tokens, place, levels)
    parts = pc.extract_regex(pa.array(tokens, pa.large_string()), _TOKEN)
    if parts.null_count:
        raise _bad_token(path, names, tokens, int(np.argmax(np.asarray(parts.is_null()))), levels)
    letters = parts.field("letters").to_numpy(zero_copy_only=False).reshape(-1, levels)
    expected = np.array(level_names(levels), dtype=object)
    if letters[0, 0].isupper():
        expected = np.array([name.upper() for name in expected], dtype=object)
    wrong = np.flatnonzero((letters != expected).ravel())
    if wrong.size:
        raise _bad_token(path, names, tokens, int(wrong[0]), levels)
    codes: np.ndarray = pc.cast(parts.field("code"), pa.int64()).to_numpy()
    return codes.reshape(-1, levels)


def _bad_token(path: Path, names: list[str], tokens: list[Any], place: int, levels: int) -> DataError:
    row, level = divmod(place, levels)
    letter = level_names(levels)[level]
    return DataError(
        f"{path}: item {names[row]}: got {_short(tokens[place])} at level {level}, expected '<{letter}_NUMBER>', "
        "the case alike in the whole file"
    )


def _rows_of_keys(path: Path, names: Sequence[str], wanted: Wanted) -> np.ndarray:
    """The row of the file of each wanted item."""
    count = len(wanted.item_ids_N)
    ways = {"item_id": wanted.item_ids_N.astype(str), "position": np.arange(count).astype(str)}
    if wanted.raw_ids is not None:
        ways["raw_id"] = wanted.raw_ids
    if wanted.keys is not None:
        ways = {wanted.keys: ways[wanted.keys]}
    held = pa.array(names, pa.large_string())
    places = {way: pc.index_in(pa.array(keys, pa.large_string()), value_set=held) for way, keys in ways.items()}
    found = {way: rows.to_numpy() for way, rows in places.items() if rows.null_count == 0}
    if not found:
        way, rows = min(places.items(), key=lambda pair: pair[1].null_count)
        lacking = int(np.argmax(np.asarray(rows.is_null())))
        raise DataError(
            f"{path}: item {wanted.item_ids_N[lacking]} is missing, expected its {way} {ways[way][lacking]!r} as a "
            f"key ({rows.null_count} of {count} items are missing, first key {names[0]!r}); use a file for this dataset"
        )
    first, *others = found
    if any(not np.array_equal(found[first], found[way]) for way in others):
        raise DataError(
            f"{path}: got keys that can be read as {' and as '.join(found)}, expected one way; pass keys= one of these"
        )
    if len(names) > count:
        logger.info("%s: %d of %d items are not in the catalogue and left out", path, len(names) - count, len(names))
    return found[first]


def _read_torch(path: Path, wanted: Wanted) -> np.ndarray:
    try:
        tensor = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: cannot be read as a tensor ({reason}); save a plain tensor of codes") from error
    if not isinstance(tensor, Tensor) or tensor.is_floating_point():
        got = str(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise DataError(f"{path}: got {got}, expected a tensor of integers (levels, items)")
    return _rows(path, tensor.numpy(), wanted, wanted.orientation or LEVELS_FIRST)


def _read_npy(path: Path, wanted: Wanted) -> np.ndarray:
    if wanted.orientation is None:
        raise DataError(
            f"{path}: got no orientation, expected one as .npy files come both ways; "
            f"pass orientation={ITEMS_FIRST!r} or {LEVELS_FIRST!r}"
        )
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: cannot be read as .npy ({str(error).splitlines()[0]}); get the file again") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu":
        raise DataError(f"{path}: got {getattr(array, 'dtype', type(array).__name__)}, expected integers")
    return _rows(path, array, wanted, wanted.orientation)


def _rows(path: Path, array: np.ndarray, wanted: Wanted, orientation: str) -> np.ndarray:
    """Codes (items, levels) of an array in either orientation."""
    count = len(wanted.item_ids_N)
    names = "(levels, items)" if orientation == LEVELS_FIRST else "(items, levels)"
    codes = array.T if orientation == LEVELS_FIRST else array
    if codes.ndim != 2 or len(codes) != count or codes.shape[1] == 0:
        other = ITEMS_FIRST if orientation == LEVELS_FIRST else LEVELS_FIRST
        turned = codes.ndim == 2 and codes.shape[1] == count
        advice = f"pass orientation={other!r}" if turned else "use a file for this dataset"
        raise DataError(f"{path}: got shape {array.shape}, expected {names} with {count} items; {advice}")
    return codes


def _read_specgr(path: Path, wanted: Wanted) -> np.ndarray:
    levels = len(wanted.sizes) if wanted.sizes else SPECGR_LEVELS
    count = len(wanted.item_ids_N)
    expected = (count + 1) * levels * 8
    if path.stat().st_size != expected:
        raise DataError(
            f"{path}: got {path.stat().st_size} bytes, expected {expected} of int64 ({count} items + 1, {levels}); "
            "pass the sizes, or use a file for this dataset"
        )
    values_NL = np.fromfile(path, "<i8").reshape(-1, levels)
    if values_NL[0].any():
        raise DataError(f"{path}: got {values_NL[0].tolist()} in row 0, expected zeros for padding")
    values_NL = values_NL[1:]
    size = max(wanted.sizes) if wanted.sizes else _specgr_size(path, values_NL)
    return values_NL - 1 - size * np.arange(levels)


def _specgr_size(path: Path, values_NL: np.ndarray) -> int:
    """The one number of codes a level that the offsets allow."""
    levels = np.arange(values_NL.shape[1])
    least = int(np.ceil(values_NL.max(axis=0) / (levels + 1)).max())
    most = int(((values_NL.min(axis=0)[1:] - 1) // levels[1:]).min())
    if least == most:
        return least
    raise DataError(
        f"{path}: got offset codes of levels that have {least} to {most} codes, expected one number; "
        f"pass sizes=({max(least, 256)},) * {len(levels)} or what they were"
    )


def _read_csv(path: Path, wanted: Wanted) -> np.ndarray:
    types = {"item_id": pa.int64(), "raw_id": pa.large_string()}
    try:
        options = pacsv.ConvertOptions(column_types=types)
        table = pacsv.read_csv(path, parse_options=pacsv.ParseOptions(newlines_in_values=True), convert_options=options)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as csv ({str(error).splitlines()[0]}); fix that line") from error
    columns = [name for name in table.column_names if name.startswith("level_")]
    key = wanted.keys or ("raw_id" if wanted.raw_ids is not None and "raw_id" in table.column_names else "item_id")
    expected = [f"level_{level}" for level in range(len(columns))]
    if not columns or set(columns) != set(expected) or key not in table.column_names:
        raise DataError(f"{path}: got columns {', '.join(table.column_names)}, expected {key}, level_0, level_1, ...")
    names = pc.cast(table[key], pa.large_string()).to_pylist()
    for column in expected:
        values = table[column]
        if values.null_count or not pa.types.is_integer(values.type):
            row = int(np.argmax(np.asarray(values.is_null()))) if values.null_count else 0
            raise DataError(f"{path}: item {names[row]}: got {values[row].as_py()!r} in {column}, expected an integer")
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise DataError(f"{path}: item {twice} is there twice, expected every item once")
    rows = _rows_of_keys(path, names, Wanted(wanted.item_ids_N, wanted.raw_ids, None, key, None))
    return np.stack([table[column].to_numpy() for column in expected], axis=1)[rows]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


IMPORTERS: dict[str, Reader] = {
    "lc-rec": _read_index,
    "lc-rec-upper": _read_index,
    "torch-rechub": _read_index,
    "grid": _read_torch,
    "nvidia": _read_torch,
    "npy": _read_npy,
    "specgr": _read_specgr,
    "csv": _read_csv,
}
# The first pattern that fits the file's name decides.
_NAMES = (
    ("semantic_ids.json", "torch-rechub"),
    ("*.json", "lc-rec"),
    ("item-sid-mapping.pt", "nvidia"),
    ("*.pt", "grid"),
    ("*.npy", "npy"),
    ("*.semantic_id", "specgr"),
    ("*.csv", "csv"),
)
