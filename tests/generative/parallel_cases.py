"""Small Parallel TIGERs, tables and brute force for their tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.generative.beam_config import BeamSearchConfig
from generative_recommenders.generative.beam_result import BeamResult
from generative_recommenders.generative.parallel_config import ParallelTigerConfig
from generative_recommenders.generative.parallel_tiger import ParallelTiger
from generative_recommenders.generative.tokens import IdTable
from generative_recommenders.generative.trie import Trie
from generative_recommenders.tokenizers.semantic_ids import SemanticIds

ITEMS = 30
SMALL: dict[str, Any] = {
    "num_encoder_layers": 1,
    "num_decoder_layers": 2,
    "dim": 16,
    "num_heads": 2,
    "dkv": 8,
    "ffn_hidden_dim": 32,
    "dropout_rate": 0.0,
}
MASKED: dict[str, Any] = {"training_mode": "masked"}
COVERING = BeamSearchConfig(widths=4096)


def ids_of(seed: int = 0, sizes: tuple[int, ...] = (4, 5, 3), items: int = ITEMS, **facts: Any) -> SemanticIds:
    """Random codes of the items 1 to `items`; with the small sizes several items share a tuple."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.stack([torch.randint(size, (items,), generator=generator) for size in sizes], 1)
    return SemanticIds.of(torch.arange(1, items + 1), codes, sizes, **facts)


def trie_of(ids: SemanticIds) -> Trie:
    return Trie.build(ids.codes_NL, ids.sizes, ids.item_ids_N, ids.active_N)


def model_of(*tables: SemanticIds, seed: int = 0, **settings: Any) -> ParallelTiger:
    torch.manual_seed(seed)
    config = ParallelTigerConfig(**(SMALL | settings))
    model = ParallelTiger(config, IdTable(*(tables or (ids_of(),)))).eval()
    # Wide enough that lists differ from request to request.
    with torch.no_grad():
        for matrix in model.heads.matrices:
            matrix.mul_(50.0)
    return model


def rows_of(result: BeamResult, row: int) -> list[tuple[int, float]]:
    count = int(result.valid_count_B[row])
    return list(zip(result.items_BK[row, :count].tolist(), result.scores_BK[row, :count].tolist(), strict=True))


def assert_same(found: BeamResult, expected: BeamResult) -> None:
    assert torch.equal(found.valid_count_B, expected.valid_count_B)
    torch.testing.assert_close(found.scores_BK, expected.scores_BK, atol=1e-5, rtol=0)
    assert torch.equal(found.items_BK, expected.items_BK)
    assert torch.equal(found.codes_BKL, expected.codes_BKL)


def log_probs_of(model: ParallelTiger, batch: SequenceBatch, temperature: float = 1.0) -> list[Tensor]:
    with torch.no_grad():
        return [(logits / temperature).log_softmax(-1) for logits in model.level_logits(batch)]


def brute_force(
    ids: SemanticIds, log_probs: list[Tensor], row: int, k: int, without: frozenset[int] = frozenset()
) -> list[tuple[int, float]]:
    """Items in Python: by score, then by codes, then by id."""
    scored = []
    for item, codes, active in zip(ids.item_ids_N.tolist(), ids.codes_NL.tolist(), ids.active_N.tolist(), strict=True):
        score = sum(float(level[row, code]) for level, code in zip(log_probs, codes, strict=True))
        if active and item not in without:
            scored.append((-round(score, 4), codes, item, score))
    return [(item, score) for _, _, item, score in sorted(scored)[:k]]


def modalities(seed: int = 0) -> tuple[SemanticIds, SemanticIds]:
    """Two tables of which the second lacks some items and has others."""
    second = ids_of(seed + 50, (6, 2))
    return ids_of(seed), SemanticIds.of(second.item_ids_N + 4, second.codes_NL, second.sizes)


def modality_scores(joint: SemanticIds, log_probs: list[Tensor], row: int) -> list[dict[int, float]]:
    """Sum of log-probabilities of each modality's own ID, by item."""
    codes = dict(zip(joint.item_ids_N.tolist(), joint.codes_NL.tolist(), strict=True))
    return [
        {item: sum(float(log_probs[level][row, own[level]]) for level in levels) for item, own in codes.items()}
        for levels in (range(3), range(3, 5))
    ]
