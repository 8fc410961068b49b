"""A growing catalogue: numbered tables of semantic IDs in one folder, one of them current.

    <folder>/tokenizer/      the quantizer (`quantizer.save_quantizer`)
    <folder>/v1/, v2/, ...   a table each (`SemanticIds`) with `churn.json`, what changed since the version before
    <folder>/current.json    the version in use, replaced in one step when the new version is complete

An item's codes never change from version to version. New items get theirs from the tokenizer as it is, beside the codes
in use; removed items are masked at once and leave the table with a rebuild. One process writes at a time, the others
wait; readers need no lock. A process killed anywhere leaves the version that was current. Numbers are not used twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from generative_recommenders.data.errors import DataError
from generative_recommenders.data.folders import lock_file, whole_file, whole_folder, write_failure
from generative_recommenders.tokenizers.churn import ChurnReport, compare, shared_rows
from generative_recommenders.tokenizers.collisions import resolve
from generative_recommenders.tokenizers.quantizer import Quantizer, fingerprint, load_quantizer, save_quantizer
from generative_recommenders.tokenizers.raw_ids import as_raw_ids, check_new_raw_ids
from generative_recommenders.tokenizers.semantic_ids import SemanticIds, ids_on_cpu

logger = logging.getLogger(__name__)

TOKENIZER, CURRENT_FILE, CHURN_FILE = "tokenizer", "current.json", "churn.json"
FORMAT = 1


def load_current(folder: str | Path) -> SemanticIds:
    """The table in use.

    Raises:
        DataError: there is none, or its files are damaged.
    """
    path = Path(folder) / CURRENT_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise DataError(f"{path}: got format {content['format']}, expected {FORMAT}; make the table again")
        version, expected = int(content["version"]), content["fingerprint"]
    except FileNotFoundError:
        raise DataError(f"{path}: no such file, expected a catalogue of semantic IDs; make or import one") from None
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: cannot be read ({type(error).__name__}: {error}); make the table again") from error
    table = SemanticIds.load(path.parent / f"v{version}")
    if table.fingerprint != expected or table.version != version:
        raise DataError(
            f"{path}: got table {table.fingerprint} (version {table.version}) in v{version}, expected {expected} "
            f"(version {version}); put the folder back as it was"
        )
    return table


def publish(folder: str | Path, table: SemanticIds, quantizer: Quantizer | None = None) -> ChurnReport:
    """Make `table` the current version, with its tokenizer where it has one; nothing is written if it is current.

    Raises:
        DataError: the quantizer is not the one the table was made with, or the folder cannot be written.
    """
    folder = Path(folder)
    if quantizer is not None:
        _check_tokenizer(folder, table, quantizer)
    with _writing(folder, create=True):
        old = load_current(folder) if (folder / CURRENT_FILE).exists() else None
        if quantizer is not None:
            save_quantizer(quantizer, folder / TOKENIZER)
        if old is not None and _same(old, table):
            return compare(old, old)
        return _write_version(folder, old, table, False)


def add_items(
    folder: str | Path,
    item_ids: Tensor | np.ndarray | Sequence[int],
    x_nD: Tensor,
    raw_ids: np.ndarray | Sequence[str] | None = None,
    *,
    dataset_fingerprint: str | None = None,
    seed: int = 0,
    nearest: int = 10,
) -> ChurnReport:
    """Give items codes beside those in use, as the table's policy does, and make the result the current version.

    An item that was removed comes back with the codes it had.

    Args:
        x_nD: embeddings, a row an item, from the encoder that the tokenizer was fitted on.
        raw_ids: one an item where the table has raw ids, else None.
        dataset_fingerprint: of the dataset with the new items; None leaves the table's.
        seed, nearest: as of `collisions.resolve`.
    Raises:
        DataError: an item is there already or twice, the embeddings do not fit, or the tokenizer is not the table's.
    """
    folder = Path(folder)
    ids_n, order = torch.sort(ids_on_cpu(item_ids), stable=True)
    x_nD = _embeddings(x_nD, ids_n, order)
    raw_n = None if raw_ids is None else as_raw_ids(raw_ids, len(ids_n))[order.numpy()]
    with _writing(folder):
        old = load_current(folder)
        if not old.tokenizer_fingerprint:
            raise DataError(
                f"{folder}: got a table without a tokenizer (policy {old.policy}), expected one that codes were made "
                "with; import a table that has the new items"
            )
        if (raw_n is None) != (old.raw_ids is None):
            raise DataError(f"raw ids: got {'none' if raw_n is None else 'some'}, expected them as the table has them")
        quantizer = load_quantizer(folder / TOKENIZER)
        _check_tokenizer(folder, old, quantizer)
        fresh_n, active_N = _restored(folder, old, ids_n, raw_n)
        table = dataclasses.replace(
            old,
            active_N=active_N,
            embeddings_fingerprint=_extended(old.embeddings_fingerprint, ids_n, x_nD),
            dataset_fingerprint=old.dataset_fingerprint if dataset_fingerprint is None else dataset_fingerprint,
            ancestors=_lineage(old),
        )
        resolved, shared = 0, 0
        if bool(fresh_n.any()):
            raw_n = None if raw_n is None else raw_n[fresh_n.numpy()]
            base_nL = quantizer.encode(x_nD[fresh_n])
            result = resolve(
                old.policy,
                quantizer,
                x_nD[fresh_n],
                base_nL,
                taken_ML=old.codes_NL.to(torch.int64),
                width=old.sizes[-1],
                seed=seed,
                nearest=nearest,
            )
            table = _with_rows(table, ids_n[fresh_n], result.codes_NL, tuple(result.sizes), raw_n)
            levels = len(quantizer.sizes)
            before = shared_rows(old.codes_NL[:, :levels], base_nL, old.sizes[:levels])
            shared = shared_rows(old.codes_NL, result.codes_NL, table.sizes)
            resolved = before - shared
        return _write_version(folder, old, table, True, resolved, shared)


def remove_items(folder: str | Path, item_ids: Tensor | np.ndarray | Sequence[int]) -> ChurnReport:
    """Mask items: they keep their codes, which no other item gets, and are found by them no more.

    Raises:
        DataError: an item that is not in the table.
    """
    folder = Path(folder)
    with _writing(folder):
        old = load_current(folder)
        rows_n = old.rows_of(item_ids)
        if bool((rows_n < 0).any()):
            missing = ids_on_cpu(item_ids)[rows_n < 0]
            raise DataError(
                f"{folder}: got item {int(missing[0])} to remove ({len(missing)} such), which is not in the table"
            )
        active_N = old.active_N.clone()
        active_N[rows_n] = False
        if torch.equal(active_N, old.active_N):
            return compare(old, old)
        return _write_version(folder, old, dataclasses.replace(old, active_N=active_N), True)


def rebuild(folder: str | Path, *, dataset_fingerprint: str | None = None) -> ChurnReport:
    """Drop the removed items, so that their codes can be given again; the codes of the others stay.

    Models of earlier versions refuse the result, as their histories may hold what is gone.

    Raises:
        DataError: all items are removed.
    """
    folder = Path(folder)
    with _writing(folder):
        old = load_current(folder)
        if bool(old.active_N.all()):
            return compare(old, old)
        if not bool(old.active_N.any()):
            raise DataError(f"{folder}: got a table with all items removed, expected one to keep; add items first")
        table = old.without_removed()
        if dataset_fingerprint is not None:
            table = dataclasses.replace(table, dataset_fingerprint=dataset_fingerprint)
        return _write_version(folder, old, table, True)


@contextlib.contextmanager
def _writing(folder: Path, *, create: bool = False) -> Iterator[None]:
    """Keep other writers out; waits for the one that is at work."""
    try:
        if create:
            folder.mkdir(parents=True, exist_ok=True)
        elif not folder.is_dir():
            raise DataError(f"{folder}: no such folder, expected a catalogue of semantic IDs; make or import one")
        handle = lock_file(folder / ".lock")
        if handle is None:
            logger.info("%s: waiting for another process that writes there", folder)
            handle = lock_file(folder / ".lock", wait=True)
    except OSError as error:
        raise DataError(write_failure(folder / ".lock", error)) from error
    assert handle is not None
    try:
        yield
    finally:
        os.close(handle)


def _write_version(
    folder: Path, old: SemanticIds | None, table: SemanticIds, keeps_codes: bool, resolved: int = 0, unresolved: int = 0
) -> ChurnReport:
    """Write the next version and make it the current one."""
    taken = [int(path.name[1:]) for path in folder.glob("v*") if path.name[1:].isdecimal()]
    table = dataclasses.replace(table, version=max(taken, default=0) + 1)
    report = dataclasses.replace(compare(old, table), collisions_resolved=resolved, unresolved=unresolved)
    if report.changed and keeps_codes:
        raise RuntimeError(f"{folder}: codes of {report.changed} old items would change; nothing was written")
    with whole_folder(folder / f"v{table.version}") as partial:
        table.write(partial)
        (partial / CHURN_FILE).write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    content = {"format": FORMAT, "version": table.version, "fingerprint": table.fingerprint}
    with whole_file(folder / CURRENT_FILE) as aside:
        aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    logger.debug("%s: %s", folder, report.summary())
    return report


def _embeddings(x_nD: Tensor, ids_n: Tensor, order: Tensor) -> Tensor:
    """Rows by ascending item id, checked."""
    if len(ids_n) == 0 or x_nD.dim() != 2 or len(x_nD) != len(ids_n):
        raise DataError(f"embeddings: got shape {tuple(x_nD.shape)}, expected ({len(ids_n) or 'some'} items, width)")
    twice = ids_n[1:][ids_n.diff() == 0]
    if len(twice) or int(ids_n[0]) < 1:
        got = f"item {int(twice[0])} twice" if len(twice) else f"item {int(ids_n[0])}"
        raise DataError(f"item ids: got {got}, expected every item once and ids from 1; drop it")
    x_nD = x_nD[order.to(x_nD.device)]
    bad = (~torch.isfinite(x_nD).all(dim=1)).nonzero()
    if len(bad):
        raise DataError(
            f"embeddings: got NaN or infinity for item {int(ids_n[bad[0]])} ({len(bad)} such); encode it again"
        )
    return x_nD


def _check_tokenizer(folder: Path, table: SemanticIds, quantizer: Quantizer) -> None:
    found = fingerprint(quantizer)
    if found != table.tokenizer_fingerprint:
        raise DataError(
            f"{folder}: got tokenizer {found}, expected {table.tokenizer_fingerprint or 'none'}, which the table was "
            "made with; put that one back or make the table again"
        )


def _same(old: SemanticIds, table: SemanticIds) -> bool:
    return (
        old.fingerprint == table.fingerprint
        and torch.equal(old.active_N, table.active_N)
        and old.embeddings_fingerprint == table.embeddings_fingerprint
        and old.policy == table.policy
    )


def _restored(folder: Path, old: SemanticIds, ids_n: Tensor, raw_n: np.ndarray | None) -> tuple[Tensor, Tensor]:
    """Which of the items are not in the table, bool (n,), and who is active once the others are back, bool (N,)."""
    rows_n = old.rows_of(ids_n)
    there_n = rows_n >= 0
    rows, ids = rows_n[there_n], ids_n[there_n]
    already = ids[old.active_N[rows]]
    if len(already):
        raise DataError(
            f"{folder}: got item {int(already[0])} to add ({len(already)} such), which is there already; leave it out, "
            "its codes cannot change"
        )
    if raw_n is not None and old.raw_ids is not None:
        differs = np.flatnonzero(raw_n[there_n.numpy()] != old.raw_ids[rows.numpy()])
        if differs.size:
            place = int(differs[0])
            raise DataError(
                f"{folder}: got raw id {raw_n[there_n.numpy()][place]!r} for item {int(ids[place])}, expected "
                f"{old.raw_ids[rows[place]]!r} as it had when it was removed; give the other item a new id"
            )
    active_N = old.active_N.clone()
    active_N[rows] = True
    return ~there_n, active_N


def _lineage(old: SemanticIds) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*old.ancestors, old.fingerprint)))


def _with_rows(
    table: SemanticIds, ids_n: Tensor, codes_nL: Tensor, sizes: tuple[int, ...], raw_n: np.ndarray | None
) -> SemanticIds:
    """The table with items that it has not."""
    if sizes != table.sizes:
        logger.warning(
            "codes a level: got %s, expected %s; models of the old table refuse this one", sizes, table.sizes
        )
        table = dataclasses.replace(table, ancestors=())
    raw_ids = None
    if raw_n is not None and table.raw_ids is not None:
        check_new_raw_ids(table.raw_ids, raw_n)
        raw_ids = np.concatenate([table.raw_ids, raw_n])
    ids_N, order = torch.sort(torch.cat([table.item_ids_N, ids_n]))
    return dataclasses.replace(
        table,
        codes_NL=torch.cat([table.codes_NL, codes_nL.cpu().to(torch.int32)])[order],
        item_ids_N=ids_N,
        sizes=sizes,
        raw_ids=None if raw_ids is None else raw_ids[order.numpy()],
        active_N=torch.cat([table.active_N, torch.ones(len(ids_n), dtype=torch.bool)])[order],
    )


def _extended(embeddings_fingerprint: str, ids_n: Tensor, x_nD: Tensor) -> str:
    digest = hashlib.sha256(embeddings_fingerprint.encode())
    digest.update(ids_n.numpy().tobytes())
    digest.update(x_nD.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()
