"""Scores of given semantic IDs by teacher forcing, and from them the exact top-K of a whole catalogue.

The search never uses these: they are what it is held against, and on a small catalogue they are the simpler answer.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.errors import UserError
from generative_recommenders.generative.beam_config import BeamSearchConfig
from generative_recommenders.generative.beam_items import excluded_history, leaf_order, result_of
from generative_recommenders.generative.beam_result import BeamResult
from generative_recommenders.generative.beam_steps import Beams, legal_log_softmax
from generative_recommenders.generative.decoding import Context, GenerativeModel
from generative_recommenders.generative.trie import ItemFilter, Trie

C = TypeVar("C", bound=Context)


@torch.no_grad()
def path_scores(
    model: GenerativeModel[C],
    batch: SequenceBatch,
    codes_BKL: Tensor,
    trie: Trie,
    config: BeamSearchConfig,
    *,
    allowed: ItemFilter | None = None,
) -> Tensor:
    """Sums of the log-probabilities of K semantic IDs a request as `config` defines them: float32 (B, K).

    Plain probabilities come from `model.teacher_forced`. Temperatures and probabilities over legal codes need all
    logits of a level: the K IDs are then fed to `model.logits` as K beams that never change places.
    """
    temperatures = config.temperatures_for(len(model.sizes))
    if config.normalization == "vocabulary" and set(temperatures) == {1.0}:
        return model.teacher_forced(batch, codes_BKL).float().sum(-1)
    size, count, _ = codes_BKL.shape
    context = model.begin(batch)
    own_BK = torch.arange(count, device=codes_BKL.device).expand(size, count)
    states_BK = trie.root(size, codes_BKL.device).expand(size, count)
    scores_BK = torch.zeros(size, count, device=codes_BKL.device)
    tokens_BK: Tensor | None = None
    for level, temperature in enumerate(temperatures):
        logits_BKC = model.logits(context, level, tokens_BK, (own_BK,) * level).float() / temperature
        logits_BKC = logits_BKC.expand(size, count, -1)
        if config.normalization == "legal":
            log_probs_BKC = legal_log_softmax(logits_BKC, trie.mask(states_BK, level, allowed=allowed))
        else:
            log_probs_BKC = logits_BKC.log_softmax(-1)
        tokens_BK = codes_BKL[..., level].contiguous()
        scores_BK = scores_BK + log_probs_BKC.gather(-1, tokens_BK[..., None])[..., 0]
        states_BK = trie.advance(states_BK, tokens_BK, level)
    return scores_BK


@torch.no_grad()
def exhaustive(
    model: GenerativeModel[C],
    batch: SequenceBatch,
    trie: Trie,
    k: int,
    config: BeamSearchConfig | None = None,
    *,
    allowed: ItemFilter | None = None,
    exclude_history: bool = False,
    chunk: int = 4096,
) -> BeamResult:
    """The exact top-K of each request: every semantic ID of the catalogue is scored, `chunk` at a time.

    `config` matters for its normalization, temperature and length_normalize. Same results, in the same order, as
    `beam_search` where that is exact.

    Raises:
        UserError: k or chunk below 1, or temperatures that do not fit the levels.
    """
    config = BeamSearchConfig() if config is None else config
    if k < 1 or chunk < 1:
        raise UserError(f"exhaustive search: got k {k} and chunk {chunk}, expected at least 1")
    if exclude_history:
        allowed = excluded_history(trie, batch, allowed)
    device = batch.user_ids_B.device
    leaves_NL = trie.leaf_codes()
    best_states_BM = torch.empty(batch.size, 0, dtype=torch.int64, device=device)
    best_scores_BM = torch.empty(batch.size, 0, device=device)
    for first in range(0, len(leaves_NL), chunk):
        codes_BKL = leaves_NL[first : first + chunk].expand(batch.size, -1, -1)
        scores_BK = path_scores(model, batch, codes_BKL, trie, config, allowed=allowed)
        states_BK = torch.arange(first, first + codes_BKL.shape[1], device=device).expand_as(scores_BK)
        empty_BK = trie.item_counts(states_BK, allowed=allowed) == 0
        best_scores_BM = torch.cat([best_scores_BM, scores_BK.masked_fill(empty_BK, -math.inf)], dim=1)
        best_states_BM = torch.cat([best_states_BM, states_BK], dim=1)
        order_BM = leaf_order(best_scores_BM, best_states_BM)[:, :k]
        best_scores_BM, best_states_BM = best_scores_BM.gather(1, order_BM), best_states_BM.gather(1, order_BM)
    codes_BML = leaves_NL[best_states_BM]
    own_BM = torch.arange(best_states_BM.shape[1], device=device).expand_as(best_states_BM)
    beams = Beams(
        best_states_BM,
        best_scores_BM,
        torch.full((batch.size,), -math.inf, device=device),
        tuple(codes_BML.unbind(-1)),
        (own_BM,) * len(trie.sizes),
    )
    return result_of(beams, trie, k, allowed, config.divisor(len(trie.sizes)), searched=False)
