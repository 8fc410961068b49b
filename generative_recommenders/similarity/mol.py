"""Mixture of Logits ("Revisiting Neural Retrieval on Accelerators", arXiv 2306.04039; "Retrieval with Learned
Similarities", arXiv 2407.15462).

A query has P_Q components, an item P_X, each D_P wide; the P = P_Q * P_X dot products of a pair are mixed by weights
that a gate computes from the query, the item and the products (`ops.mol_score` has the equations). This module is what
lies before that: the projections of both sides, components of users by their hashed ids, the gate's parts of one side
alone, and two auxiliary losses,

    uid_embedding_l2_norm = sum over tables of the mean over tokens of |e_user|^2
    mi_loss               = mean H(pi) - H(mean pi)      over the pairs of queries and positives, H of log(pi + 1e-6)

Differences from the public code: an item is projected once a step, so that the dropout of its embedding is drawn once
a step and item and not for each pair, and memory does not grow with pairs; all dropouts are keyed and both losses are
those of all ranks' tokens, so that ranks and resumed runs agree; bfloat16 is that of the projections alone, as rounded
unit vectors move gradients by several per cent; user ids that the hash has no place for are unknown users and have a
zero component. Kept, for the scale the published models start from: every matrix, the gated units' biases and the user
tables start Xavier-normal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from generative_recommenders.config import configurable
from generative_recommenders.distributed.runtime import all_reduce_sum, global_sum
from generative_recommenders.nn.dropout import Draws, KeyedDropout
from generative_recommenders.nn.outputs import l2_normalize
from generative_recommenders.similarity.dot import AuxiliaryLosses, Features, Similarity
from ops.mol_score import MoLDropout, MoLGate, MoLItems, MoLQueries, mol_score, mol_score_with_mixture

_ENTROPY_EPS = 1e-6
# Apart from every stream of an encoder's dropouts and of the samplers.
_FIRST_STREAM = 2_000_003
_QUERY, _ITEM, _ITEM_GATE, _PAIRS, _USERS = range(_FIRST_STREAM, _FIRST_STREAM + 5)
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": F.silu, "geglu": F.gelu}
_RATES = (
    "query_dropout_rate item_dropout_rate softmax_dropout_rate uid_dropout_rate gating_item_dropout_rate "
    "gating_qi_dropout_rate"
).split()
_AT_LEAST_ONE = "dot_product_dimension query_dot_product_groups item_dot_product_groups".split()
UNKNOWN_USER = -1


@configurable("create_mol_interaction_module")
@dataclass(frozen=True)
class MoLConfig:
    """Bindings `create_mol_interaction_module.*`, with the public names and defaults.

    query_embedding_dim, item_embedding_dim: widths of both sides, from `train_fn.item_embedding_dim` and not bound.
    query_dot_product_groups: P_Q, the components by user id included; item_dot_product_groups: P_X;
    dot_product_dimension: D_P; temperature divides the products. query_hidden_dim, item_hidden_dim: width of the gated
    unit before a side's projection, -1 is none; *_nonlinearity: its activation. gating_*_hidden_dim: widths of the
    gate's layers; gating_qi_hidden_dim <= 0 is one linear layer. gating_combination_type: see `ops.mol_score`.
    uid_embedding_hash_sizes: rows of each table of user components; uid_embedding_level_dropout drops whole components
    instead of single features, without rescaling.
    """

    query_embedding_dim: int = field(metadata={"runtime": True})
    item_embedding_dim: int = field(metadata={"runtime": True})
    dot_product_dimension: int
    query_dot_product_groups: int
    item_dot_product_groups: int
    temperature: float
    query_dropout_rate: float
    query_hidden_dim: int
    item_dropout_rate: float
    item_hidden_dim: int
    gating_query_hidden_dim: int
    gating_qi_hidden_dim: int
    gating_item_hidden_dim: int
    softmax_dropout_rate: float
    bf16_training: bool = False
    gating_query_fn: bool = True
    gating_item_fn: bool = True
    dot_product_l2_norm: bool = True
    query_nonlinearity: Literal["geglu", "swiglu"] = "geglu"
    item_nonlinearity: Literal["geglu", "swiglu"] = "geglu"
    uid_dropout_rate: float = 0.5
    uid_embedding_hash_sizes: list[int] | None = None
    uid_embedding_level_dropout: bool = False
    gating_combination_type: Literal["glu_silu", "glu_silu_ln", "none"] = "glu_silu"
    gating_item_dropout_rate: float = 0.0
    gating_qi_dropout_rate: float = 0.0
    eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in _RATES:
            self._expect(name, 0.0 <= getattr(self, name) < 1.0, "0 <= rate < 1")
        for name in _AT_LEAST_ONE:
            self._expect(name, getattr(self, name) >= 1, "at least 1")
        for name in ("temperature", "eps"):
            self._expect(name, getattr(self, name) > 0, "more than 0")
        for name in ("query_hidden_dim", "item_hidden_dim"):
            self._expect(name, getattr(self, name) >= 1 or getattr(self, name) == -1, "at least 1, or -1 for none")
        for side in ("query", "item"):
            name = f"gating_{side}_hidden_dim"
            self._expect(name, not getattr(self, f"gating_{side}_fn") or getattr(self, name) >= 1, "at least 1")
        sizes = self.uid_embedding_hash_sizes or []
        self._expect("uid_embedding_hash_sizes", all(size >= 1 for size in sizes), "sizes of at least 1, or None")
        self._expect(
            "query_dot_product_groups",
            self.query_dot_product_groups > len(sizes),
            f"more than the {len(sizes)} tables of uid_embedding_hash_sizes",
        )

    def _expect(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            got = getattr(self, name)
            raise ValueError(f"create_mol_interaction_module.{name}: got {got!r}, expected {expected}")

    @property
    def auxiliary_losses(self) -> tuple[str, ...]:
        """Names that `train_fn.loss_weights` may weight."""
        return ("mi_loss", "uid_embedding_l2_norm") if self.uid_embedding_hash_sizes else ("mi_loss",)

    def describe(self) -> str:
        """The published short form, such as 8x4x64-t0.05-d0.2-l2-q512d0.0swiglu-id0.1-gq128-gi128d0.0-gqi128d0.0."""
        norm = "-l2" if self.dot_product_l2_norm else ""
        query = f"q{self.query_hidden_dim}d{self.query_dropout_rate}{self.query_nonlinearity}"
        item = f"i{self.item_hidden_dim}d{self.item_dropout_rate}{self.item_nonlinearity}"
        sizes = "".join(f"-uids{size}d{self.uid_dropout_rate}" for size in self.uid_embedding_hash_sizes or [])
        return (
            f"{self.query_dot_product_groups}x{self.item_dot_product_groups}x{self.dot_product_dimension}"
            f"-t{self.temperature}-d{self.softmax_dropout_rate}{norm}"
            f"-{query if self.query_hidden_dim > 0 else f'qd{self.query_dropout_rate}'}"
            f"-{item if self.item_hidden_dim > 0 else f'id{self.item_dropout_rate}'}"
            f"-gq{self.gating_query_hidden_dim if self.gating_query_fn else 0}"
            f"-gi{self.gating_item_hidden_dim if self.gating_item_fn else 0}d{self.gating_item_dropout_rate}"
            f"-gqi{self.gating_qi_hidden_dim}d{self.gating_qi_dropout_rate}-x-{self.gating_combination_type}{sizes}"
        )


@configurable("get_similarity_function")
@dataclass(frozen=True)
class SimilarityOptions:
    """bf16_training: project both sides of a learned similarity in bfloat16; activation_checkpoint: recompute its
    projections in backward instead of keeping their activations (pairs are always recomputed)."""

    bf16_training: bool = False
    activation_checkpoint: bool = False


class GatedLinear(nn.Module):
    """act(left) * right of one product x W + b that is cut in two (SwiGLU with SiLU, GeGLU with GELU)."""

    def __init__(self, dim: int, hidden: int, nonlinearity: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, 2 * hidden))
        self.bias = nn.Parameter(torch.empty(1, 2 * hidden))
        self.activation = _ACTIVATIONS[nonlinearity]

    def forward(self, x: Tensor) -> Tensor:
        left, right = (x @ self.weight + self.bias).chunk(2, dim=-1)
        return self.activation(left) * right


def _components(dim: int, hidden: int, width: int, nonlinearity: str) -> nn.Sequential:
    if hidden == -1:
        return nn.Sequential(nn.Linear(dim, width))
    return nn.Sequential(GatedLinear(dim, hidden, nonlinearity), nn.Linear(hidden, width))


class MoL(Similarity):
    """A query's features are its components (T, P_Q, D_P) and, with `gating_query_fn`, its gate (T, P); an item's the
    same with P_X and `gating_item_fn`."""

    def __init__(self, config: MoLConfig, options: SimilarityOptions | None = None) -> None:
        super().__init__()
        options = options or SimilarityOptions()
        self.config = c = config
        self.bf16 = c.bf16_training or options.bf16_training
        self.activation_checkpoint = options.activation_checkpoint
        sizes = c.uid_embedding_hash_sizes or []
        width, pairs = c.dot_product_dimension, c.query_dot_product_groups * c.item_dot_product_groups
        own = (c.query_dot_product_groups - len(sizes)) * width
        self.query_components = _components(c.query_embedding_dim, c.query_hidden_dim, own, c.query_nonlinearity)
        self.item_components = _components(
            c.item_embedding_dim, c.item_hidden_dim, c.item_dot_product_groups * width, c.item_nonlinearity
        )
        # Row 0 belongs to unknown users and stays out of training.
        self.user_components = nn.ParameterList(torch.empty(size + 1, width) for size in sizes)
        self.query_gate = _gate(c.query_embedding_dim, c.gating_query_hidden_dim, pairs) if c.gating_query_fn else None
        self.item_gate = _gate(c.item_embedding_dim, c.gating_item_hidden_dim, pairs) if c.gating_item_fn else None
        hidden = c.gating_qi_hidden_dim if c.gating_qi_hidden_dim > 0 else None
        self.pair_gate_in = nn.Linear(pairs, hidden) if hidden else None
        self.pair_gate_out = nn.Linear(hidden or pairs, pairs)
        self.query_dropout = KeyedDropout(c.query_dropout_rate, _QUERY)
        self.item_dropout = KeyedDropout(c.item_dropout_rate, _ITEM)
        self.item_gate_dropout = KeyedDropout(c.gating_item_dropout_rate, _ITEM_GATE)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for parameter in self.parameters():
            if parameter.dim() >= 2:
                nn.init.xavier_normal_(parameter)

    def project_queries(
        self, queries_TD: Tensor, user_ids_T: Tensor, draws: Draws | None
    ) -> tuple[Features, AuxiliaryLosses]:
        """User ids are int64 >= 0, or `UNKNOWN_USER`."""
        auxiliary: AuxiliaryLosses = {}
        with self._precision(queries_TD):
            parts = self.query_components(self.query_dropout(queries_TD, draws))
            parts = parts.unflatten(-1, (-1, self.config.dot_product_dimension))
            users = [self._user_component(n, user_ids_T, draws) for n in range(len(self.user_components))]
            if users:
                parts = torch.cat([parts, *(used[:, None].to(parts.dtype) for used, _ in users)], dim=1)
                if self.training:
                    norms = torch.stack([embedded.square().sum() for _, embedded in users]).sum()
                    auxiliary["uid_embedding_l2_norm"] = global_sum(norms) / _everybodys(len(user_ids_T), norms)
            gate = () if self.query_gate is None else (self.query_gate(queries_TD).float(),)
        return (self._normalized(parts), *gate), auxiliary

    def _user_component(self, table: int, user_ids_T: Tensor, draws: Draws | None) -> tuple[Tensor, Tensor]:
        """The component after dropout and before it, (T, D_P)."""
        rows = self.user_components[table]
        known = user_ids_T >= 0
        places = torch.where(known, user_ids_T % (rows.shape[0] - 1) + 1, 0)
        embedded = F.embedding(places, rows) * known[:, None]
        dropout = KeyedDropout(self.config.uid_dropout_rate, _USERS + table)
        dropout.train(self.training)
        if self.config.uid_embedding_level_dropout:
            ones = torch.ones_like(embedded[:, :1])
            return embedded * (dropout(ones, draws) > 0), embedded
        return dropout(embedded, draws), embedded

    def project_items(self, items_XD: Tensor, item_ids_X: Tensor, draws: Draws | None) -> Features:
        keyed = None if draws is None else Draws(draws.seed, item_ids_X)
        if self.activation_checkpoint and torch.is_grad_enabled():
            features: Features = checkpoint(self._project_items, items_XD, keyed, use_reentrant=False)
            return features
        return self._project_items(items_XD, keyed)

    def _project_items(self, items_XD: Tensor, keyed: Draws | None) -> Features:
        with self._precision(items_XD):
            parts = self.item_components(self.item_dropout(items_XD, keyed))
            parts = parts.unflatten(-1, (-1, self.config.dot_product_dimension))
            gate = () if self.item_gate is None else (self.item_gate(self.item_gate_dropout(items_XD, keyed)).float(),)
        return (self._normalized(parts), *gate)

    def score(self, queries: Features, items: Features, draws: Draws | None) -> Tensor:
        return mol_score(
            MoLQueries(*queries),
            MoLItems(*items),
            self.pair_gate(),
            temperature=self.config.temperature,
            dropout=self._pair_dropout(draws),
        )

    def pair_losses(self, queries: Features, positives: Features, draws: Draws | None) -> AuxiliaryLosses:
        _, mean_P, entropy = mol_score_with_mixture(
            MoLQueries(*queries),
            MoLItems(*positives),
            self.pair_gate(),
            temperature=self.config.temperature,
            dropout=self._pair_dropout(draws),
        )
        # The entropy of a mean is no mean over ranks: the sums of all come first.
        pairs = len(queries[0])
        total = _everybodys(pairs, mean_P)
        mean_P, entropy = global_sum(mean_P * pairs) / total, global_sum(entropy * pairs) / total
        return {"mi_loss": entropy + (mean_P * torch.log(mean_P + _ENTROPY_EPS)).sum()}

    def pair_gate(self) -> MoLGate:
        """The part of the gate that depends on both sides."""
        last = self.pair_gate_out
        first = self.pair_gate_in
        kind = self.config.gating_combination_type
        if first is None:
            return MoLGate(None, None, last.weight.T, last.bias, kind)
        return MoLGate(first.weight.T, first.bias, last.weight.T, last.bias, kind)

    def _pair_dropout(self, draws: Draws | None) -> MoLDropout | None:
        if not self.training or draws is None:
            return None
        rates = self.config.gating_qi_dropout_rate, self.config.softmax_dropout_rate
        return MoLDropout(draws.stream(_PAIRS), *rates, row_keys=draws.keys_T)

    def _normalized(self, parts: Tensor) -> Tensor:
        parts = parts.float()
        return l2_normalize(parts, self.config.eps) if self.config.dot_product_l2_norm else parts

    def _precision(self, tensor: Tensor) -> torch.autocast:
        return torch.autocast(tensor.device.type, dtype=torch.bfloat16, enabled=self.bf16)


def _everybodys(count: int, like: Tensor) -> Tensor:
    """The count of all ranks together, at least 1."""
    return all_reduce_sum(like.new_tensor(float(count))).clamp(min=1.0)


def _gate(dim: int, hidden: int, pairs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, pairs, bias=False))
