"""SASRec encoder (Kang and McAuley, arXiv 1808.09781) as the public HSTU experiments build it.

A block:

    Q = LN(x);  a = MHA(Q, x, x);  z = LN(Q + a);  x' = z + Dropout(W2 Dropout(act(W1 z)))

Keys and values are not normalized, the residual is on Q, layer norms have no parameters (eps 1e-8) and there is no
final one: quirks of the public code, kept for parity. `ffn_dropout_rate` is also the dropout of attention
probabilities. Differences: rows are jagged; the unused `predict` is gone; dropout masks are keyed per token. Initial
values: every matrix Xavier-normal (the fused query-key-value matrix as one), attention biases 0, feed-forward biases
uniform(-1/sqrt(fan_in), 1/sqrt(fan_in)).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.config import configurable
from generative_recommenders.nn.attention import RowGroups, causal_attention, last_query_attention
from generative_recommenders.nn.dropout import Draws, KeyedDropout
from generative_recommenders.nn.inputs import PositionalInput

_EPS = 1e-8
_STREAMS_PER_LAYER = 4
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


@configurable("sasrec_encoder")
@dataclass(frozen=True)
class SASRecConfig:
    """Bindings `sasrec_encoder.*`, with the public names and defaults."""

    num_blocks: int = 2
    num_heads: int = 1
    ffn_hidden_dim: int = 64
    ffn_activation_fn: Literal["relu", "gelu"] = "relu"
    ffn_dropout_rate: float = 0.2

    def __post_init__(self) -> None:
        for name in ("num_blocks", "num_heads", "ffn_hidden_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"sasrec_encoder.{name}: got {getattr(self, name)}, expected at least 1")
        if not 0.0 <= self.ffn_dropout_rate < 1.0:
            raise ValueError(f"sasrec_encoder.ffn_dropout_rate: got {self.ffn_dropout_rate}, expected 0 <= rate < 1")

    def build(
        self,
        dim: int,
        num_positions: int,
        input_dropout: float,
        activation_checkpoint: bool,
        features: nn.Module | None = None,
    ) -> SASRec:
        """`dim` must be a multiple of `num_heads`."""
        assert dim % self.num_heads == 0
        return SASRec(self, dim, num_positions, input_dropout, activation_checkpoint, features)

    def describe(self) -> str:
        return (
            f"SASRec-b{self.num_blocks}-h{self.num_heads}-ffn{self.ffn_hidden_dim}"
            f"-{self.ffn_activation_fn}-d{self.ffn_dropout_rate}"
        )


class SASRecLayer(nn.Module):
    def __init__(self, config: SASRecConfig, dim: int, first_stream: int) -> None:
        super().__init__()
        self.config = config
        self.in_proj = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)
        self.ffn_in = nn.Linear(dim, config.ffn_hidden_dim)
        self.ffn_out = nn.Linear(config.ffn_hidden_dim, dim)
        self.activation = _ACTIVATIONS[config.ffn_activation_fn]
        self.attention_stream = first_stream
        self.hidden_dropout = KeyedDropout(config.ffn_dropout_rate, first_stream + 1)
        self.output_dropout = KeyedDropout(config.ffn_dropout_rate, first_stream + 2)
        for linear in (self.in_proj, self.out_proj, self.ffn_in, self.ffn_out):
            nn.init.xavier_normal_(linear.weight)
        for linear in (self.in_proj, self.out_proj):
            nn.init.zeros_(linear.bias)

    def forward(
        self, x_TD: Tensor, batch: SequenceBatch, draws: Draws | None, groups: RowGroups, queries: Tensor | None = None
    ) -> Tensor:
        """Next states (T, D); with `queries` (B,), the last token of each row, only those tokens' states (B, D)."""
        dim, heads = x_TD.shape[-1], self.config.num_heads
        normed = F.layer_norm(x_TD if queries is None else x_TD[queries], (dim,), eps=_EPS)
        w, b = self.in_proj.weight, self.in_proj.bias
        q = F.linear(normed, w[:dim], b[:dim]).unflatten(-1, (heads, -1))
        k, v = (p.unflatten(-1, (heads, -1)) for p in F.linear(x_TD, w[dim:], b[dim:]).chunk(2, dim=-1))
        if queries is None:
            rate = self.config.ffn_dropout_rate if self.training else 0.0
            attended = causal_attention(q, k, v, groups, dropout_rate=rate, stream=self.attention_stream, draws=draws)
        else:
            attended = last_query_attention(q, k, v, batch.offsets)
        z = F.layer_norm(normed + self.out_proj(attended.flatten(1)), (dim,), eps=_EPS)
        hidden = self.hidden_dropout(self.activation(self.ffn_in(z)), draws)
        return z + self.output_dropout(self.ffn_out(hidden), draws)


class SASRec(nn.Module):
    """Input preprocessing and a stack of `SASRecLayer`s."""

    def __init__(
        self,
        config: SASRecConfig,
        dim: int,
        num_positions: int,
        input_dropout: float,
        activation_checkpoint: bool,
        features: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.activation_checkpoint = activation_checkpoint
        self.input = PositionalInput(num_positions, dim, input_dropout, 0, features)
        self.layers = nn.ModuleList(
            SASRecLayer(config, dim, _STREAMS_PER_LAYER * (i + 1)) for i in range(config.num_blocks)
        )

    def forward(self, x_TD: Tensor, batch: SequenceBatch, draws: Draws | None = None) -> Tensor:
        """States after every event, (T, D)."""
        groups = RowGroups.of(batch.offsets)
        for layer in self.layers:
            if self.activation_checkpoint and self.training:
                x_TD = checkpoint(layer, x_TD, batch, draws, groups, use_reentrant=False)
            else:
                x_TD = layer(x_TD, batch, draws, groups)
        return x_TD

    def last_states(self, x_TD: Tensor, batch: SequenceBatch) -> Tensor:
        """States after the last event of each row, (B, D); every row must hold at least one event."""
        groups = RowGroups.of(batch.offsets)
        for layer in self.layers[:-1]:
            x_TD = layer(x_TD, batch, None, groups)
        return self.layers[-1](x_TD, batch, None, groups, batch.offsets[1:] - 1)
