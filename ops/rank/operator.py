"""`rank_of_target` and `topk` as operators for both devices; neither has a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ops.rank import blocked, gpu
from ops.rank.reference import Seen, seen_of
from ops.triton_runtime import on_gpu


@torch.library.custom_op("gr::rank_of_target", mutates_args=())
def _rank_of_target(
    queries_BD: Tensor,
    table_XD: Tensor,
    candidate_ids_X: Tensor,
    target_ids_B: Tensor,
    seen_offsets: Tensor | None,
    seen_ids_S: Tensor | None,
    triton: bool,
) -> Tensor:
    arguments = (queries_BD, table_XD, candidate_ids_X, target_ids_B, seen_of(seen_offsets, seen_ids_S))
    form = gpu if on_gpu(queries_BD, triton) and gpu.refuses(*arguments) is None else blocked
    return form.rank_of_target(*arguments)


@_rank_of_target.register_fake
def _(
    queries_BD: Tensor,
    table_XD: Tensor,
    candidate_ids_X: Tensor,
    target_ids_B: Tensor,
    seen_offsets: Tensor | None,
    seen_ids_S: Tensor | None,
    triton: bool,
) -> Tensor:
    return torch.empty_like(target_ids_B)


@torch.library.custom_op("gr::topk", mutates_args=())
def _topk(
    queries_BD: Tensor,
    table_XD: Tensor,
    candidate_ids_X: Tensor,
    k: int,
    seen_offsets: Tensor | None,
    seen_ids_S: Tensor | None,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = (queries_BD, table_XD, candidate_ids_X, k, seen_of(seen_offsets, seen_ids_S))
    form = gpu if on_gpu(queries_BD, triton) and gpu.topk_refuses(*arguments) is None else blocked
    return form.topk(*arguments)


@_topk.register_fake
def _(
    queries_BD: Tensor,
    table_XD: Tensor,
    candidate_ids_X: Tensor,
    k: int,
    seen_offsets: Tensor | None,
    seen_ids_S: Tensor | None,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch = queries_BD.shape[0]
    dtype = torch.promote_types(queries_BD.dtype, torch.float32)
    ids_BK = candidate_ids_X.new_empty(batch, k)
    return queries_BD.new_empty(batch, k, dtype=dtype), ids_BK, candidate_ids_X.new_empty(batch)


def rank_of_target(
    queries_BD: Tensor, table_XD: Tensor, candidate_ids_X: Tensor, target_ids_B: Tensor, seen: Seen, *, triton: bool
) -> Tensor:
    """`triton` runs the Triton form also on CPU tensors, under the interpreter."""
    result: Tensor = _rank_of_target(
        queries_BD, table_XD, candidate_ids_X, target_ids_B, *(seen or (None, None)), triton
    )
    return result


def topk(
    queries_BD: Tensor, table_XD: Tensor, candidate_ids_X: Tensor, k: int, seen: Seen, *, triton: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`triton` runs the Triton form also on CPU tensors, under the interpreter."""
    scores_BK, ids_BK, valid_B = _topk(queries_BD, table_XD, candidate_ids_X, k, *(seen or (None, None)), triton)
    return scores_BK, ids_BK, valid_B
