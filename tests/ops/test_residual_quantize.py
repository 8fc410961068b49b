"""Residual quantization: equal to the definition on integers, and nearest up to rounding on anything else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ops.residual_quantize import cpu, residual_quantize
from ops.testing import FACTOR, Place, assert_accurate, places

PLACES = places(cpu.refuses)
FAST_PLACES = places(cpu.refuses, reference=False)
HALVES_AND_FLOAT = [torch.bfloat16, torch.float16, torch.float32]


def integers(*shape: int, seed: int = 0, bound: int = 3) -> Tensor:
    """Small integers as floats: exact in every dtype, full of equal distances."""
    return torch.randint(-bound, bound + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def quantize(place: Place, x_TD: Tensor, codebooks: Any) -> tuple[Tensor, Tensor]:
    codes_TL, residual_TD = residual_quantize(place.put(x_TD), place.put(codebooks), backend=place.backend)
    assert codes_TL.dtype == torch.int64 and residual_TD.dtype == x_TD.dtype
    return codes_TL.cpu(), residual_TD.cpu()


def by_definition(x_TD: Tensor, codebooks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The first code at the smallest squared distance, in whole numbers."""
    residual_TD, codes = x_TD.long(), []
    for codebook_CD in codebooks:
        distances_TC = (residual_TD[:, None] - codebook_CD.long()).square().sum(dim=2)
        order = [min(range(len(row)), key=row.__getitem__) for row in distances_TC.tolist()]
        codes.append(torch.tensor(order, dtype=torch.int64))
        residual_TD = residual_TD - codebook_CD.long()[codes[-1]]
    return torch.stack(codes, dim=1), residual_TD


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
@pytest.mark.parametrize(
    ("tokens", "width", "sizes"),
    [(1, 1, (1,)), (70, 3, (5, 40, 33)), (33, 50, (64, 31)), (5, 17, (7, 7, 7, 7)), (40, 2, (130,)), (3, 1024, (40,))],
)
def test_equals_the_definition_on_integers(
    place: Place, tokens: int, width: int, sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    x_TD = integers(tokens, width, seed=1)
    codebooks = [integers(size, width, seed=2 + level) for level, size in enumerate(sizes)]
    codes_TL, residual_TD = quantize(place, x_TD.to(dtype), [codebook.to(dtype) for codebook in codebooks])
    wanted_codes, wanted_residual = by_definition(x_TD, codebooks)
    assert torch.equal(codes_TL, wanted_codes)
    assert torch.equal(residual_TD.long(), wanted_residual)


@pytest.mark.parametrize("place", PLACES)
@given(data=st.data())
@settings(max_examples=15, deadline=None, derandomize=True)
def test_equals_the_definition_on_any_lists(place: Place, data: st.DataObject) -> None:
    width = data.draw(st.integers(1, 3))
    row = st.lists(st.integers(-2, 2), min_size=width, max_size=width)

    def rows(least: int) -> Tensor:
        return torch.tensor(data.draw(st.lists(row, min_size=least, max_size=6))).float().view(-1, width)

    x_TD, codebooks = rows(0), [rows(1) for _ in range(data.draw(st.integers(1, 3)))]
    codes_TL, residual_TD = quantize(place, x_TD, codebooks)
    wanted_codes, wanted_residual = by_definition(x_TD, codebooks)
    assert torch.equal(codes_TL, wanted_codes)
    assert torch.equal(residual_TD.long(), wanted_residual)


def scores(residual_TD: Tensor, codebook_CD: Tensor) -> Tensor:
    return residual_TD @ codebook_CD.T - codebook_CD.square().sum(dim=1) / 2


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
@pytest.mark.parametrize(("width", "center"), [(32, 0.0), (50, 2.0), (300, 0.0)])
def test_no_code_is_nearer_by_more_than_rounding(place: Place, width: int, center: float, dtype: torch.dtype) -> None:
    """Codes a thousandth apart, so that distances differ by about what float32 resolves.

    Two scores may each be wrong by twice PyTorch's error plus a rounding, and a distance is two scores.
    """
    generator = torch.Generator().manual_seed(5)
    x_TD = (center + torch.randn(30, width, generator=generator)).to(dtype)
    base_CD = center * (torch.arange(3) == 0)[:, None, None] + torch.randn(3, 1, width, generator=generator)
    codebooks_LCD = (base_CD + 1e-3 * torch.randn(3, 70, width, generator=generator)).to(dtype)
    codes_TL, residual_TD = quantize(place, x_TD, codebooks_LCD)
    plain_TD, exact_TD = x_TD.float(), x_TD.double()
    for level, codebook_CD in enumerate(codebooks_LCD):
        exact_TC = scores(exact_TD, codebook_CD.double())
        error = (scores(plain_TD, codebook_CD.float()) - exact_TC).abs().max()
        allowed = FACTOR * error + torch.finfo(torch.float32).eps * exact_TC.abs().max()
        code_T = codes_TL[:, level]
        distances_TC = (exact_TD[:, None] - codebook_CD.double()).square().sum(dim=2)
        lost_T = distances_TC.gather(1, code_T[:, None])[:, 0] - distances_TC.amin(dim=1)
        assert lost_T.max() <= 4 * allowed
        plain_TD, exact_TD = plain_TD - codebook_CD.float()[code_T], exact_TD - codebook_CD.double()[code_T]
    assert_accurate({"residual": residual_TD}, {"residual": plain_TD.to(dtype)}, {"residual": exact_TD})


@pytest.mark.parametrize("place", FAST_PLACES)
def test_float64_is_left_to_what_can_compute_it(place: Place) -> None:
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(30, 8, generator=generator, dtype=torch.float64)
    codebooks_LCD = torch.randn(3, 20, 8, generator=generator, dtype=torch.float64)
    if place.backend == "triton":
        with pytest.raises(ValueError, match="no kernel for"):
            quantize(place, x_TD, codebooks_LCD)
        return
    codes_TL, residual_TD = quantize(place, x_TD, codebooks_LCD)
    wanted_codes, wanted_residual = quantize(Place("reference"), x_TD, codebooks_LCD)
    assert torch.equal(codes_TL, wanted_codes) and torch.equal(residual_TD, wanted_residual)


@pytest.mark.parametrize("place", PLACES)
def test_what_fills_up_short_levels_is_never_chosen(place: Place) -> None:
    """Zeros would be nearer to x than any code of the short level."""
    x_TD = integers(9, 4, bound=1)
    codebooks = [torch.full((2, 4), 100.0), integers(50, 4, seed=1) + 50]
    codes_TL, _ = quantize(place, x_TD, codebooks)
    assert not codes_TL[:, 0].any()
    assert int(codes_TL[:, 1].max()) < 50


@pytest.mark.parametrize("place", PLACES)
def test_nan_and_infinity_choose_codes_that_exist(place: Place) -> None:
    nan, inf = float("nan"), float("inf")
    x_TD = integers(8, 3, seed=1)
    codebooks_LCD = integers(2, 40, 3, seed=2)
    healthy = quantize(place, x_TD, codebooks_LCD)
    x_TD[2] = torch.tensor([1.0, nan, 0.0])
    x_TD[5] = torch.tensor([inf, 1.0, -inf])
    codes_TL, residual_TD = quantize(place, x_TD, codebooks_LCD)
    others = torch.tensor([0, 1, 3, 4, 6, 7])
    assert torch.equal(codes_TL[others], healthy[0][others])
    assert torch.equal(residual_TD[others], healthy[1][others])
    assert not codes_TL[2].any() and bool(residual_TD[2].isnan().any())
    assert bool(((codes_TL >= 0) & (codes_TL < 40)).all())
    assert not bool(residual_TD[5].isfinite().all())


@pytest.mark.parametrize("place", PLACES)
def test_a_code_with_nan_is_never_nearest(place: Place) -> None:
    x_TD, codebooks = integers(30, 3), integers(1, 40, 3, seed=2)
    codebooks[0, [0, 33]] = float("nan")
    codes_TL, residual_TD = quantize(place, x_TD, codebooks)
    without = torch.tensor([c for c in range(40) if c not in (0, 33)])
    assert torch.equal(codes_TL, without[by_definition(x_TD, [codebooks[0][without]])[0]])
    assert bool(residual_TD.isfinite().all())
    alone = quantize(place, x_TD, torch.full((1, 2, 3), float("nan")))
    assert not alone[0].any() and bool(alone[1].isnan().all())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("tokens", "levels", "width"), [(0, 2, 3), (4, 0, 3), (4, 2, 0), (0, 0, 0)])
def test_nothing_gives_nothing(place: Place, tokens: int, levels: int, width: int) -> None:
    x_TD = integers(tokens, width)
    codes_TL, residual_TD = quantize(place, x_TD, [integers(5, width)] * levels)
    assert codes_TL.shape == (tokens, levels)
    assert residual_TD.shape == (tokens, width)
    if levels == 0:
        assert torch.equal(residual_TD, x_TD)
    if width == 0:
        assert not codes_TL.any()


@pytest.mark.parametrize("place", PLACES)
def test_memory_layout_and_kinds_of_codebooks_do_not_matter(place: Place) -> None:
    x_TD, codebooks_LCD = integers(40, 9), integers(3, 12, 9, seed=1)
    wanted = quantize(place, x_TD, codebooks_LCD)
    wide = torch.zeros(40, 20)
    wide[:, 3:12] = x_TD
    apart = integers(9, 40).new_zeros(9, 40)
    apart[:] = x_TD.T
    for other in (wide[:, 3:12], apart.T):
        for codebooks in (codebooks_LCD, list(codebooks_LCD), tuple(codebooks_LCD.bfloat16()), codebooks_LCD.half()):
            found = quantize(place, other, codebooks)
            assert all(map(torch.equal, found, wanted))
    assert torch.equal(x_TD, integers(40, 9))


@pytest.mark.parametrize("place", PLACES)
def test_fewer_levels_are_a_prefix(place: Place) -> None:
    """The residual before a level is that of a call without it."""
    x_TD, codebooks_LCD = integers(40, 9, bound=9), integers(3, 12, 9, seed=1)
    codes_TL, _ = quantize(place, x_TD, codebooks_LCD)
    residual_TD = x_TD
    for level in range(3):
        found = quantize(place, x_TD, codebooks_LCD[: level + 1])
        residual_TD = residual_TD - codebooks_LCD[level][codes_TL[:, level]]
        assert torch.equal(found[0], codes_TL[:, : level + 1]) and torch.equal(found[1], residual_TD)


@pytest.mark.skipif(cpu.refuses() is not None, reason="no C++ form")
def test_blocks_join(monkeypatch: pytest.MonkeyPatch) -> None:
    x_TD, codebooks_LCD = integers(1000, 6, bound=9), integers(2, 100, 6, seed=1, bound=9)
    whole = quantize(Place("cpu"), x_TD, codebooks_LCD)
    monkeypatch.setattr(cpu, "BLOCK_SCORES", 1)
    assert all(map(torch.equal, quantize(Place("cpu"), x_TD, codebooks_LCD), whole))
    assert all(map(torch.equal, by_definition(x_TD, codebooks_LCD), (whole[0], whole[1].long())))


@pytest.mark.parametrize("place", PLACES)
def test_losses_are_built_from_codes(place: Place) -> None:
    """The recipe of the module's docstring: who gets which gradient."""
    x_TD, codebooks_LCD = (place.put(x).requires_grad_() for x in (integers(20, 5), integers(2, 7, 5, seed=1)))
    codes_TL, last_TD = residual_quantize(x_TD, codebooks_LCD, backend=place.backend)
    assert not last_TD.requires_grad
    residual_TD, beta = x_TD, 0.25
    codebook_loss = commitment = torch.zeros((), device=x_TD.device)
    for codebook_CD, code_T in zip(codebooks_LCD, codes_TL.T, strict=True):
        chosen_TD = codebook_CD[code_T]
        codebook_loss = codebook_loss + (residual_TD.detach() - chosen_TD).square().sum()
        commitment = commitment + beta * (residual_TD - chosen_TD.detach()).square().sum()
        residual_TD = residual_TD - chosen_TD.detach()
    quantized_TD = x_TD - residual_TD.detach()
    assert torch.equal(residual_TD, last_TD)
    assert torch.equal(quantized_TD, sum(codebooks_LCD[level][codes_TL[:, level]] for level in range(2)))
    (straight,) = torch.autograd.grad(quantized_TD.sum(), x_TD)
    assert torch.equal(straight, torch.ones_like(straight))
    grad_x, none = torch.autograd.grad(commitment, (x_TD, codebooks_LCD), allow_unused=True)
    assert none is None and grad_x.any()
    none, grad_codebooks = torch.autograd.grad(codebook_loss, (x_TD, codebooks_LCD), allow_unused=True)
    assert none is None and grad_codebooks.any()


@pytest.mark.parametrize("place", FAST_PLACES)
def test_custom_op_is_registered_soundly(place: Place) -> None:
    codebooks_LCD = integers(2, 5, 3)
    arguments = (integers(4, 3), codebooks_LCD, codebooks_LCD.square().sum(dim=2) / 2)
    torch.library.opcheck(torch.ops.gr.residual_quantize.default, (*place.put(arguments), place.backend == "triton"))


@pytest.mark.parametrize("place", FAST_PLACES)
def test_compiles_without_graph_breaks(place: Place) -> None:
    x_TD, codebooks = place.put((integers(6, 4), [integers(5, 4, seed=1), integers(3, 4, seed=2)]))

    def run(x_TD: Tensor, codebooks: list[Tensor]) -> tuple[Tensor, Tensor]:
        return residual_quantize(x_TD, codebooks, backend=place.backend)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(x_TD, codebooks), run(x_TD, codebooks)))


@pytest.mark.parametrize(
    ("x", "codebooks", "message"),
    [
        (torch.ones(3), torch.ones(1, 2, 3), "x: got"),
        (torch.ones(4, 3).long(), torch.ones(1, 2, 3), "x: got"),
        (torch.ones(4, 3), torch.ones(1, 2, 4), "codebook of level 0: got"),
        (torch.ones(4, 3), [torch.ones(2, 3), torch.ones(0, 3)], "codebook of level 1: got"),
        (torch.ones(4, 3), torch.ones(2, 3), "codebook of level 0: got"),
        (torch.ones(4, 3), [torch.ones(2, 3).long()], "codebook of level 0: got"),
    ],
)
def test_bad_arguments_are_named(x: Tensor, codebooks: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"residual_quantize {message}"):
        residual_quantize(x, codebooks)
