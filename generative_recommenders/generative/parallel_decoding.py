"""From the logits of Parallel TIGER to items: exact, by beam search, or left to right.

"exact": every item of the catalogue is scored from the one decoder pass (`parallel_exact`). "beam": a beam search over
the trie with the same scores, for catalogues where scoring every item is dearer; what it finds is certified or not, as
for any model. "autoregressive": a beam search with p(c_l | history, c_1 .. c_{l-1}) of a model trained on masked
positions; the decoder, which is small, runs once a level over all beams, the encoder once in all.

How an item with several IDs gets one score is in `parallel_merging`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.errors import UserError
from generative_recommenders.generative.beam import beam_search
from generative_recommenders.generative.beam_config import BeamSearchConfig
from generative_recommenders.generative.beam_items import excluded_history, result_of
from generative_recommenders.generative.beam_result import BeamResult
from generative_recommenders.generative.beam_sampling import request_keys
from generative_recommenders.generative.beam_steps import Beams
from generative_recommenders.generative.beam_verification import verify
from generative_recommenders.generative.decoding import GenerativeModel
from generative_recommenders.generative.parallel_config import Decoding
from generative_recommenders.generative.parallel_merging import LeafRanking, RankedLeaves
from generative_recommenders.generative.parallel_tiger import ParallelTiger
from generative_recommenders.generative.t5 import Memory
from generative_recommenders.generative.t5_attention import RowRectangles
from generative_recommenders.generative.trie import ItemFilter, Trie
from generative_recommenders.tokenizers.semantic_ids import SemanticIds
from ops import jagged

# Decoder rows that teacher forcing handles at a time.
_ROWS_AT_A_TIME = 1 << 14


def joint_ids(*tables: SemanticIds) -> SemanticIds:
    """One table whose IDs are those of several tables (modalities) one after the other; what a search's trie is of.

    Items are those that all tables have; one is on where it is on in all.

    Raises:
        UserError: no item is in all of them.
    """
    items = tables[0].item_ids_N
    for table in tables[1:]:
        items = items[table.rows_of(items) >= 0]
    if items.numel() == 0:
        raise UserError("semantic IDs: got tables without an item in common, expected those of one dataset")
    rows = [table.rows_of(items) for table in tables]
    codes = torch.cat([table.codes_NL[row] for table, row in zip(tables, rows, strict=True)], 1)
    active = torch.stack([table.active_N[row] for table, row in zip(tables, rows, strict=True)]).all(0)
    raw_ids = None if tables[0].raw_ids is None else tables[0].raw_ids[rows[0].numpy()]
    sizes = tuple(size for table in tables for size in table.sizes)
    datasets = {table.dataset_fingerprint for table in tables}
    dataset = datasets.pop() if len(datasets) == 1 else ""
    return SemanticIds(codes, items, sizes, raw_ids, active_N=active, dataset_fingerprint=dataset)


@dataclass
class ForcedContext:
    """Encoder states of B requests, and the codes fed so far, a level each, in the places they were fed at."""

    memory: Memory
    codes: list[Tensor] = field(default_factory=list)

    def select(self, rows: Tensor) -> ForcedContext:
        return ForcedContext(_rows_of(self.memory, rows))

    def branch(self, rows: Tensor | None = None) -> ForcedContext:
        if rows is None:
            return ForcedContext(self.memory, [*self.codes])
        return ForcedContext(_rows_of(self.memory, rows), [codes_BM[rows] for codes_BM in self.codes])


class LeftToRight:
    """The conditionals p(c_l | history, codes before) of a Parallel TIGER, as a search over IDs asks for them."""

    def __init__(self, model: ParallelTiger) -> None:
        self.model = model
        self.sizes = model.sizes

    def begin(self, batch: SequenceBatch) -> ForcedContext:
        return ForcedContext(self.model.encode(self.model.table.known_only(batch)))

    def logits(
        self, context: ForcedContext, level: int, tokens_BM: Tensor | None, ancestors: Sequence[Tensor]
    ) -> Tensor:
        """(B, M, C_level); see `decoding.GenerativeModel`."""
        if tokens_BM is None:
            return self.model.heads.logits(0, self.model.states(context.memory)[:, :1])
        context.codes.append(tokens_BM)
        before = [codes.gather(1, index) for codes, index in zip(context.codes, ancestors, strict=True)]
        return self._next(context.memory, torch.stack(before, -1))

    def _next(self, memory: Memory, before_BMl: Tensor) -> Tensor:
        """Logits of the position after the given ones, (B, M, C)."""
        size, beams, level = before_BMl.shape
        codes_RL = before_BMl.new_zeros(size * beams, len(self.sizes))
        codes_RL[:, :level] = before_BMl.flatten(0, 1)
        given_RL = (torch.arange(len(self.sizes), device=codes_RL.device) < level).expand_as(codes_RL)
        states_RD = self.model.states(memory, codes_RL, given_RL)[:, level]
        return self.model.heads.logits(level, states_RD).unflatten(0, (size, beams))

    def teacher_forced(self, batch: SequenceBatch, codes_BKL: Tensor) -> Tensor:
        """Log-probability of each code given those before it, over all codes of its level: (B, K, L)."""
        memory = self.begin(batch).memory
        at_a_time = max(1, _ROWS_AT_A_TIME // max(1, batch.size))
        parts = []
        for codes in codes_BKL.split(at_a_time, dim=1):
            columns = [
                self._next(memory, codes[..., :level]).float().log_softmax(-1).gather(-1, codes[..., level, None])
                for level in range(len(self.sizes))
            ]
            parts.append(torch.cat(columns, -1))
        return torch.cat(parts, 1)


def _rows_of(memory: Memory, rows: Tensor) -> Memory:
    """The encoder's states of the given requests, in that order."""
    starts = memory.rectangles.offsets
    offsets = jagged.lengths_to_offsets(starts.diff()[rows])
    count = int(offsets[-1])
    tokens = starts[rows][jagged.rows(offsets, count)] + jagged.positions(offsets, count)
    return Memory(memory.states_SD[tokens], RowRectangles.of(offsets, count))


class ParallelSearch:
    """Recommends from one catalogue with one model; what depends on the catalogue alone is prepared once.

    Args:
        trie: over the table the model was trained with, `joint_ids` of several.
    Raises:
        UserError: the trie is of another table.
    """

    def __init__(self, model: ParallelTiger, trie: Trie) -> None:
        if tuple(trie.sizes) != tuple(model.sizes):
            raise UserError(
                f"parallel search: got a trie of codes {tuple(trie.sizes)} for a model of {tuple(model.sizes)}, "
                "expected the same; build it from the table the model was trained with"
            )
        self.model = model
        self.trie = trie
        self.ranking: LeafRanking | None = None

    @torch.no_grad()
    def __call__(
        self,
        batch: SequenceBatch,
        k: int,
        config: BeamSearchConfig,
        *,
        decoding: Decoding | None = None,
        allowed: ItemFilter | None = None,
        exclude_history: bool = False,
    ) -> BeamResult:
        """The k best items of each request, as `beam.beam_search` returns them.

        Args:
            config: "exact" reads temperature, length_normalize, stochastic, seed and verify; it needs no widths, and
                what it returns is certified.
            decoding: instead of the model's own `parallel_tiger.decoding`.
        Raises:
            UserError: settings that do not fit each other or the model.
        """
        decoding = self.model.config.decoding if decoding is None else decoding
        if decoding == "exact":
            return self._exact(batch, k, config, allowed, exclude_history)
        if self.model.config.modality_merge != "joint":
            raise UserError(
                f"parallel_tiger.modality_merge: got {self.model.config.modality_merge!r}, expected 'joint' with "
                f"decoding {decoding!r}"
            )
        model: GenerativeModel[Any] = self.model
        if decoding == "autoregressive":
            if self.model.config.training_mode != "masked":
                raise UserError(
                    "parallel_tiger.decoding: got 'autoregressive', expected 'exact' or 'beam' for a model of "
                    "training_mode 'standard'"
                )
            model = LeftToRight(self.model)
        return beam_search(model, batch, self.trie, k, config, allowed=allowed, exclude_history=exclude_history)

    def _exact(
        self, batch: SequenceBatch, k: int, config: BeamSearchConfig, allowed: ItemFilter | None, exclude_history: bool
    ) -> BeamResult:
        merge = self.model.config.modality_merge
        self._check(k, config)
        wanted = k
        if exclude_history and (config.stochastic or merge == "published"):
            # What is drawn, or listed, depends on what may be.
            allowed = excluded_history(self.trie, batch, allowed)
        elif exclude_history and batch.size:
            wanted = k + int(batch.lengths_B.max())
        temperatures = config.temperatures_for(len(self.model.sizes))
        logits = self.model.level_logits(batch)
        log_probs = [
            (logits_BC.float() / temperature).log_softmax(-1)
            for logits_BC, temperature in zip(logits, temperatures, strict=True)
        ]
        if self.ranking is None:
            self.ranking = LeafRanking(self.trie, self.model.table.modalities, merge)
        keys_B1 = request_keys(batch, config.seed) if config.stochastic else None
        ranked = self.ranking(log_probs, wanted, allowed, keys_B1)
        divisor = config.divisor(len(logits))
        result = result_of(self._beams(ranked), self.trie, wanted, allowed, divisor, searched=False)
        if wanted > k:
            result = _without_history(result, batch, k)
        if config.verify:
            verify(result, self.model, batch, self.trie, config, allowed=allowed)
        return result

    def _check(self, k: int, config: BeamSearchConfig) -> None:
        merge = self.model.config.modality_merge
        if k < 1:
            raise UserError(f"parallel search: got k {k}, expected at least 1")
        if config.normalization != "vocabulary":
            raise UserError(
                "beam_search.normalization: got 'legal', expected 'vocabulary' with decoding 'exact'; try 'beam'"
            )
        if merge != "joint" and config.length_normalize:
            raise UserError(f"beam_search.length_normalize: got True, expected False with modality_merge {merge!r}")
        if merge != "joint" and config.verify:
            raise UserError(f"beam_search.verify: got True, expected False with modality_merge {merge!r}")
        if merge == "published" and config.stochastic:
            raise UserError("beam_search.stochastic: got True, expected False with modality_merge 'published'")

    def _beams(self, ranked: RankedLeaves) -> Beams:
        leaves_BK = ranked.leaves_BK
        own_BK = torch.arange(leaves_BK.shape[1], device=leaves_BK.device).expand_as(leaves_BK)
        codes = self.trie.leaf_codes()[leaves_BK].unbind(-1)
        given_up = -math.inf if ranked.exact else math.inf
        pruned_B = torch.full_like(ranked.scores_BK[:, 0], given_up)
        ancestors = (own_BK,) * len(codes)
        return Beams(leaves_BK, ranked.scores_BK, pruned_B, tuple(codes), ancestors, noisy_BM=ranked.noisy_BK)


def _without_history(result: BeamResult, batch: SequenceBatch, k: int) -> BeamResult:
    """The first k results that are not in the request's own history, of a list that much longer.

    Costs the extra results instead of a mask of the whole catalogue for each request.
    """
    items_BX = result.items_BK
    rows_B1 = torch.arange(batch.size, device=items_BX.device)[:, None]
    beyond = torch.stack([items_BX.max(), batch.item_ids_T.max()]).max() + 1 if len(batch.item_ids_T) else 1
    seen_BX = torch.isin(rows_B1 * beyond + items_BX, batch.rows_T() * beyond + batch.item_ids_T)
    dropped_BX = seen_BX | ~result.valid_BK
    order_BK = dropped_BX.to(torch.int8).argsort(dim=1, stable=True)[:, :k]
    gone_BK = dropped_BX.gather(1, order_BK)
    codes_BKL = result.codes_BKL.gather(1, order_BK[..., None].expand(-1, -1, result.codes_BKL.shape[-1]))
    return BeamResult(
        items_BX.gather(1, order_BK).masked_fill(gone_BK, 0),
        codes_BKL.masked_fill(gone_BK[..., None], -1),
        result.scores_BK.gather(1, order_BK).masked_fill(gone_BK, -math.inf),
        (~gone_BK).sum(1),
        result.exact_B,
        result.gap_B,
        result.width_B,
    )
