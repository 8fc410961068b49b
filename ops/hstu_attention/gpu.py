"""The Triton form of HSTU attention: allocates, describes the call to the kernels of kernels.py and launches them.

bfloat16 and float16 go to the tensor cores as they are and accumulate in float32; float32 follows
`torch.backends.cuda.matmul.allow_tf32`. Rows of q, k, v and of the incoming gradient may be strided (slices of one
projection): only (head, dim) within a row must be contiguous.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ops import triton_runtime
from ops.hstu_attention.arguments import Bias, CachedInputs, Drop, Inputs, Mask, Rows, Settings, Strides
from ops.hstu_attention.buckets import time_bucket_thresholds
from ops.random import drop_threshold
from ops.random.reference import seed_halves
from ops.tuning import Table

_TABLE = Table("hstu_attention")
_MAX_DIM = 256
# Programs that fill a GPU, and few enough for the partial sums of the bias gradient to stay small.
_PROGRAMS = 1024
# Keys one program of cached attention should at least have, and parts to cut a row's keys into at most.
_SPLIT_KEYS = 512
_MAX_SPLITS = 16


def refuses(x: Inputs | CachedInputs | None = None, *_: Any) -> str | None:
    """Why the kernels cannot take these arguments, or None; without arguments, about this machine."""
    reason = triton_runtime.refuses(*(x or ()))
    if reason is None and x is not None and max(x.q.shape[2], x[2].shape[2]) > _MAX_DIM:
        return f"heads wider than {_MAX_DIM}"
    return reason


def _rows_of(tensor: Tensor) -> Tensor:
    heads, dim = tensor.shape[1:]
    dense = (dim == 1 or tensor.stride(2) == 1) and (heads == 1 or tensor.stride(1) == dim)
    return tensor if dense else tensor.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _float32(table: Tensor | None) -> Tensor | None:
    return None if table is None else table.float().contiguous()


def _typed_as(grad: Tensor, table: Tensor | None) -> Tensor:
    return grad if table is None else grad.to(table.dtype)


def _bias(x: Inputs | CachedInputs, key_times: Tensor | None, s: Settings) -> Bias:
    position, time = _float32(x.position_weights), _float32(x.time_weights)
    num_buckets = 0 if time is None else time.shape[-1] - 1
    return Bias(
        position=position,
        time=time,
        # At least one, so that there is something to read.
        thresholds=None if time is None else time_bucket_thresholds(max(num_buckets, 1), x.q.device),
        query_times=_contiguous(x.query_times),
        key_times=_contiguous(key_times),
        position_stride=0 if position is None or position.dim() == 1 else position.shape[1],
        time_stride=0 if time is None or time.dim() == 1 else time.shape[1],
        num_buckets=num_buckets,
        max_seq_len=s.max_seq_len,
    )


def _mask(x: Inputs | CachedInputs, s: Settings) -> Mask:
    window = s.max_attn_len or None
    full_tail = (s.min_full_attn_seq_len or None) if window else None
    targets = x.num_targets
    if s.contextual_seq_len > 0 and targets is None:
        # In a row shorter than the context nobody sees a span that holds himself, which is so with targets only.
        rows = x.offsets if isinstance(x, Inputs) else x.q_offsets
        targets = rows.new_zeros(rows.shape[0] - 1)
    return Mask(_contiguous(targets), window, s.contextual_seq_len or None, full_tail)


def _drop(s: Settings, row_keys: Tensor | None) -> Drop:
    if s.dropout_rate == 0.0:
        return Drop(None, 1.0, None)
    return Drop(drop_threshold(s.dropout_rate), 1.0 / (1.0 - s.dropout_rate), _contiguous(row_keys))


def _constants(q: Tensor, v: Tensor) -> dict[str, Any]:
    half = q.dtype != torch.float32
    return {
        "KEY_DIM": q.shape[2],
        "VALUE_DIM": v.shape[2],
        "BLOCK_K": triton_runtime.power_of_two(q.shape[2], at_least=16),
        "BLOCK_V": triton_runtime.power_of_two(v.shape[2], at_least=16),
        "FAST": half and not triton_runtime.interpreted(),
        "EXACT": not (half or torch.backends.cuda.matmul.allow_tf32),
    }


def _key(constants: dict[str, Any], q: Tensor, bias: Bias, mask: Mask, drop: Drop) -> dict[str, int]:
    """What selects a row of the tuning table; each of these costs registers or takes other instructions."""
    return {
        "dim": max(constants["BLOCK_K"], constants["BLOCK_V"]),
        "bytes": q.element_size(),
        "exact": int(constants["EXACT"]),
        "bias": int(bias.position is not None or bias.time is not None),
        "options": int(any(rule is not None for rule in (*mask, drop.threshold))),
    }


class _Call(NamedTuple):
    """What every kernel of a call gets."""

    q: Tensor
    k: Tensor
    v: Tensor
    rows: Rows
    bias: Bias
    mask: Mask
    drop: Drop
    scales: Tensor | None
    constants: dict[str, Any]


def _order(offsets: Tensor, s: Settings) -> Tensor | None:
    return torch.argsort(offsets.diff(), descending=True) if s.sort_by_length else None


def _call(x: Inputs, s: Settings) -> _Call:
    q, k, v = (_rows_of(tensor) for tensor in (x.q, x.k, x.v))
    rows = Rows(x.offsets.contiguous(), _order(x.offsets, s))
    bias = _bias(x, x.key_times, s)
    return _Call(
        *(q, k, v, rows, bias, _mask(x, s), _drop(s, x.row_keys), _contiguous(x.scales)), constants=_constants(q, v)
    )


def _blocks(total: int, block: int) -> int:
    return -(-total // block)


def forward(x: Inputs, s: Settings) -> Tensor:
    from ops.hstu_attention import kernels

    c = _call(x, s)
    batch, heads = x.offsets.shape[0] - 1, x.q.shape[1]
    out = torch.empty(x.v.shape, dtype=x.v.dtype, device=x.v.device)
    triton_runtime.launch(
        kernels.forward,
        lambda config: (_blocks(s.max_seq_len, config["BLOCK_M"]) * batch * heads,),
        *(c.q, c.k, c.v, out, Strides(c.q.stride(0), c.k.stride(0), c.v.stride(0)), *c[3:8]),
        *(*seed_halves(s.dropout_seed), s.alpha, s.scale, heads),
        table=_TABLE,
        key=_key(c.constants, c.q, c.bias, c.mask, c.drop),
        **c.constants,
    )
    return out


def backward(
    grad_out: Tensor, x: Inputs, s: Settings, need_position: bool, need_time: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and both tables, empty ones for tables that are absent or not needed."""
    from ops.hstu_attention import backward_kernels

    c = _call(x, s)
    batch, heads = x.offsets.shape[0] - 1, x.q.shape[1]
    upstream = _rows_of(grad_out)
    strides = Strides(c.q.stride(0), c.k.stride(0), c.v.stride(0), upstream.stride(0))
    grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x.q, x.k, x.v)]
    shared: dict[str, Any] = {"table": _TABLE, "key": _key(c.constants, c.q, c.bias, c.mask, c.drop), **c.constants}
    numbers = (*seed_halves(s.dropout_seed), s.alpha, s.scale, heads)
    triton_runtime.launch(
        backward_kernels.backward_keys,
        lambda config: (_blocks(s.max_seq_len, config["BLOCK_N"]) * batch * heads,),
        *(c.q, c.k, c.v, upstream, grads[1], grads[2], strides, *c[3:8], *numbers),
        **shared,
    )
    triton_runtime.launch(
        backward_kernels.backward_queries,
        lambda config: (_blocks(s.max_seq_len, config["BLOCK_M"]) * batch * heads,),
        *(c.q, c.k, c.v, upstream, grads[0], strides, *c[3:8], *numbers),
        **shared,
    )
    position, time = _bias_gradients(c, upstream, strides, s, numbers, batch, need_position, need_time)
    return grads[0], grads[1], grads[2], _typed_as(position, x.position_weights), _typed_as(time, x.time_weights)


def _bias_gradients(
    c: _Call,
    upstream: Tensor,
    strides: Strides,
    s: Settings,
    numbers: tuple[Any, ...],
    batch: int,
    need_position: bool,
    need_time: bool,
) -> tuple[Tensor, Tensor]:
    from ops.hstu_attention import backward_kernels

    position, time = c.q.new_empty(0), c.q.new_empty(0)
    position_weights = c.bias.position if need_position else None
    time_weights = c.bias.time if need_time else None
    if position_weights is None and time_weights is None:
        return position, time
    constants = dict(c.constants)
    if c.q.dtype == torch.float32 and max(constants["BLOCK_K"], constants["BLOCK_V"]) > 128:
        # The fragments of tensor cores for heads this wide do not fit the registers beside the sums.
        constants["EXACT"] = True
    key = _key(constants, c.q, c.bias, c.mask, c.drop)
    block = _TABLE.constant("backward_bias", key, "BLOCK_M")
    heads, lower = c.q.shape[1], _blocks(s.max_seq_len, block)
    bands = lower + (lower - 1 if s.contextual_seq_len > 0 else 0)
    chunks = max(1, min(batch, _blocks(_PROGRAMS, bands * heads)))
    buckets = triton_runtime.power_of_two(c.bias.num_buckets + 1, at_least=16)

    def parts(wanted: Tensor | None, *shape: int) -> Tensor | None:
        if wanted is None:
            return None
        return torch.empty(chunks, heads, bands, *shape, dtype=torch.float32, device=c.q.device)

    position_parts, time_parts = parts(position_weights, block, block), parts(time_weights, buckets)
    triton_runtime.launch(
        backward_kernels.backward_bias,
        lambda config: (bands, chunks, heads),
        *(c.q, c.k, c.v, upstream, position_parts, time_parts, strides, *c[3:8], *numbers, batch, chunks, lower),
        table=_TABLE,
        key=key,
        **constants,
        BUCKETS=buckets,
    )
    if position_weights is not None and position_parts is not None:
        position = torch.empty_like(position_weights)
        triton_runtime.launch(
            backward_kernels.reduce_positions,
            lambda config: (_blocks(2 * s.max_seq_len - 1, config["BLOCK"]), position.numel() // position.shape[-1]),
            *(position_parts.sum(0, dtype=torch.float64), position, s.max_seq_len, heads, lower, bands),
            table=_TABLE,
            key={},
            BLOCK_M=block,
            SHARED=position.dim() == 1,
        )
    if time_weights is not None and time_parts is not None:
        over = (0, 1, 2) if time_weights.dim() == 1 else (0, 2)
        time = time_parts.sum(over, dtype=torch.float64)[..., : c.bias.num_buckets + 1].to(time_weights.dtype)
    return position, time


def cached(x: CachedInputs, s: Settings) -> Tensor:
    from ops.hstu_attention import kernels

    q, k, v = _rows_of(x.q), _rows_of(x.k_cache), _rows_of(x.v_cache)
    new_k, new_v = (None if t is None else _rows_of(t) for t in (x.k, x.v))
    batch, (queries, heads, _) = x.q_offsets.shape[0] - 1, q.shape
    constants, bias, mask = _constants(q, v), _bias(x, x.cache_times, s), _mask(x, s)
    rows = Rows(x.cache_offsets.contiguous(), None, x.q_offsets.contiguous(), _contiguous(x.cache_lengths))
    # Few queries leave a GPU idle: the keys are shared out, and the parts, without a softmax, simply add.
    splits = max(1, min(_MAX_SPLITS, s.max_seq_len // _SPLIT_KEYS, _PROGRAMS // max(1, batch * heads)))
    shape = (splits, queries, heads, v.shape[2])
    out = torch.empty(shape, dtype=v.dtype if splits == 1 else torch.float32, device=v.device)
    new_strides = Strides(0, new_k.stride(0), new_v.stride(0)) if new_k is not None and new_v is not None else None
    triton_runtime.launch(
        kernels.cached,
        lambda config: (_blocks(s.max_queries, config["BLOCK_M"]) * batch * heads, splits),
        *(q, k, v, new_k, new_v, out, Strides(q.stride(0), k.stride(0), v.stride(0)), new_strides),
        *(rows, bias, mask, _contiguous(x.scales), _contiguous(x.key_times)),
        *(s.alpha, s.scale, heads, queries, s.max_queries),
        table=_TABLE,
        key=_key(constants, q, bias, mask, _drop(s, None)),
        **constants,
        SPLITS=splits,
    )
    return out[0] if splits == 1 else out.sum(0).to(v.dtype)
