"""Position and time embeddings: indices by a loop over tokens, accuracy and gradients against the reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ops.position_embedding import operator, position_embedding, reference, time_bucket
from ops.position_embedding.buckets import bucket_offsets
from ops.testing import LENGTHS, Place, assert_accurate, offsets_of, outputs_and_gradients, places

PLACES = places()
FORMS = places(reference=False)
examples = settings(max_examples=25, deadline=None, derandomize=True)


def expected_index(p: int, length: int, targets: int, newest: bool, stride: int, context: int, size: int) -> int:
    highest = length - stride * targets
    counted = p if p < context else highest - min(p, highest) + context
    return min(counted if newest else p, size - 1)


def expected_bucket(delta: int, num_buckets: int, unit: float, scale: str) -> int:
    """Of the formula in double precision, away from a bucket's edges."""
    elapsed = max(delta, 1e-6) / unit
    return min(max(int(math.sqrt(elapsed) if scale == "sqrt" else math.log(elapsed)), 0), num_buckets)


@pytest.mark.parametrize("place", PLACES)
@given(
    lengths=st.lists(st.integers(0, 12), max_size=5),
    size=st.integers(1, 16),
    count_from=st.sampled_from(["newest", "oldest"]),
    stride=st.sampled_from([1, 2]),
    context=st.integers(0, 4),
    data=st.data(),
)
@examples
def test_positions_are_those_of_a_loop(
    place: Place, lengths: list[int], size: int, count_from: Any, stride: int, context: int, data: st.DataObject
) -> None:
    newest = count_from == "newest"
    targets = [data.draw(st.integers(0, 4)) for _ in lengths] if newest and data.draw(st.booleans()) else None
    options: dict[str, Any] = {"count_from": count_from}
    if newest:
        options |= {"interleaved_targets": stride == 2, "contextual_seq_len": context}
    if targets is not None:
        options["num_targets"] = place.put(torch.tensor(targets, dtype=torch.int64))
    table = torch.arange(float(size))[:, None]
    x = torch.zeros(sum(lengths), 1)
    out = position_embedding(*place.put((x, offsets_of(lengths), table)), **options, backend=place.backend)
    assert out[:, 0].tolist() == [
        expected_index(p, length, targets[b] if targets else 0, newest, stride, context, size)
        for b, length in enumerate(lengths)
        for p in range(length)
    ]


def times_at_edges(num_buckets: int, unit: float, scale: Any) -> Tensor:
    """Elapsed times beside every bucket's edge, and some that are none."""
    edges = bucket_offsets(num_buckets, unit, scale)[1:-1]
    return torch.cat([torch.tensor([-(2**40), -1, 0, 1, 2**61]), edges - 1, edges, edges + 1])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("num_buckets", "unit", "scale"), [(300, 60.0, "sqrt"), (64, 60.0, "log"), (0, 60.0, "sqrt")])
def test_times_are_in_equal_buckets_everywhere(place: Place, num_buckets: int, unit: float, scale: Any) -> None:
    elapsed = times_at_edges(num_buckets, unit, scale)
    asked = 2**62
    timestamps = torch.cat([asked - elapsed, torch.tensor([asked])])
    offsets, x = torch.tensor([0, 0, len(timestamps)]), torch.zeros(len(timestamps), 1)
    tables = torch.zeros(1, 1), torch.arange(float(num_buckets + 1))[:, None]
    x, offsets, positions, buckets, timestamps = place.put((x, offsets, *tables, timestamps))
    times: dict[str, Any] = {"time_table": buckets, "timestamps": timestamps, "time_unit": unit, "time_scale": scale}
    out = position_embedding(x, offsets, positions, **times, backend=place.backend)
    assert out[:-1, 0].tolist() == time_bucket(elapsed, num_buckets, unit, scale).tolist()
    assert out[-1] == 0


@given(
    delta=st.integers(-(2**40), 2**40),
    num_buckets=st.integers(0, 3000),
    unit=st.sampled_from([60.0, 1.0, 0.1, 86400.0]),
)
@settings(max_examples=200, deadline=None, derandomize=True)
@pytest.mark.parametrize("scale", ["sqrt", "log"])
def test_buckets_are_the_formula(scale: Any, delta: int, num_buckets: int, unit: float) -> None:
    got = int(time_bucket(torch.tensor(delta), num_buckets, unit, scale))
    edge = (lambda b: unit * b * b) if scale == "sqrt" else (lambda b: unit * math.exp(b))
    wanted = expected_bucket(delta, num_buckets, unit, scale)
    # Doubles are right but on an edge itself, which no whole number of seconds misses by less than this.
    assert got == wanted or abs(delta - edge(max(got, wanted))) < 1e-12 * delta


def test_bucket_starts_are_exact() -> None:
    assert bucket_offsets(4, 60.0, "sqrt")[:-1].tolist() == [0, 60, 240, 540, 960]
    assert bucket_offsets(3, 60.0, "log")[:-1].tolist() == [0, 164, 444, 1206]
    assert bucket_offsets(3, 0.5, "sqrt")[:-1].tolist() == [0, 1, 2, 5]
    # 64 bits end before e^64 minutes do; what is left is still a bucket's edge.
    assert len(bucket_offsets(64, 60.0, "log")) == 1 + 39 + 1
    assert int(time_bucket(torch.tensor(2**63 - 2), 64, 60.0, "log")) == 39


def test_buckets_differ_from_float32_only_beside_edges() -> None:
    # Float32 rounds d, d / 60 and the function, by 2^-24 each (machines whose vector instructions round the function by
    # a whole unit in the last place: 2^-23). Squaring doubles the root's error, and the exponential turns the absolute
    # error of the logarithm, between 16 and 32 for the longest times, into a relative one.
    elapsed = torch.cat([torch.arange(486_185), torch.randint(486_185, 2**31, (200_000,))])
    rounding = 2.0**-24
    for scale, function, first, error in (
        ("sqrt", torch.sqrt, 8_893_499, 6 * rounding),
        ("log", torch.log, 486_185, 2 * rounding + 32 * rounding),
    ):
        published = function(elapsed.clamp(min=1e-6) / 60).clamp(0, 2048).long()
        exact = time_bucket(elapsed, 2048, 60.0, scale)
        apart = elapsed[published != exact]
        upper = torch.maximum(published, exact)[published != exact].double()
        edges = 60 * (upper**2 if scale == "sqrt" else upper.exp())
        assert bool((apart >= first).all())
        assert bool(((apart - edges).abs() <= error * edges).all())


def leaves_of(lengths: Sequence[int], width: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any]]:
    generator = torch.Generator().manual_seed(4)
    total = sum(lengths)

    def draw(rows: int) -> Tensor:
        return torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype)

    leaves = {"x_TD": draw(total), "position_table_PD": draw(20), "time_table": draw(30)}
    timestamps = torch.randint(0, 20_000, (total,), generator=generator).cumsum(0)
    targets = torch.tensor([min(2, length) for length in lengths])
    return leaves, {"offsets": offsets_of(lengths), "timestamps": timestamps, "num_targets": targets}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("width", [25, 64])
def test_results_and_gradients_are_as_accurate_as_pytorch(
    place: Place, dtype: torch.dtype, lengths: list[int], width: int
) -> None:
    leaves, rest = leaves_of(lengths, width, dtype)
    got = outputs_and_gradients(
        partial(position_embedding, **place.put(rest), alpha=width**0.5, contextual_seq_len=2, backend=place.backend),
        place.put(leaves),
    )
    assert all(value.dtype == dtype for value in got.values())
    options = {"alpha": width**0.5, "newest": True, "stride": 1, "context": 2, "unit": 60.0, "scale": "sqrt"}
    rest["timestamps_T"] = rest.pop("timestamps")
    plain, exact = (
        outputs_and_gradients(
            partial(reference.position_embedding, **rest, **options, compute_dtype=compute),
            {name: x.to(compute) for name, x in leaves.items()},
        )
        for compute in (dtype, torch.float64)
    )
    assert_accurate(got, plain, exact)


@pytest.mark.parametrize("place", PLACES)
def test_tables_may_have_another_dtype_and_x_strides(place: Place) -> None:
    x = torch.randn(5, 40).bfloat16()[:, 3:20]
    table, offsets = torch.randn(4, 17), torch.tensor([0, 2, 5])
    got = outputs_and_gradients(
        lambda x, table: position_embedding(x, place.put(offsets), table, backend=place.backend),
        place.put({"x": x, "table": table}),
    )
    assert got["out"].dtype == torch.bfloat16
    assert got["grad_table"].dtype == torch.float32
    assert torch.equal(got["out"].cpu(), (x.float() + table[[2, 1, 3, 2, 1]]).bfloat16())


@pytest.mark.parametrize("place", PLACES)
def test_gradients_repeat_bit_for_bit(place: Place) -> None:
    leaves, rest = leaves_of([40, 0, 61], 8, torch.float32)
    call = partial(position_embedding, **place.put(rest), backend=place.backend)
    first, second = (outputs_and_gradients(call, place.put(leaves)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu() -> None:
    leaves, rest = leaves_of([4, 0, 3], 6, torch.float32)
    held, rest = {name: x.cuda().requires_grad_() for name, x in leaves.items()}, Place("triton", "cuda").put(rest)

    def step() -> Tensor:
        out = position_embedding(**held, **rest, backend="triton")
        out.sum().backward()
        return out.detach()

    # The first call brings the buckets' edges to the device.
    first = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, second)


@pytest.mark.parametrize("options", [{}, {"count_from": "oldest"}, {"contextual_seq_len": 1, "time_scale": "log"}])
def test_gradcheck(options: dict[str, Any]) -> None:
    leaves, rest = leaves_of([3, 0, 4], 2, torch.float64)
    del rest["num_targets"]
    held = [x.requires_grad_() for x in leaves.values()]

    def call(x: Tensor, positions: Tensor, times: Tensor) -> Tensor:
        return position_embedding(
            x, rest["offsets"], positions, time_table=times, timestamps=rest["timestamps"], **options
        )

    assert torch.autograd.gradcheck(call, held)


@pytest.mark.parametrize("place", [Place("cpu"), *FORMS])
@pytest.mark.parametrize("timed", [True, False])
def test_custom_op_is_registered_soundly(place: Place, timed: bool) -> None:
    x, positions, times = (place.put(torch.randn(n, 3)).requires_grad_() for n in (5, 4, 6))
    offsets, stamps, targets = place.put(tuple(map(torch.tensor, ([0, 2, 5], [0, 500, 7, 90, 10_000], [1, 0]))))
    tensors = (x, offsets, positions, times, stamps, targets) if timed else (x, offsets, positions, None, None, None)
    arguments = (*tensors, 2.0, True, 1, 1, 60.0, "sqrt", place.backend == "triton")
    torch.library.opcheck(torch.ops.gr.position_embedding.default, arguments)


@pytest.mark.parametrize("place", PLACES)
def test_torch_compile_sees_through(place: Place) -> None:
    leaves, rest = leaves_of([4, 3], 6, torch.float32)
    call = partial(position_embedding, **place.put(rest), backend=place.backend)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected, got = (outputs_and_gradients(f, place.put(leaves)) for f in (call, compiled))
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value)


def test_an_exported_operator_serves_both_devices() -> None:
    leaves, rest = leaves_of([4, 0, 3], 6, torch.float32)
    tensors = (*leaves.values(), rest["timestamps"], rest["num_targets"])
    options = {"alpha": 2.0, "newest": True, "stride": 2, "context": 1, "unit": 60.0, "scale": "log"}
    x, positions, times, stamps, targets = tensors
    arguments = (x, rest["offsets"], positions, times, stamps, targets)
    got = operator.position_embedding(*arguments, **options, triton=False)
    assert torch.equal(got, reference.position_embedding(*arguments, **options))


def test_bad_arguments_are_named() -> None:
    x, offsets, table, stamps = torch.zeros(5, 3), torch.tensor([0, 2, 5]), torch.zeros(4, 3), torch.arange(5)
    timed: dict[str, Any] = {"time_table": table, "timestamps": stamps}
    bad: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        (r"x: got torch.int64 \(5, 3\), expected floats of \(T, D\)", (x.long(), offsets, table), {}),
        (r"offsets: got torch.int32 \(3,\), expected torch.int64 of \(B \+ 1\)", (x, offsets.int(), table), {}),
        (r"position_table: got torch.float32 \(0, 3\), expected floats of \(P, 3\)", (x, offsets, table[:0]), {}),
        (r"position_table: got torch.float32 \(4, 2\)", (x, offsets, table[:, :2]), {}),
        (r"time_table: got torch.float32 \(3,\)", (x, offsets, table), timed | {"time_table": table[0]}),
        (
            r"timestamps: got torch.int64 \(4,\), expected torch.int64 of \(5\)",
            (x, offsets, table),
            timed | {"timestamps": stamps[1:]},
        ),
        ("timestamps: got None", (x, offsets, table), {"time_table": table}),
        ("time_table: got None", (x, offsets, table), {"timestamps": stamps}),
        (
            r"num_targets: got torch.int64 \(3,\), expected torch.int64 of \(2\)",
            (x, offsets, table),
            {"num_targets": offsets},
        ),
        ("count_from: got 'first'", (x, offsets, table), {"count_from": "first"}),
        ("count_from: got 'oldest' with", (x, offsets, table), {"count_from": "oldest", "contextual_seq_len": 1}),
        ("contextual_seq_len: got -1", (x, offsets, table), {"contextual_seq_len": -1}),
        ("time_scale: got 'linear', expected 'sqrt' or 'log'", (x, offsets, table), timed | {"time_scale": "linear"}),
        ("time_unit: got 0", (x, offsets, table), timed | {"time_unit": 0}),
    ]
    for message, arguments, options in bad:
        with pytest.raises(ValueError, match=f"position_embedding {message}"):
            position_embedding(*arguments, **options)
