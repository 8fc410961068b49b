"""Jagged rows: every form moves the same bits as a loop over rows in Python, and gradients are the opposite moves."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ops
from ops.jagged import (
    concat_jagged,
    cpu,
    fbgemm,
    jagged_dense_bmm,
    jagged_to_padded,
    last_n,
    lengths_to_offsets,
    offsets_to_lengths,
    operator,
    padded_to_jagged,
    positions,
    reference,
    rows,
    split_jagged,
)
from ops.testing import LENGTHS, Place, assert_accurate, offsets_of, outputs_and_gradients, places

ROOT = Path(__file__).resolve().parents[2]
NO_FBGEMM = pytest.mark.skipif(fbgemm.refuses() is not None, reason=fbgemm.refuses() or "")
FBGEMM = [pytest.param(Place("fbgemm"), id="fbgemm", marks=NO_FBGEMM)]
if torch.cuda.is_available() and (fbgemm.refuses() or fbgemm.refuses(torch.empty(0, device="cuda"))) is None:
    FBGEMM.append(pytest.param(Place("fbgemm", "cuda"), id="fbgemm-gpu", marks=pytest.mark.gpu))
PLACES = [*places(cpu.refuses), *FBGEMM]
FORMS = [*places(cpu.refuses, reference=False), *FBGEMM]

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# Paddings that a detour through another type would change.
PADDINGS: dict[torch.dtype, list[bool | int | float]] = {
    torch.float64: [0, 0.1, float("nan")],
    torch.float32: [0.0, -1.5, float("-inf"), float("nan"), 2**53 + 1],
    torch.bfloat16: [0, 0.1, float("inf")],
    torch.float16: [0, -0.3, float("nan")],
    torch.int64: [0, -(2**63), 2**53 + 1],
    torch.int32: [0, 2**31 - 1, -1],
    torch.int16: [-3],
    torch.uint8: [255],
    torch.bool: [True, 0],
}
SHAPES: list[tuple[int, ...]] = [(), (1,), (3,), (2, 5), (0,), (33,)]

small_lengths = st.lists(st.one_of(st.integers(0, 4), st.integers(0, 20)), max_size=6)
shapes = st.sampled_from(SHAPES)
dtypes = st.sampled_from(list(PADDINGS))
examples = settings(max_examples=25, deadline=None, derandomize=True)


def at(place: Place) -> AbstractContextManager[None]:
    """fbgemm refuses some arguments, and what it does not do is then the reference's; all else must do everything."""
    return ops.backend(place.backend)


def drawn(shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random bits of whole numbers, far above 2^53 where the type reaches there."""
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    if dtype == torch.bool:
        return torch.rand(*shape, generator=generator) < 0.5
    limits = torch.iinfo(dtype)
    return torch.randint(limits.min, limits.max, tuple(shape), generator=generator, dtype=dtype)


def runs(place: Place, dtype: torch.dtype) -> bool:
    return place.backend != "triton" or dtype != torch.float64


def row_list(values: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    return list(values.split(list(lengths))) if lengths else []


def joined(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.cat([like[:0], *parts])


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@given(lengths=small_lengths)
@examples
def test_offsets_rows_and_positions(place: Place, dtype: torch.dtype, lengths: list[int]) -> None:
    offsets, total = offsets_of(lengths), sum(lengths)
    with at(place):
        assert_equal(lengths_to_offsets(place.put(torch.tensor(lengths, dtype=dtype))), offsets)
        assert_equal(offsets_to_lengths(place.put(offsets)), torch.tensor(lengths, dtype=torch.int64))
        row_T, position_T = (index(place.put(offsets), total) for index in (rows, positions))
    pairs = [(b, p) for b, length in enumerate(lengths) for p in range(length)]
    assert row_T.dtype == position_T.dtype == torch.int64
    assert list(zip(row_T.tolist(), position_T.tolist(), strict=True)) == pairs


@pytest.mark.parametrize("place", PLACES)
def test_offsets_of_many_lengths_leave_the_int32_range(place: Place) -> None:
    lengths = torch.full((3000,), 2**30, dtype=torch.int32)
    with at(place):
        assert_equal(lengths_to_offsets(place.put(lengths)), torch.arange(3001) * 2**30)


@pytest.mark.parametrize("place", PLACES)
@given(lengths=small_lengths, shape=shapes, dtype=dtypes, max_len=st.integers(0, 22), data=st.data())
@examples
def test_rows_are_padded_and_cut(
    place: Place, lengths: list[int], shape: tuple[int, ...], dtype: torch.dtype, max_len: int, data: st.DataObject
) -> None:
    padding = data.draw(st.sampled_from(PADDINGS[dtype]))
    values = drawn((sum(lengths), *shape), dtype)
    expected = torch.full((len(lengths), max_len, *shape), padding, dtype=dtype)
    for b, row in enumerate(row_list(values, lengths)):
        expected[b, : len(row)] = row[:max_len]
    if runs(place, dtype):
        with at(place):
            padded = jagged_to_padded(*place.put((values, offsets_of(lengths))), max_len, padding)
        assert padded.dtype == dtype
        assert_equal(padded, expected)


@pytest.mark.parametrize("place", PLACES)
@given(lengths=small_lengths, shape=shapes, dtype=dtypes, n=st.integers(0, 22))
@examples
def test_rectangles_become_rows(
    place: Place, lengths: list[int], shape: tuple[int, ...], dtype: torch.dtype, n: int
) -> None:
    dense = drawn((len(lengths), n, *shape), dtype)
    parts = [
        torch.cat([dense[b, :length], torch.zeros(max(length - n, 0), *shape, dtype=dtype)])
        for b, length in enumerate(lengths)
    ]
    if runs(place, dtype):
        with at(place):
            values = padded_to_jagged(*place.put((dense, offsets_of(lengths))), sum(lengths))
        assert_equal(values, joined(parts, torch.empty(0, *shape, dtype=dtype)))


@pytest.mark.parametrize("place", PLACES)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=5),
    shape=shapes,
    dtype=dtypes,
    dense=st.sampled_from(["neither", "left", "right", "both"]),
)
@examples
def test_concatenation_and_its_inverse(
    place: Place, pairs: list[tuple[int, int]], shape: tuple[int, ...], dtype: torch.dtype, dense: str
) -> None:
    left_lengths = [2 if dense in ("left", "both") else a for a, _ in pairs]
    right_lengths = [3 if dense in ("right", "both") else b for _, b in pairs]
    left, right = (drawn((sum(x), *shape), dtype, seed) for seed, x in enumerate((left_lengths, right_lengths)))
    parts = zip(row_list(left, left_lengths), row_list(right, right_lengths), strict=True)
    expected = joined([side for pair in parts for side in pair], left)
    left_offsets, right_offsets = offsets_of(left_lengths), offsets_of(right_lengths)
    if not runs(place, dtype):
        return
    sides: dict[str, Any] = {}
    if dense in ("left", "both"):
        left = left.view(len(pairs), 2, *shape)
    else:
        sides["left_offsets"] = left_offsets
    if dense in ("right", "both"):
        right = right.view(len(pairs), 3, *shape)
    else:
        sides["right_offsets"] = right_offsets
    with at(place):
        values, offsets = concat_jagged(place.put(left), place.put(right), **place.put(sides))
        assert_equal(values, expected)
        assert_equal(offsets, left_offsets + right_offsets)
        shares: list[dict[str, Any]] = [place.put({name: x}) for name, x in sides.items()]
        shares += [{"left_len": 2}] * (left.dim() == len(shape) + 2) + [{"right_len": 3}] * (dense in ("right", "both"))
        for share in shares:
            first, second, rest = split_jagged(values, offsets, **share)
            assert_equal(first, left if "left_len" in share else left.reshape(sum(left_lengths), *shape))
            assert_equal(second, right if "right_len" in share else right.reshape(sum(right_lengths), *shape))
            assert_equal(rest, right_offsets if next(iter(share)).startswith("left") else left_offsets)


@pytest.mark.parametrize("place", PLACES)
@given(lengths=small_lengths, shape=shapes, dtype=dtypes, n=st.integers(0, 22), each=st.booleans(), known=st.booleans())
@examples
def test_last_values(
    place: Place, lengths: list[int], shape: tuple[int, ...], dtype: torch.dtype, n: int, each: bool, known: bool
) -> None:
    limits = [max(n - 2 * b, -1) for b in range(len(lengths))] if each else [n] * len(lengths)
    values = drawn((sum(lengths), *shape), dtype)
    kept = [min(length, max(limit, 0)) for length, limit in zip(lengths, limits, strict=True)]
    parts = [row[len(row) - k :] for row, k in zip(row_list(values, lengths), kept, strict=True)]
    if runs(place, dtype):
        limit = place.put(torch.tensor(limits, dtype=torch.int64)) if each else n
        with at(place):
            last, offsets = last_n(*place.put((values, offsets_of(lengths))), limit, total=sum(kept) if known else None)
        assert_equal(last, joined(parts, values))
        assert_equal(offsets, offsets_of(kept))


def moves(offsets: Tensor, place: Place | None = None) -> dict[str, tuple[Callable[..., Any], Callable[..., Tensor]]]:
    """Every differentiable move as a function of one input, and the input's shape before the trailing dimensions."""
    batch, total = len(offsets) - 1, int(offsets[-1])
    offsets = offsets if place is None else place.put(offsets)
    other = torch.arange(batch + 1, device=offsets.device) * 2
    shares = (offsets + 1) // 2
    return {
        "pad": (lambda x: jagged_to_padded(x, offsets, 11, 3.0), partial(torch.randn, total)),
        "unpad": (lambda x: padded_to_jagged(x, offsets, total), partial(torch.randn, batch, 11)),
        "concat left": (
            lambda x: concat_jagged(x, x.new_ones(2 * batch, *x.shape[1:]), left_offsets=offsets, right_offsets=other),
            partial(torch.randn, total),
        ),
        "concat right": (
            lambda x: concat_jagged(x.new_ones(total, *x.shape[2:]), x, left_offsets=offsets),
            partial(torch.randn, batch, 3),
        ),
        "split": (
            lambda x: split_jagged(x, offsets, left_offsets=shares, total=int(shares[-1]))[:2],
            partial(torch.randn, total),
        ),
        "last": (lambda x: last_n(x, offsets, 4)[0], partial(torch.randn, total)),
    }


def floats_only(call: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    def called(x: Tensor) -> Any:
        out = call(x)
        return out if isinstance(out, Tensor) else tuple(o for o in out if o.is_floating_point())

    return called


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_gradients_are_those_of_the_reference_bit_for_bit(place: Place, dtype: torch.dtype, lengths: list[int]) -> None:
    offsets = offsets_of(lengths)
    for name, (call, draw) in moves(offsets, place).items():
        x = draw(3, generator=torch.Generator().manual_seed(1)).to(dtype)
        with at(place):
            got = outputs_and_gradients(floats_only(call), {"x": place.put(x)})
        with ops.backend("reference"):
            expected = outputs_and_gradients(floats_only(moves(offsets)[name][0]), {"x": x})
        assert got.keys() == expected.keys()
        for key, value in got.items():
            assert torch.equal(value.cpu(), expected[key]), f"{name}: {key}"


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradcheck(backend: str) -> None:
    offsets = offsets_of([3, 0, 1, 13])
    with ops.backend(backend):
        for call, draw in moves(offsets).values():
            x = draw(2, dtype=torch.float64).requires_grad_()
            assert torch.autograd.gradcheck(floats_only(call), x)
            assert torch.autograd.gradgradcheck(floats_only(call), x)
        leaves = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((17, 3), (4, 3, 2), (4, 2))]
        assert torch.autograd.gradcheck(lambda x, w, b: jagged_dense_bmm(x, offsets, w, b), leaves)


@pytest.mark.parametrize("place", PLACES)
def test_strided_inputs(place: Place) -> None:
    offsets, wide = offsets_of([3, 0, 5]), torch.arange(8 * 12).view(8, 12)
    dense = torch.arange(3 * 4 * 12).view(3, 4, 12)
    for part in (slice(2, 9), slice(1, 12, 3)):
        with at(place):
            padded = jagged_to_padded(place.put(wide)[:, part], place.put(offsets), 4)
            values = padded_to_jagged(place.put(dense)[..., part], place.put(offsets), 8)
            last, _ = last_n(place.put(wide)[:, part], place.put(offsets), 2)
            transposed = jagged_to_padded(place.put(wide.T.contiguous()).T, place.put(offsets), 4)
        assert_equal(padded, reference.jagged_to_padded(wide[:, part], offsets, 4, 0))
        assert_equal(values, reference.padded_to_jagged(dense[..., part], offsets, 8))
        assert_equal(last, wide[[1, 2, 6, 7], part])
        assert_equal(transposed, reference.jagged_to_padded(wide, offsets, 4, 0))


@pytest.mark.parametrize("place", places(cpu.refuses))
def test_prefix_and_last_values_around_a_context(place: Place) -> None:
    """What the published code does in one operation of its own: (context, prefix, last) -> prefix, (context, last)."""
    context, last_lengths = 2, [3, 0, 4]
    lengths = [2 + 5 + 3, 2 + 1 + 0, 2 + 0 + 4]
    values, offsets = place.put((torch.arange(sum(lengths)), offsets_of(lengths)))
    last_offsets = place.put(offsets_of(last_lengths))
    with at(place):
        head, history, history_offsets = split_jagged(values, offsets, left_len=context)
        prefix, last, prefix_offsets = split_jagged(history, history_offsets, right_offsets=last_offsets, total=7)
        recent, recent_offsets = concat_jagged(head, last, right_offsets=last_offsets)
        assert prefix.tolist() == [2, 3, 4, 5, 6, 12]
        assert recent.tolist() == [0, 1, 7, 8, 9, 10, 11, 13, 14, 15, 16, 17, 18]
        head, last, _ = split_jagged(recent, recent_offsets, left_len=context)
        history, history_offsets = concat_jagged(prefix, last, left_offsets=prefix_offsets, right_offsets=last_offsets)
        whole, whole_offsets = concat_jagged(head, history, right_offsets=history_offsets)
    assert_equal(whole, values.cpu())
    assert_equal(whole_offsets, offsets.cpu())


@pytest.mark.parametrize("place", places(cpu.refuses))
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(("inner", "outer", "bias"), [(17, 33, True), (50, 1, False)])
def test_products_are_as_accurate_as_pytorch(
    place: Place, dtype: torch.dtype, lengths: list[int], inner: int, outer: int, bias: bool
) -> None:
    generator = torch.Generator().manual_seed(2)
    offsets, batch = offsets_of(lengths), len(lengths)
    shapes = {"values_TK": (sum(lengths), inner), "weight_BKN": (batch, inner, outer), "bias_BN": (batch, outer)}
    if not bias:
        del shapes["bias_BN"]
    leaves = {name: torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for name, s in shapes.items()}
    none = {} if bias else {"bias_BN": None}

    got = outputs_and_gradients(
        lambda **x: jagged_dense_bmm(offsets=place.put(offsets), **x, backend=place.backend), place.put(leaves)
    )
    assert all(value.dtype == dtype for value in got.values())
    plain, exact = (
        outputs_and_gradients(
            partial(reference.jagged_dense_bmm, offsets=offsets, compute_dtype=compute, **none),
            {name: x.to(compute) for name, x in leaves.items()},
        )
        for compute in (dtype, torch.float64)
    )
    assert_accurate(got, plain, exact)


@pytest.mark.parametrize("place", places(cpu.refuses))
def test_a_row_without_values_has_no_gradient_and_none_depends_on_scheduling(place: Place) -> None:
    offsets, generator = offsets_of([40, 0, 3]), torch.Generator().manual_seed(3)
    shapes = {"values_TK": (43, 8), "weight_BKN": (3, 8, 5), "bias_BN": (3, 5)}
    leaves = place.put({name: torch.randn(*s, generator=generator) for name, s in shapes.items()})
    call = partial(jagged_dense_bmm, offsets=place.put(offsets), backend=place.backend)
    first, second = (outputs_and_gradients(call, leaves) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not first["grad_weight_BKN"][1].any()
    assert not first["grad_bias_BN"][1].any()


@pytest.fixture
def synchronization_is_an_error() -> Iterator[Callable[[], None]]:
    """A call that makes waiting for the GPU an error from then on."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_nothing_waits_for_the_gpu(backend: str, synchronization_is_an_error: Callable[[], None]) -> None:
    offsets = torch.tensor([0, 2, 5], device="cuda")
    x, weight = (torch.randn(*s, device="cuda", requires_grad=True) for s in ((5, 3), (2, 3, 3)))
    synchronization_is_an_error()
    with ops.backend(backend):
        assert lengths_to_offsets(offsets_to_lengths(offsets)).shape == offsets.shape
        padded = jagged_to_padded(jagged_dense_bmm(x, offsets, weight), offsets, 4, -1.0)
        values, joint = concat_jagged(padded_to_jagged(padded, offsets, 5), padded, left_offsets=offsets)
        last, last_offsets = last_n(values, joint, 3, total=6)
        left, right, _ = split_jagged(last, last_offsets, left_len=1)
        (left.sum() + right.sum() + rows(offsets, 5).sum() + positions(offsets, 5).sum()).backward()


def test_products_of_strided_values_and_transposed_weights() -> None:
    offsets = offsets_of([3, 0, 5])
    values, weight = torch.randn(8, 40)[:, 3:20], torch.randn(3, 9, 17).transpose(1, 2)
    expected = reference.jagged_dense_bmm(values.double(), offsets, weight.double(), None)
    for place in (p.values[0] for p in places(cpu.refuses) if not p.marks):
        got = jagged_dense_bmm(values, offsets, weight, backend=place.backend)
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", FORMS)
def test_custom_ops_are_registered_soundly(place: Place) -> None:
    backend = place.backend
    x, dense = place.put(torch.randn(5, 3)).requires_grad_(), place.put(torch.randn(2, 4, 3)).requires_grad_()
    offsets, half = place.put(torch.tensor([0, 2, 5])), place.put(torch.tensor([0, 1, 2]))
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (operator.lengths_to_offsets, (offsets.diff(),)),
        (operator.positions, (offsets, 5)),
        (operator.jagged_to_padded, (x, offsets, 4, -1)),
        (operator.padded_to_jagged, (dense, offsets, 5)),
    ]
    if backend != "fbgemm":
        weight, bias = (place.put(torch.randn(*s)).requires_grad_() for s in ((2, 3, 4), (2, 4)))
        calls += [
            (operator.rows, (offsets, 5)),
            (operator.concat_jagged, (x, x, offsets, offsets)),
            (operator.split_jagged, (x, half, offsets - half, 2)),
            (operator.last_part, (x, half, offsets - half, 3)),
            (operator.jagged_dense_bmm, (x, offsets, weight, bias)),
            (operator.jagged_dense_bmm, (x, offsets, weight, None)),
        ]
    for custom, arguments in calls:
        torch.library.opcheck(custom._opoverload, (*arguments, backend))


@pytest.mark.parametrize("place", FORMS)
def test_torch_compile_sees_through(place: Place) -> None:
    offsets, x = place.put(torch.tensor([0, 2, 5])), place.put(torch.randn(5, 3))
    weight = place.put(torch.randn(2, 3, 3))

    def step(x: Tensor, offsets: Tensor) -> Tensor:
        padded = jagged_to_padded(jagged_dense_bmm(x, offsets, weight), offsets, 4, -1.0)
        values, joint = concat_jagged(x, padded, left_offsets=offsets)
        last, last_offsets = last_n(values, joint, 3, total=6)
        left, _, _ = split_jagged(last, last_offsets, left_len=1)
        return left.sum() + padded_to_jagged(padded, offsets, 5).sin().sum() + positions(offsets, 5).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with at(place):
        results = [outputs_and_gradients(partial(f, offsets=offsets), {"x": x}) for f in (step, compiled)]
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value)


@NO_FBGEMM
def test_fbgemm_refuses_what_it_would_not_do_alike() -> None:
    offsets = torch.tensor([0, 2, 5])
    values, dense = torch.zeros(5, 3), torch.zeros(2, 4, 3)
    refuses = fbgemm.padded_refuses
    assert refuses(values, offsets, 4, 0) is refuses(dense, offsets, 5) is refuses(values.long(), offsets, 4, 7) is None
    assert "float64" in str(refuses(values.double(), offsets, 4, 0))
    assert "bool" in str(refuses(dense.bool(), offsets, 5))
    assert "not exact" in str(refuses(values.long(), offsets, 4, 2**53 + 1))
    assert refuses(values[:, :0], offsets, 4, 0) == refuses(dense, offsets, 0) == "no values"
    assert "elements" in str(refuses(values[:, :1].expand(5, 3), offsets, 2**30, 0))
    assert fbgemm.lengths_refuses(offsets[:0]) == "no lengths"
    assert fbgemm.positions_refuses(offsets[:1], 0) == "no rows"
    with pytest.raises(ValueError, match=r"backend 'fbgemm' cannot run here: no fbgemm kernel for torch\.float64"):
        jagged_to_padded(values.double(), offsets, 4, backend="fbgemm")


@NO_FBGEMM
def test_auto_takes_fbgemm_first(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for name in ("lengths_to_offsets", "positions", "jagged_to_padded", "padded_to_jagged"):
        form = getattr(fbgemm, name)
        monkeypatch.setattr(fbgemm, name, lambda *a, name=name, form=form: (taken.append(name), form(*a))[1])
    offsets = lengths_to_offsets(torch.tensor([2, 3]))
    padded_to_jagged(jagged_to_padded(positions(offsets, 5), offsets, 4), offsets, 5)
    assert taken == ["lengths_to_offsets", "positions", "jagged_to_padded", "padded_to_jagged"]


def test_a_cpu_run_does_not_wait_for_fbgemm_to_be_imported() -> None:
    code = "import sys, torch, ops.jagged as j; o = j.lengths_to_offsets(torch.tensor([2, 3]));"
    code += "j.jagged_to_padded(torch.zeros(5), o, 3); print('fbgemm_gpu' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "False\n"


@pytest.fixture
def imports_anew() -> Iterator[None]:
    """fbgemm_gpu is looked for again, in the test and after it."""
    fbgemm.import_refuses.cache_clear()
    yield
    fbgemm.import_refuses.cache_clear()


@pytest.mark.usefixtures("imports_anew")
@pytest.mark.parametrize("error", ["ImportError('no such build')", "OSError('undefined symbol: _ZN3c10')"])
def test_a_broken_fbgemm_counts_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str) -> None:
    (tmp_path / "fbgemm_gpu.py").write_text(f"raise {error}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fbgemm_gpu", raising=False)
    lines = {line.split()[0]: line for line in ops.explain().splitlines()}
    for name in ("jagged_to_padded", "lengths_to_offsets"):
        assert f"no fbgemm: fbgemm_gpu cannot be imported ({error[:-2].split('(')[1][1:]})" in lines[name]
    assert jagged_to_padded(torch.ones(2), torch.tensor([0, 2]), 3).tolist() == [[1.0, 1.0, 0.0]]


@pytest.mark.usefixtures("imports_anew")
def test_an_fbgemm_without_an_operator_counts_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fbgemm, "_OPERATORS", ("renamed_since",))
    assert "cannot be imported" in str(fbgemm.refuses())


def test_bad_arguments_are_named() -> None:
    offsets, values = torch.tensor([0, 2, 5]), torch.zeros(5, 3)
    bad: list[tuple[str, Callable[[], object]]] = [
        ("lengths: got torch.float32", lambda: lengths_to_offsets(torch.zeros(2))),
        (r"rows offsets: got torch.int32 \(3,\), expected int64", lambda: rows(offsets.int(), 5)),
        ("positions total: got -1", lambda: positions(offsets, -1)),
        (r"offsets: got torch.int64 \(0,\)", lambda: offsets_to_lengths(offsets[:0])),
        ("max_len: got -1", lambda: jagged_to_padded(values, offsets, -1)),
        ("padding_value: got 0.5, expected an integer from", lambda: jagged_to_padded(values.long(), offsets, 3, 0.5)),
        ("padding_value: got 1e\\+39", lambda: jagged_to_padded(values, offsets, 3, 1e39)),
        ("padding_value: got 256", lambda: jagged_to_padded(values.byte(), offsets, 3, 256)),
        (r"dense: got torch.float32 \(5, 3\), expected .* \(2, N, ...\)", lambda: padded_to_jagged(values, offsets, 5)),
        ("complex64", lambda: jagged_to_padded(values.to(torch.complex64), offsets, 3)),
        ("right: got torch.int64", lambda: concat_jagged(values, values.long(), left_offsets=offsets)),
        ("right: got 5 rows", lambda: concat_jagged(values, values[:, None], left_offsets=offsets)),
        (r"left: got torch.float32 \(5,\), expected", lambda: concat_jagged(values[:, 0], values[:, 0])),
        ("got 0 shares, expected one of", lambda: split_jagged(values, offsets)),
        ("got 2 shares", lambda: split_jagged(values, offsets, left_len=1, right_len=1)),
        ("length: got -1", lambda: split_jagged(values, offsets, left_len=-1)),
        ("total: got 9", lambda: split_jagged(values, offsets, left_offsets=offsets, total=9)),
        (r"n: got torch.int64 \(3,\)", lambda: last_n(values, offsets, offsets)),
        ("n: got -2", lambda: last_n(values, offsets, -2)),
        ("values: got torch.int64", lambda: jagged_dense_bmm(values.long(), offsets, values)),
        (r"weight: got .* expected torch.float32 \(2, 3, N\)", lambda: jagged_dense_bmm(values, offsets, values)),
        ("bias: got", lambda: jagged_dense_bmm(values, offsets, torch.zeros(2, 3, 4), torch.zeros(4))),
    ]
    for message, call in bad:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("offsets", [[0, 2, 6], [1, 2, 5], [0, 6, 5], [0, -1, 5]])
def test_offsets_that_do_not_fit_are_refused_on_a_cpu(offsets: list[int], backend: str) -> None:
    values, wrong, length = torch.zeros(5, 3), torch.tensor(offsets), torch.zeros(2, 4, 3)
    weight, bias = torch.zeros(2, 3, 6), torch.zeros(2, 6)
    calls: list[Callable[[], object]] = [
        lambda: positions(wrong, 5, backend=backend),
        lambda: rows(wrong, 5, backend=backend),
        lambda: jagged_to_padded(values, wrong, 4, backend=backend),
        lambda: padded_to_jagged(length, wrong, 5, backend=backend),
        lambda: last_n(values, wrong, 2, backend=backend),
        lambda: concat_jagged(values, length, left_offsets=wrong, backend=backend),
        lambda: split_jagged(values, wrong, left_len=0, backend=backend),
        lambda: jagged_dense_bmm(values, wrong, weight, bias, backend=backend),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="expected offsets that ascend from 0 to 5"):
            call()


@pytest.mark.skipif(cpu.refuses() is not None, reason=str(cpu.refuses()))
def test_rows_too_short_for_their_share_are_refused_on_a_cpu() -> None:
    with pytest.raises(ValueError, match="jagged offsets"):
        split_jagged(torch.zeros(5, 3), torch.tensor([0, 1, 5]), left_len=2, backend="cpu")
