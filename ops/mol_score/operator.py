"""Mixture-of-Logits scoring as operators for both devices: scores and their gradient, ranks, and the k best."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ops.mol_score import blocked, gpu
from ops.mol_score.arguments import DIFFERENTIABLE, Operands, Settings
from ops.random.reference import signed_seed
from ops.rank import blocked as blocked_rank
from ops.rank import gpu as gpu_rank
from ops.rank.checks import check_scores
from ops.rank.reference import Seen, seen_of
from ops.triton_runtime import on_gpu

_OPERANDS = len(Operands._fields)


def _form(o: Operands, triton: bool) -> Any:
    return gpu if on_gpu(o.q, triton) and gpu.refuses(o) is None else blocked


@torch.library.custom_op("gr::mol_score", mutates_args=())
def _mol_score(
    q: Tensor,
    x: Tensor,
    q_gate: Tensor | None,
    x_gate: Tensor | None,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    row_keys: Tensor | None,
    combination: str,
    measure: bool,
    seed: int,
    numbers: Sequence[float],
    triton: bool,
) -> tuple[Tensor, Tensor]:
    o = Operands(q, x, q_gate, x_gate, w1, b1, w2, b2, row_keys)
    return _form(o, triton).mol_score(o, Settings(combination, measure, seed, *numbers))


@_mol_score.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor]:
    o, measure = Operands(*args[:_OPERANDS]), args[_OPERANDS + 1]
    return o.q.new_empty(o.pairs), o.q.new_empty(o.num_logits + 1 if measure else 0, dtype=o.compute_dtype)


@torch.library.custom_op("gr::mol_score_backward", mutates_args=())
def _mol_score_backward(
    grad_scores: Tensor,
    grad_sums: Tensor,
    operands: Sequence[Tensor | None],
    wanted: Sequence[bool],
    combination: str,
    measure: bool,
    seed: int,
    numbers: Sequence[float],
    triton: bool,
) -> list[Tensor]:
    """A gradient for each differentiable operand, an empty tensor for one that is absent or not wanted."""
    o, s = Operands.of(operands), Settings(combination, measure, seed, *numbers)
    form = gpu if on_gpu(o.q, triton) and gpu.backward_refuses(o) is None else blocked
    return form.backward(grad_scores, grad_sums, o, s, wanted)


@_mol_score_backward.register_fake
def _(
    grad_scores: Tensor, grad_sums: Tensor, operands: Sequence[Tensor | None], wanted: Sequence[bool], *_: Any
) -> list[Tensor]:
    o = Operands.of(operands)
    found = zip(o, wanted, strict=False)
    return [t.new_empty(t.shape) if t is not None and w else o.q.new_empty(0) for t, w in found]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:_OPERANDS])
    ctx.settings = inputs[_OPERANDS:]


def _backward(ctx: Any, grad_scores: Tensor, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
    operands = ctx.saved_tensors
    wanted = [t is not None and w for t, w in zip(operands[:DIFFERENTIABLE], ctx.needs_input_grad, strict=False)]
    grads = _mol_score_backward(grad_scores, grad_sums, operands, wanted, *ctx.settings)
    return *(grad if w else None for grad, w in zip(grads, wanted, strict=True)), *[None] * 6


_mol_score.register_autograd(_backward, setup_context=_setup_context)


def _packed(s: Settings) -> tuple[str, bool, int, list[float]]:
    return s.combination, s.measure, signed_seed(s.seed), [s.temperature, s.gate_rate, s.mixture_rate]


def mol_score(o: Operands, s: Settings, *, triton: bool) -> tuple[Tensor, Tensor]:
    """`triton` runs the Triton form also on CPU tensors, under the interpreter."""
    scores, sums = _mol_score(*o, *_packed(s), triton)
    return scores, sums


def _row_blocks(o: Operands, s: Settings, form: Any) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the batch and all their scores, in a buffer that is free to be overwritten."""
    batch, items = o.pairs
    step = max(min(blocked_rank.block_rows(items, o.q.device), batch), 1)
    buffer = torch.empty(step, items, dtype=o.compute_dtype, device=o.q.device)
    for start in range(0, batch, step):
        rows = slice(start, min(start + step, batch))
        scores_bX = buffer[: rows.stop - rows.start]
        form.score_into(scores_bX, o.block(rows, slice(0, items)), s)
        check_scores(scores_bX)
        yield rows, scores_bX


def _sources(o: Operands, s: Settings) -> Iterator[tuple[slice, gpu_rank.Source]]:
    return ((rows, gpu_rank.given(scores_bX)) for rows, scores_bX in _row_blocks(o, s, gpu))


@torch.library.custom_op("gr::mol_rank_of_target", mutates_args=())
def _mol_rank_of_target(
    operands: Sequence[Tensor | None],
    candidate_ids_X: Tensor,
    target_ids_B: Tensor,
    seen_offsets: Tensor | None,
    seen_ids_S: Tensor | None,
    combination: str,
    temperature: float,
    triton: bool,
) -> Tensor:
    o, s = Operands.of(operands), Settings(combination, temperature=temperature)
    rest = (candidate_ids_X, target_ids_B, seen_of(seen_offsets, seen_ids_S))
    if _form(o, triton) is gpu:
        return gpu_rank.rank_in_blocks(_sources(o, s), *rest)
    return blocked_rank.rank_in_blocks(_row_blocks(o, s, blocked), *rest)


@_mol_rank_of_target.register_fake
def _(operands: Sequence[Tensor | None], candidate_ids_X: Tensor, target_ids_B: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(target_ids_B)


@torch.library.custom_op("gr::mol_topk", mutates_args=())
def _mol_topk(
    operands: Sequence[Tensor | None],
    candidate_ids_X: Tensor,
    k: int,
    seen_offsets: Tensor | None,
    seen_ids_S: Tensor | None,
    combination: str,
    temperature: float,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    o, s = Operands.of(operands), Settings(combination, temperature=temperature)
    rest = (candidate_ids_X, k, seen_of(seen_offsets, seen_ids_S), len(o.q))
    if _form(o, triton) is gpu and k <= gpu_rank.MAX_K:
        return gpu_rank.topk_in_blocks(_sources(o, s), *rest)
    return blocked_rank.topk_in_blocks(_row_blocks(o, s, _form(o, triton)), *rest, o.compute_dtype)


@_mol_topk.register_fake
def _(operands: Sequence[Tensor | None], candidate_ids_X: Tensor, k: int, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    o = Operands.of(operands)
    ids_BK = candidate_ids_X.new_empty(len(o.q), k)
    return o.q.new_empty(len(o.q), k, dtype=o.compute_dtype), ids_BK, candidate_ids_X.new_empty(len(o.q))


def mol_rank_of_target(
    o: Operands, s: Settings, candidate_ids_X: Tensor, target_ids_B: Tensor, seen: Seen, *, triton: bool
) -> Tensor:
    ranks_B: Tensor = _mol_rank_of_target(
        o, candidate_ids_X, target_ids_B, *(seen or (None, None)), s.combination, s.temperature, triton
    )
    return ranks_B


def mol_topk(
    o: Operands, s: Settings, candidate_ids_X: Tensor, k: int, seen: Seen, *, triton: bool
) -> tuple[Tensor, Tensor, Tensor]:
    scores_BK, ids_BK, valid_B = _mol_topk(
        o, candidate_ids_X, k, *(seen or (None, None)), s.combination, s.temperature, triton
    )
    return scores_BK, ids_BK, valid_B
