"""C++ form of a level of the search (cpu.cpp): it visits legal children alone, and holds a few times k of them.

float32 and float64; lower precisions run in float32. Requests run in parallel.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ops import native
from ops.rows import compute_dtype

_SOURCE = Path(__file__).with_name("cpu.cpp")
_NORMALIZATIONS = {"none": 0, "vocabulary": 1, "legal": 2}
# Children of a request are numbered in 32 bits.
_MAX_CHILDREN = 1 << 31


def refuses(*args: Any, **_: Any) -> str | None:
    if args and args[0].device.type != "cpu":
        return "logits are not on the CPU"
    if args and args[0][:1].numel() >= _MAX_CHILDREN:
        return f"{args[0][:1].numel()} scores of a request, expected under {_MAX_CHILDREN}"
    return native.reason(_SOURCE)


def trie_step(
    logits_BMC: Tensor,
    states_BM: Tensor,
    scores_BM: Tensor,
    offsets_S: Tensor,
    tokens_E: Tensor,
    allowed: Tensor | None,
    k: int,
    normalization: str,
    most_children: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(logits_BMC, scores_BM)
    logits_BMC = logits_BMC.to(dtype)
    if logits_BMC.stride(2) != 1:
        logits_BMC = logits_BMC.contiguous()
    batch, beams, codes = logits_BMC.shape
    states = offsets_S.shape[0] - 1
    # Bound to names so that copies made here live until the call returns.
    inputs = [x.contiguous() for x in (states_BM, scores_BM.to(dtype), offsets_S, tokens_E)]
    if allowed is not None:
        inputs.append(allowed.contiguous())
    floats = [torch.empty(shape, dtype=dtype) for shape in ((batch, k), (batch,))]
    integers = [torch.empty(shape, dtype=torch.int64) for shape in ((batch, k),) * 3 + ((batch,),)]
    scores_BK, pruned_B = floats
    parents_BK, tokens_BK, states_BK, count_B = integers
    outside = _function(dtype)(
        logits_BMC.data_ptr(),
        *(x.data_ptr() for x in inputs),
        *(() if allowed is not None else (None,)),
        *(batch, beams, codes, *logits_BMC.stride()[:2], states),
        tokens_E.shape[0] if allowed is not None and allowed.dim() == 2 else 0,
        *(k, _NORMALIZATIONS[normalization]),
        *(x.data_ptr() for x in (*floats, *integers)),
    )
    if outside >= 0:
        raise IndexError(f"trie_step: got state {outside}, expected at most {states - 1}")
    return scores_BK, parents_BK, tokens_BK, states_BK, count_B, pruned_B


@functools.cache
def _function(dtype: torch.dtype) -> Any:
    library = native.require(_SOURCE)
    run = library.trie_step_f64 if dtype == torch.float64 else library.trie_step_f32
    # Declared, so that plain numbers can be passed: a step takes less time than wrapping them.
    run.argtypes = [*[ctypes.c_void_p] * 6, *[ctypes.c_int64] * 8, ctypes.c_int, *[ctypes.c_void_p] * 6]
    run.restype = ctypes.c_int64
    return run
