"""Sums of rows by id: every back-end against the definition, in one order whatever runs in parallel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.row_sums import cpu, gpu, row_sums, row_sums_sparse
from ops.testing import Place, assert_accurate, outputs_and_gradients, places

PLACES = places(cpu.refuses)

# Entries, source rows, width, output rows.
SHAPES = [(0, 3, 4, 5), (1, 1, 1, 1), (40, 7, 25, 0), (0, 0, 3, 2), (37, 50, 130, 300), (200, 30, 50, 3)]


def problem(shape: tuple[int, int, int, int], seed: int = 0) -> dict[str, Any]:
    entries, sources, width, num_rows = shape
    generator = torch.Generator().manual_seed(seed)
    return {
        # Some of them on either side of the output.
        "ids_N": torch.randint(-1, num_rows + 2, (entries,), generator=generator),
        "source_SD": torch.randn(sources, width, generator=generator, dtype=torch.float64),
        "num_rows": num_rows,
        "rows_N": torch.randint(0, max(sources, 1), (entries,), generator=generator),
        "weights_N": torch.randn(entries, generator=generator, dtype=torch.float64),
    }


def by_definition(data: dict[str, Any]) -> torch.Tensor:
    sums = torch.zeros(data["num_rows"], data["source_SD"].shape[1], dtype=torch.float64)
    for v, row, weight in zip(data["ids_N"], data["rows_N"], data["weights_N"], strict=True):
        if 0 <= v < data["num_rows"]:
            sums[v] += weight * data["source_SD"][row]
    return sums


def caller(data: dict[str, Any], place: Place) -> Callable[..., torch.Tensor]:
    held = place.put({name: data[name] for name in ("ids_N", "num_rows", "rows_N")})
    return lambda **leaves: row_sums(**held, **leaves, backend=place.backend)


def assert_as_accurate_as_the_reference(data: dict[str, Any], place: Place, dtype: torch.dtype) -> None:
    leaves = {name: data[name].to(dtype) for name in ("source_SD", "weights_N")}
    wide = {name: x.double() for name, x in leaves.items()}
    reference = caller(data, Place("reference"))
    got = outputs_and_gradients(caller(data, place), place.put(leaves))
    assert got["out"].dtype == torch.promote_types(dtype, torch.float32)
    assert got["grad_source_SD"].dtype == got["grad_weights_N"].dtype == dtype
    assert_accurate(got, outputs_and_gradients(reference, leaves), outputs_and_gradients(reference, wide))


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("shape", SHAPES)
def test_float64_is_the_definition(shape: tuple[int, int, int, int], backend: str) -> None:
    data = problem(shape)
    torch.testing.assert_close(row_sums(**data, backend=backend), by_definition(data), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("place", places(cpu.refuses, reference=False))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_and_gradients(shape: tuple[int, int, int, int], dtype: torch.dtype, place: Place) -> None:
    assert_as_accurate_as_the_reference(problem(shape), place, dtype)


@pytest.mark.parametrize("place", places(cpu.refuses, reference=False))
@pytest.mark.parametrize("start", [0, 1, 511, 700])
def test_an_id_that_fills_whole_chunks(start: int, place: Place) -> None:
    count = start + 2 * gpu.CHUNK + 200
    data = problem((count + 300, 9, 17, 40), seed=start)
    data["ids_N"][:start] = 3
    data["ids_N"][start:count] = 4
    assert_as_accurate_as_the_reference(data, place, torch.float32)


@pytest.mark.parametrize("place", PLACES)
def test_rows_and_weights_may_be_left_out(place: Place) -> None:
    source = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    ids = torch.tensor([2, -1, 2, 0])
    plain = row_sums(place.put(ids), place.put(source), num_rows=3, backend=place.backend)
    assert plain.tolist() == [[7.0, 8.0], [0.0, 0.0], [6.0, 8.0]]
    rows, weights = torch.tensor([0, 99, 0, 1]), torch.tensor([1.0, 1.0, 2.0, -1.0])
    repeated = row_sums(*place.put((ids, source)), num_rows=3, rows_N=place.put(rows), backend=place.backend)
    assert repeated.tolist() == [[3.0, 4.0], [0.0, 0.0], [2.0, 4.0]]
    weighted = row_sums(*place.put((ids, source)), num_rows=3, weights_N=place.put(weights), backend=place.backend)
    assert weighted.tolist() == [[-7.0, -8.0], [0.0, 0.0], [11.0, 14.0]]


@pytest.mark.parametrize("place", PLACES)
@given(
    ids=st.lists(st.integers(-(2**40), 2**40) | st.integers(-2, 9), max_size=30),
    num_rows=st.integers(0, 8),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_ids(place: Place, ids: list[int], num_rows: int) -> None:
    source = torch.arange(3.0 * len(ids)).view(-1, 3)
    given_ids, rows = place.put(torch.tensor(ids, dtype=torch.int64)), place.put(source)
    wanted = torch.zeros(num_rows, 3)
    for v, row in zip(ids, source, strict=True):
        if 0 <= v < num_rows:
            wanted[v] += row
    assert torch.equal(row_sums(given_ids, rows, num_rows=num_rows, backend=place.backend).cpu(), wanted)
    unique, sums = row_sums_sparse(given_ids, rows, num_rows=num_rows, backend=place.backend)
    assert unique.tolist() == sorted({v for v in ids if 0 <= v < num_rows})
    assert torch.equal(sums.cpu(), wanted[unique.cpu()])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sparse_rows_equal_the_dense_ones_bit_for_bit(shape: tuple[int, int, int, int], place: Place) -> None:
    data = problem(shape)
    data = place.put(data | {name: data[name].float() for name in ("source_SD", "weights_N")})
    dense = row_sums(**data, backend=place.backend)
    unique, sums = row_sums_sparse(**data, backend=place.backend)
    assert unique.dtype == torch.int64
    assert torch.equal(sums, dense[unique])
    untouched = torch.ones(len(dense), dtype=torch.bool, device=dense.device).index_fill(0, unique, False)
    assert bool((dense[untouched] == 0).all())


@pytest.mark.parametrize("place", PLACES)
def test_strided_sources_and_no_wish_for_gradients(place: Place) -> None:
    data = problem((60, 20, 12, 9))
    wide = torch.randn(20, 30, generator=torch.Generator().manual_seed(3))
    ids, rows = place.put((data["ids_N"], data["rows_N"]))
    for strided in (wide[:, 5:17], wide[:12].T):
        wanted = row_sums(data["ids_N"] % 9, strided, num_rows=9, rows_N=data["rows_N"] % len(strided))
        got = row_sums(ids % 9, place.put(strided), num_rows=9, rows_N=rows % len(strided), backend=place.backend)
        torch.testing.assert_close(got.cpu(), wanted)


@pytest.mark.skipif(cpu.refuses() is not None, reason="no C++ compiler")
def test_sums_do_not_depend_on_the_number_of_threads() -> None:
    data, before, results = problem((3000, 40, 50, 20)), torch.get_num_threads(), []
    data["source_SD"] = data["source_SD"].float()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(row_sums(**data, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_gradcheck(backend: str) -> None:
    data = problem((12, 5, 3, 4))
    leaves = [data.pop(name).requires_grad_() for name in ("source_SD", "weights_N")]
    call = lambda source, weights: row_sums(**data, source_SD=source, weights_N=weights, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("place", places(cpu.refuses, reference=False))
def test_custom_op_is_registered_soundly(place: Place) -> None:
    data = problem((9, 4, 6, 5))
    for rows, weights in ((data["rows_N"], data["weights_N"].float().requires_grad_()), (None, None)):
        source = torch.randn(4 if rows is not None else 9, 6)
        arguments = place.put((data["ids_N"], source.requires_grad_(), 5, rows, weights, place.backend == "triton"))
        torch.library.opcheck(torch.ops.gr.row_sums.default, tuple(arguments))


@pytest.mark.parametrize("place", places(cpu.refuses, reference=False))
def test_is_compiled_whole(place: Place) -> None:
    data = problem((30, 8, 5, 6))
    leaves = place.put({name: data[name].float() for name in ("source_SD", "weights_N")})
    call = caller(data, place)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for name, wanted in outputs_and_gradients(call, leaves).items():
        torch.testing.assert_close(outputs_and_gradients(compiled, leaves)[name], wanted, msg=name)


@pytest.mark.parametrize("place", places(cpu.refuses, reference=False))
def test_a_row_outside_the_source_is_an_error_or_nan(place: Place) -> None:
    ids, source = place.put((torch.tensor([0, 1, 1, -1]), torch.ones(3, 2)))
    for row in (3, -1):
        rows = place.put(torch.tensor([0, row, 0, 99]))
        if place.backend == "triton":
            sums = row_sums(ids, source, num_rows=3, rows_N=rows, backend="triton")
            assert sums.isnan().any(dim=1).tolist() == [False, True, False]
        else:
            with pytest.raises(IndexError, match=f"row_sums rows: got {row}, expected 0 to 2"):
                row_sums(ids, source, num_rows=3, rows_N=rows, backend=place.backend)


def test_bad_arguments_are_named() -> None:
    ids, source = torch.tensor([0, 1]), torch.ones(2, 3)
    with pytest.raises(ValueError, match="num_rows: got -1"):
        row_sums(ids, source, num_rows=-1)
    for bad in (source[0], source.long()):
        with pytest.raises(ValueError, match="source: got"):
            row_sums(ids, bad, num_rows=2)
    for bad in (ids.int(), ids[:1], ids[None]):
        with pytest.raises(ValueError, match="ids: got"):
            row_sums(bad, source, num_rows=2)
    with pytest.raises(ValueError, match="rows: got"):
        row_sums(ids, source, num_rows=2, rows_N=ids.int())
    for bad in (ids, torch.ones(3)):
        with pytest.raises(ValueError, match="weights: got"):
            row_sums_sparse(ids, source, num_rows=2, weights_N=bad)
