"""Beam search over semantic IDs, for any model: batched, constrained by a trie, with a proof of its own result.

All requests and beams advance together, a level a step: the model's logits, the exact best among all legal
continuations of all beams (`Trie.step`), and an index that says where each beam came from. What the model stored for
beams is never moved; it is reached through that index. No step waits for the device, and shapes depend on the batch,
the widths and k alone.

A prefix's score only falls as codes are added. So whatever is below a prefix that was given up scores at most as much
as that prefix, and a list whose K-th score is higher than all of these is the exact top-K of the catalogue. NVIDIA's
SID-GR searches without a trie, and STATIC (arXiv 2602.22647) keeps only some children of every beam; neither tells a
request whose list is complete from one whose list is not.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.errors import UserError
from generative_recommenders.generative.beam_config import BeamSearchConfig
from generative_recommenders.generative.beam_items import excluded_history, result_of
from generative_recommenders.generative.beam_result import BeamResult
from generative_recommenders.generative.beam_sampling import request_keys
from generative_recommenders.generative.beam_steps import Beams, Step
from generative_recommenders.generative.beam_verification import verify
from generative_recommenders.generative.decoding import Context, GenerativeModel
from generative_recommenders.generative.trie import ItemFilter, Trie

C = TypeVar("C", bound=Context)

# A round of `certify` is so many times as wide as the one before.
_WIDER = 4


@torch.no_grad()
def beam_search(
    model: GenerativeModel[C],
    batch: SequenceBatch,
    trie: Trie,
    k: int,
    config: BeamSearchConfig,
    *,
    allowed: ItemFilter | None = None,
    exclude_history: bool = False,
    context: C | None = None,
) -> BeamResult:
    """The K best items of each request under the model.

    Args:
        batch: histories of B requests, on the device of model and trie.
        k: results a request, at least 1; more than there are items is all of them.
        allowed: which items may be returned, for all requests or for each. With `exclude_history` none of a request's
            own history is.
        context: what `model.begin(batch)` returned, where it is at hand.
    Raises:
        UserError: k, a list of widths or temperatures, or the trie does not fit.
        InternalError: `config.verify` found a wrong result.
    """
    if k < 1:
        raise UserError(f"beam search: got k {k}, expected at least 1")
    if tuple(trie.sizes) != tuple(model.sizes):
        raise UserError(
            f"beam search: got a trie of codes {tuple(trie.sizes)} for a model of {tuple(model.sizes)}, expected the "
            "same; build it from the table the model was trained with"
        )
    if exclude_history:
        allowed = excluded_history(trie, batch, allowed)
    keys_B1 = request_keys(batch, config.seed) if config.stochastic else None
    rows = torch.arange(batch.size, device=batch.user_ids_B.device)
    # A context of the caller's stays as it is.
    context = model.begin(batch) if context is None else context.select(rows)
    result = _search(model, context, rows, trie, k, config, allowed, keys_B1)
    if config.certify:
        result = _certified(model, context, trie, k, config, allowed, result)
    if config.verify:
        verify(result, model, batch, trie, config, allowed=allowed)
    return result


def _search(
    model: GenerativeModel[C],
    context: C,
    rows: Tensor,
    trie: Trie,
    k: int,
    config: BeamSearchConfig,
    allowed: ItemFilter | None,
    keys_B1: Tensor | None = None,
) -> BeamResult:
    """One search at the widths of `config`; `context` and `allowed` are those of the requests `rows` alone."""
    step = Step(trie, allowed, config.constrained, config.normalization, config.stochastic)
    temperatures = config.temperatures_for(len(trie.sizes))
    beams = Beams.start(trie, rows, keys_B1)
    for level, width in enumerate(_widths(config, trie, k)):
        logits_BMC = model.logits(context, level, beams.tokens_BM, beams.ancestors).float()
        if temperatures[level] != 1.0:
            logits_BMC = logits_BMC / temperatures[level]
        beams = step(beams, logits_BMC, width)
    return result_of(beams, trie, k, allowed, config.divisor(len(trie.sizes)))


def _certified(
    model: GenerativeModel[C],
    context: C,
    trie: Trie,
    k: int,
    config: BeamSearchConfig,
    allowed: ItemFilter | None,
    result: BeamResult,
) -> BeamResult:
    """Search requests without a proof again, wider each round, within the budget. Waits for the device once a round."""
    left, widths = config.budget, _widths(config, trie, k)
    while True:
        config = config.widened(_WIDER)
        wider = _widths(config, trie, k)
        # What is kept at the last level is not shown to the model any more.
        left -= sum(wider[:-1])
        rows = (~result.exact_B).nonzero()[:, 0]
        if left < 0 or wider == widths or not rows.numel():
            return result
        own = None if allowed is None else allowed.select(rows)
        again = _search(model, context.select(rows), rows, trie, k, config, own)
        result, widths = result.replaced(rows, again), wider


def _widths(config: BeamSearchConfig, trie: Trie, k: int) -> tuple[int, ...]:
    return config.widths_for(trie.sizes, k, tuple(len(tokens_E) for tokens_E in trie.tokens))
