"""hstu_attention_cached: new queries against cached keys give the rows that the whole attention has for them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ops.hstu_attention import gpu, hstu_attention, hstu_attention_cached
from ops.testing import Place, offsets_of
from tests.ops.hstu_cases import PLACES, make_case, needs_compiler


def cached_run(
    inputs: list[Tensor],
    kwargs: dict[str, Any],
    counts: list[int],
    place: Place,
    *,
    split: bool,
    room: int = 0,
    **more: Any,
) -> Tensor:
    """Attention of the last `counts` positions of each row: with all keys cached, or (`split`) their own passed apart.

    The cache has `room` unused entries, NaN, behind each row.
    """
    q, k, v, offsets = inputs
    lengths, new = offsets.diff(), torch.tensor(counts)
    known = lengths - new if split else lengths
    rows = torch.cat([torch.arange(o - c, o) for o, c in zip(offsets[1:].tolist(), counts, strict=True)])
    cache_offsets = offsets_of((known + room).tolist())

    def cache(values: Tensor) -> Tensor:
        blank = math.nan if values.is_floating_point() else 77
        filled = values.new_full((int(cache_offsets[-1]), *values.shape[1:]), blank)
        for start, place, count in zip(offsets.tolist(), cache_offsets.tolist(), known.tolist(), strict=False):
            filled[place : place + count] = values[start : start + count]
        return filled

    arguments: dict[str, Any] = {name: x for name, x in kwargs.items() if not name.endswith("_times")}
    if "query_times" in kwargs:
        arguments["query_times"] = kwargs["query_times"][rows]
        arguments["cache_times"] = cache(kwargs["key_times"])
        arguments["key_times"] = kwargs["key_times"][rows] if split else None
    if split:
        arguments |= {"k_QHK": k[rows], "v_QHV": v[rows]}
    if room:
        arguments["cache_lengths"] = known
    positional = (q[rows], offsets_of(counts), cache(k), cache(v), cache_offsets)
    out = hstu_attention_cached(*place.put(positional), **place.put(arguments), **more, backend=place.backend)
    return out.cpu()


CACHED = {
    "causal": {},
    "targets": {"num_targets": torch.tensor([2, 0, 0, 30, 1])},
    "everything": {
        "num_targets": torch.tensor([2, 0, 0, 30, 1]),
        "contextual_seq_len": 2,
        "max_attn_len": 40,
        "min_full_attn_seq_len": 3,
        "scale": torch.rand(5, generator=torch.Generator().manual_seed(2)),
    },
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("counts", [[4, 0, 1, 31, 2], [1, 0, 1, 1, 1], [9, 0, 1, 80, 40], [0, 0, 0, 0, 0]], ids=str)
@pytest.mark.parametrize("options", CACHED.values(), ids=CACHED)
def test_cached_rows_are_the_last_rows_of_the_whole(
    place: Place, counts: list[int], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "_SPLIT_KEYS", 30)
    dtype = torch.float32 if place.backend == "triton" else torch.float64
    inputs, kwargs, _ = make_case([9, 0, 1, 80, 40], 2, 8, 5, dtype=dtype, time="per_head", **options)
    whole = hstu_attention(*inputs, **kwargs, backend="reference")
    rows = torch.cat([torch.arange(o - c, o) for o, c in zip(inputs[3][1:].tolist(), counts, strict=True)])
    tolerance = {"rtol": 2e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-14}
    for split, room, more in ((False, 0, {}), (True, 3, {"max_queries": max(counts)})):
        out = cached_run(inputs, kwargs, counts, place, split=split, room=room, **more)
        torch.testing.assert_close(out, whole[rows], **tolerance)


@pytest.mark.parametrize("place", PLACES)
def test_growing_a_cache_event_by_event_gives_the_whole(place: Place) -> None:
    """Incremental inference: every row starts empty and grows by different counts, keys being added to the cache."""
    inputs, kwargs, _ = make_case([12, 5, 20], 2, 4, 4, n=24, dtype=torch.float32)
    q, k, v, offsets = inputs
    whole = hstu_attention(*inputs, **kwargs, backend="reference")
    known = torch.zeros(3, dtype=torch.int64)
    k_cache, v_cache = (torch.full((3 * 24, 2, 4), math.nan) for _ in range(2))
    times, room = torch.zeros(3 * 24, dtype=torch.int64), torch.arange(4) * 24
    shared = {name: kwargs[name] for name in ("position_weights", "time_weights", "max_seq_len")}
    for step in ([5, 0, 1], [0, 5, 1], [7, 0, 18]):
        new = torch.tensor(step)
        rows = torch.cat([torch.arange(offsets[b] + known[b], offsets[b] + known[b] + new[b]) for b in range(3)])
        positional = (q[rows], offsets_of(step), k_cache, v_cache, room)
        out = hstu_attention_cached(
            *place.put(positional),
            **place.put({**shared, "k_QHK": k[rows], "v_QHV": v[rows], "cache_lengths": known}),
            **place.put({"query_times": kwargs["query_times"][rows], "key_times": kwargs["key_times"][rows]}),
            cache_times=place.put(times),
            backend=place.backend,
        )
        torch.testing.assert_close(out.cpu(), whole[rows], rtol=2e-5, atol=1e-6)
        ends = torch.cat([torch.arange(int(known[b]), int(known[b] + new[b])) + 24 * b for b in range(3)])
        k_cache[ends], v_cache[ends], times[ends] = k[rows], v[rows], kwargs["key_times"][rows]
        known = known + new
    assert known.tolist() == [12, 5, 20]


def test_cached_attention_refuses_what_it_cannot_do() -> None:
    inputs, kwargs, _ = make_case([5, 3], time=None)
    q, k, v, offsets = inputs
    counts = torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="forward only"):
        hstu_attention_cached(q[:2].clone().requires_grad_(), counts, k, v, offsets, **kwargs)
    with pytest.raises(ValueError, match="both or neither"):
        hstu_attention_cached(q[:2], counts, k, v, offsets, **kwargs, k_QHK=k[:2])
    with pytest.raises(ValueError, match="rows of q_offsets"):
        hstu_attention_cached(q[:2], counts, k, v, offsets[:2], **kwargs)
    with pytest.raises(ValueError, match="a missing time"):
        hstu_attention_cached(q[:2], counts, k, v, offsets, **kwargs, time_weights=torch.zeros(9, dtype=torch.float64))


@needs_compiler
def test_cached_attention_checks_counts_on_a_cpu() -> None:
    inputs, kwargs, _ = make_case([5, 3], n=10, time=None, position=None)
    q, k, v, offsets = inputs
    wrong = "q_offsets or cache_lengths"
    for counts, lengths, message in (
        ([6, 0], None, wrong),
        ([-1, 3], None, "q_offsets: got descending"),
        ([1, 1], [6, 3], wrong),
        ([1, 1], [0, 3], wrong),
    ):
        q_offsets = torch.tensor([0, *counts]).cumsum(0)
        rows = q[: int(q_offsets[-1])]
        lengths_B = None if lengths is None else torch.tensor(lengths)
        with pytest.raises(ValueError, match=message):
            hstu_attention_cached(rows, q_offsets, k, v, offsets, **kwargs, cache_lengths=lengths_B, backend="cpu")
    with pytest.raises(ValueError, match="max_seq_len"):
        hstu_attention_cached(
            *(q[:2], torch.tensor([0, 1, 2]), k, v, offsets), max_seq_len=5, k_QHK=k[:2], v_QHV=v[:2], backend="cpu"
        )
