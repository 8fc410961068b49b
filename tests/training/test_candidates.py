"""Lists of unseen or of trained items alone, at evaluation and from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from generative_recommenders.config import ConfigError, load
from generative_recommenders.data import sources
from generative_recommenders.data.preprocess import prepare
from generative_recommenders.data.temporal import TimeSplit
from generative_recommenders.distributed.runtime import Runtime
from generative_recommenders.serving.generated import recommender_of
from generative_recommenders.serving.histories import Histories
from generative_recommenders.tokenizers.catalogue import load_current
from generative_recommenders.training.checkpoint import CheckpointError
from generative_recommenders.training.experiment import Places, experiment_of
from generative_recommenders.training.generative import GenerativeExperiment
from generative_recommenders.training.runs import find_checkpoint
from generative_recommenders.training.tokenizer import TokenizerExperiment
from tests.toy import FIRST_TIMESTAMP, raw_id, write_toy_dataset

HERE = Runtime(0, 1, torch.device("cpu"))
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
DAY = 86_400
SMALL = (
    "train_tokenizer.embedding_dim = 8",
    "rq_kmeans.sizes = (4, 4)",
    "train_generative.max_sequence_length = 6",
    "train_generative.num_epochs = 1",
    "train_generative.top_k = 10",
    "beam_search.widths = 40",
    *(f"{m}.{n}" for m in ("tiger", "parallel_tiger") for n in ("num_encoder_layers = 1", "num_decoder_layers = 1")),
    *(f"{m}.{n}" for m in ("tiger", "parallel_tiger") for n in ("dim = 16", "num_heads = 2", "dkv = 8")),
    *(f"{m}.ffn_hidden_dim = 32" for m in ("tiger", "parallel_tiger")),
)
Make = Callable[..., GenerativeExperiment]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Users walk a ring of items; the last ones they come to are never in train."""
    events = [
        f"{user},{raw_id((user + step) % 24)},{FIRST_TIMESTAMP + DAY * step + user},1\n"
        for user in range(12)
        for step in range(10)
    ]
    (tmp_path / "events.csv").write_text("user_id,item_id,timestamp,rating\n" + "".join(events))
    items = "".join(f"{raw_id(item)},Item {item}\n" for item in range(24))
    (tmp_path / "items.csv").write_text("item_id,title\n" + items)
    source = sources.get("custom").with_options(items=tmp_path / "items.csv")
    rule = TimeSplit(("0.7", "0.85"))
    prepare(source, raw=tmp_path / "events.csv", data_dir=tmp_path, name="ring", split=rule)

    def experiment(*bindings: str, kind: str = "tiger", dataset: str = "ring") -> GenerativeExperiment:
        names = [f"{part}.dataset_name = '{dataset}'" for part in ("train_tokenizer", "train_generative")]
        config = load([CONFIGS / "amzn14-beauty" / f"{kind}.gin"], [*SMALL, *names, *bindings])
        made = experiment_of(config, Places(tmp_path, tmp_path / "exps"), HERE)
        assert isinstance(made, GenerativeExperiment)
        return made

    return experiment


@pytest.mark.parametrize("kind", ["tiger", "parallel-tiger"])
def test_lists_hold_the_chosen_items_alone(make: Make, kind: str) -> None:
    trained = make(kind=kind)
    _, run = trained.train()
    data = trained.dataset
    unseen = set(data.unseen_items().tolist())
    assert 0 < len(unseen) < len(data.catalog) and all(i > len(data.catalog) - len(unseen) for i in unseen)
    metrics = trained.evaluate_checkpoint(run, "test").metrics
    cold = metrics["users_cold"]
    assert cold > 0 and metrics["users_warm"] + cold == len(trained.split("test"))
    for choice, chosen in (("unseen", unseen), ("in_sample", set(data.catalog.item_ids.tolist()) - unseen)):
        experiment = make(f"train_generative.candidates = '{choice}'", kind=kind)
        lists = experiment.searcher(experiment.model())(next(iter(experiment.batches("test"))))
        assert int(lists.valid_count_B.min()) == min(len(chosen), 10)
        assert set(lists.items_BK[lists.valid_BK].tolist()) <= chosen
        # A choice of the evaluation: the checkpoint stays good.
        metrics = experiment.evaluate_checkpoint(run, "test").metrics
        assert metrics[f"hr@10_{'warm' if choice == 'unseen' else 'cold'}"] == 0
        assert metrics["users_cold"] == cold


@pytest.mark.parametrize("choice", ["unseen", "in_sample"])
def test_a_checkpoint_recommends_the_chosen_items_alone(make: Make, choice: str) -> None:
    experiment = make(f"train_generative.candidates = '{choice}'")
    _, run = experiment.train()
    data = experiment.dataset
    unseen = {
        raw
        for raw, i in zip(data.catalog.raw_ids, data.catalog.item_ids.tolist(), strict=True)
        if i in data.unseen_items().tolist()
    }
    wanted = unseen if choice == "unseen" else set(data.catalog.raw_ids) - unseen
    recommender = recommender_of(find_checkpoint(run))
    seen = sorted(wanted)[0]
    asked = Histories(["u"], [[seen, raw_id(1)]], [None], [None])
    plain = recommender.recommend(asked, 30, filter_history=False)
    filtered = recommender.recommend(asked, 30, filter_history=True)
    assert set(plain["item_id"]) == wanted
    assert set(filtered["item_id"]) == wanted - {seen, raw_id(1)}
    assert find_checkpoint(run).facts["unseen_items"] == data.unseen_items().tolist()


def test_the_tokenizer_is_fitted_on_trained_items(make: Make, tmp_path: Path) -> None:
    experiment = make()
    tokenizer = TokenizerExperiment(experiment.config, Places(tmp_path, tmp_path / "exps"), HERE)
    data = experiment.dataset
    assert data.catalog.item_ids[~tokenizer._fitted()].tolist() == data.unseen_items().tolist()
    tokenizer.run()
    assert len(load_current(tokenizer.folder)) == len(data.catalog)


def test_a_choice_without_items_is_refused(make: Make, tmp_path: Path) -> None:
    write_toy_dataset(tmp_path)
    experiment = make("train_generative.candidates = 'unseen'", dataset="toy")
    with pytest.raises(ConfigError, match=r"train_generative\.candidates: got 'unseen', which no item"):
        experiment.train()


def test_a_checkpoint_without_the_note_is_refused(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment, noted = make("train_generative.candidates = 'unseen'"), GenerativeExperiment.facts

    def without(self: GenerativeExperiment) -> dict[str, Any]:
        return {name: value for name, value in noted(self).items() if name != "unseen_items"}

    monkeypatch.setattr(GenerativeExperiment, "facts", without)
    _, run = experiment.train()
    with pytest.raises(CheckpointError, match="does not note which items training lacks"):
        recommender_of(find_checkpoint(run))


@pytest.mark.parametrize("kind", ["tiger", "parallel-tiger", "sid-gr-hstu"])
def test_reranking_is_a_choice_of_the_evaluation(make: Make, kind: str) -> None:
    head = ("draft_head.width = 8", "sid_gr.dim = 16", "sid_gr.num_blocks = 1")
    _, run = make(*head, kind=kind).train()
    lists = {}
    for weight in (0.0, 1.0):
        chosen = (f"train_generative.rerank_weight = {weight}", "train_generative.rerank_candidates = 24")
        experiment = make(*head, *chosen, kind=kind)
        model = experiment.model()
        find_checkpoint(run).load_model(model)
        lists[weight] = experiment.searcher(model.eval())(next(iter(experiment.batches("test"))))
        metrics = experiment.evaluate_checkpoint(run, "test").metrics
        assert metrics["certified"] == (1.0 if weight == 0 else 0.0)
    # All 24 items are candidates, and their own scores alone decide.
    expected = experiment.searcher(model).rerank.drafter.scores(next(iter(experiment.batches("test"))))
    assert lists[1.0].items_BK.tolist() == expected.topk(10).indices.tolist()
    assert lists[0.0].items_BK.tolist() != lists[1.0].items_BK.tolist()
    chosen = (*head, "train_generative.rerank_weight = 0.5")
    for name in ("length_normalize", "stochastic", "certify"):
        with pytest.raises(ConfigError, match=rf"beam_search.{name}: got True with train_generative.rerank_weight > 0"):
            make(*chosen, f"beam_search.{name} = True", kind=kind)
    with pytest.raises(ConfigError, match=r"rerank_weight: got 0.5 with draft_head.width = 0, expected a model"):
        make("train_generative.rerank_weight = 0.5", kind=kind)
