"""Sampled softmax: the C++ kernels against the reference, the reference against the definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ops.sampled_softmax import cpu, sampled_softmax_loss

needs_compiler = pytest.mark.skipif(cpu.refuses() is not None, reason="no C++ compiler")
BACKENDS = ["reference", pytest.param("cpu", marks=needs_compiler)]
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


def problem(shape: tuple[int, int, int, int], seed: int = 0) -> dict[str, Any]:
    tokens, negatives, width, rows = shape
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    if rows > 3:
        # A row of zeros and one shorter than eps meet the clamp of the norm.
        table[2] = 0.0
        table[3] *= 1e-9
    return {
        "queries": torch.randn(tokens, width, generator=generator, dtype=torch.float64) / width**0.5,
        "table": table,
        "positive": torch.randint(0, rows, (tokens,), generator=generator),
        "negative": torch.randint(0, rows, (tokens, negatives), generator=generator),
        "weights": torch.randn(tokens, generator=generator, dtype=torch.float64),
    }


def run(data: dict[str, Any], backend: str, dtype: torch.dtype = torch.float64, **options: Any) -> list[torch.Tensor]:
    queries = data["queries"].to(dtype, copy=True).requires_grad_()
    table = data["table"].to(dtype, copy=True).requires_grad_()
    options = {"temperature": 0.3, **options}
    losses = sampled_softmax_loss(queries, table, data["positive"], data["negative"], backend=backend, **options)
    grads = torch.autograd.grad(losses, (queries, table), data["weights"].to(losses.dtype))
    return [losses.detach(), *grads]


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_cross_entropy_of_the_positive(backend: str) -> None:
    queries, table = torch.tensor([[1.0, 2.0]]), torch.tensor([[9.0, 9.0], [0.6, 0.8], [2.0, 0.0], [0.0, -3.0]])
    positive, negative = torch.tensor([1]), torch.tensor([[2, 1, 3]])
    plain = sampled_softmax_loss(queries, table, positive, negative, temperature=0.5, backend=backend)
    scores = [2.2 / 0.5, 2.0 / 0.5, -6.0 / 0.5]
    assert plain.item() == pytest.approx(math.log(sum(map(math.exp, scores))) - scores[0], rel=1e-5)
    normed = sampled_softmax_loss(queries, table, positive, negative, temperature=0.5, l2_norm=True, backend=backend)
    scores = [2.2 / 0.5, 1.0 / 0.5, -2.0 / 0.5]
    assert normed.item() == pytest.approx(math.log(sum(map(math.exp, scores))) - scores[0], rel=1e-5)
    log_q = torch.tensor([0.0, -1.0, -3.0, 0.5])
    corrected = sampled_softmax_loss(
        queries, table, positive, negative, temperature=0.5, item_log_q=log_q, backend=backend
    )
    scores = [2.2 / 0.5 + 1.0, 2.0 / 0.5 + 3.0, -6.0 / 0.5 - 0.5]
    assert corrected.item() == pytest.approx(math.log(sum(map(math.exp, scores))) - scores[0], rel=1e-5)


@pytest.mark.parametrize("l2_norm", [False, True])
@pytest.mark.parametrize("log_q", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@needs_compiler
def test_cpu_equals_reference_in_float64(shape: tuple[int, int, int, int], l2_norm: bool, log_q: bool) -> None:
    data = problem(shape)
    item_log_q = torch.linspace(-6, 0, shape[3], dtype=torch.float64) if log_q else None
    options = {"l2_norm": l2_norm, "item_log_q": item_log_q}
    reference, got = run(data, "reference", **options), run(data, "cpu", **options)
    for name, wanted, value in zip(NAMES, reference, got, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("l2_norm", [False, True])
@pytest.mark.parametrize("shape", [(40, 33, 64, 300), (300, 128, 50, 2000), (500, 64, 25, 3)])
@needs_compiler
def test_float32_error_is_within_twice_the_reference(shape: tuple[int, int, int, int], l2_norm: bool) -> None:
    data = problem(shape)
    exact = run(data, "reference", l2_norm=l2_norm)
    reference = run(data, "reference", torch.float32, l2_norm=l2_norm)
    got = run(data, "cpu", torch.float32, l2_norm=l2_norm)
    for name, true, plain, value in zip(NAMES, exact, reference, got, strict=True):
        # Rows of norm eps multiply their gradient by 1 / eps: compare in units of the row.
        scale = true.abs().amax(dim=-1, keepdim=True).clamp_min(1.0)
        allowed, error = (((x - true) / scale).abs().max().item() for x in (plain, value))
        assert error <= 2 * allowed + 1e-7, f"{name}: error {error}, reference {allowed}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_negatives_equal_to_the_positive_give_no_loss_and_no_gradient(backend: str) -> None:
    data = problem((6, 4, 8, 10))
    data["negative"] = data["positive"][:, None].expand(-1, 4)
    for name, value in zip(NAMES, run(data, backend, l2_norm=True), strict=True):
        assert value.abs().max() < 1e-12, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_duplicate_negatives_count_twice(backend: str) -> None:
    data = problem((5, 1, 8, 10))
    data["positive"] = torch.full((5,), 4)
    data["negative"] = torch.full((5, 1), 7)
    single = run(data, backend)[0]
    double = run({**data, "negative": data["negative"].expand(-1, 2)}, backend)[0]
    torch.testing.assert_close(double, ((single.exp() - 1) * 2 + 1).log())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("l2_norm", [False, True])
def test_gradcheck(backend: str, l2_norm: bool) -> None:
    data = problem((4, 6, 5, 3))
    inputs = (data["queries"].requires_grad_(), data["table"].requires_grad_())
    log_q = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64)
    torch.autograd.gradcheck(
        lambda q, e: sampled_softmax_loss(
            q,
            e,
            data["positive"],
            data["negative"],
            temperature=0.7,
            l2_norm=l2_norm,
            item_log_q=log_q,
            backend=backend,
        ),
        inputs,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_in_float32(backend: str, dtype: torch.dtype) -> None:
    data = problem((7, 5, 8, 12))
    data["table"][3] = 1.0
    rounded = {**data, "queries": data["queries"].to(dtype), "table": data["table"].to(dtype)}
    losses, *grads = run(rounded, backend, dtype)
    exact = run({**rounded, "queries": rounded["queries"].double(), "table": rounded["table"].double()}, "reference")
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), exact[0], rtol=1e-5, atol=1e-5)
    for grad, wanted in zip(grads, exact[1:], strict=True):
        assert grad.dtype == dtype
        torch.testing.assert_close(grad.double(), wanted, rtol=2e-2, atol=2e-2)


@needs_compiler
def test_table_gradient_does_not_depend_on_the_number_of_threads() -> None:
    data, before, results = problem((200, 32, 50, 90)), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(data, "cpu", torch.float32, l2_norm=True))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for name, first, other in zip(NAMES, results[0], result, strict=True):
            assert torch.equal(first, other), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_needs_no_gradient_and_accepts_strided_inputs(backend: str) -> None:
    data = problem((6, 4, 8, 10))
    wanted = run(data, "reference")[0]
    with torch.no_grad():
        got = sampled_softmax_loss(
            data["queries"].T.contiguous().T,
            data["table"].T.contiguous().T,
            data["positive"],
            data["negative"].T.contiguous().T,
            temperature=0.3,
            backend=backend,
        )
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_leaf_that_asks_gets_a_gradient(backend: str) -> None:
    data = problem((6, 4, 8, 10))
    wanted = run({**data, "weights": torch.ones(6, dtype=torch.float64)}, "reference")
    for index, name in ((1, "queries"), (2, "table")):
        leaf = {**data, name: data[name].clone().requires_grad_()}
        losses = sampled_softmax_loss(
            leaf["queries"], leaf["table"], data["positive"], data["negative"], temperature=0.3, backend=backend
        )
        losses.sum().backward()
        torch.testing.assert_close(leaf[name].grad, wanted[index])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_a_query_reaches_only_its_loss(backend: str) -> None:
    data = problem((6, 4, 8, 10))
    data["queries"][2, 3] = float("nan")
    assert run(data, backend)[0].isnan().tolist() == [False, False, True, False, False, False]


@needs_compiler
def test_custom_ops_are_registered_soundly() -> None:
    data = problem((4, 3, 5, 6))
    queries, table = data["queries"].requires_grad_(), data["table"].requires_grad_()
    arguments = (queries, table, data["positive"], data["negative"], None, 0.3, True, 1e-6, True)
    torch.library.opcheck(torch.ops.gr.sampled_softmax_cpu.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_arguments_are_named(backend: str) -> None:
    data = problem((6, 4, 8, 10))
    q, e, positive, negative = (data[name] for name in ("queries", "table", "positive", "negative"))
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature: got"):
            sampled_softmax_loss(q, e, positive, negative, temperature=temperature, backend=backend)
    with pytest.raises(ValueError, match="shapes: got"):
        sampled_softmax_loss(q, e, positive[:5], negative, temperature=1.0, backend=backend)
    with pytest.raises(ValueError, match="expected int64"):
        sampled_softmax_loss(q, e, positive.int(), negative, temperature=1.0, backend=backend)
    with pytest.raises(ValueError, match="item_log_q: got"):
        sampled_softmax_loss(q, e, positive, negative, temperature=1.0, item_log_q=e[:3, 0], backend=backend)
    for bad in (10, -1):
        ids = negative.clone()
        ids[3, 1] = bad
        with pytest.raises(IndexError):
            sampled_softmax_loss(q, e, positive, ids, temperature=1.0, backend=backend)
