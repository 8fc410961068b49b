"""hstu_attention: the reference against a scalar restatement of the contract, the C++ kernel against the reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import ops
from ops.hstu_attention import hstu_attention, hstu_attention_cached, time_bucket
from ops.hstu_attention.arguments import Settings
from ops.hstu_attention.buckets import time_bucket_thresholds
from ops.testing import Place
from tests.ops.hstu_cases import BUCKETS, KERNELS, NAMES, PLACES, make_case, needs_compiler, run

settings.register_profile(
    "hstu", max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("hstu")


def mixed32(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


def is_dropped(seed: int, key: int, lane: int, rate: float) -> bool:
    seed, key = seed % 2**64, key % 2**64
    token = mixed32(mixed32(key % 2**32 ^ seed % 2**32) ^ key >> 32 ^ (seed >> 32) * 0x9E3779B9 % 2**32)
    return mixed32((token + lane * 0x9E3779B9) % 2**32) < math.floor(rate * 2**32)


def sees(i: int, j: int, length: int, targets: int | None, window: int, context: int, full: int) -> bool:
    """The mask of one pair, spelled out by the role of each position."""
    last_id = length - max(context - 1, 0) - (targets or 0)

    def identity(p: int) -> int:
        own = p if context == 0 else max(p - context + 1, 0)
        return own if targets is None else min(own, last_id)

    a, b = identity(i), identity(j)
    if context > 0 and a == 0 and b < last_id:
        return True
    if not (i == j or b < a):
        return False
    return window == 0 or a - b <= window or (full > 0 and a >= last_id - full)


def scalar_attention(inputs: list[Tensor], kwargs: dict[str, Any]) -> Tensor:
    """One (row, head, query) at a time, with a Python loop over the keys; differentiable."""
    q, k, v, offsets = inputs
    n, heads = kwargs["max_seq_len"], q.shape[1]
    position, time = kwargs.get("position_weights"), kwargs.get("time_weights")
    rate, keys = kwargs.get("dropout_rate", 0.0), kwargs.get("row_keys")
    rows = []
    for b, (start, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        targets = None if kwargs.get("num_targets") is None else int(kwargs["num_targets"][b])
        scale = kwargs.get("scale")
        factor = 1 / n if scale is None else (scale[b] if isinstance(scale, Tensor) else scale)
        options = [kwargs.get(x, 0) for x in ("max_attn_len", "contextual_seq_len", "min_full_attn_seq_len")]
        for i in range(end - start):
            for h in range(heads):
                total = torch.zeros(v.shape[2], dtype=q.dtype)
                for j in range(end - start):
                    if not sees(i, j, end - start, targets, *options):
                        continue
                    score = kwargs.get("alpha", 1.0) * (q[start + i, h] * k[start + j, h]).sum()
                    if position is not None:
                        score = score + (position[h] if position.dim() == 2 else position)[n - 1 + j - i]
                    if time is not None:
                        gap = abs(int(kwargs["query_times"][start + i]) - int(kwargs["key_times"][start + j]))
                        bucket = min(math.trunc(math.log(max(gap, 1)) / 0.301), BUCKETS)
                        score = score + (time[h] if time.dim() == 2 else time)[bucket]
                    weight = score * torch.sigmoid(score) * factor
                    if rate > 0.0:
                        key = start + i if keys is None else int(keys[start + i])
                        dropped = is_dropped(kwargs.get("dropout_seed", 0), key, h * n + j, rate)
                        weight = weight * (0.0 if dropped else 1 / (1 - rate))
                    total = total + weight * v[start + j, h]
                rows.append(total)
    return torch.stack(rows).view(-1, heads, v.shape[2]) if rows else q.new_zeros(0, heads, v.shape[2])


@st.composite
def mask_options(draw: st.DrawFn, lengths: list[int]) -> dict[str, Any]:
    options: dict[str, Any] = {
        "max_attn_len": draw(st.sampled_from([0, 1, 3, 7, 40])),
        "contextual_seq_len": draw(st.sampled_from([0, 1, 2, 5])),
        "min_full_attn_seq_len": draw(st.sampled_from([0, 1, 4])),
    }
    if draw(st.booleans()):
        options["num_targets"] = torch.tensor([draw(st.integers(0, max(n // 2, 1))) for n in lengths])
    return options


@st.composite
def small_cases(draw: st.DrawFn) -> tuple[list[Tensor], dict[str, Any], Tensor]:
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=3))
    options = draw(mask_options(lengths))
    options["scale"] = draw(st.sampled_from([None, 0.25, torch.arange(1.0, len(lengths) + 1, dtype=torch.float64)]))
    if draw(st.booleans()):
        options |= {"dropout_rate": 0.4, "dropout_seed": draw(st.integers(-(2**63), 2**64 - 1))}
        options["row_keys"] = draw(st.sampled_from([None, torch.arange(sum(lengths)) * 2**33 - 5]))
    table = st.sampled_from([None, "shared", "per_head"])
    extra = draw(st.integers(0, 4))
    return make_case(
        *(lengths, draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 4])), draw(st.sampled_from([2, 3]))),
        n=max([*lengths, 1]) + extra,
        position=draw(table),
        time=draw(table),
        alpha=0.7,
        **options,
    )


@given(small_cases())
@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_compiler)])
def test_equals_scalar_loops(backend: str, case: tuple[list[Tensor], dict[str, Any], Tensor]) -> None:
    inputs, kwargs, grad = case
    actual = run(inputs, kwargs, grad, backend)
    leaves = {name: x.clone().requires_grad_() for name, x in zip("qkv", inputs[:3], strict=True)}
    leaves |= {name: kwargs[name].clone().requires_grad_() for name in NAMES[4:] if name in kwargs}
    tables = {name: x for name, x in leaves.items() if name in kwargs}
    out = scalar_attention([leaves["q"], leaves["k"], leaves["v"], inputs[3]], {**kwargs, **tables})
    torch.testing.assert_close(actual["out"], out, rtol=1e-10, atol=1e-12)
    if out.requires_grad:
        grads = torch.autograd.grad(out, tuple(leaves.values()), grad, allow_unused=True)
        for (name, leaf), expected in zip(leaves.items(), grads, strict=True):
            wanted = torch.zeros_like(leaf) if expected is None else expected
            torch.testing.assert_close(actual[name], wanted, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


# Longer than a tile of the C++ kernel.
LONG = {
    "mixed": [7, 0, 113, 1, 48, 97],
    "one row": [131],
    "all equal": [49, 49, 49],
    "one long": [3, 401, 0, 2],
    "empty": [0, 0],
    "ends empty": [0, 6, 0],
}


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dims", [(1, 50, 50), (2, 25, 25), (4, 16, 8), (2, 8, 17)], ids=str)
@pytest.mark.parametrize("lengths", LONG.values(), ids=LONG)
def test_cpu_equals_reference(lengths: list[int], dims: tuple[int, int, int], dtype: torch.dtype) -> None:
    inputs, kwargs, grad = make_case(lengths, *dims, dtype=dtype, alpha=0.4)
    exact = run(inputs, kwargs, grad, "reference", torch.float64)
    plain = run(inputs, kwargs, grad, "reference")
    for name, actual in run(inputs, kwargs, grad, "cpu").items():
        assert actual.dtype == dtype
        if actual.numel() == 0:
            continue
        size = exact[name].abs().max().clamp(min=1e-30)
        error, allowed = ((x[name].double() - exact[name]).abs().max() / size for x in ({name: actual}, plain))
        floor = 1e-7 if dtype == torch.float32 else 1e-14
        assert error <= 2 * allowed + floor, f"{name}: error {error:.2e}, reference {allowed:.2e}"


@needs_compiler
@given(st.data())
def test_cpu_masks_across_tiles(data: st.DataObject) -> None:
    lengths = data.draw(st.sampled_from([[130, 0, 61], [205, 97, 5], [300]]))
    options = data.draw(mask_options(lengths))
    options["max_attn_len"] = data.draw(st.sampled_from([0, 1, 30, 120]))
    options["contextual_seq_len"] = data.draw(st.sampled_from([0, 1, 4, 60]))
    inputs, kwargs, grad = make_case(lengths, 2, 4, 3, **options)
    expected = run(inputs, kwargs, grad, "reference")
    for name, actual in run(inputs, kwargs, grad, "cpu").items():
        torch.testing.assert_close(actual, expected[name], rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@needs_compiler
@pytest.mark.parametrize("position", [None, "shared", "per_head"])
@pytest.mark.parametrize("time", [None, "shared", "per_head"])
def test_cpu_bias_tables(position: str | None, time: str | None) -> None:
    scale = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    inputs, kwargs, grad = make_case([60, 3, 110], 2, 8, 8, n=128, position=position, time=time, scale=scale)
    expected, actual = run(inputs, kwargs, grad, "reference"), run(inputs, kwargs, grad, "cpu")
    assert expected.keys() == actual.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-9, atol=1e-10)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("time_range", [3, 2**24, 2**30, 2**31, 2**40, 2**62])
def test_cpu_time_ranges(time_range: int, dtype: torch.dtype) -> None:
    inputs, kwargs, grad = make_case([90, 4, 33], 1, 8, 8, dtype=dtype, position=None, time_range=time_range)
    # The table alone decides the output: a wrong bucket is an error of order one.
    inputs[0].zero_()
    expected, actual = run(inputs, kwargs, grad, "reference"), run(inputs, kwargs, grad, "cpu")
    for name in ("out", "v", "time_weights"):
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shift", [0, 2**33])
def test_buckets_at_every_threshold(place: Place, shift: int) -> None:
    """A row of keys just below, at and above each threshold; value one-hot by key, so that weights are read off."""
    edges = torch.cat([time_bucket_thresholds(BUCKETS) + d for d in (-2, -1, 0, 1, 2)])
    gaps = edges[edges < 2**31 - 2] if shift == 0 else edges
    n = gaps.shape[0] + 1
    # Only the last query matters; the key before the others widens the range past 32 bits.
    times = torch.cat([-gaps, torch.zeros(1, dtype=torch.int64)])
    times[0] -= shift
    weights = torch.arange(1.0, BUCKETS + 2)
    zeros = torch.zeros(n, 1, 1)
    now = torch.zeros(1, dtype=torch.int64)
    z = weights[time_bucket(-times, BUCKETS)]
    for values in torch.eye(n).split(256, dim=1):
        arguments = (zeros[-1:], torch.tensor([0, 1]), zeros, values[:, None], torch.tensor([0, n]))
        options = {"time_weights": weights, "query_times": now, "cache_times": times}
        out = hstu_attention_cached(
            *place.put(arguments), **place.put(options), max_seq_len=n, scale=1.0, backend=place.backend
        )
        wanted = values.T @ (z * torch.sigmoid(z))
        torch.testing.assert_close(out[0, 0].cpu(), wanted)


@needs_compiler
def test_dropout_is_the_same_on_every_backend() -> None:
    inputs, kwargs, grad = make_case([40, 0, 130], 2, 8, 8, dropout_rate=0.3, dropout_seed=2**63 + 11)
    kwargs["row_keys"] = torch.arange(170) * -(2**34) + 3
    expected, actual = run(inputs, kwargs, grad, "reference"), run(inputs, kwargs, grad, "cpu")
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-9, atol=1e-10)
    other = run(inputs, {**kwargs, "dropout_seed": 12}, grad, "cpu")
    assert not torch.allclose(other["out"], actual["out"])


def test_dropout_keeps_the_mean() -> None:
    ones = torch.ones(400, 1, 1)
    offsets = torch.tensor([0, 400])
    out = hstu_attention(ones, ones, ones, offsets, max_seq_len=400, scale=1.0, dropout_rate=0.25, dropout_seed=5)
    full = hstu_attention(ones, ones, ones, offsets, max_seq_len=400, scale=1.0)
    # 80,200 Bernoulli draws: the ratio of sums has a deviation of about 0.002.
    assert abs(out.sum() / full.sum() - 1.0) < 0.01


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_rounds_once(dtype: torch.dtype) -> None:
    inputs, kwargs, grad = make_case([30, 75], 2, 16, 16, dtype=dtype)
    kwargs = {name: x.float() if name in NAMES[4:] else x for name, x in kwargs.items()}
    expected, actual = run(inputs, kwargs, grad, "reference"), run(inputs, kwargs, grad, "cpu")
    for name in expected:
        assert actual[name].dtype == (torch.float32 if name in NAMES[4:] else dtype)
        torch.testing.assert_close(actual[name], expected[name])


@needs_compiler
@pytest.mark.parametrize("dropout_rate", [0.0, 0.5])
def test_gradcheck_cpu(dropout_rate: float) -> None:
    targets = torch.tensor([1, 0, 2])
    inputs, kwargs, _ = make_case([3, 0, 5], 2, 3, 2, time_range=40, dropout_rate=dropout_rate, num_targets=targets)
    # Few enough buckets for the last one to collect what lies past it.
    kwargs["time_weights"] = kwargs["time_weights"][:9].clone()
    tables = [kwargs.pop(name) for name in NAMES[4:]]
    leaves = [x.requires_grad_() for x in (*inputs[:3], *tables)]

    def attention(q: Tensor, k: Tensor, v: Tensor, position: Tensor, time: Tensor) -> Tensor:
        return hstu_attention(
            *(q, k, v, inputs[3]), **kwargs, position_weights=position, time_weights=time, backend="cpu"
        )

    assert torch.autograd.gradcheck(attention, leaves)


@pytest.mark.parametrize("place", KERNELS)
def test_operators_are_registered_soundly(place: Place) -> None:
    dtype = torch.float32
    inputs, kwargs, _ = make_case([3, 0, 5], 1, 4, 4, dtype=dtype, num_targets=torch.tensor([1, 0, 2]))
    q, k, v, offsets = place.put(inputs)
    tables = [place.put(kwargs[name]) for name in NAMES[4:]]
    times = [place.put(kwargs[name]) for name in ("query_times", "key_times", "num_targets")]
    leaves = [x.requires_grad_() for x in (q, k, v, *tables)]
    settings = Settings(max_seq_len=5, scale=0.2).packed()
    triton = place.backend == "triton"
    torch.library.opcheck(
        torch.ops.gr.hstu_attention.default, (*leaves, offsets, *times, None, None, *settings, triton)
    )
    settings = Settings(max_seq_len=5, scale=0.2, max_queries=5).packed()
    with torch.no_grad():
        plain = [x.detach() for x in leaves]
        cached = (*plain[:3], None, None, *plain[3:], offsets, offsets, None, times[0], times[1], None, times[2], None)
        torch.library.opcheck(torch.ops.gr.hstu_attention_cached.default, (*cached, *settings, triton))


@needs_compiler
def test_permuting_rows_permutes_outputs() -> None:
    lengths = [17, 0, 101, 5]
    inputs, kwargs, grad = make_case(lengths, 2, 8, 8, dtype=torch.float32, row_keys=torch.arange(123))
    kwargs["dropout_rate"] = 0.1
    expected = run(inputs, kwargs, grad, "cpu")
    order = [2, 3, 0, 1]
    take = torch.cat([torch.arange(inputs[3][b], inputs[3][b + 1]) for b in order])
    moved = [*(x[take] for x in inputs[:3]), torch.tensor([0, *(lengths[b] for b in order)]).cumsum(0)]
    per_token = {name: kwargs[name][take] for name in ("query_times", "key_times", "row_keys")}
    actual = run(moved, {**kwargs, **per_token}, grad[take], "cpu")
    for name in ("out", "q", "k", "v"):
        assert torch.equal(actual[name], expected[name][take]), name


@needs_compiler
def test_outputs_are_fully_written(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        result = real(*args, **kwargs)
        return result.fill_(math.nan) if result.is_floating_point() else result

    inputs, kwargs, grad = make_case([5, 0, 130], 2, 7, 9, dtype=torch.float32, num_targets=torch.tensor([0, 0, 90]))
    monkeypatch.setattr(torch, "empty", poisoned)
    for name, value in run(inputs, kwargs, grad, "cpu").items():
        assert value.isfinite().all(), name


@needs_compiler
def test_same_bits_for_any_thread_count() -> None:
    inputs, kwargs, grad = make_case([50, 120, 3, 77, 200], 2, 8, 8, dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append(run(inputs, kwargs, grad, "cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, value in other.items():
            assert torch.equal(value, results[0][name]), name


@needs_compiler
def test_strided_slices_of_one_projection() -> None:
    inputs, kwargs, grad = make_case([20, 33], 2, 6, 6)
    together = torch.cat([x.flatten(1) for x in inputs[:3]], dim=1)
    slices = [together[:, 12 * i : 12 * i + 12].view(-1, 2, 6) for i in range(3)]
    assert not slices[0].is_contiguous()
    spread = torch.stack([grad, grad], dim=1)[:, 0]
    expected, actual = run(inputs, kwargs, grad, "cpu"), run([*slices, inputs[3]], kwargs, spread, "cpu")
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name
    transposed = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs[:3]]
    assert torch.equal(run([*transposed, inputs[3]], kwargs, grad, "cpu")["q"], expected["q"])


@needs_compiler
def test_nan_and_infinity_stay_visible() -> None:
    inputs, kwargs, _ = make_case([20], 1, 4, 4, dtype=torch.float32)
    inputs[0][7, 0, 0] = math.nan
    out = hstu_attention(*inputs, **kwargs, backend="cpu")
    assert out[7].isnan().all()
    assert out[:7].isfinite().all()
    assert out[8:].isfinite().all()
    inputs[0][7, 0, 0], inputs[1][9] = 0.0, math.inf
    out = hstu_attention(*inputs, **kwargs, backend="cpu")
    assert out[:9].isfinite().all()
    assert not out[9].isfinite().all()


@needs_compiler
def test_large_scores_saturate() -> None:
    scores = torch.tensor([-1e30, -200.0, -88.0, -20.0, 0.0, 20.0, 88.0, 200.0, 1e30])
    n = scores.shape[0]
    out = hstu_attention_cached(
        torch.ones(1, 1, 1),
        torch.tensor([0, 1]),
        scores[:, None, None],
        torch.eye(n)[:, None],
        torch.tensor([0, n]),
        max_seq_len=n,
        scale=1.0,
        backend="cpu",
    )
    torch.testing.assert_close(out[0, 0, 1:], scores[1:] * torch.sigmoid(scores[1:]), rtol=1e-6, atol=1e-30)
    assert abs(out[0, 0, 0]) < 1e-6


@needs_compiler
def test_compiles_to_one_graph() -> None:
    inputs, kwargs, grad = make_case([6, 11], 1, 4, 4, dtype=torch.float32)

    def loss(q: Tensor, position_weights: Tensor) -> Tensor:
        out = hstu_attention(q, *inputs[1:], **{**kwargs, "position_weights": position_weights})
        return (out * grad).sum()

    leaves = [inputs[0].requires_grad_(), kwargs["position_weights"].requires_grad_()]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    actual = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@needs_compiler
def test_exports_with_rows_and_tokens_that_vary() -> None:
    class Attention(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, times: Tensor) -> Tensor:
            tables = {"position_weights": torch.ones(39), "time_weights": torch.ones(BUCKETS + 1)}
            both = {"query_times": times, "key_times": times}
            return hstu_attention(q, k, v, offsets, max_seq_len=20, **tables, **both)

    def inputs(lengths: list[int]) -> tuple[Tensor, ...]:
        (q, k, v, offsets), kwargs, _ = make_case(lengths, 2, 4, 4, dtype=torch.float32, position=None)
        return q, k, v, offsets, kwargs["key_times"]

    tokens, rows = torch.export.Dim("tokens", min=2), torch.export.Dim("rows", min=2)
    shapes = tuple({0: rows if name == "offsets" else tokens} for name in ("q", "k", "v", "offsets", "times"))
    program = torch.export.export(Attention(), inputs([5, 7]), dynamic_shapes=shapes)
    other = inputs([3, 0, 20, 4])
    torch.testing.assert_close(program.module()(*other), Attention()(*other))


def test_thresholds_are_exact_and_cached() -> None:
    thresholds = time_bucket_thresholds(BUCKETS)
    assert thresholds is time_bucket_thresholds(BUCKETS)
    assert thresholds.dtype == torch.int64
    assert thresholds.shape == (BUCKETS,)
    # float64 holds exp(0.301 b) to one part in 2^50, so that its ceiling is certain while it is small.
    for b in range(1, 80):
        assert int(thresholds[b - 1]) == math.ceil(math.exp(0.301 * b))
    assert (time_bucket_thresholds(400)[150:] == 2**63 - 1).all()


def test_buckets_equal_the_published_formula_but_at_thresholds() -> None:
    g = torch.Generator().manual_seed(1)
    gaps = torch.cat([torch.arange(2**22), torch.randint(2**22, 2**31, (10**6,), generator=g)])
    logarithm = (torch.log(gaps.clamp(min=1).to(torch.float32)) / 0.301).to(torch.int64).clamp(0, BUCKETS)
    different = gaps[time_bucket(gaps, BUCKETS) != logarithm]
    # The float32 logarithm of a gap up to 2^31 is off by about 2e-6: it errs that close to a threshold, not elsewhere.
    thresholds = time_bucket_thresholds(BUCKETS)
    nearest = (different[:, None] - thresholds).abs().amin(dim=1)
    assert (nearest <= (3e-6 * different).ceil()).all()
    assert different[different < 2**22].tolist() == [417901, 1030959, 1882290, 2543367, 2543368, 3436623]
    assert torch.equal(time_bucket(-gaps[:1000], BUCKETS), time_bucket(gaps[:1000], BUCKETS))


def bad_arguments() -> dict[str, tuple[dict[str, Any], str]]:
    return {
        "long row": ({"max_seq_len": 4, "position_weights": None}, "max_seq_len"),
        "offsets short": ({"offsets": torch.tensor([0, 5])}, "offsets"),
        "offsets int32": ({"offsets": torch.tensor([0, 5, 8], dtype=torch.int32)}, "offsets"),
        "table length": ({"position_weights": torch.zeros(10)}, "position_weights"),
        "table heads": ({"time_weights": torch.zeros(3, 129)}, "time_weights"),
        "no times": ({"key_times": None}, "time_weights"),
        "times int32": ({"key_times": torch.zeros(8, dtype=torch.int32)}, "key_times"),
        "rate": ({"dropout_rate": 1.0}, "dropout_rate"),
        "scale": ({"scale": torch.ones(3)}, "scale"),
        "targets": ({"num_targets": torch.ones(3, dtype=torch.int64)}, "num_targets"),
        "window": ({"max_attn_len": -1}, "max_attn_len"),
        "backend": ({"backend": "cuda"}, "backend"),
    }


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_compiler)])
@pytest.mark.parametrize("name", bad_arguments())
def test_bad_arguments_are_named(name: str, backend: str) -> None:
    inputs, kwargs, _ = make_case([5, 3])
    changes, word = bad_arguments()[name]
    arguments = {"offsets": inputs[3], "backend": backend, **kwargs, **changes}
    with pytest.raises(ValueError, match=word) as caught:
        hstu_attention(*inputs[:3], **arguments)
    assert "\n" not in str(caught.value)
    assert "got" in str(caught.value)


@needs_compiler
def test_auto_takes_the_kernel() -> None:
    inputs, kwargs, _ = make_case([12, 30])
    expected = hstu_attention(*inputs, **kwargs, backend="reference")
    chosen, forced = hstu_attention(*inputs, **kwargs), hstu_attention(*inputs, **kwargs, backend="cpu")
    assert torch.equal(chosen, forced)
    torch.testing.assert_close(chosen, expected)
    assert any(line.split()[:2] == ["hstu_attention", "cpu"] for line in ops.explain().splitlines())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("lengths", [[2], [0, 2, 20, 4, 1]])
def test_rows_shorter_than_their_context_see_themselves(lengths: list[int], place: Place) -> None:
    inputs, kwargs, _ = make_case(lengths, n=24, dtype=torch.float32)
    options = kwargs | {"contextual_seq_len": 4}
    wanted = hstu_attention(*inputs, **options, backend="reference")
    got = hstu_attention(*place.put(inputs), **place.put(options), backend=place.backend)
    torch.testing.assert_close(got.cpu(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_arguments_that_would_be_misread_are_refused(backend: str) -> None:
    x, offsets = torch.ones(5, 2, 4), torch.tensor([0, 5])
    for wrong in ([1, 5], [0, 6], [0, 7, 5]):
        with pytest.raises(ValueError, match="offsets: got"):
            hstu_attention(x, x, x, torch.tensor(wrong), max_seq_len=8, backend=backend)
    for shape in ((5, 0, 4), (5, 2, 0)):
        with pytest.raises(ValueError, match="heads and dims"):
            hstu_attention(*[torch.ones(shape)] * 3, offsets, max_seq_len=8, backend=backend)
    with pytest.raises(ValueError, match="alpha: got Tensor"):
        hstu_attention(x, x, x, offsets, max_seq_len=8, alpha=torch.tensor(1.0), backend=backend)
    with pytest.raises(ValueError, match="max_queries: got 0"):
        hstu_attention_cached(x, offsets, x, x, offsets, max_seq_len=8, max_queries=0, backend=backend)


@needs_compiler
def test_silu_of_a_huge_negative_score_is_nothing() -> None:
    x, weights = torch.ones(3, 1, 4), torch.tensor([0.0, 0.0, -1e38, 0.0, 0.0])
    options = {"max_seq_len": 3, "position_weights": weights}
    wanted, got = (hstu_attention(x, x, x, torch.tensor([0, 3]), **options, backend=b) for b in ("reference", "cpu"))
    torch.testing.assert_close(got, wanted)


def test_thresholds_made_by_a_tracer_do_not_stay() -> None:
    with FakeTensorMode():
        time_bucket_thresholds(11)
    assert time_bucket_thresholds(11)[0] == 2
