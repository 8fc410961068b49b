"""Scores of tokens and drawn items under any similarity, a block of tokens at a time.

Items are projected once a step, not once a pair: with 128 negatives a token a step has more pairs than a catalogue has
items. Only the projected features are gathered for the pairs of a block, and gathered again in backward.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from generative_recommenders.nn.dropout import Draws
from generative_recommenders.nn.outputs import l2_normalize
from generative_recommenders.similarity.dot import AuxiliaryLosses, Features, Similarity

# Numbers that the gathered features of a block may hold: 128 MB in fp32.
_BLOCK_NUMBERS = 1 << 25


def drawn_items(
    ids_TR: Tensor, table_VD: Tensor, similarity: Similarity, draws: Draws, l2_eps: float | None
) -> tuple[Features, Tensor]:
    """Features of the items that occur in `ids_TR`, and where in them each occurrence is, (T, R).

    l2_eps: of the items' L2 norm, None leaves embeddings as they are.
    """
    if ids_TR.numel() >= table_VD.shape[0]:
        rows, places_TR = torch.arange(table_VD.shape[0], device=ids_TR.device), ids_TR
        embeddings = table_VD
    else:
        rows, places_TR = torch.unique(ids_TR, return_inverse=True)
        embeddings = F.embedding(rows, table_VD)
    if l2_eps is not None:
        embeddings = l2_normalize(embeddings, l2_eps)
    return similarity.project_items(embeddings, rows, draws), places_TR


def gathered(features: Features, places: Tensor) -> Features:
    """Features (T, R, ...) of the items at `places` (T, R)."""
    return tuple(F.embedding(places, f.flatten(1)).unflatten(-1, f.shape[1:]) for f in features)


def pair_scores(queries: Features, items: Features, places_TR: Tensor, similarity: Similarity, draws: Draws) -> Tensor:
    """Scores (T, R) of each token with its own items."""
    width = places_TR.shape[1] * sum(f[0].numel() for f in items if len(f))
    size = max(1, _BLOCK_NUMBERS // max(width, 1))
    count = len(queries)

    def block(places: Tensor, keys: Tensor, *features: Tensor) -> Tensor:
        own = gathered(features[count:], places)
        return similarity.score(features[:count], own, Draws(draws.seed, keys))

    return in_blocks(block, size, (places_TR, draws.keys_T, *queries), items)


def positive_losses(
    queries: Features, items: Features, places_T1: Tensor, similarity: Similarity, draws: Draws
) -> AuxiliaryLosses:
    """The similarity's losses of queries and positives, in training."""
    return similarity.pair_losses(queries, gathered(items, places_T1), draws) if similarity.training else {}


def in_blocks(
    function: Callable[..., Tensor], size: int, sliced: tuple[Tensor, ...], shared: tuple[Tensor, ...]
) -> Tensor:
    """`function(*slices, *shared)` of each `size` rows of the tensors `sliced`, recomputed in backward, laid end to
    end."""
    blocks = zip(*(t.split(size) for t in sliced), strict=True)
    # Everything random is keyed: there is no state of a generator to keep.
    parts = [checkpoint(function, *block, *shared, use_reentrant=False, preserve_rng_state=False) for block in blocks]
    return torch.cat(parts)
