"""Checks of a search's results against the model, by other means than the search's own."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.generative.beam_config import BeamSearchConfig
from generative_recommenders.generative.beam_result import BeamResult
from generative_recommenders.generative.decoding import Context, GenerativeModel
from generative_recommenders.generative.scoring import path_scores
from generative_recommenders.generative.trie import ItemFilter, Trie

C = TypeVar("C", bound=Context)


class InternalError(AssertionError):
    """A result that cannot be right: a defect of this project, not a mistake of its user."""


def verify(
    result: BeamResult,
    model: GenerativeModel[C],
    batch: SequenceBatch,
    trie: Trie,
    config: BeamSearchConfig,
    *,
    allowed: ItemFilter | None = None,
) -> None:
    """Check padding, distinctness, legality, order and, by teacher forcing, the score of every result.

    Raises:
        InternalError: the first result that fails, by request and place.
    """
    valid_BK = result.valid_BK
    codes_BKL = torch.where(valid_BK[..., None], result.codes_BKL, 0)
    padding_BK = (result.items_BK == 0) & (result.codes_BKL == -1).all(-1) & result.scores_BK.isneginf()
    _require(torch.where(valid_BK, ~result.scores_BK.isneginf(), padding_BK), "valid_count", result)
    _require(~valid_BK | ~_repeated(result.items_BK), "item returned twice", result)
    _require(~valid_BK | trie.holds(codes_BKL, result.items_BK, allowed=allowed), "item that is not allowed", result)
    falling_BK = torch.ones_like(valid_BK)
    falling_BK[:, 1:] = result.scores_BK[:, 1:] <= result.scores_BK[:, :-1]
    _require(falling_BK, "score above the one before", result)
    scores_BK = path_scores(model, batch, codes_BKL, trie, config, allowed=allowed) / config.divisor(len(trie.sizes))
    near_BK = (scores_BK - result.scores_BK).abs() <= config.verify_tolerance * result.scores_BK.abs().clamp(min=1.0)
    _require(~valid_BK | near_BK, "score that teacher forcing does not give", result, scores_BK)


def _repeated(items_BK: Tensor) -> Tensor:
    """Which places hold an item that an earlier place holds."""
    same_BKK = items_BK[:, :, None] == items_BK[:, None, :]
    return same_BKK.tril(-1).any(-1)


def _require(holds_BK: Tensor, what: str, result: BeamResult, expected_BK: Tensor | None = None) -> None:
    if bool(holds_BK.all()):
        return
    request, place = (int(x) for x in (~holds_BK).nonzero()[0])
    expected = "" if expected_BK is None else f", expected score {float(expected_BK[request, place])}"
    raise InternalError(
        f"beam search: request {request}, result {place}: {what}: got item {int(result.items_BK[request, place])}, "
        f"codes {result.codes_BKL[request, place].tolist()}, score {float(result.scores_BK[request, place])}, "
        f"{int(result.valid_count_B[request])} valid results{expected}"
    )
