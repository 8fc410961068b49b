"""Whether a tensor's values can be looked at, for checks that must neither wait for a device nor end up in a graph."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import is_fake


def tracing() -> bool:
    """Whether tensors made now may be a tracer's: compiled, exported or without values."""
    return torch.compiler.is_compiling() or detect_fake_mode() is not None


def values_at_hand(tensor: Tensor) -> bool:
    """Whether reading the tensor costs next to nothing."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not is_fake(tensor)


def check_offsets(what: str, offsets: Tensor, total: int | None = None) -> None:
    """Raises ValueError where offsets (B + 1,) on a CPU do not ascend from 0 to `total`; None: to anywhere."""
    if not values_at_hand(offsets):
        return
    ends = [int(offsets[0]), int(offsets[-1])]
    if ends[0] != 0 or (total is not None and ends[1] != total) or bool((offsets.diff() < 0).any()):
        end = "" if total is None else f" to {total}, the number of values"
        found = "descending ones" if ends[0] == 0 and total in (None, ends[1]) else f"{ends[0]} to {ends[1]}"
        raise ValueError(f"{what}: got {found}, expected offsets that ascend from 0{end}")
