"""The semantic-ID experiment from config to folder: made once, found again, refused or replaced where it changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from generative_recommenders.config import ConfigError, load
from generative_recommenders.data.errors import DataError
from generative_recommenders.distributed.runtime import Runtime
from generative_recommenders.errors import UserError
from generative_recommenders.tokenizers.catalogue import load_current, remove_items
from generative_recommenders.tokenizers.quantizer import fingerprint, load_quantizer
from generative_recommenders.training import tokenizer
from generative_recommenders.training.experiment import Places, experiment_of
from generative_recommenders.training.tokenizer import TokenizerExperiment
from tests.toy import write_toy_dataset

HERE = Runtime(0, 1, torch.device("cpu"))
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
KINDS = [path.stem for path in sorted((CONFIGS / "ml-1m").glob("*.gin")) if "train_tokenizer" in path.read_text()]
SMALL = (
    "rq_kmeans.sizes = (4, 4)",
    "rq_kmeans_plus.sizes = (4, 4)",
    "rq_kmeans_plus.steps = 20",
    "rq_vae.sizes = (4, 4)",
    "rq_vae.hidden_dims = (16,)",
    "rq_vae.code_dim = 4",
    "rq_vae.steps = 40",
    "rq_vae.batch_size = 16",
    "r_vq.sizes = (4, 4)",
    "pq.sizes = (4, 4)",
    "opq.sizes = (4, 4)",
    "lsh.sizes = (4, 4)",
    "random_codes.sizes = (4, 4)",
    "train_tokenizer.collision_policy = 'dedup'",
    "train_tokenizer.embedding_dim = 8",
    "train_tokenizer.dataset_name = 'toy'",
)
Make = Callable[..., TokenizerExperiment]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    write_toy_dataset(tmp_path)

    def experiment(*bindings: str, kind: str = "rqkmeans") -> TokenizerExperiment:
        config = load([CONFIGS / "ml-1m" / f"{kind}.gin"], [*SMALL, *bindings])
        made = experiment_of(config, Places(tmp_path, tmp_path / "exps"), HERE)
        assert isinstance(made, TokenizerExperiment)
        return made

    return experiment


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_each_item_an_id(make: Make, kind: str) -> None:
    experiment = make(kind=kind)
    lines = experiment.run()
    table = load_current(experiment.folder)
    assert table.item_ids_N.tolist() == experiment.dataset.catalog.item_ids.tolist()
    assert int(table.group_sizes().max()) == 1 and table.policy == "dedup"
    assert table.raw_ids is not None and table.raw_ids.tolist() == experiment.dataset.catalog.raw_ids
    assert table.tokenizer_fingerprint == fingerprint(load_quantizer(experiment.folder / "tokenizer"))
    assert table.dataset_fingerprint == experiment.dataset.fingerprint
    assert (experiment.folder / "quality.png").stat().st_size > 1000
    record = json.loads((experiment.run_folder / "metrics.json").read_text())
    assert record["metrics"]["p_unique"] == 1.0 and record["fingerprint"] == table.fingerprint
    assert list(experiment.run_folder.glob("events.out.tfevents.*"))
    assert "perplexity" in lines[0] and "fingerprint" in lines[-1]


def test_ids_are_made_once_and_the_same_again(make: Make) -> None:
    first = make()
    first.run()
    codes = (first.folder / "v1" / "codes.safetensors").read_bytes()
    assert "there already" in make().run()[-1]
    assert "perplexity" in make().report(None, "test", None)[0]
    # From anew, the embeddings and all that is drawn included.
    again = make("train_tokenizer.resume = 'never'")
    again.run()
    assert (again.folder / "v1" / "codes.safetensors").read_bytes() == codes


@pytest.mark.parametrize("damage", ["v1/codes.safetensors", "tokenizer/model.safetensors", "current.json"])
def test_a_damaged_folder_is_not_taken_for_a_made_one(make: Make, damage: str) -> None:
    first = make()
    first.run()
    (first.folder / damage).write_bytes(b"{")
    with pytest.raises(UserError):
        make().run()
    with pytest.raises(UserError):
        make().report(None, "test", None)


def test_ids_made_meanwhile_by_another_config_are_not_overwritten(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    build = tokenizer.build_semantic_ids

    def slow(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(tokenizer, "build_semantic_ids", build)
        make("train_tokenizer.random_seed = 7").run()
        return build(*arguments, **options)

    monkeypatch.setattr(tokenizer, "build_semantic_ids", slow)
    with pytest.raises(ConfigError, match="holds IDs of other settings"):
        make().run()


def test_other_settings_are_refused_or_replace(make: Make) -> None:
    first = make()
    first.run()
    before = load_current(first.folder)
    other = ("train_tokenizer.random_seed = 7", "rq_kmeans.sizes = (5, 3)")
    with pytest.raises(ConfigError, match=r"try another train_tokenizer\.name"):
        make(*other).run()
    assert load_current(first.folder).fingerprint == before.fingerprint
    make(*other, "train_tokenizer.resume = 'never'").run()
    assert load_current(first.folder).sizes[:2] == (5, 3)
    make(*other, "train_tokenizer.name = 'second'").run()


def test_a_grown_catalogue_is_not_made_anew(make: Make) -> None:
    first = make()
    first.run()
    remove_items(first.folder, [3])
    assert "there already" in make().run()[-1]
    assert "39 items" in make().report(None, "test", None)[-1]
    with pytest.raises(ConfigError, match="2 versions"):
        make("train_tokenizer.resume = 'never'").run()
    assert load_current(first.folder).version == 2


def test_it_is_fitted_on_items_of_the_training_events(make: Make) -> None:
    experiment = make()
    data = experiment.dataset
    wanted = {
        int(item)
        for user in range(data.num_users)
        for item in data.item_ids_E[data.offsets[user] : data.offsets[user + 1] - 2]
    }
    assert set(data.catalog.item_ids[experiment._fitted()].tolist()) == wanted
    assert bool(make("train_tokenizer.fit_on = 'all'")._fitted().all())


@pytest.mark.parametrize(
    ("bindings", "told"),
    [
        (["rq_kmeans.sizes = (400, 4)"], "400"),
        (["train_tokenizer.collision_policy = 'hope'"], "expected one of dedup"),
        (["train_tokenizer.name = '../elsewhere'"], "train_tokenizer.name"),
        (["train_tokenizer.encoder = 'file'"], "train_tokenizer.embeddings_path"),
        (["train_tokenizer.dataset_name = 'toyy'"], "toyy"),
        (["main.experiment = @rq_kmeans"], "not an experiment"),
        (["train_tokenizer.collision_policy = 'first_free'", "rq_kmeans.sizes = (2, 2)"], "expected at most 4"),
    ],
)
def test_mistakes_are_told_in_one_line(make: Make, bindings: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        make(*bindings).run()
    assert "\n" not in str(caught.value)


def test_a_collapsed_level_stops_with_advice(make: Make) -> None:
    with pytest.raises(UserError, match="codes in use on level 0"):
        make("random_codes.sizes = (16, 16)", "train_tokenizer.collapse_threshold = 1.0", kind="random").run()
    make("random_codes.sizes = (16, 16)", "train_tokenizer.collapse_threshold = 0.0", kind="random").run()


def test_there_is_nothing_to_evaluate_before_training(make: Make) -> None:
    with pytest.raises(DataError, match="try --mode=train"):
        make().report(None, "test", None)
