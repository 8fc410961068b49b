"""Items' ids in the raw data: strings, one an item, as an array of objects in memory and as two tensors on disk."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from generative_recommenders.data.errors import DataError


def as_raw_ids(values: np.ndarray | Sequence[str], count: int) -> np.ndarray:
    """The strings as an array of objects (count,).

    Raises:
        DataError: there are not `count`, one is no string, or two are equal.
    """
    # Not by way of numpy's own strings, which lose a final zero character.
    raw_ids = np.asarray(values, dtype=object)
    if raw_ids.shape != (count,):
        raise DataError(f"raw ids: got shape {raw_ids.shape}, expected ({count},), one an item")
    try:
        counted = pc.value_counts(pa.array(raw_ids, pa.large_string()))
    except (pa.ArrowException, TypeError, UnicodeError) as error:
        raise DataError(f"raw ids: got something that is no string ({error}), expected strings alone") from error
    if len(counted) < count:
        repeated = counted.field(0)[pc.index(pc.greater(counted.field(1), 1), True).as_py()]
        raise DataError(f"raw ids: got {repeated.as_py()!r} for several items, expected one each; drop the doubles")
    return raw_ids


def check_new_raw_ids(old: np.ndarray, new: np.ndarray) -> None:
    """Raises DataError, naming the first, where an old raw id is among the new ones."""
    # The few new ones are the table that is looked up in: a table of the old ones takes longer to make.
    places = pc.index_in(pa.array(old, pa.large_string()), value_set=pa.array(new, pa.large_string()))
    if places.null_count < len(places):
        repeated = new[int(pc.min(places).as_py())]
        raise DataError(f"raw ids: got {repeated!r} for several items, expected one each; drop the doubles")


def packed_strings(values: np.ndarray) -> dict[str, Tensor]:
    """Characters and bounds of strings, to be kept in safetensors."""
    array = pa.array(values, pa.large_string())
    _, offsets, characters = array.buffers()
    bounds = np.frombuffer(offsets, np.int64, len(array) + 1).copy()
    text = np.frombuffer(characters or b"", np.uint8)[: bounds[-1]].copy()
    return {"raw_id_offsets": torch.from_numpy(bounds), "raw_id_bytes": torch.from_numpy(text)}


def unpacked_strings(tensors: dict[str, Tensor]) -> np.ndarray | None:
    """What `packed_strings` packed, None where the tensors hold no strings."""
    if "raw_id_offsets" not in tensors:
        return None
    offsets, text = tensors["raw_id_offsets"].numpy(), tensors["raw_id_bytes"].numpy()
    buffers = (pa.py_buffer(offsets), pa.py_buffer(text))
    array = pa.LargeStringArray.from_buffers(len(offsets) - 1, *buffers)
    strings: np.ndarray = array.to_numpy(zero_copy_only=False)
    return strings
