"""What the back-ends of HSTU attention are handed: tensors by name, settings that travel through an operator, and the
groups in which Triton kernels take their arguments.

A custom operator takes tensors, numbers and lists of numbers; `Settings` packs into two lists and back. Inside a kernel
a field that is None is known to be while compiling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """Tensors of `hstu_attention`, in the order of the operator's arguments."""

    q: Tensor
    k: Tensor
    v: Tensor
    position_weights: Tensor | None
    time_weights: Tensor | None
    offsets: Tensor
    query_times: Tensor | None
    key_times: Tensor | None
    num_targets: Tensor | None
    scales: Tensor | None
    row_keys: Tensor | None


class CachedInputs(NamedTuple):
    """Tensors of `hstu_attention_cached`, in the order of the operator's arguments."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    k: Tensor | None
    v: Tensor | None
    position_weights: Tensor | None
    time_weights: Tensor | None
    q_offsets: Tensor
    cache_offsets: Tensor
    cache_lengths: Tensor | None
    query_times: Tensor | None
    cache_times: Tensor | None
    key_times: Tensor | None
    num_targets: Tensor | None
    scales: Tensor | None


# How many tensors of `Inputs` have gradients: they come first.
DIFFERENTIABLE = 5


class Settings(NamedTuple):
    """Numbers of a call. `scale` is what weights are multiplied by where there is no value a row."""

    max_seq_len: int
    max_attn_len: int = 0
    contextual_seq_len: int = 0
    min_full_attn_seq_len: int = 0
    dropout_seed: int = 0
    sort_by_length: bool = True
    max_queries: int = 0
    alpha: float = 1.0
    scale: float = 1.0
    dropout_rate: float = 0.0

    def packed(self) -> tuple[list[int], list[float]]:
        """Integers and numbers, as an operator takes them."""
        return [int(x) for x in self[:_INTEGERS]], [float(x) for x in self[_INTEGERS:]]

    @classmethod
    def unpacked(cls, integers: Sequence[int], numbers: Sequence[float]) -> Settings:
        return cls._make((*integers, *numbers))


_INTEGERS = Settings._fields.index("alpha")


class Strides(NamedTuple):
    """Elements from one flat row to the next."""

    q: int
    k: int
    v: int
    grad_out: int = 0


class Rows(NamedTuple):
    """Row boundaries of keys, and of queries where they differ; lengths in a cache with room; the order of starting."""

    offsets: Tensor
    order: Tensor | None = None
    q_offsets: Tensor | None = None
    lengths: Tensor | None = None


class Bias(NamedTuple):
    """Tables and times; a stride of 0 makes heads share a table."""

    position: Tensor | None
    time: Tensor | None
    thresholds: Tensor | None
    query_times: Tensor | None
    key_times: Tensor | None
    position_stride: int
    time_stride: int
    num_buckets: int
    max_seq_len: int


class Mask(NamedTuple):
    """The mask's rules, None where off."""

    num_targets: Tensor | None
    window: int | None
    context: int | None
    full_tail: int | None


class Drop(NamedTuple):
    """Dropout, off where the threshold is None; the seed is added inside a kernel, as it changes with every call."""

    threshold: int | None
    factor: float
    row_keys: Tensor | None
    low_seed: Any = None
    high_seed: Any = None
