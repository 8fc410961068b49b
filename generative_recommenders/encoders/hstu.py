"""HSTU encoder: Actions Speak Louder than Words (arXiv 2402.17152), section 3, as in the public experiments.

A layer, on jagged tokens x_TD with h heads:

    U, V, Q, K = split(SiLU(LN(x) W_uvqk))
    Y = (SiLU(Q K^T + rab) / n, causal) V            n = max_sequence_length + gr_output_length + 1, a constant
    out = x + Dropout(U * LN(Y)) W_o + b_o           with concat_ua: [U, LN(Y), U * LN(Y)] W_o

    rab[i, j] = pos_w[n - 1 + j - i] + ts_w[bucket(t_{i+1} - t_j)]
    bucket(d) = clamp(trunc(ln(max(|d|, 1)) / 0.301), 0, 128)

The bias of row i uses the time of the next event: the time at which the prediction is asked for.

Deliberate differences from the published code:
- rows are jagged and no N x N bias or score tensor exists; the result is the same, the row after the last is not
  computed;
- `enable_relative_attention_bias=False` runs (published: an assertion), and `attn_dropout_rate` drops attention weights
  (published: accepted and unused);
- `softmax_rel_bias` masks the future before the softmax (published: after it, so future keys leak into the
  denominator);
- time buckets are compared with integer thresholds, exact on every device, instead of a float32 logarithm;
- `linear_config` has no second value there, and `activation_checkpoint` is honored here.
Initial values follow the published code: W_uvqk, pos_w and ts_w normal(0, 0.02), W_o Xavier-uniform, and the input's
position embedding Xavier-normal (a side effect of that code's reset, kept because it sets the initial scale).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.config import configurable
from generative_recommenders.nn.attention import RowGroups, causal_attention
from generative_recommenders.nn.dropout import Draws
from generative_recommenders.nn.inputs import PositionalInput
from generative_recommenders.nn.relative_bias import RelativeBias
from ops.hstu_attention import hstu_attention, hstu_attention_cached
from ops.norm_mul_dropout import norm_mul_dropout

_EPS = 1e-6
# Streams of randomness within a layer; layers are `_STREAMS_PER_LAYER` apart and the input has stream 0.
_STREAMS_PER_LAYER = 4


@configurable("hstu_encoder")
@dataclass(frozen=True)
class HSTUConfig:
    """Bindings `hstu_encoder.*`, with the public names and defaults.

    num_blocks, num_heads: layers and heads. dqk, dv: width of a head's queries/keys and of its values.
    linear_dropout_rate: dropout before the output projection. attn_dropout_rate: dropout of attention weights.
    normalization: "rel_bias" and "hstu_rel_bias" are the SiLU attention above; "softmax_rel_bias" is one softmax head.
    linear_activation: applied to all of u, v, q, k. attention_divisor (ours): n above is "max_length", the published
    constant, or "keys", the number of keys that a token attends to. The layer norm behind it takes a factor that all
    values of a token have in common out again, so what differs is the weight of that norm's eps.
    """

    num_blocks: int = 2
    num_heads: int = 1
    dqk: int = 64
    dv: int = 64
    linear_dropout_rate: float = 0.0
    attn_dropout_rate: float = 0.0
    normalization: Literal["rel_bias", "hstu_rel_bias", "softmax_rel_bias"] = "rel_bias"
    linear_config: Literal["uvqk"] = "uvqk"
    linear_activation: Literal["silu", "none"] = "silu"
    concat_ua: bool = False
    enable_relative_attention_bias: bool = True
    attention_divisor: Literal["max_length", "keys"] = "max_length"

    def __post_init__(self) -> None:
        for name in ("num_blocks", "num_heads", "dqk", "dv"):
            if getattr(self, name) < 1:
                raise ValueError(f"hstu_encoder.{name}: got {getattr(self, name)}, expected at least 1")
        for name in ("linear_dropout_rate", "attn_dropout_rate"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"hstu_encoder.{name}: got {getattr(self, name)}, expected 0 <= rate < 1")
        if self.attention_divisor != "max_length" and self.normalization == "softmax_rel_bias":
            raise ValueError(
                f"hstu_encoder.attention_divisor: got {self.attention_divisor!r}, expected 'max_length' with "
                "hstu_encoder.normalization = 'softmax_rel_bias', which divides by the softmax's sum"
            )

    def build(
        self,
        dim: int,
        num_positions: int,
        input_dropout: float,
        activation_checkpoint: bool,
        features: nn.Module | None = None,
    ) -> HSTU:
        return HSTU(self, dim, num_positions, input_dropout, activation_checkpoint, features)

    def describe(self) -> str:
        bias = "" if self.enable_relative_attention_bias else "-norab"
        bias += "-perkey" if self.attention_divisor == "keys" else ""
        return (
            f"HSTU-b{self.num_blocks}-h{self.num_heads}-dqk{self.dqk}-dv{self.dv}"
            f"-l{self.linear_activation}d{self.linear_dropout_rate}-ad{self.attn_dropout_rate}{bias}"
        )


class HSTULayer(nn.Module):
    """One layer; `num_positions` is n of the module docstring."""

    def __init__(self, config: HSTUConfig, dim: int, num_positions: int, first_stream: int) -> None:
        super().__init__()
        self.config = config
        self.num_positions = num_positions
        self.value_width = config.num_heads * config.dv
        self.key_width = config.num_heads * config.dqk
        self.uvqk = nn.Parameter(torch.empty(dim, 2 * self.value_width + 2 * self.key_width))
        self.output = nn.Linear(self.value_width * (3 if config.concat_ua else 1), dim)
        self.bias = RelativeBias(num_positions) if config.enable_relative_attention_bias else None
        self.linear_stream = first_stream
        self.attention_stream = first_stream + 1
        nn.init.normal_(self.uvqk, std=0.02)
        nn.init.xavier_uniform_(self.output.weight)

    def forward(
        self,
        x_TD: Tensor,
        batch: SequenceBatch,
        draws: Draws | None,
        groups: RowGroups | None = None,
    ) -> Tensor:
        """Next states (T, D)."""
        u, v, q, k = self._project(self._norm(x_TD), "uvqk")
        if groups is not None:
            attended = self._softmax_attention(q, k, v, batch, draws, groups)
        else:
            attended = self._attend(q, k, v, batch, draws)
        return self._output(x_TD, u, attended, draws)

    def last_states(self, x_TD: Tensor, batch: SequenceBatch) -> Tensor:
        """States of the last token of each row, (B, D); no row may be empty. Only its keys need the other tokens."""
        last = batch.offsets[1:] - 1
        normed = self._norm(x_TD)
        v, k = self._project(normed, "vk")
        u, q = self._project(normed[last], "uq")
        position_weights, time_weights = self._tables()
        attended = hstu_attention_cached(
            self._heads(q),
            torch.arange(batch.size + 1, device=last.device),
            self._heads(k),
            self._heads(v),
            batch.offsets,
            max_seq_len=self.num_positions,
            position_weights=position_weights,
            time_weights=time_weights,
            query_times=batch.next_timestamps_T[last],
            cache_times=batch.timestamps_T,
            max_queries=1,
        )
        attended = self._per_key(attended.flatten(1), batch.lengths_B)
        return self._output(x_TD[last], u, attended, None)

    def _norm(self, x_TD: Tensor) -> Tensor:
        return F.layer_norm(x_TD, x_TD.shape[-1:], eps=_EPS)

    def _heads(self, x_TD: Tensor) -> Tensor:
        return x_TD.unflatten(1, (self.config.num_heads, -1))

    def _tables(self) -> tuple[Tensor | None, Tensor | None]:
        """Position and time weights of the bias."""
        return (None, None) if self.bias is None else (self.bias.position_weights, self.bias.time_weights)

    def _drops(self, rate: float, stream: int, draws: Draws | None) -> tuple[float, int, Tensor | None]:
        """Rate, seed and row keys of a fused op's dropout, which is off in evaluation and where nothing is drawn."""
        if not self.training or rate == 0.0 or draws is None:
            return 0.0, 0, None
        return rate, draws.stream(stream), draws.keys_T

    def _output(self, x_TD: Tensor, u: Tensor, attended: Tensor, draws: Draws | None) -> Tensor:
        rate, seed, keys_T = self._drops(self.config.linear_dropout_rate, self.linear_stream, draws)
        gated = norm_mul_dropout(
            attended,
            u,
            eps=_EPS,
            output="concat_normed" if self.config.concat_ua else "product",
            dropout_rate=rate,
            dropout_seed=seed,
            keys_T=keys_T,
        )
        return torch.addmm(x_TD, gated, self.output.weight.T) + self.output.bias

    def _project(self, normed: Tensor, parts: str) -> tuple[Tensor, ...]:
        widths = {"u": self.value_width, "v": self.value_width, "q": self.key_width, "k": self.key_width}
        columns = dict(zip(widths, self.uvqk.split(list(widths.values()), dim=1), strict=True))
        weight = self.uvqk if parts == "uvqk" else torch.cat([columns[p] for p in parts], dim=1)
        projected = normed @ weight
        if self.config.linear_activation == "silu":
            # Backward needs the product itself; without it the activation overwrites it.
            projected = F.silu(projected, inplace=not torch.is_grad_enabled())
        return projected.split([widths[p] for p in parts], dim=1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, batch: SequenceBatch, draws: Draws | None) -> Tensor:
        position_weights, time_weights = self._tables()
        rate, seed, row_keys = self._drops(self.config.attn_dropout_rate, self.attention_stream, draws)
        attended = hstu_attention(
            self._heads(q),
            self._heads(k),
            self._heads(v),
            batch.offsets,
            max_seq_len=self.num_positions,
            position_weights=position_weights,
            time_weights=time_weights,
            query_times=batch.next_timestamps_T,
            key_times=batch.timestamps_T,
            dropout_rate=rate,
            dropout_seed=seed,
            row_keys=row_keys,
        )
        return self._per_key(attended.flatten(1), batch.positions_T() + 1)

    def _per_key(self, attended: Tensor, num_keys: Tensor) -> Tensor:
        """Attention that was divided by n, divided by the tokens' numbers of keys instead where that is asked for."""
        if self.config.attention_divisor == "max_length":
            return attended
        return (attended * (self.num_positions / num_keys)[:, None]).to(attended.dtype)

    def _softmax_attention(
        self, q: Tensor, k: Tensor, v: Tensor, batch: SequenceBatch, draws: Draws | None, groups: RowGroups
    ) -> Tensor:
        """One head over the concatenated width: softmax((Q K^T + rab) / sqrt(dqk)), causal."""
        scale = 1.0 / math.sqrt(self.config.dqk)
        bias = self.bias

        def scaled_bias(query_tokens: Tensor, key_tokens: Tensor) -> Tensor:
            assert bias is not None
            return scale * bias.dense(batch.next_timestamps_T[query_tokens], batch.timestamps_T[key_tokens])

        attended = causal_attention(
            q[:, None],
            k[:, None],
            v[:, None],
            groups,
            scale=scale,
            bias=None if bias is None else scaled_bias,
            dropout_rate=self.config.attn_dropout_rate if self.training else 0.0,
            stream=self.attention_stream,
            draws=draws,
        )
        return attended[:, 0]


class HSTU(nn.Module):
    """Input preprocessing and a stack of `HSTULayer`s."""

    def __init__(
        self,
        config: HSTUConfig,
        dim: int,
        num_positions: int,
        input_dropout: float,
        activation_checkpoint: bool,
        features: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpoint = activation_checkpoint
        self.input = PositionalInput(num_positions, dim, input_dropout, 0, features)
        nn.init.xavier_normal_(self.input.position_embedding)
        self.layers = nn.ModuleList(
            HSTULayer(config, dim, num_positions, _STREAMS_PER_LAYER * (i + 1)) for i in range(config.num_blocks)
        )

    def _groups(self, batch: SequenceBatch) -> RowGroups | None:
        return RowGroups.of(batch.offsets) if self.config.normalization == "softmax_rel_bias" else None

    def forward(self, x_TD: Tensor, batch: SequenceBatch, draws: Draws | None = None) -> Tensor:
        """States after every event, (T, D)."""
        groups = self._groups(batch)
        for layer in self.layers:
            if self.activation_checkpoint and self.training:
                x_TD = checkpoint(layer, x_TD, batch, draws, groups, use_reentrant=False)
            else:
                x_TD = layer(x_TD, batch, draws, groups)
        return x_TD

    def last_states(self, x_TD: Tensor, batch: SequenceBatch) -> Tensor:
        """States after the last event of each row, (B, D): the last layer is computed for those tokens alone.

        Every row must hold at least one event.
        """
        if self._groups(batch) is not None:
            return self.forward(x_TD, batch)[batch.offsets[1:] - 1]
        for layer in self.layers[:-1]:
            x_TD = layer(x_TD, batch, None)
        final = self.layers[-1]
        assert isinstance(final, HSTULayer)
        return final.last_states(x_TD, batch)
