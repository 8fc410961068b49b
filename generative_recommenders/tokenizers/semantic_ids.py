"""The table of semantic IDs: the codes of every item, the items of every tuple of codes, and how it is kept.

A table is made once (by a tokenizer and a collision policy, or by an importer) and never changed; a grown catalogue is
a further table (`catalogue`). On disk it is a folder with `semantic_ids.json` (all facts, to be read by people) and
`codes.safetensors` (codes, item ids, raw ids). Nothing in it depends on when or where it was written, so that saving a
loaded table gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from generative_recommenders.data.errors import DataError
from generative_recommenders.data.folders import whole_folder
from generative_recommenders.tokenizers.code_keys import CodeKeys
from generative_recommenders.tokenizers.raw_ids import as_raw_ids, packed_strings, unpacked_strings

FACTS_FILE = "semantic_ids.json"
TENSORS_FILE = "codes.safetensors"
FORMAT = 1
_LARGEST_KEY = 2**63 - 1
# Stands for "all items": a default must exist before their number is known.
_ALL = torch.empty(0, dtype=torch.bool)


@dataclass(frozen=True, eq=False)
class SemanticIds:
    """Codes of N items at L levels, on the CPU, rows by ascending item id.

    Args:
        codes_NL: int32 (N, L); level l counts from 0 to sizes[l] - 1.
        item_ids_N: int64 (N,), ascending and at least 1. `of` takes any order.
        sizes: codes a level.
        raw_ids: the items' ids in the raw data, strings (N,).
        policy: how collisions were resolved (`collisions.POLICIES`), or "imported".
        tokenizer_fingerprint, embeddings_fingerprint, dataset_fingerprint: what the codes were made from; empty where
            it is unknown.
        version: counts the tables of a growing catalogue from 1.
        active_N: bool (N,); an item that is off keeps its codes but is not found by them any more.
        ancestors: fingerprints of earlier tables all of whose items are here with the codes they had there.
    Raises:
        DataError: shapes that differ, ids that are not ascending, or a code outside its level.
    """

    codes_NL: Tensor
    item_ids_N: Tensor
    sizes: tuple[int, ...]
    raw_ids: np.ndarray | None = None
    policy: str = "none"
    tokenizer_fingerprint: str = ""
    embeddings_fingerprint: str = ""
    dataset_fingerprint: str = ""
    version: int = 1
    active_N: Tensor = _ALL
    ancestors: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        count = len(self.item_ids_N)
        sizes = tuple(int(size) for size in self.sizes)
        if self.codes_NL.shape != (count, len(sizes)) or count == 0 or not sizes:
            raise DataError(
                f"semantic IDs: got codes of shape {tuple(self.codes_NL.shape)} for {count} items and {len(sizes)} "
                "levels, expected a row an item and a column a level, one at least; pass all three for one catalogue"
            )
        codes_NL, item_ids_N = self.codes_NL.detach().cpu(), ids_on_cpu(self.item_ids_N)
        if int(item_ids_N[0]) < 1 or not bool((item_ids_N.diff() > 0).all()):
            raise DataError(
                f"semantic IDs: got item ids that are not ascending from 1 on{_repeated(item_ids_N)}, expected every "
                "item once; try SemanticIds.of for another order"
            )
        _check_codes(codes_NL, item_ids_N, sizes)
        active_N = self.active_N if self.active_N.numel() else torch.ones(count, dtype=torch.bool)
        raw_ids = None if self.raw_ids is None else np.asarray(self.raw_ids, dtype=object)
        for name, found in (("active_N", active_N), ("raw_ids", raw_ids)):
            if found is not None and found.shape != (count,):
                raise DataError(f"semantic IDs: got {name} of shape {tuple(found.shape)}, expected ({count},)")
        changes = {
            "codes_NL": codes_NL.to(torch.int32).contiguous(),
            "item_ids_N": item_ids_N.contiguous(),
            "sizes": sizes,
            "raw_ids": raw_ids,
            "active_N": active_N.detach().cpu().to(torch.bool).contiguous(),
            "ancestors": tuple(self.ancestors),
        }
        for name, value in changes.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(
        cls,
        item_ids_N: Tensor | np.ndarray | Sequence[int],
        codes_NL: Tensor,
        sizes: Sequence[int],
        *,
        raw_ids: np.ndarray | Sequence[str] | None = None,
        **facts: Any,
    ) -> SemanticIds:
        """A table from rows in any order; `facts` are its further fields, of which `active_N` has the same order.

        Raises:
            DataError: as the class, and for a raw id that two items have.
        """
        ids_N, order = torch.sort(ids_on_cpu(item_ids_N), stable=True)
        if len(codes_NL) != len(ids_N):
            raise DataError(f"semantic IDs: got {len(codes_NL)} rows of codes for {len(ids_N)} items, expected equal")
        if "active_N" in facts:
            facts["active_N"] = facts["active_N"][order]
        kept = None if raw_ids is None else as_raw_ids(raw_ids, len(ids_N))[order.numpy()]
        return cls(codes_NL.cpu()[order], ids_N, tuple(sizes), kept, **facts)

    def __len__(self) -> int:
        return len(self.item_ids_N)

    @property
    def levels(self) -> int:
        return len(self.sizes)

    @cached_property
    def fingerprint(self) -> str:
        """Hex sha256 of all that a model depends on: codes, sizes, item ids, tokenizer and dataset."""
        about = [list(self.codes_NL.shape), list(self.sizes), self.tokenizer_fingerprint, self.dataset_fingerprint]
        digest = hashlib.sha256(json.dumps(about).encode())
        digest.update(self.item_ids_N.numpy().tobytes())
        digest.update(self.codes_NL.numpy().tobytes())
        return digest.hexdigest()

    def rows_of(self, item_ids: Tensor | np.ndarray | Sequence[int]) -> Tensor:
        """Row of each item, int64 (n,), or -1 for one that is not in the table."""
        ids_n = ids_on_cpu(item_ids)
        rows_n = torch.searchsorted(self.item_ids_N, ids_n).clamp_(max=len(self) - 1)
        return torch.where(self.item_ids_N[rows_n] == ids_n, rows_n, -1)

    def codes_of(self, item_ids: Tensor | np.ndarray | Sequence[int]) -> Tensor:
        """Codes of items, int64 (n, L), those of removed items too: a history may hold them.

        Raises:
            DataError: an item that is not in the table.
        """
        rows_n = self.rows_of(item_ids)
        missing = ids_on_cpu(item_ids)[rows_n < 0]
        if len(missing):
            raise DataError(
                f"semantic IDs: got item {int(missing[0])}, which has none ({len(missing)} such), "
                f"expected one of the {len(self)} items of the table; add it to the catalogue first"
            )
        return self.codes_NL[rows_n].to(torch.int64)

    def items_of(self, codes_nL: Tensor) -> tuple[Tensor, Tensor]:
        """The items of each tuple: offsets, int64 (n + 1,), and item ids, int64, ascending within a tuple.

        Removed items are left out. A tuple that no item has, one with codes outside their levels too, has none.

        Raises:
            DataError: the tuples have another number of levels.
        """
        if codes_nL.dim() != 2 or codes_nL.shape[1] != self.levels:
            raise DataError(f"codes: got shape {tuple(codes_nL.shape)}, expected (tuples, {self.levels})")
        keys_n = self._keys.of(codes_nL)
        first_n = torch.searchsorted(self._sorted_keys, keys_n)
        counts_n = torch.searchsorted(self._sorted_keys, keys_n, right=True) - first_n
        offsets = torch.zeros(len(keys_n) + 1, dtype=torch.int64)
        torch.cumsum(counts_n, 0, out=offsets[1:])
        places = torch.repeat_interleave(first_n - offsets[:-1], counts_n)
        places += torch.arange(len(places))
        return offsets, self._sorted_items[places]

    def group_sizes(self) -> Tensor:
        """How many active items share a tuple, int64, one value a distinct tuple."""
        return torch.unique_consecutive(self._sorted_keys, return_counts=True)[1]

    def summary(self) -> str:
        groups, active = self.group_sizes(), int(self.active_N.sum())
        removed = f", {len(self) - active:,} removed" if active < len(self) else ""
        largest = int(groups.max()) if len(groups) else 0
        sizes = " x ".join(map(str, self.sizes))
        return f"{len(groups):,} distinct of {active:,} items{removed}, codes {sizes}, largest group {largest}"

    def without_removed(self) -> SemanticIds:
        """The table of the active items alone. Models of the old table refuse it: histories may hold what is gone."""
        keep_N = self.active_N
        raw_ids = None if self.raw_ids is None else self.raw_ids[keep_N.numpy()]
        facts = self._facts() | {"ancestors": ()}
        return SemanticIds(self.codes_NL[keep_N], self.item_ids_N[keep_N], self.sizes, raw_ids, **facts)

    def check_for(self, dataset_fingerprint: str) -> None:
        """Raises DataError, naming both, unless the table was made for this dataset."""
        if self.dataset_fingerprint != dataset_fingerprint:
            raise DataError(
                f"semantic IDs: got a table for dataset {self.dataset_fingerprint or 'unknown'}, expected one for "
                f"{dataset_fingerprint}; make or import the table for this dataset"
            )

    def check_fingerprint(self, expected: str) -> None:
        """Raises DataError, naming both, unless a model of the table `expected` can use this one as it is."""
        if expected != self.fingerprint and expected not in self.ancestors:
            raise DataError(
                f"semantic IDs: got table {self.fingerprint} (version {self.version}), expected {expected} or a "
                "version that has grown from it; pass the table the model was trained with"
            )

    def save(self, folder: str | Path) -> None:
        """Write the folder, whole or not at all, in the place of an older table.

        Raises:
            DataError: the folder cannot be written, or holds something else.
        """
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or {x.name for x in folder.iterdir()} - {FACTS_FILE, TENSORS_FILE}):
            raise DataError(f"{folder}: got a place in use, expected a new folder or an old table; choose another")
        with whole_folder(folder) as partial:
            self.write(partial)

    def write(self, folder: Path) -> None:
        """Write the files into a folder that the caller makes appear whole."""
        tensors = {"codes": self.codes_NL, "item_ids": self.item_ids_N, "active": self.active_N}
        if self.raw_ids is not None:
            tensors |= packed_strings(self.raw_ids)
        content = save_tensors(tensors)
        facts = {
            "format": FORMAT,
            "version": self.version,
            "items": len(self),
            "removed": int((~self.active_N).sum()),
            "sizes": list(self.sizes),
            "policy": self.policy,
            "fingerprint": self.fingerprint,
            "tokenizer_fingerprint": self.tokenizer_fingerprint,
            "embeddings_fingerprint": self.embeddings_fingerprint,
            "dataset_fingerprint": self.dataset_fingerprint,
            "ancestors": list(self.ancestors),
            "checksums": {TENSORS_FILE: f"sha256:{hashlib.sha256(content).hexdigest()}"},
        }
        (folder / TENSORS_FILE).write_bytes(content)
        (folder / FACTS_FILE).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> SemanticIds:
        """Read a folder that `save` wrote.

        Raises:
            DataError: there is no table, one of another format, or one whose files are damaged or were edited.
        """
        path = Path(folder) / FACTS_FILE
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            if facts["format"] != FORMAT:
                raise DataError(f"{path}: got format {facts['format']}, expected {FORMAT}; make the table again")
            content = (path.parent / TENSORS_FILE).read_bytes()
            if f"sha256:{hashlib.sha256(content).hexdigest()}" != facts["checksums"][TENSORS_FILE]:
                raise DataError(
                    f"{path.parent / TENSORS_FILE}: got another checksum than {FACTS_FILE} says; get or make it again"
                )
            tensors = load_tensors(content)
            table = cls(
                tensors["codes"],
                tensors["item_ids"],
                tuple(facts["sizes"]),
                unpacked_strings(tensors),
                active_N=tensors["active"],
                **{name: facts[name] for name in _FACTS},
            )
        except FileNotFoundError as error:
            advice = "; it is a catalogue, try one of its versions" if (path.parent / "current.json").exists() else ""
            raise DataError(f"{error.filename}: no such file, expected a saved table of semantic IDs{advice}") from None
        except DataError:
            raise
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise DataError(
                f"{path}: cannot be read ({type(error).__name__}: {error}); get or make it again"
            ) from error
        if table.fingerprint != facts["fingerprint"]:
            raise DataError(
                f"{path}: got a table with fingerprint {table.fingerprint}, expected {facts['fingerprint']}; "
                "the file was edited, get or make it again"
            )
        return table

    def _facts(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _FACTS}

    @cached_property
    def _keys(self) -> CodeKeys:
        return CodeKeys(self.codes_NL, self.sizes)

    @cached_property
    def _order(self) -> tuple[Tensor, Tensor]:
        rows = self.active_N.nonzero()[:, 0]
        keys, order = torch.sort(self._keys.of(self.codes_NL)[rows], stable=True)
        return keys, self.item_ids_N[rows[order]]

    @property
    def _sorted_keys(self) -> Tensor:
        return self._order[0]

    @property
    def _sorted_items(self) -> Tensor:
        return self._order[1]


_FACTS = (
    "policy",
    "tokenizer_fingerprint",
    "embeddings_fingerprint",
    "dataset_fingerprint",
    "version",
    "ancestors",
)


def ids_on_cpu(item_ids: Tensor | np.ndarray | Sequence[int]) -> Tensor:
    """Ids as int64 (n,) on the CPU. Raises DataError for what is no list of integers."""
    ids_n = item_ids.detach().cpu() if isinstance(item_ids, Tensor) else torch.as_tensor(np.asarray(item_ids))
    if ids_n.dim() != 1 or (ids_n.is_floating_point() and ids_n.numel()):
        raise DataError(f"item ids: got {ids_n.dtype} of shape {tuple(ids_n.shape)}, expected integers (items,)")
    return ids_n.to(torch.int64)


def _repeated(item_ids_N: Tensor) -> str:
    values, counts = torch.unique(item_ids_N, return_counts=True)
    twice = values[counts > 1]
    return f" (item {int(twice[0])} is there {int(counts[counts > 1][0])} times)" if len(twice) else ""


def _check_codes(codes_NL: Tensor, item_ids_N: Tensor, sizes: tuple[int, ...]) -> None:
    if codes_NL.is_floating_point() or codes_NL.dtype == torch.bool or min(sizes) < 1 or max(sizes) > 2**31:
        raise DataError(
            f"semantic IDs: got {codes_NL.dtype} codes of sizes {sizes}, expected integers and sizes from 1"
        )
    limits = torch.tensor(sizes)
    if bool((codes_NL.amin(dim=0) < 0).any()) or bool((codes_NL.amax(dim=0) >= limits).any()):
        outside_NL = (codes_NL < 0) | (codes_NL >= limits)
        row, level = (int(x) for x in outside_NL.nonzero()[0])
        raise DataError(
            f"semantic IDs: got code {int(codes_NL[row, level])} at level {level} of item {int(item_ids_N[row])}, "
            f"expected 0 to {sizes[level] - 1}; check the sizes {sizes}"
        )
