"""Mixture of Logits from the launcher: training with every loss and encoder, evaluation, recommending, export."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from generative_recommenders.config import load
from generative_recommenders.data.dataset import PreparedDataset
from generative_recommenders.retrieval.assemble import Plan, Splits, build_model, training_counts, training_loader
from generative_recommenders.serving.recommender import Recommender
from generative_recommenders.training.runs import find_checkpoint
from tests.test_main import PUBLISHED, SMALL, SMALL_ENCODER, Launch, data_dir, flags, launch, only_run, raw_id

__all__ = ["data_dir", "launch"]  # pytest finds its fixtures among a module's names.

MOL = (
    "train_fn.interaction_module_type = 'MoL'",
    "train_fn.top_k_method = 'MoLBruteForceTopK'",
    "train_fn.item_l2_norm = False",
    "train_fn.temperature = 1.0",
    "train_fn.loss_weights = {'mi_loss': 0.001, 'uid_embedding_l2_norm': 0.1}",
    "create_mol_interaction_module.dot_product_dimension = 8",
    "create_mol_interaction_module.query_dot_product_groups = 3",
    "create_mol_interaction_module.item_dot_product_groups = 2",
    "create_mol_interaction_module.temperature = 0.05",
    "create_mol_interaction_module.query_dropout_rate = 0.1",
    "create_mol_interaction_module.query_hidden_dim = 16",
    "create_mol_interaction_module.item_dropout_rate = 0.1",
    "create_mol_interaction_module.item_hidden_dim = -1",
    "create_mol_interaction_module.gating_query_hidden_dim = 8",
    "create_mol_interaction_module.gating_qi_hidden_dim = 8",
    "create_mol_interaction_module.gating_item_hidden_dim = 8",
    "create_mol_interaction_module.softmax_dropout_rate = 0.2",
    "create_mol_interaction_module.uid_embedding_hash_sizes = [50]",
)


def mol(*bindings: str, encoder: str = "HSTU") -> list[str]:
    given = [*SMALL, *SMALL_ENCODER[encoder], f"train_fn.main_module = '{encoder}'", *MOL, *bindings]
    return flags(given, f"--gin_config_file={PUBLISHED}")


def metrics_of(folder: Path) -> dict[str, float]:
    return dict(json.loads((folder / "metrics.json").read_text())["metrics"])


@pytest.mark.parametrize("encoder", ["HSTU", "SASRec"])
@pytest.mark.parametrize("loss", ["SampledSoftmaxLoss", "FullSoftmaxLoss", "BCELoss"])
def test_every_loss_and_encoder_trains(loss: str, encoder: str, launch: Launch, tmp_path: Path) -> None:
    outcome = launch(*mol(f"train_fn.loss_module = '{loss}'", encoder=encoder))
    assert outcome.status == 0, outcome.err
    first = json.loads((only_run(tmp_path / "exps") / "metrics.jsonl").read_text().splitlines()[0])
    assert 0 < first["train"]["loss"] < 100


def test_it_learns_the_toy(launch: Launch, tmp_path: Path) -> None:
    outcome = launch(*mol("train_fn.num_epochs = 45", "train_fn.learning_rate = 0.005", "train_fn.dropout_rate = 0.0"))
    assert outcome.status == 0, outcome.err
    assert metrics_of(only_run(tmp_path / "exps"))["hr@10"] > 0.6


def test_a_run_repeats_to_the_bit(launch: Launch, tmp_path: Path) -> None:
    weights = []
    for name in ("one", "two"):
        assert launch(*mol(), f"--exps_dir={tmp_path / name}").status == 0
        weights.append(load_file(find_checkpoint(only_run(tmp_path / name)).path / "model.safetensors"))
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=0, msg=name)


@pytest.fixture
def run(launch: Launch, tmp_path: Path) -> Path:
    assert launch(*mol("train_fn.num_epochs = 1")).status == 0
    return only_run(tmp_path / "exps")


def figures(lines: list[str]) -> list[str]:
    return re.findall(r"\d\.\d{4}", lines[-1])


def test_evaluate_with_another_top_k_method(run: Path, launch: Launch) -> None:
    exact = launch("--mode=evaluate", f"--checkpoint={run}")
    whole = launch("--mode=evaluate", f"--checkpoint={run}", "--top_k_method=MoLAvgTopK1000")
    part = launch("--mode=evaluate", f"--checkpoint={run}", "--top_k_method=MoLAvgTopK5")
    assert exact.status == whole.status == part.status == 0, exact.err + whole.err + part.err
    # The first stage keeps more than the catalogue holds, so that it leaves nothing out.
    assert figures(whole.logged)[:7] == figures(exact.logged)[:7]
    assert figures(part.logged)[:7] != figures(exact.logged)[:7]


@pytest.mark.parametrize("method", ["MIPSBruteForceTopK", "MoLAvgTopK", "MoLSomething5"])
def test_a_method_that_cannot_search_is_one_line(method: str, run: Path, launch: Launch) -> None:
    outcome = launch("--mode=evaluate", f"--checkpoint={run}", f"--top_k_method={method}")
    assert outcome.status == 2
    assert f"--top_k_method: got {method!r}, expected" in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


def test_recommend_knows_the_users_it_was_trained_on(run: Path) -> None:
    recommender = Recommender.from_checkpoint(find_checkpoint(run))
    assert recommender.users["7"] == 7
    model = recommender.model
    known = torch.tensor([recommender.users["7"]])
    query = torch.ones(1, 16)
    assert model.similarity.project_queries(query, known, None)[0][0][0, -1].abs().sum() > 0


def test_recommend_and_export_agree(run: Path, launch: Launch, tmp_path: Path) -> None:
    histories = tmp_path / "histories.csv"
    pd.DataFrame({"user_id": ["7", "nobody"], "item_ids": [f"{raw_id(3)},{raw_id(6)}"] * 2}).to_csv(histories)
    exported = tmp_path / "model"
    outcome = launch("--mode=export", f"--checkpoint={run}", f"--output={exported}")
    assert outcome.status == 0, outcome.err
    assert not (exported / "optimizer.safetensors").exists()
    tables = []
    for name, source in (("run", run), ("export", exported)):
        output = tmp_path / f"{name}.csv"
        places = [f"--checkpoint={source}", f"--histories={histories}", f"--output={output}"]
        outcome = launch("--mode=recommend", *places)
        assert outcome.status == 0, outcome.err
        tables.append(pd.read_csv(output))
    pd.testing.assert_frame_equal(*tables)
    scores = tables[0].pivot(index="rank", columns="user_id", values="score")
    assert not scores["7"].equals(scores["nobody"])
    index = load_file(exported / "index.safetensors")
    assert index["components"].shape == (40, 2, 8) and index["gate"].shape == (40, 6)
    assert index["item_ids"].tolist() == list(range(3, 121, 3))


def test_export_replaces_an_export_and_nothing_else(run: Path, launch: Launch, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    assert launch("--mode=export", f"--checkpoint={run}", f"--output={folder}").status == 0
    assert launch("--mode=export", f"--checkpoint={run}", f"--output={folder}").status == 0
    (tmp_path / "thesis").mkdir()
    outcome = launch("--mode=export", f"--checkpoint={run}", f"--output={tmp_path / 'thesis'}")
    assert outcome.status == 2 and "is no export" in outcome.err


@pytest.mark.parametrize(
    ("bindings", "message"),
    [
        (["train_fn.top_k_method = 'MIPSBruteForceTopK'"], "train_fn.top_k_method: got 'MIPSBruteForceTopK', expected"),
        (["train_fn.loss_weights = {'mi': 1.0}"], "train_fn.loss_weights: got 'mi', expected auxiliary losses"),
        (
            ["create_mol_interaction_module.uid_embedding_hash_sizes = None"],
            "train_fn.loss_weights: got 'uid_embedding_l2_norm', expected auxiliary losses of this model (mi_loss)",
        ),
        (["create_mol_interaction_module.item_embedding_dim = 7"], "item_embedding_dim: supplied by the program"),
        (["create_mol_interaction_module.query_nonlinearity = 'relu'"], "query_nonlinearity"),
    ],
)
def test_mistakes_are_one_line(bindings: list[str], message: str, launch: Launch) -> None:
    outcome = launch(*mol(*bindings))
    assert outcome.status == 2
    assert message in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


def test_the_loss_is_the_main_one_and_the_weighted_others(data_dir: Path) -> None:
    weights = {"mi_loss": 0.5, "uid_embedding_l2_norm": 2.0}
    bindings = [*SMALL, *SMALL_ENCODER["SASRec"], *MOL, f"train_fn.loss_weights = {weights}"]
    plan = Plan.of(load([], [*bindings, "train_fn.loss_module = 'BCELoss'"]))
    dataset = PreparedDataset.load(data_dir, "toy")
    model = build_model(plan, dataset.catalog.item_ids, training_counts(dataset, 1))
    batch = next(iter(training_loader(plan, Splits.of(plan.experiment, dataset).train, 0, 1).epoch(0)))
    loss, scalars = model(batch, seed=1)
    others = sum(weight * scalars[name] for name, weight in weights.items())
    torch.testing.assert_close(loss, scalars["main_loss"] + others)
    torch.testing.assert_close(scalars["ar_loss"], loss.detach())
    table = model.similarity.user_components[0]
    users = batch.user_ids_B[batch.rows_T()]
    wanted = table[users % 50 + 1].square().sum(1).mean()
    torch.testing.assert_close(scalars["uid_embedding_l2_norm"], wanted.detach())
    loss.backward()
    touched = set((table.grad != 0).any(1).nonzero().flatten().tolist())
    assert touched == set((batch.user_ids_B % 50 + 1).tolist())


def test_histories_without_user_ids_are_of_unknown_users(run: Path, launch: Launch, tmp_path: Path) -> None:
    scores = {}
    for name, users in (("unnamed", {}), ("strangers", {"user_id": ["x", "y"]}), ("known", {"user_id": ["0", "1"]})):
        path, output = tmp_path / f"{name}.csv", tmp_path / f"{name}-out.csv"
        pd.DataFrame({**users, "item_ids": [f"{raw_id(3)},{raw_id(6)}"] * 2}).to_csv(path, index=False)
        assert (
            launch("--mode=recommend", f"--checkpoint={run}", f"--histories={path}", f"--output={output}").status == 0
        )
        scores[name] = pd.read_csv(output)["score"].tolist()
    assert scores["unnamed"] == scores["strangers"] != scores["known"]


def test_a_long_name_is_cut_and_told_apart() -> None:
    names = []
    for sizes in ([9, 9], [8, 8]):
        loaded = load([], [*MOL, f"create_mol_interaction_module.uid_embedding_hash_sizes = {sizes}"])
        plan = Plan.of(loaded)
        names.append(replace(plan, experiment=replace(plan.experiment, event_columns={"action" * 9: 5})).describe())
    assert names[0] != names[1] and max(map(len, names)) <= 200
