"""The demo: preferred data where it is at hand, generated data otherwise, and an end that says what to do next."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from generative_recommenders.data.dataset import PreparedDataset
from generative_recommenders.data.errors import DataError
from generative_recommenders.data.sources.ml_100k import MovieLens100K
from generative_recommenders.data.sources.synthetic import SyntheticSource
from generative_recommenders.serving import demo
from tests.toy import write_toy_dataset

SMALL = (
    "train_fn.num_epochs = 1",
    "train_fn.max_sequence_length = 8",
    "train_fn.item_embedding_dim = 16",
    "hstu_encoder.dqk = 8",
    "hstu_encoder.dv = 8",
)


def run_demo(folder: Path, caplog: pytest.LogCaptureFixture) -> list[str]:
    flags = [f"--data_dir={folder / 'data'}", f"--exps_dir={folder / 'exps'}", "--device=cpu"]
    with caplog.at_level(logging.INFO):
        assert demo.main([*flags, *(f"--gin_bindings={binding}" for binding in SMALL)]) == 0
    return [line for record in caplog.records for line in record.getMessage().splitlines()]


def test_ends_with_recommendations_the_run_folder_and_the_test_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_toy_dataset(tmp_path / "data", "ml-100k")
    lines = run_demo(tmp_path, caplog)
    (folder,) = (tmp_path / "exps" / "ml-100k-l8").iterdir()
    assert lines[-1].startswith("TEST eval: NDCG@5 ")
    assert lines[-3:-1] == [f"run folder: {folder}", f"curves: tensorboard --logdir {folder.parent}"]
    ranked = [re.fullmatch(r" *(\d+) +-?\d+\.\d{3} +sku-(\d+)  Item (\d+)", line) for line in lines[-13:-3]]
    assert [match and int(match[1]) for match in ranked] == list(range(1, 11))
    assert all(match is not None and match[2] == match[3] for match in ranked)
    # Users 11, 23, ... have the most events of the toy, 15, the nearest to fifty.
    assert "user 12, 15 events, the last 5:" in lines


def test_generated_data_takes_over_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_reach(source: MovieLens100K, data_dir: Path) -> Path:
        raise DataError("download failed: no route")

    monkeypatch.setattr(MovieLens100K, "fetch", out_of_reach)
    small = SyntheticSource(name="synthetic", synthetic_users=60, synthetic_items=100)
    get = demo.sources.get
    monkeypatch.setattr(demo.sources, "get", lambda name: small if name == "synthetic" else get(name))
    lines = run_demo(tmp_path, caplog)
    assert "ml-100k is out of reach (download failed: no route); the demo goes on with generated data" in lines
    assert lines[-1].startswith("TEST eval: ")
    assert PreparedDataset.load(tmp_path / "data", "synthetic").num_users == 60
    assert not (tmp_path / "data" / "ml-100k").exists()


def test_a_failing_fallback_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise DataError("disk full")

    monkeypatch.setattr(demo, "prepare", full)
    with pytest.raises(DataError, match="disk full"):
        demo.prepared_dataset(tmp_path)
