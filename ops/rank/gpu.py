"""Triton form of rank and top-k: sorts the seen positions, cuts the candidates into splits, launches, and merges.

Half precisions go to the tensor cores as they are: their products are exact in the float32 they are added in. float32
follows `torch.backends.cuda.matmul.allow_tf32`. Nothing waits for the device, but for what `ops.rows.extent` reads of a
new catalogue.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ops import triton_runtime
from ops.rank import reference
from ops.rows import find_sorted
from ops.tuning import Table

MAX_K = 256
_TABLE = Table("rank")
_MIN_K = 16
# Positions are 32-bit in the kernels.
_MAX_CANDIDATES = (1 << 31) - 1024
# Programs a multiprocessor, and candidates a program, should at least have.
_PROGRAMS = 4
_MIN_WALK = 2048
# Queries a program of the kernels takes, about.
_RANK_ROWS, _TOPK_ROWS = 64, 16


class Source(NamedTuple):
    """Where a kernel's scores come from: products of queries and table rows, or `given` ones (B, X), float32."""

    queries: Tensor | None
    table: Tensor | None
    candidate_ids: Tensor | None
    given: Tensor | None
    query_stride: int
    table_stride: int


class Seen(NamedTuple):
    """A kernel's seen positions, ascending within a row: where each row stands at each split's start, and row ends."""

    positions: Tensor | None
    places: Tensor | None
    offsets: Tensor | None


class Splits(NamedTuple):
    """The candidates cut into `number` splits of `walk`, the last one shorter."""

    candidates: int
    walk: int
    number: int


# Rows of the batch, and where their scores come from.
Block = tuple[slice, Source]


class SeenPositions:
    """The seen candidates of all rows by position: row * (X + 1) + position, ascending, X standing for no candidate."""

    def __init__(self, candidate_ids_X: Tensor, seen: reference.Seen, batch: int) -> None:
        self.base = candidate_ids_X.numel() + 1
        self.offsets: Tensor | None = None
        if seen is None or seen[1].numel() == 0:
            return
        self.offsets = seen[0].contiguous()
        position_S, found_S = find_sorted(candidate_ids_X, seen[1])
        place_S = torch.arange(seen[1].numel(), device=self.offsets.device)
        row_S = torch.searchsorted(self.offsets, place_S, right=True) - 1
        self.keys_S = (row_S * self.base + torch.where(found_S, position_S, self.base - 1)).sort().values
        self.positions_S = (self.keys_S - row_S * self.base).to(torch.int32)
        self.first_B = torch.arange(batch, device=self.offsets.device) * self.base

    def has(self, position_B: Tensor) -> Tensor:
        """Whether each row's list has a position."""
        if self.offsets is None:
            return torch.zeros_like(position_B, dtype=torch.bool)
        wanted_B = self.first_B + position_B
        place_B = torch.searchsorted(self.keys_S, wanted_B).clamp_max(self.keys_S.numel() - 1)
        return self.keys_S[place_B] == wanted_B

    def of(self, rows: slice, splits: Splits) -> Seen:
        """What a kernel needs for a block of rows."""
        if self.offsets is None:
            return Seen(None, None, None)
        starts_S = torch.arange(splits.number, device=self.offsets.device) * splits.walk
        places = torch.searchsorted(self.keys_S, starts_S[:, None] + self.first_B[rows])
        return Seen(self.positions_S, places, self.offsets[rows.start : rows.stop + 1])


def refuses(*args: Any, **kwargs: Any) -> str | None:
    if len(args) > 2 and args[2].numel() > _MAX_CANDIDATES:
        return f"{args[2].numel()} candidates, expected at most {_MAX_CANDIDATES}"
    return triton_runtime.refuses(*args, **kwargs)


def topk_refuses(*args: Any, **kwargs: Any) -> str | None:
    if len(args) > 3 and args[3] > MAX_K:
        return f"k = {args[3]}, expected at most {MAX_K}"
    return refuses(*args, **kwargs)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _splits(rows: int, rows_of_a_program: int, candidates: int, device: torch.device) -> Splits:
    """As few splits as give every multiprocessor its programs."""
    wanted = -(-_PROGRAMS * _multiprocessors(device) * rows_of_a_program // rows)
    walk = max(-(-candidates // wanted), _MIN_WALK)
    # Whole tiles, of whatever size.
    walk = -(-walk // 256) * 256
    return Splits(candidates, walk, -(-candidates // walk))


def _products(queries_BD: Tensor, table_XD: Tensor, candidate_ids_X: Tensor) -> Source:
    queries_BD, table_XD = (x if x.stride(1) == 1 else x.contiguous() for x in (queries_BD, table_XD))
    return Source(queries_BD, table_XD, candidate_ids_X.contiguous(), None, queries_BD.stride(0), table_XD.stride(0))


def given(scores_bX: Tensor) -> Source:
    """Scores as the kernels read them: contiguous float32."""
    return Source(None, None, None, scores_bX, 0, 0)


def _launch(
    kernel: Any, source: Source, seen: Seen, *tensors: Tensor, rows: int, splits: Splits, **constants: Any
) -> None:
    if source.queries is None or source.table is None:
        key = {"bytes": 0, "ieee": 1, "width": 0}
        constants |= {"WIDTH": 0, "PRECISION": "ieee"}
    else:
        # Unlike dtypes meet in float32.
        alike, width = source.queries.dtype == source.table.dtype, source.queries.shape[1]
        size = source.queries.element_size() if alike else 4
        precision = triton_runtime.precision() if size == 4 else "tf32"
        key = {"bytes": size, "ieee": int(precision == "ieee"), "width": width}
        constants |= {"WIDTH": width, "PRECISION": precision}
    triton_runtime.launch(
        kernel,
        lambda config: (-(-rows // config["BLOCK_B"]), splits.number),
        *(source, seen, *tensors, rows, splits.candidates, splits.walk),
        table=_TABLE,
        key=key | ({"k": constants["K"]} if "K" in constants else {}),
        **constants,
    )


def rank_of_target(
    queries_BD: Tensor, table_XD: Tensor, candidate_ids_X: Tensor, target_ids_B: Tensor, seen: reference.Seen
) -> Tensor:
    whole = (slice(0, len(queries_BD)), _products(queries_BD, table_XD, candidate_ids_X))
    return rank_in_blocks([whole], candidate_ids_X, target_ids_B, seen)


def rank_in_blocks(
    blocks: Iterable[Block], candidate_ids_X: Tensor, target_ids_B: Tensor, seen: reference.Seen
) -> Tensor:
    """Ranks (B,) from blocks of rows and where their scores come from."""
    from ops.rank import kernels

    batch, candidates = target_ids_B.numel(), candidate_ids_X.numel()
    if batch == 0 or candidates == 0:
        return torch.zeros_like(target_ids_B)
    position_B, known_B = find_sorted(candidate_ids_X, target_ids_B)
    positions = SeenPositions(candidate_ids_X, seen, batch)
    can_hit_B = known_B & ~positions.has(position_B)
    ranks_B = torch.empty_like(target_ids_B)
    for rows, source in blocks:
        number = rows.stop - rows.start
        splits = _splits(number, _RANK_ROWS, candidates, ranks_B.device)
        ahead_Sb = torch.empty(splits.number, number, dtype=torch.int32, device=ranks_B.device)
        seen_there = positions.of(rows, splits)
        _launch(kernels.rank_of_target, source, seen_there, position_B[rows], ahead_Sb, rows=number, splits=splits)
        ranks_B[rows] = torch.where(can_hit_B[rows] & (ahead_Sb[0] >= 0), ahead_Sb.sum(dim=0) + 1, 0)
    return ranks_B


def topk(
    queries_BD: Tensor, table_XD: Tensor, candidate_ids_X: Tensor, k: int, seen: reference.Seen
) -> tuple[Tensor, Tensor, Tensor]:
    whole = (slice(0, len(queries_BD)), _products(queries_BD, table_XD, candidate_ids_X))
    return topk_in_blocks([whole], candidate_ids_X, k, seen, len(queries_BD))


def topk_in_blocks(
    blocks: Iterable[Block], candidate_ids_X: Tensor, k: int, seen: reference.Seen, batch: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores and ids (B, k) and valid_count (B,) from blocks of rows and where their scores come from."""
    from ops.rank import kernels

    device, candidates = candidate_ids_X.device, candidate_ids_X.numel()
    scores_BK = torch.full((batch, k), float("-inf"), device=device)
    ids_BK = candidate_ids_X.new_zeros(batch, k)
    if batch == 0 or candidates == 0:
        return scores_BK, ids_BK, ids_BK.sum(dim=1)
    positions = SeenPositions(candidate_ids_X, seen, batch)
    kept = triton_runtime.power_of_two(k, at_least=_MIN_K)
    for rows, source in blocks:
        number = rows.stop - rows.start
        splits = _splits(number, _TOPK_ROWS, candidates, device)
        best = torch.empty(number, splits.number, kept, dtype=torch.int64, device=device)
        _launch(kernels.topk, source, positions.of(rows, splits), best, rows=number, splits=splits, K=kept)
        scores_BK[rows], ids_BK[rows] = _unpacked(best.flatten(1).topk(k).values, candidate_ids_X)
    return scores_BK, ids_BK, (scores_BK > float("-inf")).sum(dim=1)


def _unpacked(keys_bK: Tensor, candidate_ids_X: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and ids of `kernels.packed` keys; score -inf, id 0 for those that no candidate has."""
    ordered_bK = keys_bK >> 32
    valid_bK = ordered_bK > -(1 << 31)
    bits_bK = torch.where(ordered_bK < 0, ordered_bK ^ 0x7FFFFFFF, ordered_bK).to(torch.int32)
    position_bK = (0xFFFFFFFF - (keys_bK & 0xFFFFFFFF)).clamp_max(candidate_ids_X.numel() - 1)
    scores_bK = torch.where(valid_bK, bits_bK.view(torch.float32), float("-inf"))
    return scores_bK, torch.where(valid_bK, candidate_ids_X[position_bK], 0)
