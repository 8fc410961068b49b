"""Which rank this process is, on which device, and the few collectives the rest of the project uses.

One process is the ordinary case and needs nothing of torch.distributed. Under torchrun the group is set up from its
environment variables: NCCL with GPUs, gloo without.
"""

from __future__ import annotations

import datetime
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from generative_recommenders.errors import UserError
from ops.native import keep_freed_memory

# Ranks wait for the first one while it fits a tokenizer; one that fails ends all of them at once.
_PATIENCE = datetime.timedelta(hours=4)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Runtime:
    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank; all ranks must call it together."""
        if self.world_size == 1:
            return flag
        value = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value)

    def from_main(self, text: str) -> str:
        """Rank 0's text on every rank."""
        if self.world_size == 1:
            return text
        shared = [text]
        dist.broadcast_object_list(shared, src=0)
        return shared[0]

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


@contextmanager
def runtime(device: str | None = None) -> Iterator[Runtime]:
    """The process's `Runtime`; tears the group down at the end.

    Raises:
        UserError: a GPU was asked for and there is none.
    """
    keep_freed_memory()
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    known = ["cpu", *(["cuda"] if torch.cuda.is_available() else []), *_gpus()]
    if device is not None and device not in known:
        raise UserError(f"--device: got {device!r}, expected one of {', '.join(known)} on this machine")
    if device == "cpu" or not torch.cuda.is_available():
        chosen = torch.device("cpu")
        if device is None and rank == 0:
            logger.info("no GPU is visible: running on the CPU with %d threads", torch.get_num_threads())
    else:
        chosen = torch.device("cuda", local_rank) if device in (None, "cuda") else torch.device(device)
        torch.cuda.set_device(chosen)
    if world_size > 1:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield Runtime(rank, world_size, chosen)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _gpus() -> list[str]:
    return [f"cuda:{number}" for number in range(torch.cuda.device_count())]


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce_sum(value: Tensor) -> Tensor:
    """Sum over ranks, without gradient."""
    if world_size() == 1:
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value


def global_sum(value: Tensor) -> Tensor:
    """Sum over ranks whose gradient on each is that of its own part, times the ranks.

    Averaged over ranks, as DistributedDataParallel does, the gradient of any function of such sums is then the one that
    a single rank with everybody's rows would have.
    """
    if world_size() == 1:
        return value
    return all_reduce_sum(value) + world_size() * (value - value.detach())


def all_gather_concat(values: Tensor) -> Tensor:
    """Rows of all ranks in rank order, without gradient; ranks may hold different numbers of rows."""
    if world_size() == 1:
        return values
    count = torch.tensor([values.shape[0]], device=values.device)
    counts = [torch.zeros_like(count) for _ in range(world_size())]
    dist.all_gather(counts, count)
    longest = max(int(c) for c in counts)
    padded = values.new_zeros(longest, *values.shape[1:])
    padded[: values.shape[0]] = values
    parts = [torch.zeros_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(c)] for part, c in zip(parts, counts, strict=True)])


def rows_before(values: Tensor) -> int:
    """Rows of such a tensor that the ranks before this one hold."""
    counts = all_gather_concat(torch.tensor([values.shape[0]], device=values.device))
    return int(counts[: dist.get_rank()].sum()) if world_size() > 1 else 0


def gathered_rows(values: Tensor) -> Tensor:
    """`all_gather_concat` whose gradient on each rank is the sum of all ranks' gradients of its own rows."""
    if world_size() == 1:
        return values
    gathered: Tensor = _GatheredRows.apply(values)
    return gathered


class _GatheredRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        ctx.first, ctx.count = rows_before(values), values.shape[0]
        return all_gather_concat(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return all_reduce_sum(gradient.contiguous())[ctx.first : ctx.first + ctx.count]
