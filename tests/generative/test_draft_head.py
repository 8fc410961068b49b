"""The head that drafts: pooled states, its two losses against plain loops, and that no state knows of a target."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.distributed.runtime import Runtime
from generative_recommenders.errors import UserError
from generative_recommenders.evaluation.drafting import evaluate_drafts
from generative_recommenders.generative.draft_head import (
    DraftConfig,
    DraftHead,
    DraftingModel,
    EncoderDrafter,
    HistoryStates,
    lone_items,
)
from generative_recommenders.generative.parallel_config import ParallelTigerConfig
from generative_recommenders.generative.parallel_tiger import ParallelTiger
from generative_recommenders.generative.sid_gr import SIDGR
from generative_recommenders.generative.sid_gr_config import SIDGRConfig
from generative_recommenders.generative.tokens import IdTable
from tests.generative.beam_cases import batch_of
from tests.generative.test_tiger import ITEMS, ids, tiger

WIDTH = 6
HISTORIES = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]
KINDS = ("tiger", "parallel_tiger", "sid_gr_all", "sid_gr_last")


def model_of(kind: str, **bindings: float | str) -> DraftingModel:
    torch.manual_seed(1)
    table = IdTable(ids())
    model: DraftingModel
    if kind == "tiger":
        model = tiger(table, user_tokens=0, dropout_rate=0.0)
    elif kind == "parallel_tiger":
        sizes = {"num_encoder_layers": 1, "num_decoder_layers": 1, "dim": 16, "num_heads": 2, "dkv": 8}
        model = ParallelTiger(ParallelTigerConfig(**sizes, ffn_hidden_dim=24, dropout_rate=0.0), table)
    else:
        loss_on = kind.removeprefix("sid_gr_")
        own = bindings.get("items") == "embedded"
        config = SIDGRConfig(dim=16, num_blocks=1, num_heads=2, dropout_rate=0.0, loss_on=loss_on, item_embeddings=own)
        model = SIDGR(config, table, 5)
    model.draft = DraftHead(DraftConfig(**{"width": WIDTH, "loss_weight": 2.0} | bindings), 16)
    return model


def batch(targets: list[int]) -> SequenceBatch:
    made = batch_of([1, 2, 3, 4], HISTORIES)
    return replace(made, target_ids_B=torch.tensor(targets))


def vector_of(model: DraftingModel, history: list[int]) -> Tensor:
    """One history alone, in plain steps."""
    assert model.draft is not None
    states = model.history_states(batch_of([1], [history]))
    vector = model.draft.projection(states.states_SD.float().mean(0))
    return vector / vector.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_means_of_a_histories_own_states(kind: str) -> None:
    model = model_of(kind).eval()
    assert model.draft is not None
    found = model.draft(model.history_states(batch([11, 12, 13, 14])))
    expected = torch.stack([vector_of(model, h) for h in HISTORIES])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    items = model.draft.all_items(model, torch.tensor([3, 9]))
    torch.testing.assert_close(items, torch.stack([vector_of(model, [3]), vector_of(model, [9])]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_one_pass_gives_what_a_search_and_a_head_need(kind: str) -> None:
    model = model_of(kind).eval()
    asked = batch([11, 12, 13, 14])
    with torch.no_grad():
        context, states = model.begin_with_states(asked)
        expected = model.history_states(asked)
        assert torch.equal(states.offsets, expected.offsets)
        torch.testing.assert_close(states.states_SD, expected.states_SD, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            model.logits(context, 0, None, ()), model.logits(model.begin(asked), 0, None, ()), atol=1e-5, rtol=1e-5
        )


def test_a_history_without_tokens_has_no_direction() -> None:
    head = DraftHead(DraftConfig(width=WIDTH), 16)
    torch.nn.init.zeros_(head.projection.bias)
    found = head(HistoryStates(torch.randn(2, 16), torch.tensor([0, 0, 2])))
    assert found[0].eq(0).all() and found[1].norm().item() == pytest.approx(1.0)


@pytest.mark.parametrize("width", [5, 16, 20])
def test_scores_of_embedded_items_start_as_inner_products_and_all_of_them_are_learned(width: int) -> None:
    chosen = {"items": "embedded", "negatives": "catalogue", "l2_norm": False, "temperature": 1.0}
    model = model_of("sid_gr_all", width=width, **chosen)
    head, items = model.draft, torch.arange(1, ITEMS + 1)
    assert head is not None and head.item_projection is not None
    head.negatives_n = items
    states = model.history_states(batch([11, 12, 13, 14]))
    first = min(width, 16)
    expected = states.states_SD[:, :first] @ model.item_inputs(items)[:, :first].T
    torch.testing.assert_close(head(states) @ head.items(model, items).T, expected)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = [head.projection.weight.detach().clone(), head.item_projection.weight.detach().clone()]
    for _ in range(2):
        optimizer.zero_grad()
        model(batch([11, 12, 13, 14]), 0)[0].backward()
        optimizer.step()
    for old, new in zip(before, (head.projection.weight, head.item_projection.weight), strict=True):
        assert bool((old != new).any(1).all())


def test_a_history_of_unknown_items_alone_has_a_small_gradient() -> None:
    model = model_of("tiger", items="embedded", negatives="catalogue")
    assert model.draft is not None
    model.draft.negatives_n = torch.arange(1, ITEMS + 1)
    model(replace(batch_of([1, 2], [[1, 2, 3], [ITEMS + 7]]), target_ids_B=torch.tensor([4, 5])), 0)[0].backward()
    assert all(p.grad.norm() < 1e4 for p in model.parameters() if p.grad is not None)


def samples_of(kind: str, targets: list[int]) -> list[tuple[list[int], int]]:
    """Each history that a batch teaches a drafter, and the item that followed it."""
    rows = [[*history, target] for history, target in zip(HISTORIES, targets, strict=True)]
    if kind != "sid_gr_all":
        return [(row[:-1], row[-1]) for row in rows]
    return [(row[:place], row[place]) for row in rows for place in range(len(row))]


@pytest.mark.parametrize("kind", KINDS)
def test_no_state_knows_of_its_target(kind: str) -> None:
    model = model_of(kind).eval()
    assert model.draft is not None
    for targets in ([11, 12, 13, 14], [15, 16, 17, 18]):
        _, _, samples = model.generative_loss(batch(targets), 0)
        expected = samples_of(kind, targets)
        assert samples.target_ids_n.tolist() == [target for _, target in expected]
        vectors = torch.stack([vector_of(model, history) for history, _ in expected])
        torch.testing.assert_close(model.draft(samples.states), vectors, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", [[11, 12, 13, 14], [11, 12, 11, ITEMS + 5]])
def test_stage_one_contrasts_the_distinct_targets_of_a_batch(kind: str, targets: list[int]) -> None:
    model = model_of(kind).eval()
    assert model.draft is not None
    plain, _, _ = model.generative_loss(batch(targets), 3)
    loss, scalars = model(batch(targets), 3)
    samples = [sample for sample in samples_of(kind, targets) if sample[1] <= ITEMS]
    distinct = sorted({target for _, target in samples})
    items = torch.stack([vector_of(model, [item]) for item in distinct])
    losses = [
        -((items @ vector_of(model, history)) / 0.07).log_softmax(0)[distinct.index(target)]
        for history, target in samples
    ]
    draft = torch.stack(losses).mean()
    torch.testing.assert_close(scalars["draft_loss"], draft, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(loss, plain + 2.0 * draft, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(scalars["ar_loss"], loss.detach(), atol=1e-4, rtol=1e-4)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.draft.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("l2_norm", [True, False])
def test_items_are_maps_of_what_they_go_in_as_and_compared_over_all_that_are_trained(kind: str, l2_norm: bool) -> None:
    chosen = {"items": "embedded", "negatives": "catalogue", "l2_norm": l2_norm, "temperature": 0.5}
    model = model_of(kind, **chosen).eval()
    head = model.draft
    assert head is not None and head.item_projection is not None
    if isinstance(model, SIDGR):
        assert model.item_embedding is not None
        model.item_embedding.data.normal_()
    head.negatives_n = torch.tensor([*range(1, 14), 15])
    # Item 14 is none of the trained ones, and the last has no ID.
    targets = [11, 12, 14, ITEMS + 5]
    plain, _, _ = model.generative_loss(batch(targets), 3)
    loss, scalars = model(batch(targets), 3)

    def item(number: int) -> Tensor:
        codes = model.table.codes_of_items(torch.tensor([number]))[0].tolist()
        rows = [model.tokens.table[sum(model.table.sizes[:level]) + code] for level, code in enumerate(codes)]
        if isinstance(model, SIDGR) and model.item_embedding is not None:
            rows.append(model.item_embedding[number])
        vector = torch.stack(rows).sum(0) @ head.item_projection.weight.T
        return vector / vector.norm() if l2_norm else vector

    def query(history: list[int]) -> Tensor:
        states = model.history_states(batch_of([1], [history]))
        vector = head.projection(states.states_SD.float().mean(0))
        return vector / vector.norm() if l2_norm else vector

    catalogue = head.negatives_n.tolist()
    items = torch.stack([item(number) for number in catalogue])
    samples = [sample for sample in samples_of(kind, targets) if sample[1] <= ITEMS]
    losses = [
        -((items @ query(history)) / 0.5).log_softmax(0)[catalogue.index(target)]
        for history, target in samples
        if target != 14
    ]
    draft = torch.stack(losses).sum() / len(samples)
    torch.testing.assert_close(scalars["draft_loss"], draft, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(loss, plain + 2.0 * draft, atol=1e-4, rtol=1e-4)
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in head.parameters())
    scores_BV = EncoderDrafter(model).scores(batch(targets))
    assert scores_BV[3, 14].item() == pytest.approx((item(14) @ query([7, 8, 9, 10])).item(), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_stage_two_is_the_cross_entropy_over_frozen_items(kind: str) -> None:
    model = model_of(kind, finetune_loss_weight=3.0, generative_loss_weight=0.5).eval()
    assert model.draft is not None
    trained = torch.arange(1, 15)
    frozen = torch.stack([vector_of(model, [item]) for item in trained.tolist()]).detach()
    model.draft.begin_stage_two(model, trained)
    torch.testing.assert_close(model.draft.frozen_nW, frozen, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    # Item 18 is none of the trained ones.
    targets = [11, 3, 18, 14]
    plain, _, _ = model.generative_loss(batch(targets), 3)
    loss, scalars = model(batch(targets), 3)
    samples = samples_of(kind, targets)
    losses = [
        -((frozen @ vector_of(model, history)) / 0.07).log_softmax(0)[target - 1]
        for history, target in samples
        if target != 18
    ]
    # The mean is over targets with an ID, of which 18 is one.
    draft = torch.stack(losses).sum() / len(samples)
    torch.testing.assert_close(scalars["draft_loss"], draft, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(loss, 0.5 * plain + 3.0 * draft, atol=1e-4, rtol=1e-4)


def test_a_checkpoint_of_either_stage_loads_into_a_new_model() -> None:
    model = model_of("tiger")
    assert model.draft is not None
    for trained in (None, torch.arange(1, 9)):
        if trained is not None:
            model.draft.begin_stage_two(model, trained)
        fresh = model_of("tiger")
        fresh.load_state_dict(model.state_dict())
        assert fresh.draft is not None
        assert fresh.draft.in_stage_two == (trained is not None)
        torch.testing.assert_close(fresh.draft.frozen_nW, model.draft.frozen_nW)


def test_scores_are_products_of_vectors_and_unknown_ids_have_none() -> None:
    model = model_of("tiger").eval()
    drafter = EncoderDrafter(model)
    asked = batch([11, 12, 13, 14])
    scores_BV = drafter.scores(asked)
    assert scores_BV.shape == (4, ITEMS + 1) and scores_BV[:, 0].isneginf().all()
    expected = vector_of(model, [7, 8, 9, 10]) @ vector_of(model, [2])
    assert scores_BV[3, 2].item() == pytest.approx(expected.item(), abs=1e-5)
    own = scores_BV.gather(1, asked.target_ids_B[:, None])
    ranks = (scores_BV >= own).sum(1)
    trained = torch.arange(ITEMS + 1) <= 12
    metrics = evaluate_drafts(drafter, [asked, asked], Runtime(0, 1, torch.device("cpu")), trained)
    assert metrics["draft_hr@10_warm"] == pytest.approx((ranks[:2] <= 10).double().mean().item())
    assert metrics["draft_hr@10_cold"] == pytest.approx((ranks[2:] <= 10).double().mean().item())
    assert metrics["draft_hr@10"] == pytest.approx((ranks <= 10).double().mean().item())
    assert metrics["draft_hr@50"] == 1.0


def test_drafts_without_the_history() -> None:
    drafter = EncoderDrafter(model_of("tiger").eval())
    asked = batch([11, 12, 13, 14])
    scores_BV = drafter.scores(asked)
    expected = []
    for row, target in enumerate(asked.target_ids_B.tolist()):
        seen = set(asked.item_ids_T[asked.offsets[row] : asked.offsets[row + 1]].tolist())
        others = [i for i in range(1, ITEMS + 1) if i not in seen]
        better = sum(bool(scores_BV[row, i] >= scores_BV[row, target]) for i in others)
        expected.append(1 / math.log2(1 + better) if target in others and better <= 10 else 0.0)
    runtime, trained = Runtime(0, 1, torch.device("cpu")), torch.ones(ITEMS + 1, dtype=torch.bool)
    metrics = evaluate_drafts(drafter, [asked], runtime, trained, exclude_history=True)
    assert metrics["draft_ndcg@10"] == pytest.approx(sum(expected) / len(expected))
    assert metrics["draft_ndcg@10"] != evaluate_drafts(drafter, [asked], runtime, trained)["draft_ndcg@10"]


def test_mistakes_are_told_in_one_line() -> None:
    with pytest.raises(UserError, match=r"draft_head.width > 0"):
        EncoderDrafter(tiger(user_tokens=0))
    with pytest.raises(UserError, match=r"draft_head.temperature: got 0.0, expected more than 0"):
        DraftConfig(temperature=0.0)
    with pytest.raises(UserError, match=r"draft_head.finetune_epochs: got 2, expected 0 without a head"):
        DraftConfig(finetune_epochs=2)
    with pytest.raises(
        UserError, match=r"draft_head.negatives: got 'catalogue', expected 'batch' with draft_head.items"
    ):
        DraftConfig(width=8, negatives="catalogue")
    with pytest.raises(UserError, match=r"draft_head.items: got 'decoded', expected 'encoded' or 'embedded'"):
        DraftConfig(width=8, items="decoded")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"draft_head.items: got 'embedded', expected 'encoded', and .* without a head"):
        DraftConfig(items="embedded")
    with pytest.raises(UserError, match=r"draft_head.finetune_epochs: got 2, expected 0 with draft_head.items"):
        DraftConfig(width=8, items="embedded", finetune_epochs=2)


def test_lone_items_are_histories_of_one() -> None:
    made = lone_items(torch.tensor([5, 3]))
    assert made.size == 2 and made.lengths_B.tolist() == [1, 1] and made.item_ids_T.tolist() == [5, 3]
