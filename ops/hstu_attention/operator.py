"""HSTU attention as operators for both devices, which autograd, `torch.compile` and `torch.export` see through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ops.hstu_attention import cpu, gpu
from ops.hstu_attention.arguments import DIFFERENTIABLE, CachedInputs, Inputs, Settings
from ops.random.reference import signed_seed
from ops.triton_runtime import on_gpu


@torch.library.custom_op("gr::hstu_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_weights: Tensor | None,
    time_weights: Tensor | None,
    offsets: Tensor,
    query_times: Tensor | None,
    key_times: Tensor | None,
    num_targets: Tensor | None,
    scales: Tensor | None,
    row_keys: Tensor | None,
    integers: Sequence[int],
    numbers: Sequence[float],
    triton: bool,
) -> Tensor:
    x = Inputs(
        *(q, k, v, position_weights, time_weights, offsets, query_times, key_times, num_targets, scales, row_keys)
    )
    return (gpu if on_gpu(q, triton) else cpu).forward(x, Settings.unpacked(integers, numbers))


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return v.new_empty(v.shape)


@torch.library.custom_op("gr::hstu_attention_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_weights: Tensor | None,
    time_weights: Tensor | None,
    offsets: Tensor,
    query_times: Tensor | None,
    key_times: Tensor | None,
    num_targets: Tensor | None,
    scales: Tensor | None,
    row_keys: Tensor | None,
    integers: Sequence[int],
    numbers: Sequence[float],
    need_position: bool,
    need_time: bool,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the first five inputs; those of tables that are absent or not needed are empty."""
    x = Inputs(
        *(q, k, v, position_weights, time_weights, offsets, query_times, key_times, num_targets, scales, row_keys)
    )
    settings = Settings.unpacked(integers, numbers)
    return (gpu if on_gpu(q, triton) else cpu).backward(grad_out, x, settings, need_position, need_time)


@_backward.register_fake
def _(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    position_weights, time_weights, need_position, need_time = *rest[:2], *rest[-3:-1]
    return (
        *(x.new_empty(x.shape) for x in (q, k, v)),
        position_weights.new_empty(position_weights.shape) if need_position else q.new_empty(0),
        time_weights.new_empty(time_weights.shape) if need_time else q.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[: len(Inputs._fields)])
    ctx.settings = inputs[len(Inputs._fields) :]


def _autograd_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    integers, numbers, triton = ctx.settings
    needed = ctx.needs_input_grad[3:DIFFERENTIABLE]
    grads = _backward(grad_out, *ctx.saved_tensors, integers, numbers, *needed, triton)
    needs = (True, True, True, *needed)
    kept = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
    return (*kept, *(None for _ in range(len(Inputs._fields) - DIFFERENTIABLE + len(ctx.settings))))


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)


@torch.library.custom_op("gr::hstu_attention_cached", mutates_args=())
def _cached(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    position_weights: Tensor | None,
    time_weights: Tensor | None,
    q_offsets: Tensor,
    cache_offsets: Tensor,
    cache_lengths: Tensor | None,
    query_times: Tensor | None,
    cache_times: Tensor | None,
    key_times: Tensor | None,
    num_targets: Tensor | None,
    scales: Tensor | None,
    integers: Sequence[int],
    numbers: Sequence[float],
    triton: bool,
) -> Tensor:
    x = CachedInputs(
        *(q, k_cache, v_cache, k, v, position_weights, time_weights, q_offsets, cache_offsets, cache_lengths),
        *(query_times, cache_times, key_times, num_targets, scales),
    )
    return (gpu if on_gpu(q, triton) else cpu).cached(x, Settings.unpacked(integers, numbers))


@_cached.register_fake
def _(q: Tensor, k_cache: Tensor, v_cache: Tensor, *_: Any) -> Tensor:
    return v_cache.new_empty(q.shape[0], q.shape[1], v_cache.shape[2])


def hstu_attention(x: Inputs, s: Settings, *, triton: bool) -> Tensor:
    """`triton` runs the Triton form also on CPU tensors, under the interpreter."""
    if x.time_weights is None:
        x = x._replace(query_times=None, key_times=None)
    result: Tensor = _forward(*x, *s._replace(dropout_seed=signed_seed(s.dropout_seed)).packed(), triton)
    return result


def hstu_attention_cached(x: CachedInputs, s: Settings, *, triton: bool) -> Tensor:
    """`triton` runs the Triton form also on CPU tensors, under the interpreter."""
    if x.time_weights is None:
        x = x._replace(query_times=None, cache_times=None, key_times=None)
    result: Tensor = _cached(*x, *s.packed(), triton)
    return result
