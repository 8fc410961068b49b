"""Beam search with the models themselves equals the reference beam over tables of what teacher forcing gives."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.generative.beam import beam_search
from generative_recommenders.generative.beam_config import BeamSearchConfig
from generative_recommenders.generative.parallel_config import ParallelTigerConfig
from generative_recommenders.generative.parallel_tiger import ParallelTiger
from generative_recommenders.generative.scoring import exhaustive
from generative_recommenders.generative.sid_gr import SIDGR
from generative_recommenders.generative.sid_gr_config import SIDGRConfig
from generative_recommenders.generative.tiger import Tiger, TigerConfig
from generative_recommenders.generative.tokens import IdTable
from generative_recommenders.tokenizers.semantic_ids import SemanticIds
from tests.generative.beam_cases import Reference, TableModel, batch_of, leaves_of, random_ids, trie_of

MAX_ITEMS = 6


def tiger(ids: SemanticIds) -> nn.Module:
    shape = {"num_encoder_layers": 2, "num_decoder_layers": 2, "dim": 16, "num_heads": 2, "dkv": 8}
    return Tiger(TigerConfig(**shape, ffn_hidden_dim=24, user_tokens=5), IdTable(ids))


def parallel_tiger(ids: SemanticIds) -> nn.Module:
    shape = {"num_encoder_layers": 2, "num_decoder_layers": 2, "dim": 16, "num_heads": 2, "dkv": 8}
    return ParallelTiger(ParallelTigerConfig(**shape, ffn_hidden_dim=24), IdTable(ids))


def sid_gr(backbone: str) -> Callable[[SemanticIds], nn.Module]:
    def make(ids: SemanticIds) -> nn.Module:
        config: Any = {"dim": 16, "num_blocks": 2, "num_heads": 2, "ffn_hidden_dim": 24}
        return SIDGR(SIDGRConfig(backbone=backbone, **config), IdTable(ids), MAX_ITEMS)

    return make


HEADS = {
    "TIGER": tiger,
    "ParallelTIGER": parallel_tiger,
    "SIDGR-transformer": sid_gr("transformer"),
    "SIDGR-sasrec": sid_gr("sasrec"),
    "SIDGR-hstu": sid_gr("hstu"),
}


def far_from_the_start(model: nn.Module, generator: torch.Generator) -> Any:
    """Weights of a size that makes every part of the model matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def table_of(model: Any, batch: SequenceBatch) -> TableModel:
    """The model's own probabilities of all codes after all prefixes, a user a row of the batch."""
    sizes = tuple(model.sizes)
    every = torch.tensor(list(itertools.product(*(range(size) for size in sizes))))
    with torch.no_grad():
        log_probs = model.teacher_forced(batch, every.expand(batch.size, -1, -1).contiguous()).float()
    tables = TableModel(sizes, 1, torch.Generator())
    tables.tables = [
        log_probs[:, :: math.prod(sizes[level + 1 :]), level].reshape(batch.size, -1, size)
        for level, size in enumerate(sizes)
    ]
    return tables


def histories_of(ids: SemanticIds, generator: torch.Generator, lengths: Sequence[int]) -> list[list[int]]:
    return [ids.item_ids_N[torch.randint(len(ids), (length,), generator=generator)].tolist() for length in lengths]


@pytest.mark.parametrize("head", HEADS)
def test_equals_the_reference_beam_and_where_proven_the_whole_catalogue(head: str) -> None:
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        ids = random_ids(generator, levels=3, size=4, items=30)
        torch.manual_seed(seed)
        model, trie = far_from_the_start(HEADS[head](ids), generator), trie_of(ids)
        histories = histories_of(ids, generator, [3, 0, 6, 1])
        batch, k = batch_of(range(4), histories), 5
        tables = table_of(model, batch)
        for number, widths in enumerate([(1, 2, 2), (3, 2, 5), (64, 64, 64)]):
            constrained, legal = number != seed % 3, seed % 2 == 1 and number != seed % 3
            temperature = (1.0, 1.0, 1.0) if seed % 4 else (0.5, 2.0, 1.0)
            config = BeamSearchConfig(
                widths=widths,
                constrained=constrained,
                normalization="legal" if legal else "vocabulary",
                temperature=temperature,
                verify=True,
            )
            result = beam_search(model, batch, trie, k, config)
            whole = exhaustive(model, batch, trie, k, config, chunk=9)
            reference = Reference(tables, leaves_of(ids), constrained, legal, temperature)
            for user in range(4):
                expected, count = reference.beam(user, widths, k), int(result.valid_count_B[user])
                assert result.items_BK[user, :count].tolist() == [item for item, _, _ in expected.results]
                scores = torch.tensor([score for _, _, score in expected.results])
                torch.testing.assert_close(result.scores_BK[user, :count], scores, atol=1e-5, rtol=1e-5)
                if result.exact_B[user]:
                    assert torch.equal(result.items_BK[user], whole.items_BK[user])
            assert widths[0] < 64 or result.exact_B.all()


@pytest.mark.parametrize("head", HEADS)
def test_requests_do_not_depend_on_batch_or_padding_and_certify_proves_them_all(head: str) -> None:
    generator = torch.Generator().manual_seed(5)
    ids = random_ids(generator, levels=3, size=6, items=60)
    torch.manual_seed(5)
    model, trie = far_from_the_start(HEADS[head](ids), generator), trie_of(ids)
    histories = histories_of(ids, generator, [2, 5, 0, 6, 1])
    config = BeamSearchConfig(widths=(2, 3, 4), certify=True, verify=True)
    whole = beam_search(model, batch_of(range(5), histories), trie, 4, config, exclude_history=True)
    assert whole.exact_B.all()
    for row, history in enumerate(histories):
        assert not set(whole.items_BK[row].tolist()) & set(history)
    for order in ([3, 1, 0, 4, 2], [1, 2], [2]):
        part = beam_search(
            model, batch_of(order, [histories[row] for row in order]), trie, 4, config, exclude_history=True
        )
        assert torch.equal(part.items_BK, whole.items_BK[order])
        torch.testing.assert_close(part.scores_BK, whole.scores_BK[order], atol=1e-5, rtol=1e-5)
