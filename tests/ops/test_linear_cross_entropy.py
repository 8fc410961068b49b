"""Full softmax: blocked against full logits, with whole rows, with tiles, and with weights that differ by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ops.linear_cross_entropy import blocked, cpu, linear_cross_entropy

BACKENDS = ["reference", "cpu"]
NAMES = ("losses", "queries.grad", "table.grad")

# T, D, V
SHAPES = [(0, 4, 5), (1, 1, 2), (17, 25, 11), (70, 50, 300), (129, 64, 90), (30, 9, 70)]


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


def problem(shape: tuple[int, int, int], equal_weights: bool = False, seed: int = 0) -> dict[str, Any]:
    tokens, width, rows = shape
    generator = torch.Generator().manual_seed(seed)
    # Not ascending, with gaps; 0 is no candidate.
    catalogue = torch.randperm(rows - 1, generator=generator)[: max(1, (rows * 3) // 4)] + 1
    weights = torch.randn(tokens, generator=generator, dtype=torch.float64)
    return {
        "queries": torch.randn(tokens, width, generator=generator, dtype=torch.float64),
        "table": torch.randn(rows, width, generator=generator, dtype=torch.float64),
        "catalogue": catalogue,
        "targets": catalogue[torch.randint(0, len(catalogue), (tokens,), generator=generator)],
        "weights": torch.full_like(weights, 0.25) if equal_weights else weights,
    }


def run(data: dict[str, Any], backend: str, dtype: torch.dtype = torch.float64, **options: Any) -> list[torch.Tensor]:
    queries = data["queries"].to(dtype, copy=True).requires_grad_()
    table = data["table"].to(dtype, copy=True).requires_grad_()
    losses = linear_cross_entropy(
        queries, table, data["catalogue"], data["targets"], temperature=0.5, backend=backend, **options
    )
    grads = torch.autograd.grad(losses, (queries, table), data["weights"].to(losses.dtype))
    return [losses.detach(), *grads]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("l2_norm", [False, True])
def test_is_cross_entropy_over_the_catalogue_alone(backend: str, l2_norm: bool) -> None:
    data = problem((9, 5, 8))
    data["catalogue"], data["targets"] = torch.tensor([1, 2, 5, 7]), torch.tensor([1, 2, 5, 7, 1, 2, 5, 7, 7])
    rows = data["table"][[1, 2, 5, 7]]
    if l2_norm:
        rows = torch.nn.functional.normalize(rows, dim=1)
    place = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 3])
    wanted = -(data["queries"] @ rows.T / 0.5).log_softmax(dim=1)[torch.arange(9), place]
    losses, _, grad_table = run(data, backend, l2_norm=l2_norm)
    torch.testing.assert_close(losses, wanted)
    assert bool((grad_table[[0, 3, 4, 6]] == 0).all())


@pytest.mark.parametrize("equal_weights", [False, True])
@pytest.mark.parametrize("l2_norm", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("layout")
def test_blocked_equals_reference_in_float64(shape: tuple[int, int, int], l2_norm: bool, equal_weights: bool) -> None:
    data = problem(shape, equal_weights)
    reference, got = run(data, "reference", l2_norm=l2_norm), run(data, "cpu", l2_norm=l2_norm)
    for name, wanted, value in zip(NAMES, reference, got, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("equal_weights", [False, True])
@pytest.mark.usefixtures("layout")
def test_float32_error_is_within_twice_the_reference(equal_weights: bool) -> None:
    data = problem((400, 50, 700), equal_weights)
    exact, plain, got = (
        run(data, backend, dtype, l2_norm=True)
        for backend, dtype in (("reference", torch.float64), ("reference", torch.float32), ("cpu", torch.float32))
    )
    for name, true, reference, value in zip(NAMES, exact, plain, got, strict=True):
        allowed, error = ((x - true).abs().max().item() for x in (reference, value))
        assert error <= 2 * allowed + 1e-7, f"{name}: error {error}, reference {allowed}"


@pytest.mark.parametrize("catalogue", ["range", "gaps"])
@pytest.mark.usefixtures("layout")
def test_gradcheck(catalogue: str) -> None:
    data = problem((5, 3, 12))
    ids = torch.arange(1, 12) if catalogue == "range" else data["catalogue"]
    inputs = (data["queries"].requires_grad_(), data["table"].requires_grad_())
    torch.autograd.gradcheck(
        lambda q, e: linear_cross_entropy(q, e, ids, data["targets"], temperature=0.7, l2_norm=True, backend="cpu"),
        inputs,
    )


@pytest.mark.usefixtures("layout")
def test_logits_of_a_thousand_neither_overflow_nor_vanish() -> None:
    data = problem((20, 8, 60))
    data["queries"] *= 500
    reference, got = run(data, "reference"), run(data, "cpu", torch.float32)
    assert reference[0].max() > 1000
    for name, wanted, value in zip(NAMES, reference, got, strict=True):
        torch.testing.assert_close(value.double(), wanted, rtol=1e-3, atol=1e-2 * float(wanted.abs().max()), msg=name)


def test_gradients_do_not_depend_on_the_number_of_threads() -> None:
    if not cpu.usable(torch.empty(0)):
        pytest.skip("no C++ compiler")
    data, before, results = problem((300, 50, 700), equal_weights=True), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(cpu.forward_whole_rows(data["queries"].float(), data["table"].float()))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for name, first, other in zip(("lse", "means", "mass"), results[0], result, strict=True):
            assert torch.equal(first, other), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_a_query_reaches_only_its_loss(backend: str) -> None:
    data = problem((6, 4, 30))
    data["queries"][2, 3] = float("nan")
    assert run(data, backend)[0].isnan().tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_gradients_the_losses_are_the_same(backend: str) -> None:
    data = problem((17, 5, 30))
    with torch.no_grad():
        losses = linear_cross_entropy(
            data["queries"], data["table"], data["catalogue"], data["targets"], temperature=0.5, backend=backend
        )
    torch.testing.assert_close(losses, run(data, backend)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_computes_in_float32(backend: str) -> None:
    data = problem((7, 8, 12))
    rounded = {**data, "queries": data["queries"].bfloat16(), "table": data["table"].bfloat16()}
    losses, *grads = run(rounded, backend, torch.bfloat16)
    exact = run({**rounded, "queries": rounded["queries"].double(), "table": rounded["table"].double()}, "reference")
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), exact[0], rtol=1e-5, atol=1e-5)
    for grad, wanted in zip(grads, exact[1:], strict=True):
        assert grad.dtype == torch.bfloat16
        torch.testing.assert_close(grad.double(), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.usefixtures("layout")
def test_custom_ops_are_registered_soundly() -> None:
    data = problem((6, 4, 9))
    queries, items = data["queries"].requires_grad_(), data["table"].requires_grad_()
    torch.library.opcheck(torch.ops.gr.linear_cross_entropy_blocked.default, (queries, items, torch.arange(6), True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_arguments_are_named(backend: str) -> None:
    queries, table, targets = torch.ones(2, 3), torch.ones(6, 3), torch.tensor([1, 2])
    catalogue = torch.tensor([1, 2, 4])
    for target in (0, 3, 6, -1):
        with pytest.raises(ValueError, match=f"got id {target}, expected one of the catalogue"):
            linear_cross_entropy(queries, table, catalogue, torch.tensor([1, target]), temperature=1.0, backend=backend)
    for temperature in (0.0, float("nan")):
        with pytest.raises(ValueError, match="temperature: got"):
            linear_cross_entropy(queries, table, catalogue, targets, temperature=temperature, backend=backend)
    with pytest.raises(ValueError, match="shapes: got"):
        linear_cross_entropy(queries, table, catalogue, targets[:1], temperature=1.0, backend=backend)
    with pytest.raises(ValueError, match="got no ids"):
        linear_cross_entropy(queries, table, catalogue[:0], targets, temperature=1.0, backend=backend)
    with pytest.raises(ValueError, match="outside the table"):
        linear_cross_entropy(queries, table, torch.tensor([1, 6]), targets, temperature=1.0, backend=backend)
