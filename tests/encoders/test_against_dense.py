"""Both encoders against an independent dense float64 implementation that loops over users, positions and heads."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.encoders.hstu import HSTU, HSTUConfig
from generative_recommenders.encoders.sasrec import SASRec, SASRecConfig
from generative_recommenders.nn.embeddings import ItemEmbedding
from tests.batches import batch

DIM, POSITIONS, ITEMS = 12, 19, 30
LENGTHS = [7, 1, 13, 2, 16]

HSTU_CASES: dict[str, dict[str, Any]] = {
    "plain": {"num_blocks": 2, "num_heads": 1, "dqk": 12, "dv": 12},
    "heads": {"num_blocks": 3, "num_heads": 3, "dqk": 5, "dv": 7},
    "concat_ua": {"num_blocks": 2, "num_heads": 2, "dqk": 4, "dv": 6, "concat_ua": True},
    "no_activation": {"num_blocks": 2, "num_heads": 2, "dqk": 6, "dv": 6, "linear_activation": "none"},
    "no_bias": {"num_blocks": 2, "num_heads": 2, "dqk": 6, "dv": 6, "enable_relative_attention_bias": False},
    "per_key": {"num_blocks": 2, "num_heads": 2, "dqk": 6, "dv": 6, "attention_divisor": "keys"},
    "softmax": {"num_blocks": 2, "num_heads": 2, "dqk": 6, "dv": 6, "normalization": "softmax_rel_bias"},
    "softmax_no_bias": {
        "num_blocks": 1,
        "num_heads": 2,
        "dqk": 6,
        "dv": 6,
        "normalization": "softmax_rel_bias",
        "enable_relative_attention_bias": False,
    },
}
SASREC_CASES: dict[str, dict[str, Any]] = {
    "relu": {"num_blocks": 2, "num_heads": 1, "ffn_hidden_dim": 10, "ffn_dropout_rate": 0.0},
    "gelu": {
        "num_blocks": 3,
        "num_heads": 3,
        "ffn_hidden_dim": 20,
        "ffn_activation_fn": "gelu",
        "ffn_dropout_rate": 0.0,
    },
}


def norm(x: Tensor, eps: float) -> Tensor:
    centered = x - x.mean()
    return centered / torch.sqrt((centered**2).mean() + eps)


def bucket(elapsed: int) -> int:
    return min(128, int(math.log(max(abs(elapsed), 1)) / 0.301))


def dense_hstu(model: HSTU, table: Tensor, data: SequenceBatch) -> Tensor:
    config = model.config
    rows = []
    for b in range(data.size):
        first, last = int(data.offsets[b]), int(data.offsets[b + 1])
        ids = data.item_ids_T[first:last].tolist()
        times, nexts = data.timestamps_T[first:last].tolist(), data.next_timestamps_T[first:last].tolist()
        x = [table[i] * DIM**0.5 + model.input.position_embedding[p] for p, i in enumerate(ids)]
        for layer in model.layers:
            x = dense_hstu_layer(layer, config, x, times, nexts)
        rows.extend(x)
    return torch.stack(rows)


def dense_hstu_layer(layer: Any, c: HSTUConfig, x: list[Tensor], times: list[int], nexts: list[int]) -> list[Tensor]:
    h, wide, keyed = c.num_heads, c.num_heads * c.dv, c.num_heads * c.dqk
    parts = []
    for token in x:
        z = norm(token, 1e-6) @ layer.uvqk
        z = z * torch.sigmoid(z) if c.linear_activation == "silu" else z
        parts.append((z[:wide], z[wide : 2 * wide], z[2 * wide : 2 * wide + keyed], z[2 * wide + keyed :]))
    out = []
    for i in range(len(x)):

        def bias(j: int, i: int = i) -> Tensor:
            if layer.bias is None:
                return torch.zeros((), dtype=torch.float64)
            elapsed = bucket(nexts[i] - times[j])
            return layer.bias.position_weights[POSITIONS - 1 + j - i] + layer.bias.time_weights[elapsed]

        u, q = parts[i][0], parts[i][2]
        if c.normalization == "softmax_rel_bias":
            logits = torch.stack([(q @ parts[j][3] + bias(j)) / c.dqk**0.5 for j in range(i + 1)])
            y = sum(w * parts[j][1] for j, w in enumerate(torch.softmax(logits, 0)))
        else:
            heads = []
            divisor = POSITIONS if c.attention_divisor == "max_length" else i + 1
            for k in range(h):
                keys, values = slice(k * c.dqk, (k + 1) * c.dqk), slice(k * c.dv, (k + 1) * c.dv)
                total = torch.zeros(c.dv, dtype=torch.float64)
                for j in range(i + 1):
                    s = q[keys] @ parts[j][3][keys] + bias(j)
                    total = total + s * torch.sigmoid(s) / divisor * parts[j][1][values]
                heads.append(total)
            y = torch.cat(heads)
        y = norm(y, 1e-6)
        gated = torch.cat([u, y, u * y]) if c.concat_ua else u * y
        out.append(x[i] + layer.output.weight @ gated + layer.output.bias)
    return out


def dense_sasrec(model: SASRec, table: Tensor, data: SequenceBatch) -> Tensor:
    rows = []
    for b in range(data.size):
        first, last = int(data.offsets[b]), int(data.offsets[b + 1])
        ids = data.item_ids_T[first:last].tolist()
        x = [table[i] * DIM**0.5 + model.input.position_embedding[p] for p, i in enumerate(ids)]
        for layer in model.layers:
            heads, width = layer.config.num_heads, DIM // layer.config.num_heads
            queries = [norm(t, 1e-8) for t in x]
            w, bias = layer.in_proj.weight, layer.in_proj.bias
            q = [w[:DIM] @ t + bias[:DIM] for t in queries]
            k = [w[DIM : 2 * DIM] @ t + bias[DIM : 2 * DIM] for t in x]
            v = [w[2 * DIM :] @ t + bias[2 * DIM :] for t in x]
            out = []
            for i in range(len(x)):
                attended = []
                for head in range(heads):
                    part = slice(head * width, (head + 1) * width)
                    logits = torch.stack([q[i][part] @ k[j][part] / width**0.5 for j in range(i + 1)])
                    attended.append(sum(p * v[j][part] for j, p in enumerate(torch.softmax(logits, 0))))
                a = layer.out_proj.weight @ torch.cat(attended) + layer.out_proj.bias
                z = norm(queries[i] + a, 1e-8)
                hidden = layer.ffn_in.weight @ z + layer.ffn_in.bias
                if layer.config.ffn_activation_fn == "relu":
                    hidden = hidden.clamp(min=0)
                else:
                    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
                out.append(z + layer.ffn_out.weight @ hidden + layer.ffn_out.bias)
            x = out
        rows.extend(x)
    return torch.stack(rows)


def build(name: str) -> tuple[HSTU | SASRec, ItemEmbedding]:
    torch.manual_seed(3)
    kind, case = name.split(":")
    config: HSTUConfig | SASRecConfig
    config = HSTUConfig(**HSTU_CASES[case]) if kind == "hstu" else SASRecConfig(**SASREC_CASES[case])
    model = config.build(DIM, POSITIONS, 0.0, False)
    items = ItemEmbedding(ITEMS, DIM)
    with torch.no_grad():
        # The published initial values are so small that a wrong bias would hardly show.
        for parameter in [*model.parameters(), *items.parameters()]:
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model, items


NAMES = [f"hstu:{name}" for name in HSTU_CASES] + [f"sasrec:{name}" for name in SASREC_CASES]


@pytest.mark.parametrize("name", NAMES)
def test_states_and_gradients(name: str) -> None:
    model, items = build(name)
    data = batch(LENGTHS, ITEMS, seed=1)
    probe = torch.randn(sum(LENGTHS), DIM, generator=torch.Generator().manual_seed(0))
    states = model(model.input(data, items, None), data)
    (states * probe).sum().backward()
    ours = {n: p.grad.double() for n, p in [*model.named_parameters(), ("table", items.table)]}
    model.double()
    table = items.table.detach().double().requires_grad_()
    dense = dense_hstu if isinstance(model, HSTU) else dense_sasrec
    model.zero_grad()
    expected = dense(model, table, data)  # type: ignore[arg-type]
    (expected * probe.double()).sum().backward()
    scale = expected.abs().max().item()
    torch.testing.assert_close(states.double(), expected, atol=1e-5 * max(1.0, scale), rtol=0)
    for parameter, gradient in [*((n, p.grad) for n, p in model.named_parameters()), ("table", table.grad)]:
        assert gradient is not None
        size = max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(
            ours[parameter], gradient, atol=1e-4 * size, rtol=0, msg=lambda m, n=parameter: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", NAMES)
def test_last_states_are_the_last_rows_of_all_states(name: str) -> None:
    model, items = build(name)
    model.eval()
    data = batch(LENGTHS, ITEMS, seed=2)
    with torch.no_grad():
        x = model.input(data, items, None)
        torch.testing.assert_close(
            model.last_states(x, data), model(x, data)[data.offsets[1:] - 1], atol=1e-5, rtol=1e-5
        )


def test_half_precision_is_near_whatever_attention_is_divided_by() -> None:
    for name in ("hstu:heads", "hstu:per_key"):
        model, items = build(name)
        data = batch(LENGTHS, ITEMS, seed=3)
        whole = model(model.input(data, items, None), data)
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            half = model(model.input(data, items, None), data)
            last = model.eval().last_states(model.input(data, items, None), data)
        torch.testing.assert_close(half.float(), whole, atol=0.05 * float(whole.detach().abs().max()), rtol=0)
        torch.testing.assert_close(last.float(), half[data.offsets[1:] - 1].float(), atol=0.1, rtol=0.05)
