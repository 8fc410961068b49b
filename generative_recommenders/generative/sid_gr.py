"""SID-GR: a decoder-only model over flattened semantic IDs, with a choice of causal backbone.

Sources: NVIDIA's SID-GR (flattened codes, BOS before every item that carries loss, shared or per-level heads) and
"Actions Speak Louder than Words" (arXiv 2402.17152) for the HSTU backbone with its bias of position and time.

    x = Dropout(token[level, code] + level_embedding[level] + item_position[place])        [BOS] s1 .. sL for each item
        + item[id] at s_L with `item_embeddings`, + the same and all of token[level, code] of the item before at the
        BOS with `items_at_bos`, and times sqrt(D) with `scale_inputs`, all three of which are ours
    logits of s_{l+1} = head_l(LN(backbone(x)))            at the BOS (l = 0) and at s_l, over the codes of that level

Differences from NVIDIA's: positions and levels are embedded, a level's probabilities are over its own codes with the
shared head too, histories keep their newest items, and tokens are jagged everywhere. Decoding computes the context
once; what is appended for beams is never moved (`sid_gr_backbones`), and no request sees another or any padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.distributed.runtime import all_reduce_sum, world_size
from generative_recommenders.errors import UserError
from generative_recommenders.generative.draft_head import DraftingModel, DraftSamples, HistoryStates
from generative_recommenders.generative.heads import CodeHeads
from generative_recommenders.generative.sid_gr_backbones import DecoderStack, Memory
from generative_recommenders.generative.sid_gr_config import SIDGRConfig
from generative_recommenders.generative.sid_gr_tokens import FlatTokens, flatten, longest_row
from generative_recommenders.generative.tokens import IdTable, TokenEmbedding
from generative_recommenders.nn.dropout import Draws, KeyedDropout

# Tuples of all requests that teacher forcing holds at a time.
_TUPLES_AT_A_TIME = 8192


@dataclass(frozen=True)
class SIDGRContext:
    """A prefill of B requests, the place of the item to predict in each, and how many events had no ID."""

    memory: Memory
    places_B: Tensor
    unknown: int

    def select(self, rows: Tensor) -> SIDGRContext:
        return SIDGRContext(self.memory.select(rows), self.places_B[rows], self.unknown)

    def branch(self, rows: Tensor | None = None) -> SIDGRContext:
        places_B = self.places_B if rows is None else self.places_B[rows]
        return SIDGRContext(self.memory.branch(rows), places_B, self.unknown)


class SIDGR(DraftingModel):
    """`forward(batch, seed)` is the training loss; `begin`, `logits` and `teacher_forced` serve the search.

    Args:
        config: bindings `sid_gr.*`.
        table: codes of the items.
        max_items: items of a history that are read, the newest ones.
    Raises:
        UserError: histories of no items.
    """

    def __init__(self, config: SIDGRConfig, table: IdTable, max_items: int) -> None:
        super().__init__()
        if max_items < 1:
            raise UserError(f"SID-GR: got histories of {max_items} items, expected at least 1")
        self.config = config
        self.table = table
        self.max_items = max_items
        self.sizes = table.sizes
        self.tokens = TokenEmbedding(table.sizes, config.dim, bos=True)
        self.level_embedding = _rows(table.levels, config.dim) if config.level_embeddings else None
        self.position_embedding = _rows(max_items + 1, config.dim) if config.item_positions else None
        # Row = item id.
        vectors = torch.zeros(len(table.row_of_item_V), config.dim)
        self.item_embedding = nn.Parameter(vectors) if config.item_embeddings else None
        self.dropout = KeyedDropout(config.dropout_rate, 0)
        self.backbone = DecoderStack(config, longest_row(table.levels, max_items, config.loss_items))
        self.output_norm = nn.LayerNorm(config.dim)
        self.heads = CodeHeads(table.sizes, config.dim, shared=config.shared_heads)

    @property
    def flexible_buffers(self) -> frozenset[str]:
        """A checkpoint's items stay those of its vectors where items were added since; see `DraftingModel`."""
        own = () if self.item_embedding is None else ("item_embedding",)
        return super().flexible_buffers | frozenset(own)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        found = state_dict.get(f"{prefix}item_embedding")
        if found is not None and self.item_embedding is not None:
            # The same parameter, which an optimizer may hold already.
            self.item_embedding.data = self.item_embedding.data.new_empty(found.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def item_inputs(self, item_ids_n: Tensor) -> Tensor:
        """With `item_embeddings` the items' own vectors among them; see `DraftingModel`."""
        codes_nD = super().item_inputs(item_ids_n)
        return codes_nD if self.item_embedding is None else codes_nD + self._of_items(item_ids_n)

    def history_states(self, batch: SequenceBatch, seed: int | None = None) -> HistoryStates:
        """Of the BOS of the item to predict, which has seen all of the history; see `DraftingModel`."""
        flat = self._flat(batch, with_target=False)
        draws = None if seed is None else Draws.of(flat.rows, seed)
        return HistoryStates.one_a_row(self._states(flat, draws)[flat.rows.offsets[1:] - 1])

    def generative_loss(self, batch: SequenceBatch, seed: int) -> tuple[Tensor, dict[str, Tensor], DraftSamples]:
        """The mean a code; see `DraftingModel`.

        `tokens` counts the codes that were learned, `unknown_items` events and targets that have no ID.
        """
        flat = self._flat(batch, with_target=True)
        states_SD = self._states(flat, Draws.of(flat.rows, seed))
        losses_nL = self.heads.losses(states_SD[flat.loss_nL], flat.labels_nL)
        learned_nL = flat.labels_nL >= 0
        learned = all_reduce_sum(learned_nL.sum().float())
        total = learned.clamp(min=1.0)
        loss = losses_nL.sum() / total * world_size()
        unknown = flat.unknown + (self.table.rows_of(batch.target_ids_B) < 0).sum()
        main = all_reduce_sum(loss.detach()) / world_size()
        scalars = {
            "main_loss": main,
            "ar_loss": main,
            "tokens": learned,
            "unknown_items": all_reduce_sum(unknown.float()),
        }
        items = total / len(self.sizes)
        for level, level_loss in enumerate(all_reduce_sum(losses_nL.detach().sum(0)).unbind()):
            scalars[f"level_{level + 1}_loss"] = level_loss / items
        asked_n = flat.loss_nL[:, 0]
        states = HistoryStates.one_a_row(states_SD[asked_n])
        return loss, scalars, DraftSamples(states, flat.rows.item_ids_T[asked_n])

    @torch.no_grad()
    def begin(self, batch: SequenceBatch) -> SIDGRContext:
        """Prefill: histories up to the BOS of the item to predict; an empty history is that BOS alone."""
        flat = self._flat(batch, with_target=False)
        with self._autocast(flat.rows):
            memory = self.backbone.prefill(self._embedded(flat), flat.rows)
        return SIDGRContext(memory, flat.open_places_B, flat.unknown)

    @torch.no_grad()
    def begin_with_states(self, batch: SequenceBatch) -> tuple[SIDGRContext, HistoryStates]:
        """`begin` and `history_states` of one pass."""
        context = self.begin(batch)
        return context, HistoryStates.one_a_row(self.output_norm(context.memory.states_BD.float()))

    @torch.no_grad()
    def logits(
        self, context: SIDGRContext, level: int, tokens_BM: Tensor | None, ancestors: Sequence[Tensor]
    ) -> Tensor:
        """Logits of `level` for every beam, (B, M, C_level); see `decoding.GenerativeModel`."""
        if tokens_BM is None:
            states_BMD = context.memory.states_BD[:, None]
        else:
            x_BMD = self.tokens.level(level - 1, tokens_BM)
            if self.level_embedding is not None:
                x_BMD = x_BMD + self.level_embedding[level - 1]
            if self.position_embedding is not None:
                x_BMD = x_BMD + self.position_embedding[context.places_B][:, None]
            x_BMD = self._scaled(x_BMD)
            with self._autocast_of(x_BMD.device):
                states_BMD = self.backbone.step(x_BMD, context.memory, ancestors)
        return self.heads.logits(level, self.output_norm(states_BMD.float()))

    @torch.no_grad()
    def teacher_forced(self, batch: SequenceBatch, codes_BKL: Tensor) -> Tensor:
        """Log-probability of each code given those before it, (B, K, L) float32.

        Each tuple is a beam that never changes its place.
        """
        context = self.begin(batch)
        everyone = torch.arange(batch.size, device=codes_BKL.device)
        at_a_time = max(1, _TUPLES_AT_A_TIME // max(1, batch.size))
        parts = [self._forced(context.select(everyone), codes) for codes in codes_BKL.split(at_a_time, dim=1)]
        return torch.cat(parts, 1)

    def _forced(self, context: SIDGRContext, codes_BKL: Tensor) -> Tensor:
        size, count, levels = codes_BKL.shape
        own_BK = torch.arange(count, device=codes_BKL.device).expand(size, count)
        found = []
        for level in range(levels):
            given = codes_BKL[..., level - 1] if level else None
            log_probs = self.logits(context, level, given, [own_BK] * level).float().log_softmax(-1)
            # At level 0 all tuples share the row of the BOS.
            log_probs = log_probs.expand(size, count, -1)
            found.append(log_probs.gather(-1, codes_BKL[..., level, None])[..., 0])
        return torch.stack(found, -1)

    def _flat(self, batch: SequenceBatch, *, with_target: bool) -> FlatTokens:
        if not self.config.time_bias:
            batch = _without_times(batch)
        return flatten(
            batch, self.table, max_items=self.max_items, loss_items=self.config.loss_items, with_target=with_target
        )

    def _states(self, flat: FlatTokens, draws: Draws | None) -> Tensor:
        """Normalized states after every token, (S, D) float32."""
        with self._autocast(flat.rows):
            states_SD = self.backbone(self.dropout(self._embedded(flat), draws), flat.rows, draws)
        normed: Tensor = self.output_norm(states_SD.float())
        return normed

    def _embedded(self, flat: FlatTokens) -> Tensor:
        """Input of every token before dropout, (S, D)."""
        assert self.tokens.bos is not None
        codes_XLD = self.tokens.items(flat.codes_XL)
        if self.item_embedding is not None:
            last_X1D = (codes_XLD[:, -1] + self._of_items(flat.items_X))[:, None]
            codes_XLD = torch.cat([codes_XLD[:, :-1], last_X1D], 1)
        bos_XD = self.tokens.bos.expand(codes_XLD.shape[0], -1)
        if self.config.items_at_bos:
            # The item before the first of a row is another row's; one that is not the first is of a history.
            before_XD = codes_XLD.sum(1).roll(1, 0)
            bos_XD = bos_XD + torch.where((flat.places_X > 0)[:, None], before_XD, 0.0)
        if self.level_embedding is not None:
            codes_XLD = codes_XLD + self.level_embedding
        x_XCD = torch.cat([bos_XD[:, None], codes_XLD], 1)
        if self.position_embedding is not None:
            x_XCD = x_XCD + self.position_embedding[flat.places_X][:, None]
        return self._scaled(x_XCD.flatten(0, 1)[flat.cells_S])

    def _scaled(self, x: Tensor) -> Tensor:
        return x * math.sqrt(self.config.dim) if self.config.scale_inputs else x

    def _of_items(self, item_ids_X: Tensor) -> Tensor:
        """Vectors of items, (X, D); zeros of items that were added since, and of padding."""
        assert self.item_embedding is not None
        count = self.item_embedding.shape[0]
        known_X = (item_ids_X > 0) & (item_ids_X < count)
        rows_XD = F.embedding(torch.where(known_X, item_ids_X, 0), self.item_embedding)
        return torch.where(known_X[:, None], rows_XD, 0.0)

    def _autocast(self, rows: SequenceBatch) -> AbstractContextManager[object]:
        return self._autocast_of(rows.offsets.device)

    def _autocast_of(self, device: torch.device) -> AbstractContextManager[object]:
        return torch.autocast(device.type, dtype=torch.bfloat16) if self.config.bf16 else nullcontext()


def _rows(count: int, dim: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(count, dim).normal_(std=0.02))


def _without_times(batch: SequenceBatch) -> SequenceBatch:
    return replace(
        batch,
        timestamps_T=torch.zeros_like(batch.timestamps_T),
        next_timestamps_T=torch.zeros_like(batch.next_timestamps_T),
        target_timestamps_B=torch.zeros_like(batch.target_timestamps_B),
    )
