"""hstu_attention in Triton: every variant a kernel compiles apart, and every shape, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ops.hstu_attention import hstu_attention
from ops.testing import LENGTHS, Place, assert_accurate
from tests.ops.hstu_cases import KERNELS, NAMES, make_case, run

# The mask and bias variants that a kernel compiles apart, one of each at least.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"position": None, "time": None},
    "position": {"time": None},
    "time per head": {"position": None, "time": "per_head"},
    "shared tables, targets": {"num_targets": True},
    "per head, window": {"position": "per_head", "time": "per_head", "max_attn_len": 9},
    "context": {"contextual_seq_len": 5},
    "everything": {
        "position": "per_head",
        "num_targets": True,
        "max_attn_len": 6,
        "contextual_seq_len": 3,
        "min_full_attn_seq_len": 4,
        "dropout_rate": 0.3,
        "dropout_seed": 2**63 + 11,
        "alpha": 0.4,
    },
}


def variant_case(
    lengths: list[int], dims: tuple[int, int, int], name: str, dtype: torch.dtype
) -> tuple[list[Tensor], dict[str, Any], Tensor]:
    options = dict(VARIANTS[name])
    if options.pop("num_targets", False):
        options["num_targets"] = torch.tensor([min(n // 3 + b, n) for b, n in enumerate(lengths)])
    inputs, kwargs, grad = make_case(lengths, *dims, n=max([*lengths, 1]) + 3, dtype=dtype, **options)
    if dtype != torch.float32:
        # As a model keeps them: tables in float32 beside activations in half precision.
        kwargs = {key: x.float() if key in NAMES[4:] else x for key, x in kwargs.items()}
    return inputs, kwargs, grad


@pytest.mark.parametrize("place", [p for p in KERNELS if p.id != "cpu"])
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("lengths", [[7, 0, 33, 1, 40], [50]], ids=str)
def test_triton_variants(place: Place, name: str, lengths: list[int]) -> None:
    inputs, kwargs, grad = variant_case(lengths, (2, 8, 5), name, torch.float32)
    exact = run(inputs, kwargs, grad, "reference", torch.float64)
    plain = run(inputs, kwargs, grad, "reference")
    assert_accurate(run(inputs, kwargs, grad, place), plain, exact)


@pytest.mark.parametrize("place", [p for p in KERNELS if p.id != "cpu"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_triton_lengths(place: Place, lengths: list[int]) -> None:
    inputs, kwargs, grad = variant_case(lengths, (1, 16, 16), "shared tables, targets", torch.float32)
    exact = run(inputs, kwargs, grad, "reference", torch.float64)
    assert_accurate(run(inputs, kwargs, grad, place), run(inputs, kwargs, grad, "reference"), exact)


@pytest.mark.parametrize("place", [p for p in KERNELS if p.id != "cpu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dims", [(1, 50, 50), (2, 25, 25), (1, 16, 64), (1, 128, 100), (1, 256, 17)], ids=str)
def test_triton_dims_and_dtypes(place: Place, dims: tuple[int, int, int], dtype: torch.dtype) -> None:
    inputs, kwargs, grad = variant_case([21, 34], dims, "position", dtype)
    kwargs["alpha"] = dims[1] ** -0.5
    exact = run(inputs, kwargs, grad, "reference", torch.float64)
    plain = run(inputs, kwargs, grad, "reference", compute_dtype=dtype)
    # A table's gradient is summed from scores of half precision.
    assert_accurate(run(inputs, kwargs, grad, place), plain, exact, precision=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dims", [(4, 128, 128), (2, 25, 25)], ids=str)
def test_triton_at_size(dims: tuple[int, int, int], name: str, dtype: torch.dtype) -> None:
    inputs, kwargs, grad = variant_case([700, 3, 0, 1025, 64], dims, name, dtype)
    kwargs["alpha"] = dims[1] ** -0.5
    place = Place("reference", "cuda")
    exact = run(inputs, kwargs, grad, place, torch.float64)
    plain = run(inputs, kwargs, grad, place, compute_dtype=dtype)
    assert_accurate(run(inputs, kwargs, grad, Place("triton", "cuda")), plain, exact, precision=dtype)


@pytest.mark.parametrize("place", [p for p in KERNELS if p.id != "cpu"])
def test_triton_time_ranges(place: Place) -> None:
    for time_range in (3, 2**30, 2**62):
        inputs, kwargs, grad = make_case([40, 4], 1, 8, 8, dtype=torch.float32, position=None, time_range=time_range)
        inputs[0].zero_()
        expected, actual = run(inputs, kwargs, grad, "reference"), run(inputs, kwargs, grad, place)
        for name in ("out", "v", "time_weights"):
            torch.testing.assert_close(actual[name].cpu(), expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", [p for p in KERNELS if p.id != "cpu"])
def test_triton_rows_past_max_seq_len_show(place: Place) -> None:
    inputs, kwargs, _ = make_case([40, 4], 1, 8, 8, dtype=torch.float32, position=None, time=None)
    kwargs["max_seq_len"] = 30
    out = hstu_attention(*place.put(inputs), **kwargs, backend=place.backend)
    assert out[30:40].isnan().all()
    assert out[:30].isfinite().all()
    assert out[40:].isfinite().all()


@pytest.mark.parametrize("place", [p for p in KERNELS if p.id != "cpu"])
def test_triton_order_of_rows_changes_no_bit(place: Place) -> None:
    inputs, kwargs, grad = make_case([7, 33, 0, 20], 1, 8, 8, dtype=torch.float32, position=None, time=None)
    first, second = (run(inputs, {**kwargs, "sort_by_length": x}, grad, place) for x in (True, False))
    for name in ("out", "q", "k", "v"):
        assert torch.equal(first[name], second[name]), name
