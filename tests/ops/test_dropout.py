"""Counter-based dropout: one mask on every backend, recomputed in backward."""

from __future__ import annotations

import pytest
import torch

from ops.dropout import cpu, dropout
from ops.random import drop_threshold, lane_bits, token_hash
from ops.testing import Place, places

PLACES = places(cpu.refuses)
# Triton has no kernel for float64.
EACH_DTYPE = [
    pytest.param(*place.values, dtype, marks=place.marks, id=f"{place.id}-{dtype}")
    for place in PLACES
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    if dtype != torch.float64 or place.values[0].backend != "triton"
]


@pytest.mark.parametrize(("place", "dtype"), EACH_DTYPE)
@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (5, 0), (7, 3, 5), (301, 50), (9,)])
def test_backends_are_equal_bit_for_bit(place: Place, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator).to(dtype)
    upstream = torch.randn(shape, generator=generator).to(dtype)
    keys_T = torch.randint(-(2**62), 2**62, shape[:1], generator=generator)

    def run(at: Place) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = at.put(x).requires_grad_()
        y = dropout(leaf, 0.3, -12345678901, at.put(keys_T), backend=at.backend)
        (grad,) = torch.autograd.grad(y, leaf, at.put(upstream))
        assert y.dtype == grad.dtype == dtype
        return y.detach().cpu(), grad.cpu()

    for value, wanted in zip(run(place), run(Place("reference")), strict=True):
        assert torch.equal(value, wanted)


@pytest.mark.parametrize("place", PLACES)
def test_mask_is_the_formula_and_ignores_memory_layout(place: Place) -> None:
    keys_T = torch.tensor([5, 5, 2**40])
    x = torch.ones(40, 3).T
    y = dropout(place.put(x), 0.25, 17, place.put(keys_T), backend=place.backend)
    dropped = lane_bits(token_hash(17, keys_T)[:, None], torch.arange(40)) < drop_threshold(0.25)
    assert torch.equal(y == 0, dropped)
    assert torch.equal(y[~dropped], torch.full_like(y[~dropped], 4 / 3))
    assert torch.equal(y[0], y[1])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_rate_and_mean_are_kept(place: Place, rate: float) -> None:
    y = dropout(place.put(torch.ones(2000, 64)), rate, 3, place.put(torch.arange(2000)), backend=place.backend)
    deviation = (rate * (1 - rate) / y.numel()) ** 0.5
    assert abs((y == 0).double().mean().item() - rate) < 4 * deviation
    assert abs(y.double().mean().item() - 1) < 4 * deviation / (1 - rate)


@pytest.mark.parametrize("place", PLACES)
def test_nan_under_the_mask_is_dropped_and_elsewhere_stays(place: Place) -> None:
    y = dropout(
        place.put(torch.full((10, 20), float("nan"))), 0.5, 3, place.put(torch.arange(10)), backend=place.backend
    )
    assert bool((y.isnan() | (y == 0)).all())
    assert 0 < int(y.isnan().sum()) < 200


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_gradcheck(backend: str) -> None:
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    keys_T = torch.arange(4)
    assert torch.autograd.gradcheck(lambda x: dropout(x, 0.4, 9, keys_T, backend=backend), x)


def test_off_returns_x_itself() -> None:
    x, keys_T = torch.ones(2, 3), torch.arange(2)
    assert dropout(x, 0.5, 1, keys_T, training=False) is x
    assert dropout(x, 0.0, 1, keys_T) is x


@pytest.mark.parametrize("place", places(cpu.refuses, reference=False))
def test_custom_op_is_registered_soundly(place: Place) -> None:
    x, keys_T = place.put(torch.randn(4, 6)).requires_grad_(), place.put(torch.arange(4))
    torch.library.opcheck(torch.ops.gr.dropout.default, (x, 0.4, 9, keys_T, place.backend == "triton"))


def test_bad_arguments_are_named() -> None:
    x = torch.ones(2, 3)
    for rate in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="dropout rate: got"):
            dropout(x, rate, 1, torch.arange(2))
    for keys_T in (torch.arange(3), torch.arange(2).float()):
        with pytest.raises(ValueError, match="dropout keys: got"):
            dropout(x, 0.5, 1, keys_T)
