"""Semantic IDs written in the formats of other projects; `importers` says which and how each is laid out.

No format but csv keeps item ids and raw ids both, and none keeps sizes, policy and fingerprints: the table itself
(`SemanticIds.save`) does.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import torch

from generative_recommenders.data.errors import DataError
from generative_recommenders.data.folders import whole_file
from generative_recommenders.tokenizers.importers import ITEMS_FIRST, LEVELS_FIRST, format_of, level_names
from generative_recommenders.tokenizers.semantic_ids import SemanticIds

Writer = Callable[[SemanticIds, Path, str | None], None]


def export_semantic_ids(
    ids: SemanticIds,
    path: str | Path,
    format: str | None = None,  # noqa: A002
    *,
    orientation: str | None = None,
) -> None:
    """Write one file, whole or not at all, in the place of an older one.

    Args:
        format: one of `EXPORTERS`; guessed from the name of the file if None.
        orientation: of tensors, "levels_first" or "items_first"; if None, the one of the format.
    Raises:
        DataError: no such format, a table with removed items (which no format can tell), or the file cannot be written.
    """
    path = Path(path)
    name = format_of(path, format, tuple(EXPORTERS))
    removed = int((~ids.active_N).sum())
    if removed:
        raise DataError(f"{path}: got a table with {removed} removed items, expected none; try ids.without_removed()")
    if orientation not in (None, LEVELS_FIRST, ITEMS_FIRST):
        raise DataError(f"orientation: got {orientation!r}, expected {LEVELS_FIRST} or {ITEMS_FIRST}")
    if name == "npy" and orientation is None:
        raise DataError(f"{path}: got no orientation, expected {LEVELS_FIRST} or {ITEMS_FIRST}; pass orientation=")
    with whole_file(path) as partial_path:
        EXPORTERS[name](ids, partial_path, orientation)


def _write_index(ids: SemanticIds, path: Path, _: str | None, *, upper: bool = False, positions: bool = True) -> None:
    columns = []
    for level, letter in enumerate(level_names(ids.levels)):
        codes = pc.cast(pa.array(ids.codes_NL[:, level].numpy()), pa.large_string())
        prefix = f"<{letter.upper() if upper else letter}_"
        before, after, between = (pa.scalar(text, pa.large_string()) for text in (prefix, ">", ""))
        tokens = pc.binary_join_element_wise(before, codes, after, between)
        columns.append(tokens.to_numpy(zero_copy_only=False))
    keys = range(len(ids)) if positions else ids.item_ids_N.tolist()
    content = dict(zip(map(str, keys), np.stack(columns, axis=1).tolist(), strict=True))
    path.write_text(json.dumps(content), encoding="utf-8")


def _write_torch(ids: SemanticIds, path: Path, orientation: str | None) -> None:
    codes_NL = ids.codes_NL.to(torch.int64)
    # `save` keeps the storage, of which a transposed view would show another order.
    torch.save(codes_NL if orientation == ITEMS_FIRST else codes_NL.T.contiguous(), path)


def _write_npy(ids: SemanticIds, path: Path, orientation: str | None) -> None:
    codes_NL = ids.codes_NL.numpy()
    with path.open("wb") as file:
        np.save(file, codes_NL if orientation == ITEMS_FIRST else np.ascontiguousarray(codes_NL.T))


def _write_specgr(ids: SemanticIds, path: Path, _: str | None) -> None:
    values_NL = ids.codes_NL.numpy().astype("<i8") + 1 + max(ids.sizes) * np.arange(ids.levels)
    np.concatenate([np.zeros((1, ids.levels), "<i8"), values_NL]).tofile(path)


def _write_csv(ids: SemanticIds, path: Path, _: str | None) -> None:
    columns = {"item_id": pa.array(ids.item_ids_N.numpy())}
    if ids.raw_ids is not None:
        columns["raw_id"] = pa.array(ids.raw_ids, pa.large_string())
    codes_NL = ids.codes_NL.numpy()
    columns |= {f"level_{level}": pa.array(codes_NL[:, level]) for level in range(ids.levels)}
    pacsv.write_csv(pa.table(columns), path)


EXPORTERS: dict[str, Writer] = {
    "lc-rec": _write_index,
    "lc-rec-upper": partial(_write_index, upper=True),
    "torch-rechub": partial(_write_index, positions=False),
    "grid": _write_torch,
    "nvidia": _write_torch,
    "npy": _write_npy,
    "specgr": _write_specgr,
    "csv": _write_csv,
}
