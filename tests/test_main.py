"""The launcher, end to end on a toy dataset: what it prints, what a run leaves, what it refuses."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main as launcher
from generative_recommenders import config
from generative_recommenders.errors import exit_on_user_error
from generative_recommenders.training.runs import find_checkpoint
from tests.toy import ID_STEP, NUM_ITEMS, NUM_USERS, raw_id, write_toy_dataset

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in ROOT.glob("configs/**/*.gin")
    if config.load([path]).build(config.Main).experiment == "train_fn"
)
PUBLISHED = "configs/ml-1m/hstu-sampled-softmax-n128-final.gin"
SMALL = (
    "train_fn.dataset_name = 'toy'",
    "train_fn.num_epochs = 2",
    "train_fn.max_sequence_length = 8",
    "train_fn.local_batch_size = 32",
    "train_fn.item_embedding_dim = 16",
)
SMALL_ENCODER = {
    "HSTU": (
        "hstu_encoder.num_blocks = 2",
        "hstu_encoder.num_heads = 2",
        "hstu_encoder.dqk = 8",
        "hstu_encoder.dv = 8",
    ),
    "SASRec": ("sasrec_encoder.num_blocks = 2", "sasrec_encoder.num_heads = 2", "sasrec_encoder.ffn_hidden_dim = 16"),
}
SMALL_HSTU = (*SMALL, *SMALL_ENCODER["HSTU"])
TEST_LINE = re.compile(
    r"TEST eval: NDCG@5 \d\.\d{4} NDCG@10 (?P<ndcg>\d\.\d{4}) NDCG@50 \d\.\d{4} HR@5 \d\.\d{4} "
    r"HR@10 (?P<hr>\d\.\d{4}) HR@50 \d\.\d{4} MRR (?P<mrr>\d\.\d{4}) eval_loss (?P<loss>\d+\.\d{4}) "
    r"\(test, (?P<users>\d+) users, \d+\.\d+s\)"
)


@dataclass(frozen=True)
class Outcome:
    """What a launch in this process gave: exit status, logged lines, standard output and error."""

    status: int
    logged: list[str]
    out: str
    err: str


Launch = Callable[..., Outcome]


def flags(bindings: Sequence[str], *others: str) -> list[str]:
    return [*others, *(f"--gin_bindings={binding}" for binding in bindings)]


def published(*bindings: str) -> list[str]:
    return flags([*SMALL_HSTU, *bindings], f"--gin_config_file={PUBLISHED}")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_toy_dataset(folder)
    return folder


@pytest.fixture
def launch(
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> Launch:
    """Run the launcher in this process; its folders are the toy's and `tmp_path / "exps"` where flags do not differ."""

    def run(*arguments: str) -> Outcome:
        places = [f"--data_dir={data_dir}", f"--exps_dir={tmp_path / 'exps'}", "--device=cpu"]
        monkeypatch.setattr(sys, "argv", ["main.py", *places, *arguments])
        caplog.clear()
        capsys.readouterr()
        with caplog.at_level("INFO"):
            try:
                status = exit_on_user_error(launcher.main)()
            except SystemExit as stopped:
                status = int(stopped.code or 0)
        captured = capsys.readouterr()
        return Outcome(status, [record.getMessage() for record in caplog.records], captured.out, captured.err)

    return run


@dataclass(frozen=True)
class Trained:
    """A finished run of the published HSTU config at toy size, started as a person starts it."""

    folder: Path
    exps_dir: Path
    lines: list[str]

    @property
    def metrics(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "metrics.json").read_text()))


@pytest.fixture(scope="module")
def trained(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    exps_dir = tmp_path_factory.mktemp("exps")
    places = [f"--data_dir={data_dir}", f"--exps_dir={exps_dir}", "--device=cpu"]
    command = [sys.executable, str(ROOT / "main.py"), *places, *published("train_fn.eval_interval = 1")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=exps_dir)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (exps_dir / "toy-l8").iterdir()
    return Trained(folder, exps_dir, done.stdout.splitlines())


def only_run(exps_dir: Path) -> Path:
    (folder,) = exps_dir.glob("*/*")
    return folder


def test_a_run_ends_with_the_test_line(trained: Trained) -> None:
    line = TEST_LINE.fullmatch(trained.lines[-1])
    assert line is not None, trained.lines[-1]
    metrics = trained.metrics["metrics"]
    assert [line[x] for x in ("ndcg", "hr", "mrr", "loss")] == [
        f"{metrics[x]:.4f}" for x in ("ndcg@10", "hr@10", "mrr", "loss")
    ]
    assert int(line["users"]) == NUM_USERS
    assert [x for x in trained.lines if x.startswith("epoch ")] != []
    assert f"curves: tensorboard --logdir {trained.folder.parent}" in trained.lines


def test_the_saved_config_is_the_run(trained: Trained) -> None:
    saved = config.load([trained.folder / "config.gin"])
    assert saved.experiment() == config.load([PUBLISHED], [*SMALL_HSTU, "train_fn.eval_interval = 1"]).experiment()
    assert saved.build("hstu_encoder").dqk == 8


def test_metrics_files(trained: Trained) -> None:
    lines = [json.loads(line) for line in (trained.folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["step"], line["split"]) for line in lines] == [(0, 2, "test"), (1, 4, "test")]
    final = trained.metrics
    assert lines[-1]["metrics"] | {"loss": final["metrics"]["loss"]} == final["metrics"]
    assert all("loss" not in line["metrics"] for line in lines)
    assert {"split", "metrics", "counts", "seconds", "device", "torch", "commit", "seed", "steps"} <= final.keys()
    assert (final["split"], final["seed"], final["steps"], final["dataset"]) == ("test", 42, 4, "toy")
    assert final["counts"]["items"] == NUM_ITEMS
    assert {"hr@1", "hr@10", "hr@1000", "ndcg@10", "mrr"} <= final["metrics"].keys()
    assert all(math.isfinite(value) for name, value in final["metrics"].items() if ">=" not in name)


def test_tensorboard_has_the_public_tags(trained: Trained) -> None:
    events = EventAccumulator(str(trained.folder)).Reload()
    public = {"losses/ar_loss", "losses/main_loss", "loss/train", "lr", "eval/hr@10", "eval_epoch/hr@10"}
    assert public | {"eval_test/ndcg@10", "final/hr@10"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("losses/ar_loss")] == [0, 1, 2, 3]
    assert [event.step for event in events.Scalars("eval_epoch/hr@10")] == [0, 1]
    assert events.Scalars("eval_epoch/hr@10")[-1].value == pytest.approx(trained.metrics["metrics"]["hr@10"])
    assert events.Scalars("lr")[0].value == pytest.approx(1e-3)
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "train_fn.dataset_name = 'toy'" in text
    assert "_hparams_/session_start_info" in events.PluginTagToContent("hparams")


@pytest.mark.parametrize("given", ["run folder", "checkpoint", "newest run of the config"])
def test_evaluate_gives_the_metrics_of_the_test_line(trained: Trained, launch: Launch, given: str) -> None:
    chosen = {
        "run folder": [f"--checkpoint={trained.folder}"],
        "checkpoint": [f"--checkpoint={find_checkpoint(trained.folder).path}"],
        "newest run of the config": [],
    }[given]
    same = published("train_fn.eval_interval = 1")
    outcome = launch("--mode=evaluate", f"--exps_dir={trained.exps_dir}", *chosen, *same)
    assert outcome.status == 0, outcome.err
    assert _figures(outcome.logged[-1]) == _figures(trained.lines[-1])


def test_the_filter_of_the_history_is_chosen_at_evaluation(trained: Trained, launch: Launch) -> None:
    unfiltered = launch(
        "--mode=evaluate", f"--checkpoint={trained.folder}", "--gin_bindings=train_fn.filter_history = False"
    )
    assert unfiltered.status == 0, unfiltered.err
    assert _figures(unfiltered.logged[-1]) != _figures(trained.lines[-1])


def _figures(line: str) -> str:
    """A TEST line without the seconds."""
    return line.rpartition(",")[0]


def test_evaluate_on_the_other_split(trained: Trained, launch: Launch) -> None:
    outcome = launch("--mode=evaluate", "--split=valid", f"--checkpoint={trained.folder}", *published())
    assert outcome.status == 2
    assert "--split=valid: this model was trained on the validation events" in outcome.err
    honest = published("train_fn.eval_split = 'valid'", "train_fn.num_epochs = 1")
    assert launch(*honest).status == 0
    outcome = launch("--mode=evaluate", "--split=valid", *honest)
    assert outcome.status == 0, outcome.err
    assert re.match(rf"VALID eval: NDCG@5 .*\(valid, {NUM_USERS} users, ", outcome.logged[-1])


def test_dry_run_says_what_a_run_would_be_and_writes_nothing(launch: Launch, tmp_path: Path) -> None:
    outcome = launch("--dry_run", *published())
    assert outcome.status == 0, outcome.err
    text = "\n".join(outcome.logged)
    events = sum(4 + user % 12 for user in range(NUM_USERS))
    assert f"toy: {NUM_USERS} users, {NUM_ITEMS} items, {events} events" in text
    assert "2 an epoch, 4 in 2 epochs" in text
    assert "parameters" in text
    assert not (tmp_path / "exps").exists()


def write_histories(path: Path) -> None:
    """Three users: items known, one unknown item among known ones, none known."""
    lists = [[raw_id(3), raw_id(6), raw_id(9)], [raw_id(30), "sku-31", raw_id(33)], ["elsewhere"]]
    table = pd.DataFrame({"user_id": ["ann", "bob", "cy"], "item_ids": lists})
    match path.suffix:
        case ".parquet":
            table.to_parquet(path, index=False)
        case ".csv":
            table.assign(item_ids=[",".join(row) for row in lists]).to_csv(path, index=False)
        case ".json":
            table.to_json(path, orient="records")


READERS = {".parquet": pd.read_parquet, ".csv": pd.read_csv, ".json": lambda path: pd.read_json(path, lines=True)}


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".json"])
def test_recommend_from_and_to_files(trained: Trained, launch: Launch, tmp_path: Path, suffix: str) -> None:
    histories, output = tmp_path / f"histories{suffix}", tmp_path / f"output{suffix}"
    write_histories(histories)
    places = [f"--checkpoint={trained.folder}", f"--histories={histories}", f"--output={output}"]
    outcome = launch("--mode=recommend", "--top_k=5", *places)
    assert outcome.status == 0, outcome.err
    assert any(line.startswith("2 unknown items were dropped; 1 users") for line in outcome.logged)
    table = READERS[suffix](output)
    assert table.columns.tolist() == ["user_id", "rank", "item_id", "score", "title"]
    assert table["user_id"].tolist() == ["ann"] * 5 + ["bob"] * 5
    assert table["rank"].tolist() == [1, 2, 3, 4, 5] * 2
    assert (table["title"] == "Item " + table["item_id"].str.removeprefix("sku-")).all()
    for user, seen in (("ann", {"sku-3", "sku-6", "sku-9"}), ("bob", {"sku-30", "sku-33"})):
        rows = table[table["user_id"] == user]
        assert rows["score"].is_monotonic_decreasing
        assert not seen & set(rows["item_id"])


def test_recommend_to_the_console_beyond_the_catalog(trained: Trained, launch: Launch, tmp_path: Path) -> None:
    histories = tmp_path / "histories.csv"
    histories.write_text('item_ids\n"sku-3,sku-6"\n')
    places = [f"--checkpoint={trained.folder}", f"--histories={histories}"]
    outcome = launch("--mode=recommend", "--top_k=1000", *places)
    assert outcome.status == 0, outcome.err
    found = re.findall(r"\bsku-(\d+)\b", outcome.out)
    assert sorted(map(int, found)) == [ID_STEP * i for i in range(3, NUM_ITEMS + 1)]


def test_early_stopping_keeps_the_best_and_reports_test_with_it(launch: Launch, tmp_path: Path) -> None:
    # A rate this high makes the curve jump, so that the best epoch is not the last.
    bindings = ("train_fn.num_epochs = 9", "train_fn.learning_rate = 0.3", "train_fn.item_embedding_dim = 8")
    stopping = ("train_fn.eval_split = 'valid'", "train_fn.early_stopping_patience = 3")
    outcome = launch(*published(*bindings, *stopping))
    assert outcome.status == 0, outcome.err
    folder = only_run(tmp_path / "exps")
    *curve, tested = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    values = [line["metrics"]["ndcg@10"] for line in curve]
    best = values.index(max(values))
    final = json.loads((folder / "metrics.json").read_text())
    assert {line["split"] for line in curve} == {"valid"}
    assert tested["split"] == "test"
    assert (final["split"], final["best_epoch"]) == ("test", best)
    assert best + 1 < final["epochs"] == len(curve) <= best + 1 + 3
    assert find_checkpoint(folder).progress.step == 2 * (best + 1)
    again = launch("--mode=evaluate", f"--checkpoint={folder}", *published(*bindings, *stopping))
    assert _figures(again.logged[-1]) == _figures(outcome.logged[-1])
    assert TEST_LINE.fullmatch(outcome.logged[-1])


def test_early_stopping_stops(launch: Launch, tmp_path: Path) -> None:
    still = ("train_fn.learning_rate = 1e-12", "train_fn.num_epochs = 9")
    outcome = launch(*published(*still, "train_fn.eval_split = 'valid'", "train_fn.early_stopping_patience = 2"))
    assert outcome.status == 0, outcome.err
    final = json.loads((only_run(tmp_path / "exps") / "metrics.json").read_text())
    assert (final["epochs"], final["best_epoch"]) == (3, 0)


def test_learning_on_the_toy_beats_chance(launch: Launch, tmp_path: Path) -> None:
    outcome = launch(*published("train_fn.num_epochs = 25", "train_fn.learning_rate = 0.01"))
    assert outcome.status == 0, outcome.err
    metrics = json.loads((only_run(tmp_path / "exps") / "metrics.json").read_text())["metrics"]
    # 85 of 100 steps go to the next item of 40; a guess would have it among ten in a quarter of the cases.
    assert metrics["hr@10"] > 0.6


@pytest.mark.parametrize("path", CONFIGS)
def test_every_config_runs_two_steps(path: str, launch: Launch, tmp_path: Path) -> None:
    experiment = config.load([path]).experiment()
    bindings = [*SMALL, *SMALL_ENCODER[experiment.main_module], "train_fn.num_epochs = 1"]
    if experiment.loss_module != "FullSoftmaxLoss":
        bindings.append("train_fn.num_negatives = 8")
    if experiment.item_encoder == "text":
        # The toy's items bring no vectors along.
        bindings.append("text_item_encoder.encoder = 'hashed'")
    outcome = launch(*flags(bindings, f"--gin_config_file={path}"))
    assert outcome.status == 0, outcome.err
    assert not [line for line in outcome.logged if "nothing uses" in line]
    folder = only_run(tmp_path / "exps")
    assert json.loads((folder / "metrics.json").read_text())["steps"] == 2
    line = (folder / "metrics.jsonl").read_text().splitlines()[0]
    assert 0 < json.loads(line)["train"]["loss"] < 100
    assert TEST_LINE.fullmatch(outcome.logged[-1])


def test_bindings_that_nothing_uses_are_named(launch: Launch) -> None:
    outcome = launch(*published("sasrec_encoder.num_blocks = 3", "train_fn.num_epochs = 1"))
    assert outcome.status == 0, outcome.err
    assert "bindings that nothing uses in this experiment: sasrec_encoder.num_blocks" in outcome.logged


REFUSED: list[tuple[list[str], str]] = [
    ([], "--gin_config_file: not given"),
    (["--gin_config_file=configs/ml-1m/hstu-sampled-softmax-n128-finl.gin"], "did you mean"),
    (published("train_fn.dataset_name = 'ml-2m'"), "dataset 'ml-2m': "),
    (published("train_fn.num_epoch = 3"), "did you mean num_epochs"),
    (published("train_fm.num_epochs = 3"), "did you mean train_fn"),
    (published("train_fn.num_epochs = '3'"), "expected int"),
    (published("train_fn.num_epochs = 2.5"), "expected int"),
    (published("train_fn.temperature = 0"), "train_fn.temperature: got 0.0, expected more than 0"),
    (
        published("train_fn.interaction_module_type = 'MoL'"),
        "train_fn.top_k_method: got 'MIPSBruteForceTopK', expected",
    ),
    (published("train_fn.loss_module = 'SampledSoftmax'"), "did you mean SampledSoftmaxLoss"),
    (published("train_fn.main_module = 'HTSU'"), "did you mean HSTU"),
    (published("train_fn.interaction_module_type = 'Dot'"), "expected one of 'DotProduct'"),
    (published("train_fn.early_stopping_metric = 'hr@11'"), "train_fn.early_stopping_metric: got 'hr@11'"),
    (published("train_fn.early_stopping_patience = 3"), "stopping on test would select on it"),
    (["--mode=evaluate", *published()], "--checkpoint: not given and no run of this config"),
    (["--mode=evaluate", "--checkpoint=nowhere", *published()], "nowhere"),
    (["--mode=recommend", "--histories=h.csv"], "--mode=recommend: needs --checkpoint"),
    (["--mode=recommend", "--checkpoint=nowhere", "--histories=h.csv"], "nowhere"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_mistakes_are_one_line_and_status_2(arguments: list[str], message: str, launch: Launch, tmp_path: Path) -> None:
    outcome = launch(*arguments)
    assert outcome.status == 2, outcome.err
    assert outcome.err.startswith("error: ")
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "exps").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--histories=nowhere.csv"], "nowhere.csv: no such file"),
        (["--histories=histories.txt"], "got a .txt file, expected one of .parquet, .csv, .json"),
        (["--histories={csv}", "--top_k=0"], "--top_k: got 0, expected at least 1"),
        (["--histories={csv}", "--output=out.xlsx"], "expected a name that ends in .parquet, .csv, .json or .jsonl"),
        (["--histories={csv}", "--output=nowhere/out.csv"], "--output: cannot write nowhere/out.csv: "),
        (["--histories={csv}", "--output=nowhere/out.parquet"], "--output: cannot write nowhere/out.parquet: "),
    ],
)
def test_mistakes_of_recommend(
    trained: Trained,
    launch: Launch,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_histories(tmp_path / "histories.csv")
    outcome = launch(
        "--mode=recommend", f"--checkpoint={trained.folder}", *(a.format(csv="histories.csv") for a in arguments)
    )
    assert outcome.status == 2, outcome.err
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["histories.csv"]


def test_a_checkpoint_of_another_dataset_is_refused(
    trained: Trained, launch: Launch, data_dir: Path, tmp_path: Path
) -> None:
    if not (data_dir / "other").exists():
        write_toy_dataset(data_dir, "other", seed=1)
    other = published("train_fn.dataset_name = 'other'")
    outcome = launch("--mode=evaluate", f"--checkpoint={trained.folder}", *other)
    assert outcome.status == 2
    assert "was trained on dataset toy:" in outcome.err
    assert outcome.err.count("\n") == 1
    resumed = launch(*published("train_fn.dataset_name = 'other'", f"train_fn.resume = '{trained.folder}'"))
    assert resumed.status == 2
    assert "was trained on dataset toy:" in resumed.err
    assert not (tmp_path / "exps").exists()


@pytest.mark.parametrize("flag", ["--mode=export_all", "--epochs=3", "--split=train", "positional"])
def test_unknown_flags_are_fatal(flag: str, launch: Launch, tmp_path: Path) -> None:
    outcome = launch(flag, *published())
    assert outcome.status == 2
    assert "main.py: error: " in outcome.err
    assert not (tmp_path / "exps").exists()
