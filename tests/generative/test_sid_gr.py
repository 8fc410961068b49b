"""SID-GR: decoding, teacher forcing and the whole sequence computed at once agree; what it reads and learns."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.errors import UserError
from generative_recommenders.generative.beam import beam_search
from generative_recommenders.generative.beam_config import BeamSearchConfig
from generative_recommenders.generative.decoding import Context
from generative_recommenders.generative.sid_gr import SIDGR
from generative_recommenders.generative.sid_gr_config import SIDGRConfig
from generative_recommenders.generative.sid_gr_tokens import flatten, longest_row
from generative_recommenders.generative.tokens import IdTable
from generative_recommenders.generative.trie import Trie
from generative_recommenders.tokenizers.semantic_ids import SemanticIds

SIZES = (4, 3, 5)
ITEMS = 30
MAX_ITEMS = 6
BACKBONES = ("transformer", "sasrec", "hstu")


def ids(sizes: Sequence[int] = SIZES, items: int = ITEMS) -> SemanticIds:
    """Distinct codes for the items 1, 2, ..."""
    every = torch.tensor(list(itertools.product(*(range(size) for size in sizes))))
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(3))
    return SemanticIds.of(list(range(1, items + 1)), every[order[:items]], sizes)


def batch_of(rows: Sequence[Sequence[int]], first_row: int = 0) -> SequenceBatch:
    """Rows of item ids, target last, with times that depend on the row's items alone."""
    stamps = [
        torch.randint(1, 10**6, (len(row),), generator=torch.Generator().manual_seed(sum(row))).cumsum(0)
        for row in rows
    ]
    items, none = [torch.tensor(row) for row in rows], torch.zeros(len(rows), dtype=torch.int64)
    return SequenceBatch(
        item_ids_T=torch.cat([row[:-1] for row in items]),
        ratings_T=torch.cat([torch.zeros_like(row[:-1]) for row in items]),
        timestamps_T=torch.cat([row[:-1] for row in stamps]),
        next_item_ids_T=torch.cat([row[1:] for row in items]),
        next_timestamps_T=torch.cat([row[1:] for row in stamps]),
        offsets=torch.tensor([0, *(len(row) - 1 for row in rows)]).cumsum(0),
        user_ids_B=torch.arange(len(rows)) + 1,
        target_ids_B=torch.stack([row[-1] for row in items]),
        target_ratings_B=none,
        target_timestamps_B=torch.stack([row[-1] for row in stamps]),
        row_numbers_B=torch.arange(len(rows)) + first_row,
    )


ROWS = [[3, 7, 11, 2], [9], [1, 2, 3, 4, 5, 6, 7], [20, 21], [30, 29, 28, 8, 12]]


def model_of(
    backbone: str = "hstu", *, table: SemanticIds | None = None, max_items: int = MAX_ITEMS, **changes
) -> SIDGR:
    """A small model with weights far from where they start, so that every part of it matters."""
    settings = {"dim": 16, "num_blocks": 2, "num_heads": 2, "ffn_hidden_dim": 24, "dropout_rate": 0.0, **changes}
    torch.manual_seed(0)
    model = SIDGR(SIDGRConfig(backbone=backbone, **settings), IdTable(table or ids()), max_items)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def explicit(model: SIDGR, history: list[int], times: list[int], query_time: int, codes: list[int]) -> Tensor:
    """log p(code | codes before it) of one candidate, its whole sequence spelled out token by token."""
    config, levels = model.config, len(model.sizes)
    table = {item: row.tolist() for item, row in zip(range(1, ITEMS + 1), ids().codes_NL, strict=True)}
    history, times = history[-model.max_items :], times[-model.max_items :]
    items = [table[item] for item in history] + [codes]
    stamps = [*times, query_time]
    learned = len(items) if config.loss_on == "all" else 1 if config.loss_on == "last" else config.loss_on
    vectors, keys, queries, marks = [], [], [], []
    for place, (item, stamp) in enumerate(zip(items, stamps, strict=True)):
        last = place == len(items) - 1
        position = 0 if model.position_embedding is None else model.position_embedding[place]
        if place >= len(items) - learned:
            if last:
                marks.append(len(vectors))
            before = 0
            if config.items_at_bos and place:
                before = sum(model.tokens.table[sum(model.sizes[:k]) + c] for k, c in enumerate(items[place - 1]))
                before = before + (0 if model.item_embedding is None else model.item_embedding[history[place - 1]])
            vectors.append(model.tokens.bos + before + position)
            keys.append(stamp)
            queries.append(stamp)
        for level, code in enumerate(item[: levels - 1] if last else item):
            if last:
                marks.append(len(vectors))
            embedded = model.tokens.table[sum(model.sizes[:level]) + code]
            levelled = 0 if model.level_embedding is None else model.level_embedding[level]
            own = model.item_embedding if level == levels - 1 else None
            vectors.append(embedded + levelled + position + (0 if own is None else own[history[place]]))
            keys.append(stamp)
            queries.append(stamps[place + 1] if level == levels - 1 else stamp)
    if not config.time_bias:
        keys, queries = [0] * len(keys), [0] * len(queries)
    count = len(vectors)
    none = torch.zeros(count, dtype=torch.int64)
    rows = dataclasses.replace(
        batch_of([[1]]),
        item_ids_T=none,
        timestamps_T=torch.tensor(keys),
        next_timestamps_T=torch.tensor(queries),
        next_item_ids_T=none,
        ratings_T=none,
        offsets=torch.tensor([0, count]),
    )
    scale = config.dim**0.5 if config.scale_inputs else 1.0
    states = model.output_norm(model.backbone(scale * torch.stack(vectors), rows, None))[marks]
    found = [model.heads.logits(level, states[level]).log_softmax(-1)[code] for level, code in enumerate(codes)]
    return torch.stack(found)


def all_explicit(model: SIDGR, batch: SequenceBatch, codes_BKL: Tensor) -> Tensor:
    found = []
    for b in range(batch.size):
        span = slice(int(batch.offsets[b]), int(batch.offsets[b + 1]))
        history, times = batch.item_ids_T[span].tolist(), batch.timestamps_T[span].tolist()
        time = int(batch.target_timestamps_B[b])
        found.append(torch.stack([explicit(model, history, times, time, c) for c in codes_BKL[b].tolist()]))
    return torch.stack(found)


def decoded(model: SIDGR, batch: SequenceBatch, codes_BKL: Tensor, generator: torch.Generator) -> Tensor:
    """The same, step by step, over beams that branch and change places: a level's beams hold its prefixes in an order
    of their own, each once or more."""
    size, count, levels = codes_BKL.shape
    context = model.begin(batch)
    assert isinstance(context, Context)
    found = []
    # Which candidate a beam stands for; the number of beams differs from level to level.
    owner = torch.zeros(size, 1, dtype=torch.int64)
    ancestors: list[Tensor] = []
    tokens = None
    for level in range(levels):
        log_probs = model.logits(context, level, tokens, ancestors).log_softmax(-1)
        assert log_probs.shape == (size, owner.shape[1], model.sizes[level])
        if level == 0:
            beam_of = torch.zeros(size, count, dtype=torch.int64)
        else:
            beam_of = torch.stack([(owner == k).int().argmax(1) for k in range(count)], 1)
        rows = log_probs.gather(1, beam_of[..., None].expand(-1, -1, model.sizes[level]))
        found.append(rows.gather(-1, codes_BKL[..., level, None])[..., 0])
        extra = torch.randint(count, (size, level + 1), generator=generator)
        order = [torch.cat([torch.randperm(count, generator=generator), extra[b]]) for b in range(size)]
        previous = beam_of
        owner = torch.stack(order)
        tokens = codes_BKL[..., level].gather(1, owner)
        moved = previous.gather(1, owner)
        ancestors = [index.gather(1, moved) for index in ancestors]
        ancestors.append(torch.arange(owner.shape[1]).expand(size, -1))
    return torch.stack(found, -1)


def candidates(size: int, count: int, sizes: Sequence[int] = SIZES) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.stack([torch.randint(n, (size, count), generator=generator) for n in sizes], -1)


# Bindings that give items vectors, and where; of tests that any input should pass.
INPUTS = [
    pytest.param({}, id="codes"),
    pytest.param({"item_embeddings": True}, id="items"),
    pytest.param({"item_embeddings": True, "items_at_bos": True}, id="items-at-bos"),
]
VARIANTS = [
    pytest.param({}, id="all"),
    pytest.param({"loss_on": "last", "shared_heads": False}, id="last-per-level"),
    pytest.param({"loss_on": 2}, id="two"),
    pytest.param({"shared_heads": False, "item_positions": False, "level_embeddings": False}, id="bare"),
    pytest.param({"num_heads": 1, "time_bias": False, "item_embeddings": True}, id="no-time-items"),
    pytest.param({"item_embeddings": True, "scale_inputs": True}, id="scaled"),
    pytest.param({"item_embeddings": True, "items_at_bos": True, "scale_inputs": True}, id="items-at-bos"),
    pytest.param({"items_at_bos": True, "loss_on": "last"}, id="codes-at-bos"),
]


@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_decoding_teacher_forcing_and_the_whole_sequence_agree(backbone: str, changes: dict) -> None:
    model, batch = model_of(backbone, **changes), batch_of(ROWS)
    codes = candidates(batch.size, 4)
    expected = all_explicit(model, batch, codes)
    torch.testing.assert_close(model.teacher_forced(batch, codes), expected, atol=1e-5, rtol=0)
    stepped = decoded(model, batch, codes, torch.Generator().manual_seed(2))
    torch.testing.assert_close(stepped, expected, atol=1e-5, rtol=0)
    assert float(expected.detach().exp().std()) > 0.02, "a model without opinions would agree with anything"


@pytest.mark.parametrize("changes", [variant for variant in VARIANTS if variant.id != "two"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_training_loss_is_that_of_every_learned_item_decoded_on_its_own(backbone: str, changes: dict) -> None:
    model, table = model_of(backbone, **changes), ids()
    losses = []
    for row in ROWS:
        whole = batch_of([row])
        times = [*whole.timestamps_T.tolist(), int(whole.target_timestamps_B)]
        for end in range(len(row)) if model.config.loss_on == "all" else [len(row) - 1]:
            codes = table.codes_of([row[end]])[0].tolist()
            losses.append(-explicit(model, row[:end], times[:end], times[end], codes))
    expected = torch.stack(losses).mean()
    loss, scalars = model.train()(batch_of(ROWS), seed=0)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    for name, found, want in zip(
        names, gradients, torch.autograd.grad(expected, parameters, allow_unused=True), strict=True
    ):
        assert (found is None) == (want is None), name
        if found is not None:
            torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert float(scalars["tokens"]) == len(losses) * len(SIZES)
    levels = torch.stack([scalars[f"level_{level + 1}_loss"] for level in range(len(SIZES))])
    torch.testing.assert_close(levels, torch.stack(losses).mean(0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_with_two_learned_items_the_last_has_the_first_in_its_history_with_a_bos(backbone: str) -> None:
    model, table = model_of(backbone, loss_on=2), ids()
    flat = model._flat(batch_of(ROWS), with_target=True)
    found = model.heads.losses(model._states(flat, None)[flat.loss_nL], flat.labels_nL)
    counts = torch.tensor([min(2, len(row)) for row in ROWS])
    assert len(found) == int(counts.sum())
    targets = table.codes_of([row[-1] for row in ROWS])
    expected = -all_explicit(model, batch_of(ROWS), targets[:, None])[:, 0]
    torch.testing.assert_close(found[counts.cumsum(0) - 1], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_rows_are_the_same_in_any_batch(backbone: str, inputs: dict) -> None:
    model = model_of(backbone, **inputs)
    codes = candidates(len(ROWS), 3)
    together = model.teacher_forced(batch_of(ROWS), codes)
    order = [3, 0, 4, 2, 1]
    permuted = model.teacher_forced(batch_of([ROWS[i] for i in order]), codes[order])
    torch.testing.assert_close(permuted, together[order], atol=2e-6, rtol=0)
    for i, row in enumerate(ROWS):
        alone = model.teacher_forced(batch_of([row]), codes[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], atol=2e-6, rtol=0)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_selected_requests_start_afresh(backbone: str) -> None:
    model, codes = model_of(backbone), candidates(len(ROWS), 3)
    context = model.begin(batch_of(ROWS))
    expected = model.teacher_forced(batch_of(ROWS), codes)
    for rows in (torch.arange(5), torch.tensor([4, 1]), torch.tensor([2, 2, 0]), torch.arange(5)):
        found = model._forced(context.select(rows), codes[rows])
        torch.testing.assert_close(found, expected[rows], atol=2e-6, rtol=0)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_beam_search_is_exhaustive_where_it_is_wide(backbone: str) -> None:
    model, table = model_of(backbone), ids()
    batch = batch_of(ROWS)
    every = model.teacher_forced(batch, table.codes_NL.long().expand(batch.size, -1, -1)).sum(-1)
    scores, order = every.sort(dim=1, descending=True)
    config = BeamSearchConfig(widths=(4, 12, 30), verify=True)
    trie = Trie.build(table.codes_NL, table.sizes, table.item_ids_N)
    result = beam_search(model, batch, trie, 10, config)
    assert torch.equal(result.items_BK, table.item_ids_N[order[:, :10]])
    torch.testing.assert_close(result.scores_BK, scores[:, :10], atol=1e-5, rtol=0)
    assert bool(result.exact_B.all())


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_gradients_reach_all_parameters(backbone: str, shared: bool) -> None:
    model = model_of(backbone, shared_heads=shared, activation_checkpoint=True, dropout_rate=0.1).train()
    rows = [[(7 * b + i) % ITEMS + 1 for i in range(MAX_ITEMS + 1)] for b in range(8)]
    loss, _ = model(batch_of(rows), seed=1)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.abs().sum() > 0), name
    for embedding in (model.level_embedding, model.position_embedding):
        assert bool((embedding.grad.abs().sum(1) > 0).all())


@pytest.mark.parametrize("backbone", BACKBONES)
def test_dropout_and_checkpointing_depend_on_the_row_alone(backbone: str) -> None:
    plain = model_of(backbone, dropout_rate=0.3).train()
    recomputed = model_of(backbone, dropout_rate=0.3, activation_checkpoint=True).train()
    halves = [plain(batch_of(ROWS[:2]), 4), plain(batch_of(ROWS[2:], first_row=2), 4)]
    whole, scalars = plain(batch_of(ROWS), 4)
    again, _ = recomputed(batch_of(ROWS), 4)
    assert torch.equal(whole, again)
    summed = sum(loss * told["tokens"] for loss, told in halves) / scalars["tokens"]
    torch.testing.assert_close(whole, summed, atol=1e-6, rtol=0)
    assert not torch.equal(whole, plain(batch_of(ROWS), 5)[0])


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("loss_on", ["all", "last"])
def test_learns_a_walk(backbone: str, loss_on: str) -> None:
    """Item i is followed by i + 1 in a ring of 12."""
    torch.manual_seed(0)
    table = ids(items=12)
    config = SIDGRConfig(
        backbone=backbone, dim=24, num_blocks=2, num_heads=2, ffn_hidden_dim=48, dropout_rate=0.0, loss_on=loss_on
    )
    model = SIDGR(config, IdTable(table), 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    batch = batch_of([[(start + i) % 12 + 1 for i in range(5)] for start in range(12)])
    for step in range(120):
        loss, _ = model(batch, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # The first item of a row is a guess among 12, a fifth of what "all" learns.
    floor = math.log(12) / 5 / len(SIZES) if loss_on == "all" else 0.0
    assert float(loss.detach()) < floor + 0.05
    codes = table.codes_NL.long().expand(12, -1, -1)
    best = model.eval().teacher_forced(batch, codes).sum(-1).argmax(1) + 1
    assert torch.equal(best, batch.target_ids_B)


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_empty_histories_are_a_bos_alone(backbone: str, inputs: dict) -> None:
    model = model_of(backbone, **inputs)
    batch = batch_of([[4], [5]])
    codes = candidates(1, 5).expand(2, -1, -1)
    found = model.teacher_forced(batch, codes)
    torch.testing.assert_close(found, all_explicit(model, batch, codes), atol=1e-5, rtol=0)
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=0)
    assert math.isfinite(float(model(batch, 0)[0].detach()))


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("loss_on", ["all", "last"])
@pytest.mark.parametrize("inputs", INPUTS)
def test_long_histories_keep_their_newest_items(backbone: str, loss_on: str, inputs: dict) -> None:
    model = model_of(backbone, max_items=3, loss_on=loss_on, **inputs)
    whole = batch_of([[1, 2, 3, 4, 5, 6, 7], [8, 9]])
    times = whole.timestamps_T
    cut = dataclasses.replace(
        whole,
        item_ids_T=torch.cat([whole.item_ids_T[3:6], whole.item_ids_T[6:]]),
        ratings_T=whole.ratings_T[3:],
        timestamps_T=torch.cat([times[3:6], times[6:]]),
        next_item_ids_T=whole.next_item_ids_T[3:],
        next_timestamps_T=whole.next_timestamps_T[3:],
        offsets=torch.tensor([0, 3, 4]),
    )
    codes = candidates(2, 3)
    torch.testing.assert_close(model.teacher_forced(whole, codes), model.teacher_forced(cut, codes), atol=0, rtol=0)
    torch.testing.assert_close(model(whole, 0)[0], model(cut, 0)[0], atol=0, rtol=0)


@pytest.mark.parametrize("inputs", INPUTS)
def test_items_without_an_id_are_left_out_and_counted(inputs: dict) -> None:
    model = model_of(**inputs)
    with_unknown = batch_of([[1, 2, 3, 4], [5, 6]])
    strange = dataclasses.replace(
        with_unknown,
        item_ids_T=torch.tensor([1, 99, 3, 0]),
        next_item_ids_T=torch.tensor([99, 3, 4, 6]),
        target_ids_B=torch.tensor([4, 77]),
    )
    clean = dataclasses.replace(
        with_unknown,
        item_ids_T=with_unknown.item_ids_T[[0, 2]],
        ratings_T=with_unknown.ratings_T[:2],
        timestamps_T=with_unknown.timestamps_T[[0, 2]],
        next_item_ids_T=torch.tensor([3, 4]),
        next_timestamps_T=with_unknown.next_timestamps_T[[1, 2]],
        offsets=torch.tensor([0, 2, 2]),
    )
    codes = candidates(2, 3)
    assert torch.equal(model.teacher_forced(strange, codes), model.teacher_forced(clean, codes))
    assert model.begin(strange).unknown == 2
    loss, scalars = model(strange, 0)
    assert float(scalars["unknown_items"]) == 3
    # The second row has a target without an ID, so nothing of it is learned.
    assert float(scalars["tokens"]) == 3 * len(SIZES)
    only = dataclasses.replace(batch_of([[1, 3, 4]]), timestamps_T=clean.timestamps_T[:2])
    only = dataclasses.replace(only, target_timestamps_B=clean.target_timestamps_B[:1])
    torch.testing.assert_close(loss, model(only, 0)[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("loss_items", [None, 1, 3, 50])
def test_tokens_of_a_row(loss_items: int | None) -> None:
    """Counts, order and BOS as the example of the published description has them, and rows as long as promised."""
    table = IdTable(ids())
    levels, rows = len(SIZES), [[1, 2, 3], [4], list(range(1, MAX_ITEMS + 2))]
    for with_target in (True, False):
        flat = flatten(batch_of(rows), table, max_items=MAX_ITEMS, loss_items=loss_items, with_target=with_target)
        expected = []
        for row in rows:
            for place in range(len(row)):
                marked = loss_items is None or place >= len(row) - loss_items
                last = place == len(row) - 1
                count = levels if not last else levels - 1 if with_target else 0
                expected.append([*([0] if marked else []), *range(1, count + 1)])
        assert (flat.cells_S % (levels + 1)).tolist() == [level for item in expected for level in item]
        longest = int(flat.rows.lengths_B.max()) + (0 if with_target else levels - 1)
        assert longest == longest_row(levels, MAX_ITEMS, loss_items)
        assert bool((flat.rows.next_timestamps_T >= flat.rows.timestamps_T).all())


def test_bf16_is_near() -> None:
    codes = candidates(len(ROWS), 3)
    for backbone in BACKBONES:
        exact, narrow = (model_of(backbone, bf16=bf16) for bf16 in (False, True))
        expected, found = (model.teacher_forced(batch_of(ROWS), codes) for model in (exact, narrow))
        torch.testing.assert_close(found, expected, atol=0.15, rtol=0.05)
        assert found.dtype == torch.float32 and not torch.equal(found, expected)
        torch.testing.assert_close(narrow(batch_of(ROWS), 0)[0], exact(batch_of(ROWS), 0)[0], atol=0.05, rtol=0)


def test_time_matters_to_hstu_alone_and_can_be_switched_off() -> None:
    codes, batch = candidates(len(ROWS), 3), batch_of(ROWS)
    later = dataclasses.replace(batch, target_timestamps_B=batch.target_timestamps_B + 10**8)
    for backbone, time_bias, same in (("hstu", True, False), ("hstu", False, True), ("transformer", True, True)):
        model = model_of(backbone, time_bias=time_bias)
        assert torch.equal(model.teacher_forced(batch, codes), model.teacher_forced(later, codes)) == same


def test_embeddings_start_from_codebooks() -> None:
    codebooks = [torch.randn(size, 6) for size in SIZES]
    model = SIDGR(SIDGRConfig(dim=16, num_heads=2), IdTable(ids()), MAX_ITEMS)
    model.tokens.from_codebooks(codebooks)
    centred = codebooks[0] - codebooks[0].mean(0)
    rows = model.tokens.table.detach()[: SIZES[0]]
    found, expected = torch.pdist(rows), torch.pdist(centred)
    torch.testing.assert_close(found / found.max(), expected / expected.max())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "mamba"}, "backbone"),
        ({"dim": 0}, "dim"),
        ({"dim": 10, "num_heads": 4}, "num_heads"),
        ({"loss_on": 0}, "loss_on"),
        ({"loss_on": "first"}, "loss_on"),
        ({"loss_on": True}, "loss_on"),
        ({"dropout_rate": 1.0}, "dropout_rate"),
        ({"backbone": "sasrec", "head_dim": 8}, "head_dim"),
        ({"head_dim": 0}, "head_dim"),
    ],
)
def test_bad_bindings_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=rf"^sid_gr\.{message}: got .*, expected "):
        SIDGRConfig(**changes)


@pytest.mark.parametrize("backbone", ["transformer", "hstu"])
def test_heads_may_have_a_width_of_their_own(backbone: str) -> None:
    model = model_of(backbone, dim=10, num_heads=3, head_dim=4)
    codes = candidates(len(ROWS), 2)
    found = model.teacher_forced(batch_of(ROWS), codes)
    torch.testing.assert_close(found, all_explicit(model, batch_of(ROWS), codes), atol=1e-5, rtol=0)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_one_level_needs_no_steps(backbone: str) -> None:
    table = ids((12,), 10)
    model = model_of(backbone, table=table)
    found = model.teacher_forced(batch_of([[1, 2], [3]]), torch.arange(12)[None, :, None].expand(2, -1, -1))
    torch.testing.assert_close(found.exp().sum(1), torch.ones(2, 1))
    loss, _ = model(batch_of([[1, 2, 3]]), 0)
    assert math.isfinite(float(loss.detach()))


@pytest.mark.parametrize("inputs", INPUTS[1:])
def test_items_of_histories_have_vectors_and_those_added_since_have_none(inputs: dict) -> None:
    table = ids(items=ITEMS - 2)
    model = model_of(table=table, **inputs)
    assert model.item_embedding is not None and len(model.item_embedding) == ITEMS - 1
    model(batch_of([[3, 7, 11]]), seed=0)[0].backward()
    # The target's own vector would follow the codes it is learned by.
    learned = model.item_embedding.grad.abs().sum(1).nonzero()[:, 0]
    assert learned.tolist() == [3, 7]
    grown = batch_of([[3, ITEMS, 2]])
    model.table = IdTable(ids())
    with torch.no_grad():
        before = model.history_states(grown).states_SD
        model.item_embedding[[0, 7, ITEMS - 2]] += 5.0
        torch.testing.assert_close(model.history_states(grown).states_SD, before)
        model.item_embedding[3] += torch.linspace(-5, 5, model.config.dim)
        assert not torch.allclose(model.history_states(grown).states_SD, before, atol=1e-2)


def test_every_input_is_in_the_name_of_a_run() -> None:
    names = {SIDGRConfig(**variant.values[0]).describe() for variant in INPUTS}
    assert len({*names, SIDGRConfig(scale_inputs=True).describe(), SIDGRConfig(items_at_bos=True).describe()}) == 5
