"""Which runs a grid has: sweeps, seeds, fingerprints, and what is wrong before anything runs."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from generative_recommenders.grid.plan import Request, plan
from generative_recommenders.grid.sweep import GridError, Sweep, split_values
from tests.toy import write_toy_dataset

DEMO = "configs/synthetic/hstu-demo.gin"
TOY = "train_fn.dataset_name = 'toy'"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_toy_dataset(folder)
    write_toy_dataset(folder, "other", seed=1)
    (folder / "other" / "dataset.json").write_text('{"name": "other"}')
    return folder


@pytest.fixture
def ask(data_dir: Path) -> Callable[..., Request]:
    def request(*sweeps: str, configs: Sequence[str] = (DEMO,), **others: object) -> Request:
        read = [Sweep.read(text) for text in sweeps]
        return Request(configs, data_dir, **{"bindings": [TOY], "sweeps": read, **others})  # type: ignore[arg-type]

    return request


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ("1e-3,3e-4", ["1e-3", "3e-4"]),
        (" 1 , 2 ", ["1", "2"]),
        ("'a,b','c'", ["'a,b'", "'c'"]),
        ("(1, 2), [3, {'x': 4, 'y': (5,)}]", ["(1, 2)", "[3, {'x': 4, 'y': (5,)}]"]),
        (r"'it\'s, here', 2", [r"'it\'s, here'", "2"]),
        ("'(', ')'", ["'('", "')'"]),
    ],
)
def test_values_are_split_outside_quotes_and_brackets(values: str, expected: list[str]) -> None:
    assert split_values(values, "") == expected


@given(st.lists(st.recursive(st.integers() | st.text(), lambda x: st.lists(x) | st.tuples(x, x)), min_size=1))
def test_any_literals_come_apart_as_they_were(values: list[object]) -> None:
    written = [repr(value) for value in values]
    assert split_values(", ".join(written), "") == written


@pytest.mark.parametrize("text", ["train_fn.learning_rate", "=1", "a.b=", "a.b=1,,2", "a.b=(1,2", "a.b='x", "a.b=1)"])
def test_a_sweep_that_cannot_be_read(text: str) -> None:
    with pytest.raises(GridError, match=r"^--sweep: got .*(expected|;)"):
        Sweep.read(text)


def test_runs_are_the_product_in_order(ask: Callable[..., Request]) -> None:
    runs = plan(ask("train_fn.learning_rate=1e-3,3e-4", "hstu_encoder.num_blocks=1,2", seeds=[1, 2]))
    assert [run.title for run in runs[:5]] == [
        "synthetic/hstu-demo learning_rate=1e-3 num_blocks=1 seed=1",
        "synthetic/hstu-demo learning_rate=1e-3 num_blocks=1 seed=2",
        "synthetic/hstu-demo learning_rate=1e-3 num_blocks=2 seed=1",
        "synthetic/hstu-demo learning_rate=1e-3 num_blocks=2 seed=2",
        "synthetic/hstu-demo learning_rate=3e-4 num_blocks=1 seed=1",
    ]
    assert (len(runs), len({run.id for run in runs}), len({run.row for run in runs})) == (8, 8, 4)
    assert runs[0].row == runs[1].row != runs[2].row
    assert runs[1].bindings[-1] == "train_fn.random_seed = 2"
    assert runs[4].values["train_fn.learning_rate"] == "0.0003"
    assert runs[0].values["hstu_encoder.normalization"] == "'rel_bias'"


def test_sweeps_of_one_parameter_name_are_told_apart(ask: Callable[..., Request]) -> None:
    (run,) = plan(ask("hstu_encoder.num_heads=1", "sasrec_encoder.num_heads=2"))
    assert run.label == "synthetic/hstu-demo hstu_encoder.num_heads=1 sasrec_encoder.num_heads=2"


def test_the_same_run_is_planned_once(ask: Callable[..., Request]) -> None:
    assert (
        len(
            plan(ask("train_fn.learning_rate=1e-3,0.001", seeds=[1, 1], configs=[DEMO, "configs/synthetic/hstu-*.gin"]))
        )
        == 1
    )


def test_what_a_fingerprint_depends_on(ask: Callable[..., Request], tmp_path: Path) -> None:
    def of(*bindings: str, config: str = DEMO) -> str:
        (run,) = plan(ask(configs=[config], bindings=[TOY, *bindings]))
        assert not run.broken
        return run.fingerprint

    copy = tmp_path / "another.gin"
    copy.write_text(f"include '{DEMO}'\nR = 3e-3\ntrain_fn.learning_rate = %R\n")
    plain = of()
    assert of(config=os.fspath(copy)) == plain
    assert of("train_fn.random_seed = 42", "hstu_encoder.concat_ua = False") == plain
    assert of("create_data_loader.num_workers = 3", "train_fn.resume = 'never'") == plain
    others = {of("train_fn.random_seed = 1"), of("train_fn.temperature = 0.1"), of("train_fn.dataset_name = 'other'")}
    assert len({plain, *others}) == 4


def test_prepared_again_is_the_same_data_and_other_files_are_not(ask: Callable[..., Request], tmp_path: Path) -> None:
    facts = tmp_path / "toy" / "dataset.json"
    facts.parent.mkdir()
    found = []
    for content in ({"command": "a", "n": 1}, {"command": "b", "n": 1}, {"command": "a", "n": 2}):
        facts.write_text(json.dumps(content))
        found.append(plan(Request([DEMO], tmp_path, [TOY]))[0].fingerprint)
    assert found[0] == found[1] != found[2]


def test_a_run_goes_on_in_its_own_folder_only(ask: Callable[..., Request]) -> None:
    (run,) = plan(ask(bindings=[TOY, "train_fn.resume = 'never'"]))
    assert run.bindings[-1] == "train_fn.resume = 'auto'"
    (run,) = plan(ask(bindings=[TOY, "train_fn.resume = 'exps/x'"]))
    assert "train_fn.resume: got 'exps/x', expected 'auto' or 'never' in a grid" in run.broken


def test_a_broken_config_breaks_its_runs_only(ask: Callable[..., Request], tmp_path: Path) -> None:
    broken = tmp_path / "broken.gin"
    broken.write_text(f"include '{DEMO}'\ntrain_fn.num_epoch = 3\n")
    odd = tmp_path / "odd.gin"
    odd.write_text("train_fn.main_module = 'SASRec'\nsasrec_encoder.num_heads = 7\n")
    good, first, second = plan(ask(configs=[DEMO, os.fspath(broken), os.fspath(odd)]))
    assert good.broken == ""
    assert "broken.gin:2: " in first.broken and "did you mean num_epochs" in first.broken
    assert "sasrec_encoder.num_heads: got 7" in second.broken
    assert first.fingerprint != second.fingerprint


def test_a_dataset_that_is_not_there_is_found_before_a_run(ask: Callable[..., Request]) -> None:
    (run,) = plan(ask(bindings=[]))
    assert "dataset 'synthetic': " in run.broken
    assert "preprocess_public_data.py --dataset=synthetic" in run.broken


def test_configs_here_come_before_those_of_the_repository(
    ask: Callable[..., Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert plan(ask())[0].config == DEMO
    own = tmp_path / DEMO
    own.parent.mkdir(parents=True)
    own.write_text("include 'configs/base/demo.gin'\n")
    # A base of that name here would not be seen by the run, which starts in the repository.
    (tmp_path / "configs" / "base").mkdir()
    (tmp_path / "configs" / "base" / "demo.gin").write_text("nonsense")
    (run,) = plan(ask())
    assert (run.config, run.broken) == (os.fspath(own), "")
    assert Path.cwd() == tmp_path


def test_a_macro_that_configs_refer_to_can_be_swept(ask: Callable[..., Request], tmp_path: Path) -> None:
    config = tmp_path / "macro.gin"
    config.write_text(f"include '{DEMO}'\nRATE = 1\ntrain_fn.learning_rate = %RATE\n")
    runs = plan(ask("RATE=1e-3,3e-4", configs=[os.fspath(config)]))
    assert [run.values["train_fn.learning_rate"] for run in runs] == ["0.001", "0.0003"]


def test_a_warning_about_a_config_is_given_once(
    ask: Callable[..., Request], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tmp_path / "twice.gin"
    config.write_text(f"include '{DEMO}'\ntrain_fn.num_epochs = 1\ntrain_fn.num_epochs = 2\n")
    with caplog.at_level(logging.WARNING):
        plan(ask("train_fn.learning_rate=1e-3,3e-4", configs=[os.fspath(config)], seeds=[1, 2]))
    assert [record.getMessage() for record in caplog.records if "bound twice" in record.getMessage()] == [
        f"{config}:3: train_fn.num_epochs is bound twice; line 2 has no effect"
    ]


def test_a_sweep_that_no_config_uses_is_refused(ask: Callable[..., Request]) -> None:
    with pytest.raises(GridError, match="no config uses it"):
        plan(ask("sasrec_encoder.num_blocks=1,3"))


@pytest.mark.parametrize(
    ("bindings", "message"),
    [
        (
            ["train_fn.use_rated_input_preproc = True", "train_fn.num_ratings = 2"],
            "expected at least 6 for this dataset",
        ),
        (["train_fn.event_columns = {'action': 3}"], "action"),
    ],
)
def test_inputs_that_do_not_fit_the_events_are_found_before_anything_runs(
    ask: Callable[..., Request], bindings: list[str], message: str
) -> None:
    (run,) = plan(ask(bindings=[TOY, *bindings]))
    assert message in run.broken


def test_unused_bindings_are_known_before_the_run(ask: Callable[..., Request]) -> None:
    (run,) = plan(ask(bindings=[TOY, "sasrec_encoder.num_blocks = 3"]))
    assert run.unused == ("sasrec_encoder.num_blocks",) and not run.broken


def test_generative_runs_use_what_makes_their_ids(ask: Callable[..., Request]) -> None:
    names = ("train_generative", "train_tokenizer")
    bindings = [f"{name}.dataset_name = 'toy'" for name in names]
    sweeps = ["beam_search.widths=5,10", "train_tokenizer.embedding_dim=8,16"]
    runs = plan(ask(*sweeps, configs=["configs/amzn14-beauty/tiger.gin"], bindings=bindings))
    assert len(runs) == 4 and not any(run.unused or run.broken for run in runs)
    (run,) = plan(ask(configs=["configs/amzn14-beauty/rqvae.gin"], bindings=["train_tokenizer.dataset_name = 'toy'"]))
    assert not run.unused and not run.broken
