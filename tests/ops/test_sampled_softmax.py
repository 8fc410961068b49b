"""Sampled softmax: the kernels against the reference, the reference against the definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ops.sampled_softmax import cpu, sampled_softmax_loss
from ops.testing import Place, assert_accurate, places

needs_compiler = pytest.mark.skipif(cpu.refuses() is not None, reason="no C++ compiler")
PLACES = places(cpu.refuses)
FAST_PLACES = places(cpu.refuses, reference=False)
NAMES = ("losses", "queries.grad", "table.grad")

# T, R, D, V
SHAPES = [
    (0, 4, 8, 5),
    (1, 1, 1, 1),
    (5, 0, 3, 4),
    (3, 1, 25, 2),
    (17, 8, 50, 11),
    (40, 33, 64, 300),
    (6, 5, 65, 9),
    (9, 128, 130, 700),
]


def problem(shape: tuple[int, int, int, int], seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Values that `dtype` holds exactly, in float64."""
    tokens, negatives, width, rows = shape
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    if rows > 3:
        # A row of zeros and one shorter than eps meet the clamp of the norm.
        table[2] = 0.0
        table[3] *= 1e-9
    queries = torch.randn(tokens, width, generator=generator, dtype=torch.float64) / width**0.5
    return {
        "queries": queries.to(dtype).double(),
        "table": table.to(dtype).double(),
        "positive": torch.randint(0, rows, (tokens,), generator=generator),
        "negative": torch.randint(0, rows, (tokens, negatives), generator=generator),
        "weights": torch.randn(tokens, generator=generator, dtype=torch.float64),
    }


def run(data: dict[str, Any], place: Place, dtype: torch.dtype = torch.float64, **options: Any) -> list[torch.Tensor]:
    """Losses and the gradients of queries and table, on the CPU; Triton has no float64 and runs in float32."""
    if place.backend == "triton" and dtype == torch.float64:
        dtype = torch.float32
    queries, table = (place.put(data[name].to(dtype, copy=True)).requires_grad_() for name in ("queries", "table"))
    options = {"temperature": 0.3, **place.put(options)}
    ids = place.put((data["positive"], data["negative"]))
    losses = sampled_softmax_loss(queries, table, *ids, backend=place.backend, **options)
    grads = torch.autograd.grad(losses, (queries, table), place.put(data["weights"]).to(losses.dtype))
    return [x.detach().cpu() for x in (losses, *grads)]


REFERENCE = Place("reference")


@pytest.mark.parametrize("place", PLACES)
def test_is_cross_entropy_of_the_positive(place: Place) -> None:
    queries, table = torch.tensor([[1.0, 2.0]]), torch.tensor([[9.0, 9.0], [0.6, 0.8], [2.0, 0.0], [0.0, -3.0]])
    inputs = place.put((queries, table, torch.tensor([1]), torch.tensor([[2, 1, 3]])))

    def loss(**options: Any) -> float:
        return sampled_softmax_loss(*inputs, temperature=0.5, backend=place.backend, **options).item()

    scores = [2.2 / 0.5, 2.0 / 0.5, -6.0 / 0.5]
    assert loss() == pytest.approx(math.log(sum(map(math.exp, scores))) - scores[0], rel=1e-5)
    scores = [2.2 / 0.5, 1.0 / 0.5, -2.0 / 0.5]
    assert loss(l2_norm=True) == pytest.approx(math.log(sum(map(math.exp, scores))) - scores[0], rel=1e-5)
    scores = [2.2 / 0.5 + 1.0, 2.0 / 0.5 + 3.0, -6.0 / 0.5 - 0.5]
    # float64 on purpose: its dtype is not the result's.
    log_q = place.put(torch.tensor([0.0, -1.0, -3.0, 0.5], dtype=torch.float64))
    assert loss(item_log_q=log_q) == pytest.approx(math.log(sum(map(math.exp, scores))) - scores[0], rel=1e-5)


@pytest.mark.parametrize("l2_norm", [False, True])
@pytest.mark.parametrize("log_q", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@needs_compiler
def test_cpu_equals_reference_in_float64(shape: tuple[int, int, int, int], l2_norm: bool, log_q: bool) -> None:
    data = problem(shape)
    item_log_q = torch.linspace(-6, 0, shape[3], dtype=torch.float64) if log_q else None
    options = {"l2_norm": l2_norm, "item_log_q": item_log_q}
    reference, got = run(data, REFERENCE, **options), run(data, Place("cpu"), **options)
    for name, wanted, value in zip(NAMES, reference, got, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


def in_units_of_the_row(values: list[torch.Tensor], exact: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rows of norm eps multiply their gradient by 1 / eps, and would hide the errors of all others."""
    sizes = [x.abs().amax(dim=-1, keepdim=True).clamp_min(1.0) if x.numel() else 1.0 for x in exact]
    return {name: value / size for name, value, size in zip(NAMES, values, sizes, strict=True)}


@pytest.mark.parametrize("options", [{}, {"l2_norm": True}, {"log_q": True}, {"l2_norm": True, "log_q": True}], ids=str)
@pytest.mark.parametrize("place", FAST_PLACES)
@pytest.mark.parametrize("shape", SHAPES)
def test_float32_is_as_accurate_as_the_reference(
    shape: tuple[int, int, int, int], place: Place, options: dict[str, bool]
) -> None:
    data = problem(shape)
    log_q = torch.linspace(-6, 0, shape[3]) if options.get("log_q") else None
    options = {"l2_norm": options.get("l2_norm", False), "item_log_q": log_q}
    exact = run(data, REFERENCE, **options)
    results = run(data, place, torch.float32, **options), run(data, REFERENCE, torch.float32, **options), exact
    assert_accurate(*(in_units_of_the_row(result, exact) for result in results), precision=torch.float32)


@pytest.mark.parametrize("place", [x for x in FAST_PLACES if str(x.values[0]) != "triton"])
@pytest.mark.parametrize("l2_norm", [False, True])
@pytest.mark.parametrize("shape", [(300, 128, 50, 2000), (500, 64, 25, 3)])
def test_large_shapes_are_as_accurate_as_the_reference(
    shape: tuple[int, int, int, int], l2_norm: bool, place: Place
) -> None:
    data = problem(shape)
    exact = run(data, REFERENCE, l2_norm=l2_norm)
    results = (run(data, at, torch.float32, l2_norm=l2_norm) for at in (place, REFERENCE))
    assert_accurate(*(in_units_of_the_row(result, exact) for result in (*results, exact)), precision=torch.float32)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("l2_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_in_float32(dtype: torch.dtype, l2_norm: bool, place: Place) -> None:
    data = problem((17, 8, 50, 11), dtype=dtype)
    data["table"][2:4] = 1.0
    exact = run(data, REFERENCE, l2_norm=l2_norm)
    losses, *grads = run(data, place, dtype, l2_norm=l2_norm)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), exact[0], rtol=1e-5, atol=1e-5)
    for grad, wanted in zip(grads, exact[1:], strict=True):
        assert grad.dtype == dtype
        # One rounding, of what float32 computed.
        torch.testing.assert_close(grad.double(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("place", PLACES)
def test_queries_and_table_may_differ_in_dtype(place: Place) -> None:
    data = problem((5, 7, 20, 9), dtype=torch.bfloat16)
    data["table"][2:4] = 1.0
    ids = place.put((data["positive"], data["negative"]))
    for dtypes in ((torch.bfloat16, torch.float32), (torch.float32, torch.float16)):
        leaves = [
            place.put(data[name].to(dtype)).requires_grad_()
            for name, dtype in zip(("queries", "table"), dtypes, strict=True)
        ]
        losses = sampled_softmax_loss(*leaves, *ids, temperature=0.3, l2_norm=True, backend=place.backend)
        grads = torch.autograd.grad(losses, leaves, place.put(data["weights"]).float())
        assert losses.dtype == torch.float32
        exact = run({**data, "table": data["table"].to(dtypes[1]).double()}, REFERENCE, l2_norm=True)
        torch.testing.assert_close(losses.cpu().double(), exact[0], rtol=1e-5, atol=1e-5)
        for grad, dtype, wanted in zip(grads, dtypes, exact[1:], strict=True):
            assert grad.dtype == dtype
            torch.testing.assert_close(grad.cpu().double(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("place", PLACES)
def test_all_negatives_equal_to_the_positive_give_no_loss_and_no_gradient(place: Place) -> None:
    data = problem((6, 4, 8, 10))
    data["negative"] = data["positive"][:, None].expand(-1, 4)
    for name, value in zip(NAMES, run(data, place, l2_norm=True), strict=True):
        assert value.abs().max() < 1e-12, name


@pytest.mark.parametrize("place", PLACES)
def test_duplicate_negatives_count_twice(place: Place) -> None:
    data = problem((5, 1, 8, 10))
    data["positive"] = torch.full((5,), 4)
    data["negative"] = torch.full((5, 1), 7)
    single = run(data, place)[0]
    double = run({**data, "negative": data["negative"].expand(-1, 2)}, place)[0]
    torch.testing.assert_close(double, ((single.exp() - 1) * 2 + 1).log())


@pytest.mark.parametrize("place", PLACES)
def test_logits_of_a_thousand_neither_overflow_nor_vanish(place: Place) -> None:
    data = problem((20, 12, 8, 30))
    data["queries"] *= 2000
    reference, got = run(data, REFERENCE), run(data, place)
    assert reference[0].max() > 1000
    for name, wanted, value in zip(NAMES, reference, got, strict=True):
        atol = 1e-3 * float(wanted.abs().max())
        torch.testing.assert_close(value.double(), wanted, rtol=1e-3, atol=atol, msg=name)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_compiler)])
@pytest.mark.parametrize("l2_norm", [False, True])
def test_gradcheck(backend: str, l2_norm: bool) -> None:
    data = problem((4, 6, 5, 3))
    ids = (data["positive"], data["negative"])
    options = {"temperature": 0.7, "l2_norm": l2_norm, "backend": backend}
    log_q = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64)
    inputs = (data["queries"].requires_grad_(), data["table"].requires_grad_())
    assert torch.autograd.gradcheck(lambda q, e: sampled_softmax_loss(q, e, *ids, item_log_q=log_q, **options), inputs)


@needs_compiler
def test_table_gradient_does_not_depend_on_the_number_of_threads() -> None:
    data, before, results = problem((200, 32, 50, 90)), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(data, Place("cpu"), torch.float32, l2_norm=True))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for name, first, other in zip(NAMES, results[0], result, strict=True):
            assert torch.equal(first, other), name


@pytest.mark.parametrize("place", PLACES)
def test_needs_no_gradient_and_accepts_strided_inputs(place: Place) -> None:
    data = problem((6, 4, 8, 10))
    wanted = run(data, REFERENCE)[0]
    queries, table, wide = data["queries"].float(), data["table"].float(), torch.full((16, 30), float("nan"))
    wide[:6, 3:11], wide[6:, 11:19] = queries, table
    ids = place.put((data["positive"], data["negative"].T.contiguous().T))
    for pair in ((queries.T.contiguous().T, table.T.contiguous().T), (wide[:6, 3:11], wide[6:, 11:19])):
        with torch.no_grad():
            got = sampled_softmax_loss(*place.put(pair), *ids, temperature=0.3, backend=place.backend)
        torch.testing.assert_close(got.cpu().double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("place", PLACES)
def test_only_the_leaf_that_asks_gets_a_gradient(place: Place) -> None:
    data = problem((6, 4, 8, 10))
    wanted = run({**data, "weights": torch.ones(6, dtype=torch.float64)}, REFERENCE)
    for index, name in ((1, "queries"), (2, "table")):
        held = {n: place.put(data[n].float()) for n in ("queries", "table")}
        held[name].requires_grad_()
        ids = place.put((data["positive"], data["negative"]))
        sampled_softmax_loss(*held.values(), *ids, temperature=0.3, backend=place.backend).sum().backward()
        torch.testing.assert_close(held[name].grad.cpu().double(), wanted[index], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("place", PLACES)
def test_nan_in_a_query_reaches_only_its_loss(place: Place) -> None:
    data = problem((6, 4, 8, 10))
    data["queries"][2, 3] = float("nan")
    assert run(data, place)[0].isnan().tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("l2_norm", [False, True])
@pytest.mark.parametrize("shape", [(0, 4, 8, 5), (17, 8, 50, 40), (3, 0, 4, 9)])
def test_sparse_gradient_is_the_dense_one_where_the_batch_points(
    shape: tuple[int, int, int, int], l2_norm: bool, dtype: torch.dtype, place: Place
) -> None:
    data = problem(shape, dtype=dtype)
    dense = run(data, place, dtype, l2_norm=l2_norm)[2]
    sparse = run(data, place, dtype, l2_norm=l2_norm, sparse_grad=True)[2]
    assert sparse.is_sparse
    assert sparse.is_coalesced()
    assert sparse.dtype == dtype
    named = torch.cat([data["positive"], data["negative"].flatten()]).unique()
    assert torch.equal(sparse.indices()[0], named)
    if place.backend == "triton":
        assert torch.equal(sparse.to_dense(), dense)
    else:
        # Another order of the same sums.
        size = dense.double().abs().amax(dim=1, keepdim=True).clamp_min(1.0)
        torch.testing.assert_close(sparse.to_dense() / size, dense / size, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("place", PLACES)
def test_sparse_adam_moves_the_named_rows_alone(place: Place) -> None:
    data = problem((5, 4, 8, 40))
    table = place.put(data["table"].float()).requires_grad_()
    optimizer = torch.optim.SparseAdam([table], lr=0.1)
    inputs = place.put((data["queries"].float(), data["positive"], data["negative"]))
    losses = []
    for _ in range(3):
        loss = sampled_softmax_loss(
            inputs[0], table, *inputs[1:], temperature=0.3, sparse_grad=True, backend=place.backend
        ).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]
    moved = (table.detach().cpu() != data["table"].float()).any(dim=1)
    named = torch.cat([data["positive"], data["negative"].flatten()]).unique()
    assert torch.equal(moved.nonzero()[:, 0], named)


@pytest.mark.parametrize("place", FAST_PLACES)
def test_custom_ops_are_registered_soundly(place: Place) -> None:
    data = problem((4, 3, 5, 6))
    queries, table = (place.put(data[name].float()).requires_grad_() for name in ("queries", "table"))
    ids, on_triton = place.put((data["positive"], data["negative"])), place.backend == "triton"
    arguments = (queries, table, *ids, None, 0.3, True, 1e-6, True, False, on_triton)
    torch.library.opcheck(torch.ops.gr.sampled_softmax.default, arguments)
    losses, _, kept = torch.ops.gr.sampled_softmax(*arguments)
    saved = [x.detach() for x in (torch.ones_like(losses), losses, queries, table, *ids, kept)]
    torch.library.opcheck(torch.ops.gr.sampled_softmax_table_grad.default, (*saved, 0.3, True, 1e-6, on_triton))


@pytest.mark.parametrize("place", FAST_PLACES)
def test_is_compiled_whole(place: Place) -> None:
    data = problem((6, 4, 8, 10))
    leaves = [place.put(data[name].float()).requires_grad_() for name in ("queries", "table")]
    ids = place.put((data["positive"], data["negative"]))

    def mean_loss(queries: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return sampled_softmax_loss(queries, table, *ids, temperature=0.3, l2_norm=True, backend=place.backend).mean()

    compiled = torch.compile(mean_loss, fullgraph=True, backend="aot_eager")
    wanted, got = (torch.autograd.grad(call(*leaves), leaves) for call in (mean_loss, compiled))
    for name, grad, other in zip(NAMES[1:], wanted, got, strict=True):
        assert torch.equal(grad, other), name


@pytest.mark.parametrize("place", PLACES)
def test_bad_arguments_are_named(place: Place) -> None:
    data = problem((6, 4, 8, 10))
    q, e = (place.put(data[name].float()) for name in ("queries", "table"))
    positive, negative = place.put((data["positive"], data["negative"]))
    options = {"temperature": 1.0, "backend": place.backend}
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature: got"):
            sampled_softmax_loss(q, e, positive, negative, temperature=temperature, backend=place.backend)
    with pytest.raises(ValueError, match="shapes: got"):
        sampled_softmax_loss(q, e, positive[:5], negative, **options)
    with pytest.raises(ValueError, match="expected int64"):
        sampled_softmax_loss(q, e, positive.int(), negative, **options)
    with pytest.raises(ValueError, match="item_log_q: got"):
        sampled_softmax_loss(q, e, positive, negative, item_log_q=e[:3, 0], **options)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("bad", [10, -1, 2**40])
def test_an_id_outside_the_table_is_an_error_or_nan(bad: int, place: Place) -> None:
    data = problem((6, 4, 8, 10))
    data["negative"][3, 1] = bad
    data["positive"][5] = bad
    if place.backend == "triton":
        assert run(data, place)[0].isnan().tolist() == [False, False, False, True, False, True]
        return
    with pytest.raises(IndexError):
        run(data, place)
    data["positive"][5] = 1
    with pytest.raises(IndexError):
        run(data, place)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_second_derivative_is_refused(backend: str) -> None:
    if not any(str(place.id) == backend for place in places(cpu.refuses)):
        pytest.skip(f"no {backend} here")
    queries, table = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4)
    ids = torch.tensor([1, 2, 3]), torch.tensor([[4, 5]] * 3)
    losses = sampled_softmax_loss(queries, table, *ids, temperature=1.0, backend=backend)
    (grad,) = torch.autograd.grad(losses.sum(), queries, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(grad.square().sum(), queries)


def test_what_is_no_matrix_of_floats_is_named() -> None:
    ids = torch.tensor([1, 2, 3]), torch.tensor([[4]] * 3)
    floats = torch.ones(3, 2), torch.ones(9, 2)
    for queries, table in ((torch.ones(3, 0), torch.ones(9, 0)), (floats[0].to(torch.complex64), floats[1])):
        with pytest.raises(ValueError, match="expected floats of at least one column"):
            sampled_softmax_loss(queries, table, *ids, temperature=1.0)
    with pytest.raises(ValueError, match="shapes: got"):
        sampled_softmax_loss(*floats, ids[0], torch.tensor(4), temperature=1.0)
