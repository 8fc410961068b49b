"""The generative experiment on toy data, end to end: IDs made first, three models, resuming, metrics, lists."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from generative_recommenders.config import ConfigError, load
from generative_recommenders.data.dataset import PreparedDataset
from generative_recommenders.data.errors import DataError
from generative_recommenders.distributed.runtime import Runtime
from generative_recommenders.errors import UserError
from generative_recommenders.generative.draft_head import lone_items
from generative_recommenders.generative.drafters import TEXTS_FILE, SemanticKNN
from generative_recommenders.generative.specgr import SpecGRResult
from generative_recommenders.serving.export import export
from generative_recommenders.serving.generated import GeneratedRecommender, recommender_of
from generative_recommenders.serving.histories import Histories
from generative_recommenders.tokenizers.catalogue import TOKENIZER, add_items, load_current, remove_items
from generative_recommenders.tokenizers.quantizer import load_quantizer
from generative_recommenders.tokenizers.semantic_ids import SemanticIds
from generative_recommenders.training.checkpoint import CheckpointError
from generative_recommenders.training.experiment import Places, experiment_of
from generative_recommenders.training.generative import GenerativeExperiment
from generative_recommenders.training.item_texts import embeddings_of
from generative_recommenders.training.loop import Interrupted, Trainer
from generative_recommenders.training.runs import find_checkpoint
from tests.toy import write_toy_dataset

HERE = Runtime(0, 1, torch.device("cpu"))
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# Room for items to come, and a beam that reaches all of them.
WIDE = ("train_tokenizer.dedup_width = 16", "beam_search.widths = 100")
SMALL = (
    "train_tokenizer.dataset_name = 'toy'",
    "train_tokenizer.embedding_dim = 8",
    "rq_kmeans.sizes = (4, 4)",
    "train_generative.dataset_name = 'toy'",
    "train_generative.max_sequence_length = 6",
    "train_generative.local_batch_size = 16",
    "train_generative.num_epochs = 2",
    "train_generative.num_warmup_steps = 3",
    "train_generative.schedule = 'inverse_sqrt'",
    "train_generative.top_k = 10",
    "beam_search.widths = 10",
    *(f"{m}.{n}" for m in ("tiger", "parallel_tiger") for n in ("num_encoder_layers = 1", "num_decoder_layers = 1")),
    *(f"{m}.{n}" for m in ("tiger", "parallel_tiger") for n in ("dim = 16", "num_heads = 2", "dkv = 8")),
    *(f"{m}.ffn_hidden_dim = 32" for m in ("tiger", "parallel_tiger", "sid_gr")),
    "sid_gr.dim = 16",
    "sid_gr.num_blocks = 1",
    "sid_gr.num_heads = 2",
)
KINDS = ("tiger", "parallel-tiger", "sid-gr-hstu", "sid-gr-transformer")
Make = Callable[..., GenerativeExperiment]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    write_toy_dataset(tmp_path)

    def experiment(*bindings: str, kind: str = "tiger", exps: str = "exps") -> GenerativeExperiment:
        config = load([CONFIGS / "amzn14-beauty" / f"{kind}.gin"], [*SMALL, *bindings])
        made = experiment_of(config, Places(tmp_path, tmp_path / exps), HERE)
        assert isinstance(made, GenerativeExperiment)
        return made

    return experiment


@pytest.mark.parametrize("kind", KINDS)
def test_every_model_trains_and_is_evaluated_and_recommends(make: Make, kind: str) -> None:
    experiment = make("beam_search.verify = True", kind=kind)
    lines = experiment.run()
    assert lines[-1].startswith("TEST eval: NDCG@5 ")
    (metrics,) = experiment.places.exps_dir.glob("toy-l6/*/metrics.json")
    record = json.loads(metrics.read_text())
    measured = record["metrics"]
    assert measured["valid"] == 1.0 and measured["duplicates"] == 0.0
    assert measured["sid_hr@10"] >= measured["hr@10"] >= measured["hr@5"]
    assert record["protocol"] == "selected on valid, history not filtered"
    # The checkpoint alone gives the same metrics, whichever way it is found.
    for checkpoint in (None, metrics.parent):
        again = make("beam_search.verify = True", kind=kind).evaluate_checkpoint(checkpoint, "test")
        assert again.metrics == pytest.approx(measured, nan_ok=True)
    recommender = recommender_of(find_checkpoint(metrics.parent))
    history = experiment.dataset.catalog.raw_ids[:3]
    table = recommender.recommend(Histories(["u", "v"], [history, [history[0], "nonsense"]], [None] * 2, [None] * 2), 4)
    assert table["rank"].tolist() == [1, 2, 3, 4] * 2
    ids = load_current(experiment.id_folders[0])
    assert ids.raw_ids is not None
    codes = dict(zip(ids.raw_ids.tolist(), ids.codes_NL.tolist(), strict=True))
    spelled = ["".join(f"<{n}_{c}>" for n, c in zip("abcd", codes[i], strict=False)) for i in table["item_id"]]
    assert table["semantic_id"].tolist() == spelled
    filtered = recommender.recommend(Histories(["u"], [history], [None], [None]), 30, filter_history=True)
    assert not set(filtered["item_id"]) & set(history)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_cut_short_continues_to_the_same_metrics(make: Make, kind: str) -> None:
    whole, _ = make(kind=kind, exps="whole").train()
    make("train_generative.num_epochs = 1", kind=kind).train()
    (folder,) = make(kind=kind).places.exps_dir.glob("toy-l6/*")
    rest, _ = make(f"train_generative.resume = '{folder}'", kind=kind).train()
    assert rest.metrics == pytest.approx(whole.metrics, nan_ok=True)


@pytest.mark.parametrize("kind", KINDS)
def test_both_stages_of_a_drafting_model_can_be_cut_short(
    make: Make, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bindings = ("tiger.user_tokens = 0", "draft_head.width = 8", "draft_head.finetune_epochs = 2")
    bindings += ("train_generative.num_epochs = 4", "train_generative.early_stopping_metric = 'draft_hr@10'")
    bindings += ("train_generative.early_stopping_patience = 0",)
    whole, folder = make(*bindings, kind=kind, exps="whole").train()
    assert 0.0 < whole.metrics["draft_hr@10"] <= 1.0
    assert "-draft8-" in folder.name
    stop_after = iter((1, 2, 3))
    epoch_of = Trainer._epoch

    def stopped(trainer: Trainer) -> None:
        epoch_of(trainer)
        if trainer.progress.epoch in wanted:
            trainer.stop.received = True
            trainer._stop_if_asked(saved=True)

    monkeypatch.setattr(Trainer, "_epoch", stopped)
    for last in stop_after:
        wanted = {last}
        with pytest.raises(Interrupted):
            make(*bindings, kind=kind).train()
    wanted = set()
    rest, _ = make(*bindings, kind=kind).train()
    assert rest.metrics == pytest.approx(whole.metrics, nan_ok=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_without_samples_takes_part(make: Make, kind: str) -> None:
    experiment = make(kind=kind)
    experiment._make_ids()
    model = experiment.model()
    nobody = experiment.splits.train.batch(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
    loss, scalars = model(nobody, 0)
    loss.backward()
    assert float(loss.detach()) == 0.0 and scalars["main_loss"] == 0.0
    assert all(p.grad is not None and not bool(p.grad.any()) for p in model.parameters())


@pytest.mark.parametrize("kind", [*KINDS, "masked"])
@pytest.mark.parametrize("parts", [2, 3, 40])
def test_gradients_of_a_batch_in_parts_are_those_of_the_batch(make: Make, kind: str, parts: int) -> None:
    bindings = ["tiger.dropout_rate = 0.2"]
    if kind == "masked":
        # Samples have different numbers of codes to predict, and all of them count alike.
        bindings = ["parallel_tiger.training_mode = 'masked'", "parallel_tiger.loss_normalization = 'per_batch'"]
        kind = "parallel-tiger"
    experiment = make(*bindings, kind=kind)
    experiment._make_ids()
    members = torch.arange(len(experiment.splits.train))[:13]
    batch = experiment.splits.train.batch(members, torch.arange(13))
    found = []
    for accumulation in (1, parts):
        model = experiment.model().train()
        trainer = object.__new__(Trainer)
        trainer.task, trainer.parallel = experiment.task(model), model
        trainer.settings = replace(experiment.settings(), accumulation=accumulation)
        scalars = trainer._backward(batch, 5)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found.append(([scalars[n] for n in ("main_loss", "tokens")], gradients))
    torch.testing.assert_close(found[0], found[1], atol=2e-6, rtol=2e-5)


def test_export_holds_the_ids_and_serves_like_a_checkpoint(make: Make, tmp_path: Path) -> None:
    experiment = make()
    _, folder = experiment.train()
    out = export(find_checkpoint(folder), tmp_path / "out")
    index = load_file(out / "index.safetensors")
    assert torch.equal(index["item_ids"], experiment.tables[0].item_ids_N)
    assert torch.equal(index["codes"], experiment.tables[0].codes_NL.long())
    asked = Histories(["u"], [experiment.dataset.catalog.raw_ids[:3]], [None], [None])
    before = recommender_of(find_checkpoint(folder)).recommend(asked, 5)
    pd.testing.assert_frame_equal(recommender_of(find_checkpoint(out)).recommend(asked, 5), before)


def test_ids_can_be_made_of_what_a_model_has_learned(make: Make, tmp_path: Path) -> None:
    head = ["draft_head.width = 5", "draft_head.items = 'embedded'", "draft_head.negatives = 'catalogue'"]
    experiment = make(*head, kind="sid-gr-hstu")
    _, folder = experiment.train()
    out = export(find_checkpoint(folder), tmp_path / "out")
    index, model = load_file(out / "index.safetensors"), experiment.model()
    find_checkpoint(folder).load_model(model)
    assert model.draft is not None
    expected = model.draft.items(model, index["item_ids"])
    torch.testing.assert_close(index["embeddings"], expected.detach())
    learned = ["train_tokenizer.name = 'learned'", "train_tokenizer.encoder = 'file'"]
    learned += ["train_tokenizer.embedding_dim = None", f"train_tokenizer.embeddings_path = '{out}/index.safetensors'"]
    second = make(*learned, "train_generative.semantic_ids = ('learned',)")
    _, folder = second.train()
    assert second.tables[0].fingerprint != experiment.tables[0].fingerprint
    assert len(recommender_of(find_checkpoint(folder)).catalog) == len(second.tables[0])


def test_a_dry_run_and_an_evaluation_make_nothing(make: Make) -> None:
    experiment = make()
    assert "not there yet" in experiment.dry_run()
    with pytest.raises(UserError):
        experiment.report(None, "test", None)
    assert not experiment.id_folders[0].exists() and not experiment.places.exps_dir.exists()
    experiment.train()
    assert "first batch" in make().dry_run()


def test_wider_beams_change_what_is_certified_alone(make: Make) -> None:
    _, folder = make().train()
    narrow = make("beam_search.widths = 1").evaluate_checkpoint(folder, "test").metrics
    wide = make("beam_search.widths = 40").evaluate_checkpoint(folder, "test").metrics
    certified = make("beam_search.widths = 2", "beam_search.certify = True").evaluate_checkpoint(folder, "test").metrics
    assert narrow["certified"] < wide["certified"] == certified["certified"] == 1.0
    assert certified["hr@10"] == wide["hr@10"]
    assert narrow["certified@1"] == narrow["certified"]
    widths = sorted(int(name.partition("@")[2]) for name in certified if name.startswith("certified@"))
    shares = [certified[f"certified@{width}"] for width in widths]
    assert shares == sorted(shares) and shares[-1] == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_start_from_the_tokenizers_codebooks(make: Make, kind: str) -> None:
    make(kind=kind)._make_ids()
    started = make("train_generative.codebook_start = True", kind=kind).model().tokens
    drawn = make(kind=kind).model().tokens
    digit = int(started.level_offsets_L[2])
    assert not torch.equal(started.table[:digit], drawn.table[:digit])
    # The digit that tells items of one tuple apart has no codebook.
    assert torch.equal(started.table[digit:], drawn.table[digit:])


def test_ids_of_another_dataset_or_table_are_refused(make: Make, tmp_path: Path) -> None:
    _, folder = make().train()
    other = ("train_tokenizer.name = 'other'", "train_generative.semantic_ids = ('other',)", "rq_kmeans.sizes = (5, 3)")
    make(*other)._make_ids()
    with pytest.raises(UserError, match="expected"):
        make(*other).evaluate_checkpoint(folder, "test")
    with pytest.raises(DataError, match=r"no semantic IDs of this name"):
        make("train_generative.semantic_ids = ('nothing',)")
    write_toy_dataset(tmp_path, "second", num_users=30)
    (tmp_path / "second" / "semantic_ids").symlink_to(tmp_path / "toy" / "semantic_ids")
    with pytest.raises(DataError, match="dataset"):
        make("train_generative.dataset_name = 'second'", "train_tokenizer.dataset_name = 'second'").train()


def test_removed_items_are_never_listed_and_the_model_stays_good(make: Make) -> None:
    experiment = make()
    _, folder = experiment.train()
    gone = experiment.dataset.catalog.item_ids[:5]
    remove_items(experiment.id_folders[0], gone)
    evaluation = make().evaluate_checkpoint(folder, "test")
    assert evaluation.metrics["valid"] == 1.0
    after = make()
    lists = after.searcher(after.model())(next(iter(after.batches("test"))))
    assert not bool(torch.isin(lists.items_BK[lists.valid_BK], gone).any())


@pytest.mark.parametrize("kind", KINDS)
def test_specgr_lists_what_its_model_drafts_and_verifies(make: Make, kind: str) -> None:
    bindings = ["tiger.user_tokens = 0", "draft_head.width = 8", "train_generative.search = 'specgr'"]
    bindings += ["specgr.draft_size = 12", "specgr.num_beams = 6", "specgr.threshold = -1.5"]
    experiment = make(*bindings, kind=kind)
    evaluation, run = experiment.train()
    measured = evaluation.metrics
    assert measured["valid"] == 1.0 and measured["duplicates"] == 0.0
    assert 0.0 <= measured["acceptance"] <= 1.0 and 1.0 <= measured["rounds"] <= 3.0
    model = experiment.model()
    find_checkpoint(run).load_model(model)
    batch = next(iter(experiment.batches("test")))
    result = experiment.searcher(model.eval())(batch)
    assert isinstance(result, SpecGRResult)
    # A threshold that nothing passes fills lists from drafts and beams; one that all pass ends after a round.
    for threshold, rounds in ((0.0, 3), (-100.0, 1)):
        own = make(*bindings[:-1], f"specgr.threshold = {threshold}", kind=kind)
        found = own.searcher(model)(batch)
        assert isinstance(found, SpecGRResult)
        assert found.rounds_B.tolist() == [rounds] * batch.size
    target = (*bindings[:-1], "specgr.target_acceptance = 0.5")
    for filtered in (True, False):
        # Tuned for the lists as they are searched: half of the first round's drafts of valid are accepted.
        own = make(*target, f"train_generative.filter_history = {filtered}", kind=kind)
        specgr = own.searcher(model).specgr
        assert specgr is not None
        scores = [specgr.first_scores(b, exclude_history=filtered) for b in own.batches("valid")]
        drafted = torch.cat([s[s > -torch.inf] for s in scores])
        accepted = (drafted > specgr.config.threshold).double().mean().item()
        assert accepted == pytest.approx(0.5, abs=0.01)
    # What was tuned in training is what a recommender takes.
    _, tuned_run = make(*target, kind=kind).train()
    tuned = recommender_of(find_checkpoint(tuned_run))
    assert isinstance(tuned, GeneratedRecommender) and tuned.searcher.specgr is not None
    assert tuned.model.draft is not None
    assert tuned.searcher.specgr.config.threshold == float(tuned.model.draft.threshold) != -1.4
    recommender = recommender_of(find_checkpoint(run))
    history = experiment.dataset.catalog.raw_ids[:3]
    table = recommender.recommend(Histories(["u"], [history], [None], [None]), 5)
    assert table["rank"].tolist() == [1, 2, 3, 4, 5] and table["score"].is_monotonic_decreasing


def test_specgr_drafts_by_texts_and_by_a_retrieval_model(make: Make, tmp_path: Path) -> None:
    _, run = make().train()
    retrieval = ["train_fn.dataset_name = 'toy'", "train_fn.num_epochs = 1", "train_fn.item_embedding_dim = 8"]
    trained = experiment_of(load([], retrieval), Places(tmp_path, tmp_path / "retrieval"), HERE)
    _, folder = trained.train()
    for drafter in ("specgr.drafter = 'semantic_knn'", f"specgr.drafter_checkpoint = '{folder}'"):
        bindings = ["train_generative.search = 'specgr'", "specgr.draft_size = 12", drafter]
        bindings += ["specgr.drafter = 'retrieval'"] if "checkpoint" in drafter else []
        evaluation = make(*bindings).evaluate_checkpoint(run, "test")
        assert evaluation.metrics["valid"] == 1.0 and evaluation.metrics["acceptance"] > 0.0
        some = make(*bindings, "specgr.max_eval_steps = 1", "train_generative.eval_batch_size = 7")
        assert some.evaluate_checkpoint(run, "test").num_users == 7
    mixed = make(*bindings, "specgr.knn_weight = 4.0").evaluate_checkpoint(run, "test")
    assert mixed.metrics["draft_ndcg@50"] != evaluation.metrics["draft_ndcg@50"]
    nobody = make(*bindings, "specgr.eval_mode = 'unseen'").evaluate_checkpoint(run, "test")
    assert nobody.num_users < evaluation.num_users
    # Training selects by all users, whatever is asked of an evaluation.
    whole, folder = make(*bindings, "specgr.max_eval_steps = 1", "train_generative.eval_batch_size = 7").train()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {line["users"] for line in lines} == {whole.num_users} and whole.num_users > 7


@pytest.mark.parametrize("drafter", ["encoder", "semantic_knn"])
def test_a_recommender_drafts_by_the_texts_of_its_checkpoint(make: Make, drafter: str) -> None:
    bindings = ["train_generative.search = 'specgr'", "specgr.draft_size = 4", "specgr.threshold = -100.0"]
    bindings += ["specgr.knn_last_n = 2", "specgr.knn_whiten = True", f"specgr.drafter = '{drafter}'"]
    bindings += ["train_tokenizer.dedup_width = 16"]
    bindings += ["draft_head.width = 8", "specgr.knn_weight = 5.0"] if drafter == "encoder" else []
    experiment = make(*bindings)
    _, run = experiment.train()
    checkpoint, model = find_checkpoint(run), experiment.model()
    checkpoint.load_model(model)
    recommender = recommender_of(checkpoint)
    assert isinstance(recommender, GeneratedRecommender)
    batch = next(iter(experiment.batches("test")))
    expected = experiment.searcher(model.eval())(batch)
    assert recommender.searcher(batch).items_BK.tolist() == expected.items_BK.tolist()
    assert recommender.texts is not None and recommender.texts.last_n == 2
    plain = make(*(b for b in bindings if "whiten" not in b))
    other = plain.drafter if drafter == "semantic_knn" else plain.drafter_texts
    assert isinstance(other, SemanticKNN)
    assert not torch.allclose(other.vectors_VD, recommender.texts.vectors_VD, atol=0.1)
    grown = recommender.with_ids(*experiment.tables)
    assert grown.searcher(batch).items_BK.tolist() == expected.items_BK.tolist()
    # A new item with the text of another is as near to a history as that one.
    (folder,) = experiment.id_folders
    old, texts = load_current(folder), embeddings_of(experiment.tokenizer, experiment.dataset.folder)
    new, vectors = int(old.item_ids_N[-1]) + 3, texts.values_ND[:1]
    add_items(folder, [new], vectors, raw_ids=["new"])
    latest = load_current(folder)
    grown = recommender.with_ids(latest, text_vectors={new: vectors[0]})
    assert grown.texts is not None and recommender.texts.scores(batch).shape[1] == new - 2
    scores_BV = grown.texts.scores(batch)
    torch.testing.assert_close(scores_BV[:, new], scores_BV[:, int(texts.item_ids_N[0])])
    # Nothing is as near to its twin's history.
    asked = Histories(["u"], [experiment.dataset.catalog.raw_ids[:1]], [None], [None])
    numpy_too = recommender.with_ids(latest, text_vectors={new: vectors[0].numpy()})
    for found, expected_first in ((grown, True), (numpy_too, True), (recommender.with_ids(latest), False)):
        assert found.texts is not None
        near = found.texts.scores(lone_items(texts.item_ids_N[:1]))
        nearest = near.argsort(descending=True, stable=True)[0, :2].tolist()
        assert (new in nearest) == expected_first
        assert len(found.recommend(asked, 3)) == 3
    assert recommender.with_ids(latest, text_vectors={}).texts is recommender.texts
    mistakes = {
        "expected those of items with a": {new + 1: vectors[0]},
        r"of shape \(7,\) for item": {new: vectors[0, 1:]},
        "whole numbers": {"new": vectors[0]},
        "expected real": {new: vectors[0].to(torch.complex64)},
        "got str for item": {new: "text"},
        "got NoneType for item": {new: None},
        "got one of item 100000000000000000000": {10**20: vectors[0]},
    }
    with pytest.raises(DataError, match="got list, expected a mapping"):
        recommender.with_ids(latest, text_vectors=[(new, vectors[0])])
    for told, mapping in mistakes.items():
        with pytest.raises(DataError, match=told):
            recommender.with_ids(latest, text_vectors=mapping)
    if drafter == "semantic_knn":
        _, tuned = make(*bindings, "specgr.target_acceptance = 0.5").train()
        with pytest.raises(ConfigError, match=r"target_acceptance: got 0.5 with draft_head.width = 0"):
            recommender_of(find_checkpoint(tuned))
    old_texts = replace(recommender, texts=SemanticKNN(texts.values_ND, torch.ones(len(texts.values_ND)).bool()))
    with pytest.raises(DataError, match="does not keep by what"):
        old_texts.with_ids(latest, text_vectors={new: vectors[0]})
    without = replace(recommender, texts=None)
    with pytest.raises(DataError, match="whose drafts do not go by texts"):
        without.with_ids(latest, text_vectors={new: vectors[0]})
    (checkpoint.path / TEXTS_FILE).write_bytes(b"half")
    with pytest.raises(DataError, match="no text vectors can be read"):
        recommender_of(checkpoint)


def test_one_config_trains_the_drafter_and_then_the_generator(make: Make, tmp_path: Path) -> None:
    config = tmp_path / "drafter.gin"
    config.write_text(
        "train_fn.dataset_name = 'toy'\ntrain_fn.num_epochs = 1\ntrain_fn.item_embedding_dim = 8\n"
        "train_fn.eval_split = 'valid'\n"
    )
    bindings = ["train_generative.search = 'specgr'", "specgr.draft_size = 12", "specgr.drafter = 'retrieval'"]
    bindings.append(f"specgr.drafter_config = '{config}'")
    with pytest.raises(CheckpointError, match=r"no finished run of .*drafter\.gin"):
        _ = make(*bindings).drafter
    evaluation, run = make(*bindings).train()
    drafters = list((tmp_path / "exps").glob("toy-l200/*/metrics.json"))
    assert len(drafters) == 1 and evaluation.metrics["acceptance"] > 0.0
    # It is there now, and is taken as it is.
    again = make(*bindings).evaluate_checkpoint(run, "test")
    assert again.metrics == pytest.approx(evaluation.metrics, nan_ok=True)
    assert list((tmp_path / "exps").glob("toy-l200/*/metrics.json")) == drafters
    # A run that was cut short later, or another number of ranks, does not hide it.
    (finished,) = (path.parent for path in drafters)
    newer = finished.parent / "newer"
    shutil.copytree(finished, newer)
    (newer / "metrics.json").unlink()
    identity = json.loads((finished / "run.json").read_text())
    (finished / "run.json").write_text(json.dumps({"identity": identity["identity"].replace("-w1", "-w2")}))
    drafter = make(*bindings).drafter
    assert drafter is not None
    elsewhere = tmp_path / "elsewhere.gin"
    elsewhere.write_text(config.read_text().replace("'toy'", "'other'"))
    shutil.copytree(tmp_path / "toy", tmp_path / "other")
    with pytest.raises(ConfigError, match=r"on dataset 'other', expected the generative model's, 'toy'"):
        make(*bindings[:-1], f"specgr.drafter_config = '{elsewhere}'").train()
    assert not list((tmp_path / "exps").glob("other-*"))
    other = f"specgr.drafter_config = '{CONFIGS / 'amzn14-beauty' / 'rqkmeans.gin'}'"
    with pytest.raises(UserError, match=r"expected a config of main\.experiment = @train_fn|dataset"):
        _ = make(*bindings[:-1], other).drafter


@pytest.mark.parametrize("kind", KINDS)
def test_items_added_at_run_time_are_listed_without_training(make: Make, kind: str) -> None:
    own: tuple[str, ...] = ()
    if kind == "sid-gr-hstu":
        head = ("width = 8", "items = 'embedded'", "negatives = 'catalogue'", "l2_norm = False", "temperature = 1.0")
        own = (
            "sid_gr.item_embeddings = True",
            "sid_gr.items_at_bos = True",
            *(f"draft_head.{binding}" for binding in head),
        )
    experiment = make(*WIDE, *own, kind=kind)
    _, run = experiment.train()
    recommender = recommender_of(find_checkpoint(run))
    assert isinstance(recommender, GeneratedRecommender)
    (folder,) = experiment.id_folders
    old = load_current(folder)
    like = int(old.item_ids_N[2])
    vectors = load_quantizer(folder / TOKENIZER).reconstruct(old.codes_of([like])[:, :2])
    new = int(old.item_ids_N[-1]) + 5
    add_items(folder, [new], vectors, raw_ids=["brand-new"])
    grown = recommender.with_ids(load_current(folder))
    asked = Histories(["u"], [experiment.dataset.catalog.raw_ids[:3]], [None], [None])
    # Metrics of what the catalogue is now, with ids beyond those of the dataset.
    evaluated = make(*WIDE, *own, kind=kind)
    assert evaluated.evaluate_checkpoint(run, "test").metrics["valid"] == 1.0
    if own:
        # Items are learned among those that training has; and what a checkpoint's vectors are is not a choice.
        trained = evaluated.model().draft
        assert trained is not None and trained.negatives_n is not None
        assert trained.negatives_n.tolist() == old.item_ids_N.tolist()
        for other_head in ("draft_head.l2_norm = True", "draft_head.items = 'encoded'"):
            changed = [b for b in own if other_head.split(" = ")[0] not in b and "negatives" not in b]
            with pytest.raises(CheckpointError, match=other_head.split(" = ")[0]):
                make(*WIDE, *changed, other_head, kind=kind).evaluate_checkpoint(run, "test")
    everything = len(old) + 1
    before, after = (r.recommend(asked, everything, filter_history=False) for r in (recommender, grown))
    assert set(after["item_id"]) - set(before["item_id"]) == {"brand-new"}
    # The codes of the item that it is like, but for the last, which tells the two apart.
    ids = dict(zip(after["item_id"], after["semantic_id"], strict=True))
    twin = experiment.dataset.catalog.raw_ids[2]
    assert ids["brand-new"].split("><")[:2] == ids[twin].split("><")[:2] and ids["brand-new"] != ids[twin]
    # Others keep their scores, and a history may hold the new item.
    old_scores, new_scores = (t.set_index("item_id")["score"] for t in (before, after))
    assert new_scores[old_scores.index].to_numpy() == pytest.approx(old_scores.to_numpy(), abs=1e-5)
    with_new = Histories(["u"], [["brand-new"]], [None], [None])
    assert len(grown.recommend(with_new, 3)) == 3
    with pytest.raises(DataError, match="none of the items is known"):
        recommender.recommend(with_new, 3)
    other = SemanticIds.of(old.item_ids_N, old.codes_NL.flip(0).clone(), old.sizes)
    with pytest.raises(DataError, match="pass the table the model was trained with"):
        grown.with_ids(other)


@pytest.mark.parametrize(
    ("bindings", "told"),
    [
        (["train_generative.model = 'TIGRE'"], "TIGER"),
        (["train_generative.early_stopping_metric = 'hr@50'"], r"top_k = 10"),
        (["train_generative.semantic_ids = ('a', 'b')"], "ParallelTIGER"),
        (["beam_search.widths = 0"], "beam_search.widths"),
        (["beam_search.widths = (3, 3)"], "levels"),
        (["train_generative.dataset_name = 'toys'"], "toys"),
        (
            [
                "train_generative.model = 'ParallelTIGER'",
                "parallel_tiger.training_mode = 'masked'",
                "parallel_tiger.loss_normalization = 'per_batch'",
                "train_generative.accumulation_steps = 2",
                "draft_head.width = 8",
            ],
            "accumulation_steps: got 2 with draft_head.width = 8",
        ),
        (["tiger.user_tokens = 0", "draft_head.width = 8", "draft_head.finetune_epochs = 1"], "leave out stage two"),
    ],
)
def test_mistakes_are_told_in_one_line(make: Make, bindings: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        make(*bindings).train()
    assert "\n" not in str(caught.value)


def test_the_search_is_chosen_at_evaluation(make: Make) -> None:
    _, folder = make(kind="parallel-tiger").train()
    exact = make(kind="parallel-tiger").evaluate_checkpoint(folder, "test").metrics
    wide = ("beam_search.widths = 40", "parallel_tiger.decoding = 'beam'", "train_generative.filter_history = False")
    beamed = make(*wide, kind="parallel-tiger").evaluate_checkpoint(folder, "test").metrics
    # Scoring every item keeps no beams, of which the width could be told.
    assert [name.partition("@")[0] for name in beamed if name not in exact] == ["certified"]
    assert {name: beamed[name] for name in exact} == pytest.approx(exact, nan_ok=True)
    filtered = make("train_generative.filter_history = True", kind="parallel-tiger")
    assert filtered.evaluate_checkpoint(folder, "test").metrics["hr@10"] != exact["hr@10"]


def test_a_retrieval_method_is_refused(make: Make) -> None:
    _, folder = make("train_generative.num_epochs = 1").train()
    with pytest.raises(ConfigError, match="beam_search"):
        make().evaluate_checkpoint(folder, "test", "MIPSBruteForceTopK")
    with pytest.raises(CheckpointError, match="trained with"):
        make("tiger.dim = 32").evaluate_checkpoint(folder, "test")


def test_a_partial_evaluation_sees_users_from_all_over_the_split(make: Make) -> None:
    experiment = make("train_generative.eval_batch_size = 4")
    users = torch.cat([batch.user_ids_B for batch in experiment.batches("valid", 3)]).tolist()
    again = torch.cat([batch.user_ids_B for batch in experiment.batches("valid", 3)]).tolist()
    every = torch.cat([batch.user_ids_B for batch in experiment.batches("valid")]).tolist()
    assert users == again and len(set(users)) == 12 and max(users) > every[len(every) // 2]
    assert every == sorted(every)


def test_trained_items_are_those_of_the_training_events(make: Make) -> None:
    experiment = make()
    experiment._make_ids()
    data: PreparedDataset = experiment.dataset
    wanted = {
        int(item)
        for user in range(data.num_users)
        for item in data.item_ids_E[data.offsets[user] : data.offsets[user + 1] - 2]
    }
    assert set(experiment.catalogue.trained_V.nonzero().flatten().tolist()) == wanted
