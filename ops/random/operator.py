"""`uniform_ints` as one operator for both devices, which `torch.compile` and `torch.export` see through."""

from __future__ import annotations

import torch
from torch import Tensor

from ops.random import cpu, gpu
from ops.random.reference import signed_seed
from ops.triton_runtime import on_gpu


@torch.library.custom_op("gr::uniform_ints", mutates_args=())
def _draw(seed: int, keys_T: Tensor, count: int, high: int, triton: bool) -> Tensor:
    return (gpu if on_gpu(keys_T, triton) else cpu).uniform_ints(seed, keys_T, count, high)


@_draw.register_fake
def _(seed: int, keys_T: Tensor, count: int, high: int, triton: bool) -> Tensor:
    return keys_T.new_empty(keys_T.shape[0], count)


def uniform_ints(seed: int, keys_T: Tensor, count: int, high: int, *, triton: bool) -> Tensor:
    """`triton` runs the Triton form also on CPU tensors, under the interpreter."""
    result: Tensor = _draw(signed_seed(seed), keys_T, count, high, triton)
    return result
