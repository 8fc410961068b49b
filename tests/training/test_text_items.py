"""Items made of texts, end to end: items that no training event has are found, and a checkpoint suffices."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from generative_recommenders.config import ConfigError, load
from generative_recommenders.data.dataset import PreparedDataset
from generative_recommenders.data.errors import DataError
from generative_recommenders.distributed.runtime import Runtime
from generative_recommenders.generative.drafters import RetrievalDrafter
from generative_recommenders.retrieval.assemble import Plan, training_counts
from generative_recommenders.serving.export import export
from generative_recommenders.serving.histories import Histories
from generative_recommenders.serving.recommender import Recommender
from generative_recommenders.tokenizers.config import TokenizerConfig
from generative_recommenders.training.checkpoint import CheckpointError
from generative_recommenders.training.drafters import retrieval_drafter, semantic_knn
from generative_recommenders.training.experiment import Places
from generative_recommenders.training.retrieval import RetrievalExperiment
from generative_recommenders.training.runs import find_checkpoint

CPU = Runtime(0, 1, torch.device("cpu"))
SHIPPED = "configs/amzn14-beauty/unisrec.gin"
THEMES, PER_THEME = 12, 6
ITEMS = THEMES * PER_THEME
# Ids with gaps.
STEP = 2
IDS = STEP * np.arange(1, ITEMS + 1)
# The last item of every theme occurs in no training row.
COLD = {int(i) for i in IDS[PER_THEME - 1 :: PER_THEME]}
SMALL = [
    "train_fn.dataset_name = 'themes'",
    "train_fn.max_sequence_length = 8",
    "train_fn.local_batch_size = 64",
    "train_fn.item_embedding_dim = 16",
    "train_fn.dropout_rate = 0.1",
    "train_fn.num_epochs = 4",
    "train_fn.filter_history = False",
    "train_fn.learning_rate = 1e-2",
    "sasrec_encoder.num_blocks = 1",
    "sasrec_encoder.ffn_hidden_dim = 16",
    "sasrec_encoder.ffn_dropout_rate = 0.1",
    "text_item_encoder.num_experts = 3",
]


def write_split(folder: Path, split: str, users: int, last_cold: float, seed: int) -> None:
    """Walks from theme to theme; the target of some rows is a theme's cold item."""
    generator = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        themes = (generator.integers(THEMES) + np.arange(3 + user % 5)) % THEMES
        members = generator.integers(PER_THEME - 1, size=len(themes))
        if generator.random() < last_cold:
            members[-1] = PER_THEME - 1
        rows.append(IDS[themes * PER_THEME + members])
    times = [1_000_000 + 60 * np.arange(len(row)) for row in rows]
    columns = {
        "user_id": pa.array(np.arange(1, users + 1)),
        "item_ids": pa.array(rows, pa.list_(pa.int64())),
        "ratings": pa.array([np.ones(len(row), np.float32) for row in rows], pa.list_(pa.float32())),
        "timestamps": pa.array(times, pa.list_(pa.int64())),
    }
    pq.write_table(pa.table(columns), folder / f"sequences_{split}.parquet")


def write_vectors(path: Path, width: int = 16, seed: int = 5) -> Path:
    """Items of a theme have nearly the same vector."""
    generator = np.random.default_rng(seed)
    themes = generator.normal(size=(THEMES, width)).repeat(PER_THEME, axis=0)
    values = (themes + 0.2 * generator.normal(size=(ITEMS, width))).astype(np.float32)
    raw = [f"sku-{i}" for i in IDS]
    pq.write_table(pa.table({"raw_id": raw, "embedding": pa.array(list(values), pa.list_(pa.float32()))}), path)
    return path


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data_dir = tmp_path_factory.mktemp("texts")
    folder = data_dir / "themes"
    folder.mkdir()
    for split, users, cold in (("train", 600, 0.0), ("valid", 80, 0.5), ("test", 160, 0.5)):
        write_split(folder, split, users, cold, seed=users)
    titles = [f"theme {n // PER_THEME} number {n}" for n in range(ITEMS)]
    pq.write_table(
        pa.table({"item_id": IDS, "raw_id": [f"sku-{i}" for i in IDS], "title": titles}), folder / "items.parquet"
    )
    (folder / "dataset.json").write_text(json.dumps({"name": "themes", "split": "explicit", "version": 1}))
    write_vectors(data_dir / "vectors.parquet")
    return data_dir


def experiment(data_dir: Path, exps_dir: Path, *bindings: str, vectors: str = "vectors.parquet") -> RetrievalExperiment:
    source = ["text_item_encoder.encoder = 'file'", f"text_item_encoder.embeddings_path = '{data_dir / vectors}'"]
    return RetrievalExperiment(load([SHIPPED], [*SMALL, *source, *bindings]), Places(data_dir, exps_dir), CPU)


def trained_by_id(data_dir: Path, exps_dir: Path) -> RetrievalExperiment:
    config = load([SHIPPED], [*SMALL, "train_fn.item_encoder = 'id'"])
    return RetrievalExperiment(config, Places(data_dir, exps_dir), CPU)


@pytest.fixture(scope="module")
def run(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, float], Path]:
    evaluation, folder = experiment(data_dir, tmp_path_factory.mktemp("exps")).train()
    return evaluation.metrics, folder


Run = tuple[dict[str, float], Path]


def cold_hits(drafter: RetrievalDrafter, data_dir: Path, k: int) -> float:
    """Share of the cold targets of test among the k best."""
    trial = experiment(data_dir, data_dir)
    hits = []
    for batch in trial.batches("test"):
        best = drafter.scores(batch).topk(k).indices
        cold = torch.tensor([int(i) in COLD for i in batch.target_ids_B])
        hits.append((best == batch.target_ids_B[:, None]).any(1)[cold])
    return float(torch.cat(hits).float().mean())


def test_items_without_a_training_event_are_found(run: Run, data_dir: Path, tmp_path: Path) -> None:
    metrics, folder = run
    dataset = PreparedDataset.load(data_dir, "themes")
    texts = retrieval_drafter(folder, dataset, CPU)
    # A theme has six items of 72; ids alone tell nothing of a cold one.
    assert metrics["hr@10"] > 0.8
    assert cold_hits(texts, data_dir, 10) > 0.8
    _, by_id = trained_by_id(data_dir, tmp_path).train()
    assert cold_hits(retrieval_drafter(by_id, dataset, CPU), data_dir, 10) < 0.4
    knn = semantic_knn(TokenizerConfig(dataset_name="themes"), dataset, CPU)
    assert knn.scores(next(iter(experiment(data_dir, tmp_path).batches("test")))).isfinite().sum(1).eq(ITEMS).all()


def test_untrained_items_are_no_negatives(data_dir: Path, tmp_path: Path) -> None:
    """The loss of training does not read their vectors, unless all items are candidates."""
    untrained = torch.tensor(sorted(COLD))
    for loss, sampling in (("FullSoftmaxLoss", "no-explicit-negatives"), ("SampledSoftmaxLoss", "local")):
        changes = []
        for candidates in ("trained", "all"):
            bindings = [f"train_fn.loss_module = '{loss}'", f"train_fn.sampling_strategy = '{sampling}'"]
            trial = experiment(data_dir, tmp_path, *bindings, f"train_fn.loss_candidates = '{candidates}'")
            model = trial.model()
            batch = next(iter(trial.task(model).batches.epoch(0)))
            before = model(batch, 3)[0].item()
            with torch.no_grad():
                model.items.text_VE[untrained] = 9.0  # type: ignore[union-attr, operator]
            changes.append(model(batch, 3)[0].item() - before)
        assert changes[0] == 0 and changes[1] != 0, (loss, changes)


def test_evaluation_of_the_loss_is_over_the_catalogue(run: Run) -> None:
    assert np.isfinite(run[0]["loss"]) and run[0]["loss"] < np.log(ITEMS)


def test_what_an_epoch_reports_is_of_its_weights(run: Run, data_dir: Path) -> None:
    folder = run[1]
    reported = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = sorted((folder / "checkpoints").glob("step-*"))
    assert steps
    for path in steps:
        epoch = find_checkpoint(path).progress.epoch - 1
        (line,) = [x for x in reported if x["split"] == "valid" and x["epoch"] == epoch]
        found = experiment(data_dir, folder.parents[1]).evaluate_checkpoint(path, "valid").metrics
        assert line["metrics"]["ndcg@10"] == pytest.approx(found["ndcg@10"], abs=1e-6)


def test_the_checkpoint_suffices(run: Run, data_dir: Path, tmp_path: Path) -> None:
    metrics, folder = run
    # The vectors' file is gone, which evaluation of a named checkpoint does not read.
    evaluation = experiment(data_dir, folder.parents[1], vectors="gone.parquet").evaluate_checkpoint(folder, "test")
    assert evaluation.metrics == pytest.approx(metrics)
    histories = Histories(["a"], [[f"sku-{IDS[0]}", f"sku-{IDS[PER_THEME]}"]], [None], [None])
    recommender = Recommender.from_checkpoint(find_checkpoint(folder))
    found = recommender.recommend(histories, PER_THEME)
    expected = {f"sku-{i}" for i in IDS[2 * PER_THEME : 3 * PER_THEME]}
    assert len(expected & set(found["item_id"])) >= PER_THEME - 2
    assert f"sku-{IDS[3 * PER_THEME - 1]}" in set(found["item_id"])
    served = Recommender.from_checkpoint(find_checkpoint(export(find_checkpoint(folder), tmp_path / "served")))
    assert served.recommend(histories, PER_THEME).equals(found)


def test_a_finished_run_is_found_by_its_texts(run: Run, data_dir: Path) -> None:
    exps = run[1].parents[1]
    same, plan = experiment(data_dir, exps), experiment(data_dir, exps).plan
    assert same.evaluate_checkpoint(None, "test").metrics == pytest.approx(run[0])
    write_vectors(data_dir / "others.parquet", seed=6)
    other = experiment(data_dir, exps, vectors="others.parquet")
    assert other.plan.describe() == plan.describe()
    assert other.identity() != same.identity()
    with pytest.raises(CheckpointError, match="no run of this config"):
        other.evaluate_checkpoint(None, "test")


def test_a_checkpoint_of_another_model_is_refused(run: Run, data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"text_item_encoder.num_experts = 3, got 4"):
        experiment(data_dir, tmp_path, "text_item_encoder.num_experts = 4").evaluate_checkpoint(run[1], "test")
    with pytest.raises(CheckpointError, match=r"train_fn.item_encoder = 'text', got 'id'"):
        trained_by_id(data_dir, tmp_path).evaluate_checkpoint(run[1], "test")


def test_an_interrupted_run_ends_as_a_whole_one(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    three = ["train_fn.num_epochs = 3"]
    whole, _ = experiment(data_dir, tmp_path / "whole", *three).train()
    broken = experiment(data_dir, tmp_path / "broken", *three)
    evaluate, calls = broken.evaluate, itertools.count()

    def fail_later(*arguments: object) -> object:
        if next(calls) == 1:
            raise ZeroDivisionError
        return evaluate(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(broken, "evaluate", fail_later)
    with pytest.raises(ZeroDivisionError):
        broken.train()
    (stopped,) = (tmp_path / "broken").glob("*/*")
    assert find_checkpoint(stopped).progress.epoch == 1
    continued, folder = experiment(data_dir, tmp_path / "broken", *three).train()
    assert folder == stopped
    assert continued.metrics == whole.metrics


def test_texts_from_titles_need_nothing(data_dir: Path, tmp_path: Path) -> None:
    config = load([SHIPPED], [*SMALL, "train_fn.num_epochs = 1", "text_item_encoder.embedding_dim = 8"])
    trial = RetrievalExperiment(config, Places(data_dir, tmp_path), CPU)
    assert trial.model().items.text_VE.shape == (int(IDS[-1]) + 1, 8)  # type: ignore[union-attr]
    assert "parameters" in trial.dry_run()


def test_missing_texts_are_named(data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.parquet"):
        experiment(data_dir, tmp_path, vectors="gone.parquet").train()


def test_whitening_is_fitted_on_trained_items(data_dir: Path, tmp_path: Path) -> None:
    trial = experiment(data_dir, tmp_path)
    text = trial.model().items.text_VE[torch.as_tensor(IDS)]  # type: ignore[union-attr, index]
    trained = training_counts(trial.dataset, 0) > 0
    assert int((~trained).sum()) == THEMES
    torch.testing.assert_close(text[trained].mean(0), torch.zeros(16), atol=1e-4, rtol=0)
    raw = experiment(data_dir, tmp_path, "text_item_encoder.whiten = False")
    assert raw.texts is not None
    torch.testing.assert_close(raw.model().items.text_VE[torch.as_tensor(IDS)], raw.texts.values_ND)  # type: ignore[union-attr, index]


def test_drafters_of_other_data_or_events_are_refused(run: Run, data_dir: Path, tmp_path: Path) -> None:
    dataset = PreparedDataset.load(data_dir, "themes")
    other = replace(dataset, timestamps_E=dataset.timestamps_E + 1)
    with pytest.raises(CheckpointError, match=r"was trained on dataset themes:.*try a drafter that was trained on"):
        retrieval_drafter(run[1], other, CPU)
    with pytest.raises(CheckpointError, match="no such folder"):
        retrieval_drafter(tmp_path / "nowhere", dataset, CPU)
    drafter = retrieval_drafter(run[1], dataset, CPU)
    assert drafter.window == 8


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("text_item_encoder.num_experts = 0", "text_item_encoder.num_experts: got 0, expected at least 1"),
        ("text_item_encoder.dropout_rate = 1.0", "text_item_encoder.dropout_rate: got 1.0"),
        ("text_item_encoder.encoder = 'file'", "text_item_encoder.embeddings_path: got None, expected a file"),
        ("text_item_encoder.embedding_dim = 0", "text_item_encoder.embedding_dim: got 0"),
        ("train_fn.item_encoder = 'picture'", "train_fn.item_encoder"),
        ("train_fn.loss_candidates = 'some'", "train_fn.loss_candidates"),
    ],
)
def test_mistakes_are_named(binding: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Plan.of(load([SHIPPED], [binding]))
