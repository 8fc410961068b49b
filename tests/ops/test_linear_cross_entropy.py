"""Full softmax against full logits: the Triton form, and the blocked one by whole rows, by tiles and in C++."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ops.linear_cross_entropy import blocked, cpu, gpu, linear_cross_entropy
from ops.rows import extent
from ops.testing import Place, assert_accurate, places

PLACES = places(blocked.refuses)
FAST_PLACES = places(blocked.refuses, reference=False)
TRITON = [place for place in FAST_PLACES if place.values[0].backend == "triton"]
REFERENCE, CPU = Place("reference"), Place("cpu")
NAMES = ("losses", "queries.grad", "table.grad")

# T, D, V
SHAPES = [(0, 4, 5), (1, 8, 5), (17, 25, 11), (70, 50, 300), (129, 64, 90), (30, 9, 70)]
# So many candidates, or tokens, that they are cut into splits.
SPLIT = [(5, 16, 1600), (1200, 20, 40)]


@pytest.fixture(params=["C++", "whole rows", "tiles"])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Blocks so small that the larger shapes span several of them, the last one short."""
    monkeypatch.setattr(blocked, "_BLOCK_LOGITS", 32)
    monkeypatch.setattr(blocked, "_TILE_TOKENS", 50)
    monkeypatch.setattr(blocked, "_TILE_ITEMS", 64)
    if request.param == "C++":
        if not cpu.usable(torch.empty(0)):
            pytest.skip("no C++ compiler")
    else:
        monkeypatch.setattr(cpu, "usable", lambda queries_TD: False)
    if request.param == "tiles":
        monkeypatch.setattr(blocked, "_WHOLE_ROWS", 0)
    return str(request.param)


def problem(
    shape: tuple[int, int, int],
    equal_weights: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    consecutive: bool = False,
) -> dict[str, Any]:
    """Values that `dtype` holds exactly, in float64; 0 is no candidate, the others have gaps unless consecutive."""
    tokens, width, rows = shape
    generator = torch.Generator().manual_seed(seed)
    catalogue = torch.randperm(rows - 1, generator=generator)[: max(1, (rows * 3) // 4)] + 1
    catalogue = torch.arange(1, rows) if consecutive else catalogue
    weights = torch.randn(tokens, generator=generator, dtype=torch.float64)
    queries = torch.randn(tokens, width, generator=generator, dtype=torch.float64) / width**0.5
    return {
        "queries": queries.to(dtype).double(),
        "table": torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype).double(),
        "catalogue": catalogue,
        "targets": catalogue[torch.randint(0, len(catalogue), (tokens,), generator=generator)],
        "weights": torch.full_like(weights, 0.25) if equal_weights else weights,
    }


def run(data: dict[str, Any], place: Place, dtype: torch.dtype = torch.float64, **options: Any) -> list[torch.Tensor]:
    """Losses and the gradients of queries and table, on the CPU; Triton has no float64 and runs in float32."""
    if place.backend == "triton" and dtype == torch.float64:
        dtype = torch.float32
    queries, table = (place.put(data[name].to(dtype, copy=True)).requires_grad_() for name in ("queries", "table"))
    ids = place.put((data["catalogue"], data["targets"]))
    losses = linear_cross_entropy(queries, table, *ids, temperature=0.5, backend=place.backend, **options)
    grads = torch.autograd.grad(losses, (queries, table), place.put(data["weights"]).to(losses.dtype))
    return [x.detach().cpu() for x in (losses, *grads)]


def named(values: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(zip(NAMES, values, strict=True))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("l2_norm", [False, True])
def test_is_cross_entropy_over_the_catalogue_alone(place: Place, l2_norm: bool) -> None:
    data = problem((9, 5, 8))
    data["catalogue"], data["targets"] = torch.tensor([1, 2, 5, 7]), torch.tensor([1, 2, 5, 7, 1, 2, 5, 7, 7])
    rows = data["table"][[1, 2, 5, 7]]
    if l2_norm:
        rows = torch.nn.functional.normalize(rows, dim=1)
    position = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 3])
    wanted = -(data["queries"] @ rows.T / 0.5).log_softmax(dim=1)[torch.arange(9), position]
    losses, _, grad_table = run(data, place, l2_norm=l2_norm)
    torch.testing.assert_close(losses, wanted.to(losses.dtype))
    assert bool((grad_table[[0, 3, 4, 6]] == 0).all())


@pytest.mark.parametrize("equal_weights", [False, True])
@pytest.mark.parametrize("l2_norm", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("layout")
def test_blocked_equals_reference_in_float64(shape: tuple[int, int, int], l2_norm: bool, equal_weights: bool) -> None:
    data = problem(shape, equal_weights)
    reference, got = run(data, REFERENCE, l2_norm=l2_norm), run(data, CPU, l2_norm=l2_norm)
    for name, wanted, value in zip(NAMES, reference, got, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("equal_weights", [False, True])
@pytest.mark.usefixtures("layout")
def test_blocked_float32_is_as_accurate_as_the_reference(equal_weights: bool) -> None:
    data = problem((400, 50, 700), equal_weights)
    places_and_dtypes = ((CPU, torch.float32), (REFERENCE, torch.float32), (REFERENCE, torch.float64))
    assert_accurate(*(named(run(data, place, dtype, l2_norm=True)) for place, dtype in places_and_dtypes))


@pytest.mark.parametrize("place", TRITON)
@pytest.mark.parametrize("l2_norm", [False, True])
@pytest.mark.parametrize("consecutive", [False, True], ids=["gaps", "range"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES, (150, 130, 40), (200, 256, 33), *SPLIT])
def test_triton_is_as_accurate_as_the_reference(
    shape: tuple[int, int, int], dtype: torch.dtype, consecutive: bool, l2_norm: bool, place: Place
) -> None:
    data = problem(shape, dtype=dtype, consecutive=consecutive)
    places_and_dtypes = ((place, dtype), (REFERENCE, dtype), (REFERENCE, torch.float64))
    got, plain, exact = (named(run(data, place, dtype, l2_norm=l2_norm)) for place, dtype in places_and_dtypes)
    assert got["losses"].dtype == torch.float32
    assert got["queries.grad"].dtype == got["table.grad"].dtype == dtype
    assert_accurate(got, plain, exact)


def test_shapes_reach_several_splits() -> None:
    for tokens, _, rows in SPLIT:
        candidates = rows * 3 // 4
        assert max(gpu._splits(tokens, candidates)[1], gpu._splits(candidates, tokens)[1]) > 1


@pytest.mark.parametrize("catalogue", ["range", "gaps"])
@pytest.mark.usefixtures("layout")
def test_gradcheck(catalogue: str) -> None:
    data = problem((5, 3, 12))
    ids = torch.arange(1, 12) if catalogue == "range" else data["catalogue"]
    inputs = (data["queries"].requires_grad_(), data["table"].requires_grad_())
    assert torch.autograd.gradcheck(
        lambda q, e: linear_cross_entropy(q, e, ids, data["targets"], temperature=0.7, l2_norm=True, backend="cpu"),
        inputs,
    )


@pytest.mark.usefixtures("layout")
def test_blocked_logits_of_a_thousand_neither_overflow_nor_vanish() -> None:
    assert_large_logits_are_right(CPU)


@pytest.mark.parametrize("place", TRITON)
def test_triton_logits_of_a_thousand_neither_overflow_nor_vanish(place: Place) -> None:
    assert_large_logits_are_right(place)


def assert_large_logits_are_right(place: Place) -> None:
    data = problem((20, 8, 60))
    data["queries"] *= 1500
    reference, got = run(data, REFERENCE), run(data, place, torch.float32)
    assert reference[0].max() > 1000
    for name, wanted, value in zip(NAMES, reference, got, strict=True):
        torch.testing.assert_close(value.double(), wanted, rtol=1e-3, atol=1e-2 * float(wanted.abs().max()), msg=name)


def test_gradients_do_not_depend_on_the_number_of_threads() -> None:
    if not cpu.usable(torch.empty(0)):
        pytest.skip("no C++ compiler")
    data, before, results = problem((300, 50, 700), equal_weights=True), torch.get_num_threads(), []
    try:
        for threads in (1, 8, 5):
            torch.set_num_threads(threads)
            results.append(cpu.forward_whole_rows(data["queries"].float(), data["table"].float()))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for name, first, other in zip(("lse", "means", "mass"), results[0], result, strict=True):
            assert torch.equal(first, other), name


@pytest.mark.parametrize("place", PLACES)
def test_nan_in_a_query_reaches_only_its_loss(place: Place) -> None:
    data = problem((6, 4, 30))
    data["queries"][2, 3] = float("nan")
    assert run(data, place)[0].isnan().tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("consecutive", [False, True], ids=["gaps", "range"])
def test_without_gradients_the_losses_are_the_same(consecutive: bool, place: Place) -> None:
    data = place.put(problem((17, 5, 30), consecutive=consecutive))
    with torch.no_grad():
        losses = linear_cross_entropy(
            data["queries"].float(),
            data["table"].float(),
            data["catalogue"],
            data["targets"],
            temperature=0.5,
            backend=place.backend,
        )
    torch.testing.assert_close(losses.cpu(), run(data, place, torch.float32)[0])


@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocked_losses_without_gradients_share_no_memory_with_the_table(dtype: torch.dtype) -> None:
    data = problem((3, 4, 9), consecutive=True)
    losses = linear_cross_entropy(
        *(data[name].to(dtype) for name in ("queries", "table")), data["catalogue"], data["targets"], temperature=0.5
    )
    torch.testing.assert_close(losses, run(data, REFERENCE, dtype)[0])


@pytest.mark.parametrize("place", PLACES)
def test_only_the_leaf_that_asks_gets_a_gradient(place: Place) -> None:
    data = problem((17, 5, 30))
    wanted = run({**data, "weights": torch.ones(17, dtype=torch.float64)}, REFERENCE, l2_norm=True)
    for index, name in ((1, "queries"), (2, "table")):
        held = {n: place.put(data[n].float()) for n in ("queries", "table")}
        held[name].requires_grad_()
        ids = place.put((data["catalogue"], data["targets"]))
        losses = linear_cross_entropy(*held.values(), *ids, temperature=0.5, l2_norm=True, backend=place.backend)
        losses.sum().backward()
        torch.testing.assert_close(held[name].grad.cpu().double(), wanted[index], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtypes", [(torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)], ids=str)
def test_half_precision_computes_in_float32(place: Place, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    data = problem((7, 8, 12), dtype=torch.bfloat16)
    leaves = [
        place.put(data[name].to(dtype)).requires_grad_()
        for name, dtype in zip(("queries", "table"), dtypes, strict=True)
    ]
    ids = place.put((data["catalogue"], data["targets"]))
    losses = linear_cross_entropy(*leaves, *ids, temperature=0.5, backend=place.backend)
    grads = torch.autograd.grad(losses, leaves, place.put(data["weights"]).float())
    exact = run(data, REFERENCE)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.detach().cpu().double(), exact[0], rtol=1e-5, atol=1e-5)
    for grad, dtype, wanted in zip(grads, dtypes, exact[1:], strict=True):
        assert grad.dtype == dtype
        torch.testing.assert_close(grad.cpu().double(), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("place", PLACES)
def test_strided_inputs(place: Place) -> None:
    data = problem((6, 16, 30))
    wide = torch.full((36, 40), float("nan"))
    wide[:6, 3:19], wide[6:, 20:36] = data["queries"], data["table"]
    ids = place.put((data["catalogue"], data["targets"]))
    wanted = run(data, REFERENCE)[0]
    rows = wide[:6, 3:19], wide[6:, 20:36]
    for pair in (rows, [x.T.clone().T for x in rows]):
        pair = place.put(pair)
        losses = linear_cross_entropy(*pair, *ids, temperature=0.5, backend=place.backend)
        torch.testing.assert_close(losses.cpu().double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("layout")
def test_blocked_operators_are_registered_soundly() -> None:
    assert_registered_soundly(CPU)


@pytest.mark.parametrize("place", TRITON)
def test_triton_operators_are_registered_soundly(place: Place) -> None:
    assert_registered_soundly(place)


def assert_registered_soundly(place: Place) -> None:
    data = place.put(problem((6, 4, 9)))
    leaves = tuple(data[name].float().requires_grad_() for name in ("queries", "table"))
    ids, on_triton = (data["catalogue"], data["targets"]), place.backend == "triton"
    arguments = (*leaves, *ids, 0.5, True, 1e-6, True, on_triton)
    torch.library.opcheck(torch.ops.gr.linear_cross_entropy.default, arguments)
    losses, *kept = (x.detach() for x in torch.ops.gr.linear_cross_entropy(*arguments))
    saved = (torch.ones_like(losses), *(leaf.detach() for leaf in leaves), *ids, *kept)
    torch.library.opcheck(
        torch.ops.gr.linear_cross_entropy_backward.default, (*saved, 0.5, True, 1e-6, True, on_triton)
    )


@pytest.mark.parametrize("place", FAST_PLACES)
def test_is_compiled_whole(place: Place) -> None:
    data = place.put(problem((6, 4, 9)))
    leaves = tuple(data[name].float().requires_grad_() for name in ("queries", "table"))

    def mean_loss(queries: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        ids = (data["catalogue"], data["targets"])
        return linear_cross_entropy(queries, table, *ids, temperature=0.5, l2_norm=True, backend=place.backend).mean()

    compiled = torch.compile(mean_loss, fullgraph=True, backend="aot_eager")
    wanted, got = (torch.autograd.grad(call(*leaves), leaves) for call in (mean_loss, compiled))
    for name, grad, other in zip(NAMES[1:], wanted, got, strict=True):
        assert torch.equal(grad, other), name


@pytest.mark.parametrize("place", PLACES)
def test_bad_arguments_are_named(place: Place) -> None:
    queries, table, targets = place.put((torch.ones(2, 3), torch.ones(6, 3), torch.tensor([1, 2])))
    catalogue = place.put(torch.tensor([1, 2, 4]))
    for temperature in (0.0, float("nan")):
        with pytest.raises(ValueError, match="temperature: got"):
            linear_cross_entropy(queries, table, catalogue, targets, temperature=temperature, backend=place.backend)
    options = {"temperature": 1.0, "backend": place.backend}
    with pytest.raises(ValueError, match="shapes: got"):
        linear_cross_entropy(queries, table, catalogue, targets[:1], **options)
    for pair in ((catalogue.int(), targets), (catalogue, targets.int()), (catalogue[None], targets)):
        with pytest.raises(ValueError, match="ids: got"):
            linear_cross_entropy(queries, table, *pair, **options)
    with pytest.raises(ValueError, match="got no ids"):
        linear_cross_entropy(queries, table, catalogue[:0], targets, **options)
    for bad in (torch.tensor([1, 6]), torch.tensor([2, -1, 1]), torch.arange(7)):
        with pytest.raises(ValueError, match="outside the table"):
            linear_cross_entropy(queries, table, place.put(bad), targets, **options)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("catalogue", [[1, 2, 4], [1, 2]], ids=["gaps", "range"])
@pytest.mark.parametrize("target", [0, 3, 6, -1, 2**40])
def test_a_target_outside_the_catalogue_is_an_error_or_nan(target: int, catalogue: list[int], place: Place) -> None:
    inputs = place.put((torch.ones(2, 3), torch.ones(6, 3), torch.tensor(catalogue), torch.tensor([1, target])))
    if place.backend == "triton":
        losses = linear_cross_entropy(*inputs, temperature=1.0, backend="triton")
        assert losses.isnan().tolist() == [False, True]
    else:
        with pytest.raises(ValueError, match=f"got id {target}, expected one of the catalogue"):
            linear_cross_entropy(*inputs, temperature=1.0, backend=place.backend)


def test_what_is_known_of_a_catalogue_follows_its_tensor() -> None:
    ids = torch.arange(5, 9)
    assert extent(ids) == (5, 8, True, True)
    ids[1] = 5
    assert extent(ids) == (5, 8, False, False)
    ids.copy_(torch.tensor([4, 3, 2, 1]))
    assert extent(ids) == (1, 4, False, False)
    ids.data.copy_(torch.arange(4))
    assert extent(ids) == (0, 3, True, True)
    array = np.arange(3)
    shared = torch.from_numpy(array)
    assert extent(shared) == (0, 2, True, True)
    array[2] = 7
    assert extent(shared) == (0, 7, True, False)
    with torch.inference_mode():
        assert extent(torch.tensor([7])) == (7, 7, True, True)
