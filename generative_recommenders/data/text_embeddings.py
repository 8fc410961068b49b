"""One vector an item, from its text or from a file, keyed by item id.

    embed_items(Path("tmp/ml-1m"), encoder="hashed")
    embed_items(Path("tmp/amzn14-beauty"), encoder="minilm")
    embed_items(Path("tmp/amzn14-beauty"), encoder="file", path=Path("text_emb_minilm_l6_v2.f16.npy"))

Texts come from a template (`text_templates`) and go through an encoder (`text_encoders`); or the vectors are there
already: `file` reads them (`embedding_files`), `prepared` takes the column `embedding` of `items.parquet`.

Equal texts are encoded once and get one vector, and texts are encoded in sorted order, so that the order of items
changes nothing. What was encoded is kept in `<dataset>/embeddings/<encoder>-<hash>/`, the hash being over the texts and
all settings of the encoder. Shards of texts are written there as they are done, and an interrupted call goes on from
them. `embeddings.json` comes last and vouches for the rest.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from generative_recommenders.data.dataset import read_catalog
from generative_recommenders.data.embedding_files import COLUMN, embedding_column, read_embedding_file
from generative_recommenders.data.errors import DataError
from generative_recommenders.data.folders import write_failure
from generative_recommenders.data.item_tables import with_item_table
from generative_recommenders.data.split_files import FIRST_SPLIT, SOURCE_ITEM_ID
from generative_recommenders.data.text_encoders import TextEncoder, text_encoder
from generative_recommenders.data.text_templates import item_texts, template_of, text_columns

logger = logging.getLogger(__name__)

FOLDER = "embeddings"
VALUES_FILE = "embeddings.safetensors"
METADATA_FILE = "embeddings.json"
SHARD_TEXTS = 4_096
_HASH_LETTERS = 16


@dataclass(frozen=True)
class Embeddings:
    """A vector for each of N items.

    Attributes:
        item_ids_N: int64, ascending.
        values_ND: float32, row i of item `item_ids_N[i]`.
        fingerprint: sha256 over the encoder's settings, item ids and values.
        folder: where they are kept; None for those that came from a file, or were not to be kept.
    """

    item_ids_N: Tensor
    values_ND: Tensor
    fingerprint: str
    folder: Path | None = None


def embed_items(
    dataset_folder: Path,
    *,
    encoder: str,
    dimension: int | None = None,
    path: Path | None = None,
    keys: Path | None = None,
    batch_size: int = 256,
    template: str | None = None,
    item_table: Path | None = None,
    cache: bool = True,
) -> Embeddings:
    """Embeddings of all items of a prepared dataset.

    Args:
        encoder: `hashed`, `minilm`, a model's folder or hub name, `file` or `prepared`.
        dimension: expected width; None for the encoder's own, which for `hashed` is 256.
        path: `file`: the `.npy`, `.parquet` or exported index. `hashed`: a folder of earlier embeddings whose fitted
            encoder is used again, as new items beside old ones need it. `minilm`: the folder of the model.
        keys: `file`: raw ids of the rows of an `.npy`, one a line.
        batch_size: texts a forward pass of a model; changes the last digits at most.
        template: see `text_templates`; None for the dataset's own.
        item_table: further columns for the template, see `item_tables`.
        cache: keep the result, and use a kept one.
    Raises:
        DataError: the dataset, encoder, template or a file cannot be used, no item has a text, or the result cannot
            be written.
    """
    items = _read_items(dataset_folder, with_embedding=encoder == "prepared")
    item_ids = torch.from_numpy(items["item_id"].to_numpy().astype(np.int64))
    if encoder in ("file", "prepared"):
        _refuse(encoder, template=template, item_table=item_table)
        if encoder == "prepared":
            _refuse(encoder, path=path, keys=keys)
        elif path is None:
            raise DataError("path: got none, expected the file of embeddings for encoder 'file'; name it")
        return _ready_made(dataset_folder, items, item_ids, path, keys, dimension)
    _refuse(encoder, keys=keys)
    if item_table is not None:
        items = with_item_table(items, item_table)
    columns = text_columns(items)
    chosen = template if template is not None else template_of(dataset_folder.name, columns)
    texts = item_texts(items, chosen, strict=template is not None)
    _check_texts(texts, item_ids, chosen)
    made = text_encoder(encoder, dimension=dimension, path=path, batch_size=batch_size)
    fitted = _fitted_texts(items, texts)
    content = "\0".join(f"{len(text)} {text}" for text in texts)
    if len(fitted) < len(texts):
        content += f"\0fitted on {hashlib.sha256(chr(0).join(fitted).encode()).hexdigest()}"
    key = _hash(made.settings, item_ids, content.encode())
    if not cache:
        values = _encoded(made, texts, fitted, None)
        return Embeddings(item_ids, values, _fingerprint(made.settings, item_ids, values))
    folder = dataset_folder / FOLDER / f"{made.name}-{key[:_HASH_LETTERS]}"
    kept = _kept(folder, key, made.settings, item_ids)
    if kept is not None:
        _check_dimension(dimension, kept.values_ND, str(folder))
        return kept
    return _keep(folder, key, made, item_ids, texts, fitted, chosen)


def _read_items(folder: Path, *, with_embedding: bool) -> pa.Table:
    path = folder / "items.parquet"
    if not path.exists():
        raise DataError(f"{path}: not found, expected a prepared dataset; try preprocess_public_data.py first")
    read_catalog(path)
    names = pq.read_schema(path).names
    return pq.read_table(path, columns=[name for name in names if with_embedding or name != COLUMN])


def _refuse(encoder: str, **given: object) -> None:
    for name, value in given.items():
        if value is not None:
            raise DataError(f"{name}: got {str(value)!r:.80} beside encoder {encoder!r}, which has no use for it")


def _ready_made(
    folder: Path, items: pa.Table, item_ids: Tensor, path: Path | None, keys: Path | None, dimension: int | None
) -> Embeddings:
    where = str(path or folder / "items.parquet")
    if path is not None:
        raw_ids = [str(raw_id) for raw_id in items["raw_id"].to_pylist()]
        # The file goes by the ids that items had before splits numbered them anew.
        ids = items[SOURCE_ITEM_ID].to_numpy() if SOURCE_ITEM_ID in items.column_names else item_ids.numpy()
        array = read_embedding_file(path, ids, raw_ids, keys=keys)
    else:
        array = embedding_column(items, where)
    values = torch.from_numpy(array)
    _check_dimension(dimension, values, where)
    return Embeddings(item_ids, values, _fingerprint({"encoder": "file"}, item_ids, values))


def _check_dimension(dimension: int | None, values: Tensor, where: str) -> None:
    if dimension not in (None, values.shape[1]):
        raise DataError(f"dimension: got {dimension}, expected {values.shape[1]} as in {where}; leave it out")


def _check_texts(texts: list[str], item_ids: Tensor, template: str) -> None:
    empty = [place for place, text in enumerate(texts) if not text]
    if len(empty) == len(texts):
        raise DataError(f"template {template!r:.80}: no item has a text by it; name columns of items.parquet that do")
    if empty:
        first = int(item_ids[empty[0]])
        logger.warning("%d of %d items have no text, the first is item %d", len(empty), len(texts), first)


def _fitted_texts(items: pa.Table, texts: list[str]) -> list[str]:
    """What an encoder may be fitted on: where splits hold items out of training, the texts of those that are in it."""
    if FIRST_SPLIT not in items.column_names:
        return texts
    inside = [split == 0 for split in items[FIRST_SPLIT].to_pylist()]
    return [text for text, kept in zip(texts, inside, strict=True) if kept]


def _encoded(encoder: TextEncoder, texts: Sequence[str], fitted: Sequence[str], folder: Path | None) -> Tensor:
    """(N, D) float32; with a folder, from the shards in it as far as they go, and further ones are written."""
    distinct = sorted(set(texts))
    encoder.begin(sorted(set(fitted)))
    if folder is not None:
        # Only now: an encoder that cannot begin leaves no folder.
        folder.mkdir(parents=True, exist_ok=True)
    shards = []
    with tqdm(total=len(distinct), unit="text", desc=encoder.name, disable=None, leave=False) as bar:
        for first in range(0, len(distinct), SHARD_TEXTS):
            part = distinct[first : first + SHARD_TEXTS]
            path = folder / f"shard-{first // SHARD_TEXTS:06d}.safetensors" if folder is not None else None
            values = _read_shard(path, len(part)) if path is not None else None
            if values is None:
                values = encoder.encode(part)
                if path is not None:
                    _write_tensors(path, {"values": values})
            shards.append(values)
            bar.update(len(part))
    place = {text: row for row, text in enumerate(distinct)}
    return torch.cat(shards)[torch.tensor([place[text] for text in texts])]


def _read_shard(path: Path, rows: int) -> Tensor | None:
    try:
        values = load_file(path)["values"]
    except (OSError, SafetensorError, KeyError):
        return None
    return values if values.ndim == 2 and len(values) == rows else None


def _kept(folder: Path, key: str, settings: dict[str, object], item_ids: Tensor) -> Embeddings | None:
    """What `folder` holds under this key, if it is whole."""
    try:
        metadata = json.loads((folder / METADATA_FILE).read_text(encoding="utf-8"))
        values = load_file(folder / VALUES_FILE)["values"]
    except (OSError, ValueError, SafetensorError, KeyError):
        return None
    if not isinstance(metadata, dict) or metadata.get("key") != key or len(values) != len(item_ids):
        return None
    fingerprint = _fingerprint(settings, item_ids, values)
    if metadata.get("fingerprint") != fingerprint:
        logger.warning("%s: damaged, encoding again", folder)
        return None
    return Embeddings(item_ids, values, fingerprint, folder)


def _keep(
    folder: Path,
    key: str,
    encoder: TextEncoder,
    item_ids: Tensor,
    texts: list[str],
    fitted: list[str],
    template: str,
) -> Embeddings:
    try:
        (folder / METADATA_FILE).unlink(missing_ok=True)
        done = len(list(folder.glob("shard-*.safetensors")))
        if done:
            logger.info("%s: going on after %d shards of %d texts", folder, done, SHARD_TEXTS)
        values = _encoded(encoder, texts, fitted, folder)
        encoder.save(folder)
        _write_tensors(folder / VALUES_FILE, {"item_ids": item_ids, "values": values})
        fingerprint = _fingerprint(encoder.settings, item_ids, values)
        metadata = {
            "encoder": encoder.settings,
            "template": template,
            "items": len(item_ids),
            "dimension": values.shape[1],
            "key": key,
            "fingerprint": fingerprint,
        }
        text = json.dumps(metadata, indent=2, ensure_ascii=False) + "\n"
        _write(folder / METADATA_FILE, lambda aside: aside.write_text(text, encoding="utf-8"))
        for shard in folder.glob("shard-*.safetensors"):
            shard.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(write_failure(folder, error)) from error
    return Embeddings(item_ids, values, fingerprint, folder)


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        _write(path, lambda aside: save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside))
    except SafetensorError as error:
        # What the library makes of a full disk.
        raise OSError(str(error)) from error


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, which then takes its name."""
    aside = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        write(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _hash(settings: dict[str, object], item_ids: Tensor, content: bytes) -> str:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(item_ids.numpy().astype("<i8").tobytes())
    digest.update(content)
    return digest.hexdigest()


def _fingerprint(settings: dict[str, object], item_ids: Tensor, values: Tensor) -> str:
    return _hash(settings, item_ids, values.contiguous().numpy().astype("<f4", copy=False).tobytes())
