"""The generator of `ops.random` in plain PyTorch: 32-bit arithmetic carried in int64, masked after every product."""

from __future__ import annotations

import torch

_MASK = 0xFFFFFFFF
_LANE_STEP = 0x9E3779B9
# Up to here one 32-bit draw is unbiased to 2^-8 of an id's probability; above it two lanes make 64 bits.
ONE_LANE_HIGH = 1 << 24
MAX_HIGH = 1 << 31


def _mix(x: torch.Tensor) -> torch.Tensor:
    """lowbias32 on values in [0, 2^32). int64 products wrap, which leaves their low 32 bits right."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def token_hash(seed: int, keys: torch.Tensor) -> torch.Tensor:
    """Hash of each int64 key under a 64-bit seed: int64 of the same shape, values in [0, 2^32)."""
    low_seed = seed & _MASK
    high_seed = (((seed >> 32) & _MASK) * _LANE_STEP) & _MASK
    low = _mix((keys & _MASK) ^ low_seed)
    return _mix(low ^ ((keys >> 32) & _MASK) ^ high_seed)


def seed_halves(seed: int) -> tuple[int, int]:
    """The seed as Triton kernels take it: two signed 32-bit halves, the higher times the lane step."""
    halves = (seed & _MASK, ((seed >> 32) & _MASK) * _LANE_STEP & _MASK)
    return halves[0] - (halves[0] >> 31 << 32), halves[1] - (halves[1] >> 31 << 32)


def signed_seed(seed: int) -> int:
    """The seed's 64 bits as the signed integer that torch's operators carry."""
    seed &= (1 << 64) - 1
    return seed - (1 << 64) if seed >> 63 else seed


def lane_bits(token: torch.Tensor, lanes: torch.Tensor) -> torch.Tensor:
    """32 random bits for each (token, lane), broadcast like addition: int64 values in [0, 2^32).

    token: result of `token_hash`; lanes: int64, taken modulo 2^32.
    """
    return _mix((token + (lanes & _MASK) * _LANE_STEP) & _MASK)


def drop_threshold(rate: float) -> int:
    """An element is dropped iff its 32 bits are below floor(rate * 2^32); rate in [0, 1)."""
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout rate: got {rate}, expected 0 <= rate < 1")
    return int(rate * 2**32)


def fold(seed: int, *parts: int) -> int:
    """A new 63-bit seed from a seed and the integers that name a stream, e.g. `fold(seed, step, layer)`.

    Order matters, and `fold(s, a, b) != fold(s, a)`. Each part passes one round of the splitmix64 finalizer.
    """
    mask = (1 << 64) - 1
    state = seed & mask
    for part in (len(parts), *parts):
        state = (state + (part & mask) * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1


def check_uniform_ints(keys_T: torch.Tensor, count: int, high: int) -> None:
    """Raise ValueError for arguments `uniform_ints` has no meaning for."""
    if not 1 <= high <= MAX_HIGH:
        raise ValueError(f"uniform_ints: got high {high}, expected 1 to {MAX_HIGH}")
    if count < 0:
        raise ValueError(f"uniform_ints: got count {count}, expected at least 0")
    if keys_T.dtype != torch.int64 or keys_T.dim() != 1:
        raise ValueError(f"uniform_ints: got keys {keys_T.dtype} of shape {tuple(keys_T.shape)}, expected int64 (T,)")


def uniform_ints(seed: int, keys_T: torch.Tensor, count: int, high: int) -> torch.Tensor:
    token_T1 = token_hash(seed, keys_T)[:, None]
    lanes_R = torch.arange(count, device=keys_T.device)
    if high <= ONE_LANE_HIGH:
        return (lane_bits(token_T1, lanes_R) * high) >> 32
    upper_TR = lane_bits(token_T1, 2 * lanes_R)
    lower_TR = lane_bits(token_T1, 2 * lanes_R + 1)
    # (upper * 2^32 + lower) * high >> 64 without a 64-bit overflow: high <= 2^31 keeps the sum below 2^63.
    return (upper_TR * high + ((lower_TR * high) >> 32)) >> 32
