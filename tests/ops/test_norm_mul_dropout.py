"""Norm, gate and dropout in one pass: equal to the separate steps, with the mask of `ops.dropout`."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ops.dropout import dropout
from ops.norm_mul_dropout import cpu, gpu, norm_mul_dropout, reference
from ops.norm_mul_dropout.form import ACTIVATIONS, SEGMENTS, Form
from ops.testing import Place, assert_accurate, outputs_and_gradients, places

PLACES = places(cpu.refuses)
FAST_PLACES = places(cpu.refuses, reference=False)
FORMS = list(itertools.product(SEGMENTS, ACTIVATIONS))
EPS = 1e-6


def drawn(tokens: int, width: int, seed: int = 0, center: float = 0.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "y": center + normal(tokens, width),
        "u": 2 * normal(tokens, width),
        "weight": 1 + 0.3 * normal(width),
        "bias": 0.3 * normal(width),
    }


def call(place: Place, **options: Any) -> Any:
    def run(y: Tensor, u: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return norm_mul_dropout(y, u, weight=weight, bias=bias, backend=place.backend, **options)

    return run


def separate_steps(
    y: Tensor,
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    activation: str,
    output: str,
    rate: float,
    seed: int,
) -> Tensor:
    """What the op is said to compute, one PyTorch call after the other."""
    if groups == 1:
        normed = F.layer_norm(y, y.shape[1:], weight, bias, eps=EPS)
    else:
        normed = F.group_norm(y, groups, weight, bias, eps=EPS)
    product = {"none": lambda x: x, "silu": F.silu, "sigmoid": torch.sigmoid}[activation](u) * normed
    middle = normed if output == "concat_normed" else y
    out = product if output == "product" else torch.cat([u, middle, product], dim=1)
    return dropout(out, rate, seed, torch.arange(len(y), device=y.device), backend="reference")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("output", "activation"), FORMS)
def test_equals_the_separate_steps(place: Place, output: str, activation: str, groups: int, rate: float) -> None:
    inputs = drawn(41, 51)
    options: dict[str, Any] = {"num_groups": groups, "u_activation": activation, "output": output}
    options |= {"dropout_rate": rate, "dropout_seed": -7, "eps": EPS}

    def steps(**leaves: Tensor) -> Tensor:
        return separate_steps(**leaves, groups=groups, activation=activation, output=output, rate=rate, seed=-7)

    narrow = {name: x.float() for name, x in inputs.items()}
    actual = outputs_and_gradients(call(place, **options), place.put(narrow))
    exact, plain = outputs_and_gradients(steps, inputs), outputs_and_gradients(steps, narrow)
    assert torch.equal(actual["out"].cpu() == 0, exact["out"] == 0)
    assert_accurate(actual, plain, exact)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("width", "groups"), [(3, 1), (17, 1), (64, 4), (100, 2), (300, 1)])
def test_accuracy_of_dtypes_and_widths(place: Place, width: int, groups: int, dtype: torch.dtype) -> None:
    inputs = {name: x.to(dtype) for name, x in drawn(35, width, center=3.0).items()}
    form = Form(1e-3, groups, "silu", "concat_normed", 0.2, 5)
    keys_T = torch.arange(35) * 2**33 - 4

    def plainly(compute_dtype: torch.dtype) -> Any:
        return lambda **x: reference.norm_mul_dropout(*x.values(), keys_T, form, compute_dtype)

    actual = outputs_and_gradients(call(place, **form._asdict(), keys_T=place.put(keys_T)), place.put(inputs))
    assert all(x.dtype == dtype for x in actual.values())
    plain = outputs_and_gradients(plainly(dtype), inputs)
    exact = outputs_and_gradients(plainly(torch.float64), {name: x.double() for name, x in inputs.items()})
    assert_accurate(actual, plain, exact)


@pytest.mark.parametrize("place", PLACES)
def test_one_channel_is_its_own_mean(place: Place) -> None:
    inputs = place.put({name: x.float() for name, x in drawn(35, 6).items()})
    found = outputs_and_gradients(call(place, num_groups=6), inputs)
    assert torch.equal(found["out"], inputs["u"] * inputs["bias"])
    assert not found["grad_y"].any() and not found["grad_weight"].any()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("given", [(), ("weight",), ("bias",)])
def test_weight_and_bias_are_optional(place: Place, given: tuple[str, ...]) -> None:
    inputs = {name: x for name, x in drawn(40, 24).items() if name in ("y", "u", *given)}
    exact = outputs_and_gradients(call(Place("reference"), num_groups=2), inputs)
    narrow = {name: x.float() for name, x in inputs.items()}
    plain = outputs_and_gradients(call(Place("reference"), num_groups=2), narrow)
    assert_accurate(outputs_and_gradients(call(place, num_groups=2), place.put(narrow)), plain, exact)


@pytest.mark.parametrize("place", PLACES)
def test_float32_weights_serve_bfloat16_rows(place: Place) -> None:
    inputs = drawn(40, 24)
    mixed = {name: x.to(torch.bfloat16 if name in "yu" else torch.float32) for name, x in inputs.items()}
    actual = outputs_and_gradients(call(place), place.put(mixed))
    plain = outputs_and_gradients(call(Place("reference")), mixed)
    assert all(actual[name].dtype == plain[name].dtype for name in plain)
    exact = outputs_and_gradients(call(Place("reference")), {name: x.double() for name, x in mixed.items()})
    assert_accurate(actual, plain, exact)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("output", SEGMENTS)
def test_slices_of_a_projection_are_read_where_they_lie(place: Place, output: str) -> None:
    """As in HSTU: u and y with a gap between rows, an upstream gradient with rows or columns apart."""
    generator = torch.Generator().manual_seed(3)
    wide = torch.randn(37, 70, generator=generator)
    upstream = torch.randn(SEGMENTS[output] * 20, 37, generator=generator).T

    def run(at: Place, dtype: torch.dtype) -> dict[str, Tensor]:
        leaf = at.put(wide.to(dtype)).requires_grad_()
        u, y = leaf[:, 3:23], leaf[:, 40:60]
        out = call(at, output=output, num_groups=2, dropout_rate=0.4, dropout_seed=1)(y, u)
        (grad,) = torch.autograd.grad(out, leaf, at.put(upstream.to(dtype)), retain_graph=True)
        (of_sum,) = torch.autograd.grad(out.sum(), leaf)
        return {"out": out.detach(), "grad": grad, "grad_of_sum": of_sum}

    assert_accurate(
        run(place, torch.float32),
        run(Place("reference"), torch.float32),
        run(Place("reference"), torch.float64),
    )


@pytest.mark.parametrize("rows", [gpu.rows, cpu.rows])
def test_only_columns_apart_are_copied(rows: Any) -> None:
    wide = torch.randn(4, 9)
    assert rows(wide[:, 2:5]).data_ptr() == wide[:, 2:5].data_ptr()
    assert rows(wide.T).stride() == (4, 1)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("output", SEGMENTS)
def test_a_token_does_not_depend_on_its_batch(place: Place, output: str) -> None:
    inputs = {name: place.put(x.float()) for name, x in drawn(70, 20).items()}
    keys_T = place.put(torch.arange(70) + 5)
    options: dict[str, Any] = {"output": output, "u_activation": "silu", "dropout_rate": 0.5, "dropout_seed": 2**63 + 1}

    def run(rows: slice) -> dict[str, Tensor]:
        y, u = (inputs[name][rows].clone().requires_grad_() for name in "yu")
        out = call(place, **options, keys_T=keys_T[rows])(y, u, inputs["weight"], inputs["bias"])
        grad_y, grad_u = torch.autograd.grad(out.square().sum(), (y, u))
        return {"out": out.detach(), "grad_y": grad_y, "grad_u": grad_u}

    alone, together = run(slice(40, 51)), run(slice(0, 70))
    for name, value in alone.items():
        same = together[name][40:51]
        # Where a row lies decides whether PyTorch computes it in vectors or alone, which round differently.
        tolerance = 1e-6 if place.backend == "reference" else 0.0
        torch.testing.assert_close(value, same, rtol=tolerance, atol=tolerance, msg=name)
        assert torch.equal(value == 0, same == 0), name
    unkeyed = call(place, **options)(**inputs)
    assert torch.equal(unkeyed, call(place, **options, keys_T=keys_T - 5)(**inputs))


@pytest.mark.parametrize("place", PLACES)
def test_nan_stays_in_its_token_and_under_the_mask_is_dropped(place: Place) -> None:
    inputs = {name: x.float() for name, x in drawn(9, 12).items()}
    keep = call(place, dropout_rate=0.5, dropout_seed=3)(**place.put(inputs)).cpu()
    inputs["y"][4, 7] = float("nan")
    out = call(place, dropout_rate=0.5, dropout_seed=3)(**place.put(inputs)).cpu()
    others = torch.arange(9) != 4
    assert torch.equal(out[others], keep[others])
    assert torch.equal(out[4].isnan(), keep[4] != 0)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("output", SEGMENTS)
@pytest.mark.parametrize("shape", [(0, 6), (5, 0), (0, 0)])
def test_nothing_gives_nothing(place: Place, shape: tuple[int, int], output: str) -> None:
    inputs = {name: x.float() for name, x in drawn(*shape).items()}
    found = outputs_and_gradients(call(place, output=output, num_groups=2, dropout_rate=0.5), place.put(inputs))
    assert found["out"].shape == (shape[0], SEGMENTS[output] * shape[1])
    for name, x in inputs.items():
        assert torch.equal(found[f"grad_{name}"].cpu(), torch.zeros_like(x))


@pytest.mark.parametrize("place", PLACES)
def test_off_when_not_training(place: Place) -> None:
    inputs = place.put({name: x.float() for name, x in drawn(5, 8).items()})
    plain = call(place)(**inputs)
    assert torch.equal(call(place, dropout_rate=0.5, training=False)(**inputs), plain)
    assert not torch.equal(call(place, dropout_rate=0.5)(**inputs), plain)


@pytest.mark.skipif(cpu.refuses() is not None, reason="no C++ form")
def test_threads_do_not_change_a_bit() -> None:
    inputs = {name: x.float() for name, x in drawn(1000, 33).items()}
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(outputs_and_gradients(call(Place("cpu"), output="concat_raw", dropout_rate=0.1), inputs))
    torch.set_num_threads(before)
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]) and torch.equal(value, found[2][name])


@pytest.mark.parametrize("place", PLACES)
def test_many_tokens_share_partial_sums(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """More tokens than one step of a program of backward, or one chunk of the C++ form, holds."""
    monkeypatch.setattr(gpu, "MAX_PROGRAMS", 2)
    inputs = drawn(300, 5)
    exact = outputs_and_gradients(call(Place("reference")), inputs)
    narrow = {name: x.float() for name, x in inputs.items()}
    plain = outputs_and_gradients(call(Place("reference")), narrow)
    assert_accurate(outputs_and_gradients(call(place), place.put(narrow)), plain, exact)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(("output", "activation"), FORMS)
def test_gradcheck(backend: str, output: str, activation: str) -> None:
    leaves = tuple(x.requires_grad_() for x in drawn(4, 6).values())
    run = call(Place(backend), output=output, u_activation=activation, num_groups=2, dropout_rate=0.4)
    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("place", FAST_PLACES)
@pytest.mark.parametrize("affine", [True, False])
def test_custom_op_is_registered_soundly(place: Place, affine: bool) -> None:
    leaves = [place.put(x.float()).requires_grad_() for x in drawn(4, 6).values()]
    tensors = leaves if affine else [*leaves[:2], None, None]
    scalars = (EPS, 2, "silu", "concat_normed", 0.3, 9, place.backend == "triton")
    torch.library.opcheck(torch.ops.gr.norm_mul_dropout.default, (*tensors, place.put(torch.arange(4)), *scalars))


@pytest.mark.parametrize("place", FAST_PLACES)
def test_compiles_without_graph_breaks(place: Place) -> None:
    inputs = place.put({name: x.float() for name, x in drawn(6, 8).items()})
    run = call(place, output="concat_normed", dropout_rate=0.3)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for name, value in outputs_and_gradients(run, inputs).items():
        assert torch.equal(value, outputs_and_gradients(compiled, inputs)[name])


def test_wide_groups_are_left_to_the_reference() -> None:
    y = torch.ones(1, gpu.MAX_GROUP_WIDTH + 1)
    assert "groups wider" in str(gpu.refuses(y, y, None, None, None, Form(EPS, 1, "none", "product", 0.0, 0)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"u": torch.ones(4, 5)}, "y and u: got"),
        ({"u": torch.ones(4, 6, dtype=torch.bfloat16)}, "y and u: got"),
        ({"y": torch.ones(4, 6).long(), "u": torch.ones(4, 6).long()}, "y and u: got"),
        ({"weight": torch.ones(5)}, "weight: got"),
        ({"bias": torch.ones(6).long()}, "bias: got"),
        ({"num_groups": 4}, "num_groups: got 4, expected a divisor of 6"),
        ({"num_groups": 0}, "num_groups: got 0"),
        ({"u_activation": "relu"}, "u_activation: got 'relu'"),
        ({"output": "concat"}, "output: got 'concat'"),
        ({"dropout_rate": 1.0}, "dropout_rate: got 1.0"),
        ({"keys_T": torch.arange(3)}, "keys_T: got"),
        ({"keys_T": torch.ones(4)}, "keys_T: got"),
    ],
)
def test_bad_arguments_are_named(wrong: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"y": torch.ones(4, 6), "u": torch.ones(4, 6)} | wrong
    with pytest.raises(ValueError, match=f"norm_mul_dropout {message}"):
        norm_mul_dropout(arguments.pop("y"), arguments.pop("u"), **arguments)


@pytest.mark.parametrize("place", PLACES)
def test_silu_of_a_huge_negative_value_is_nothing(place: Place) -> None:
    y, u = torch.randn(3, 8), torch.full((3, 8), -1e38)
    inputs = {"y": y, "u": u, "weight": torch.ones(8), "bias": torch.zeros(8)}
    out = call(place, output="product", u_activation="silu")(**place.put(inputs))
    assert bool((out.cpu().abs() < 1e-30).all())
