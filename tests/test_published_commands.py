"""Commands as users of the public code type them, flags and all, run here on toy data.

Each is given to a shell in a folder that has nothing but the commands, the configs and `tmp/`. Words are added at the
end only, to make a run small: `--dry_run` where the model is too large to train on a CPU in seconds (eight blocks, or
width 1024, of which one block is built), fewer epochs elsewhere. What needs a network is parsed, not run;
`tensorboard` is left out.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import preprocess_public_data
from generative_recommenders.data.merlin_raw import write_tables
from generative_recommenders.data.merlin_synthetic import generate
from tests.fractal_ratings import rating_lines, write_csv
from tests.toy import write_toy_dataset

ROOT = Path(__file__).resolve().parent.parent
DRY_RUN = ["--dry_run"]
HSTU = ["--dry_run", "--gin_bindings=hstu_encoder.num_blocks = 1"]
SASREC = ["--dry_run", "--gin_bindings=sasrec_encoder.num_blocks = 1"]
SMALL = [f"--gin_bindings=train_fn.{binding}" for binding in ("num_epochs = 1", "max_sequence_length = 8")]
ML_1M = "CUDA_VISIBLE_DEVICES=0 python3 main.py --gin_config_file=configs/ml-1m/{}.gin --master_port=12345"
MERLIN = "python3 main.py --gin_config_file=configs/merlin/{}.gin --master_port=12345"
# The command, what is added to it, and what it must print.
TRAINING = [
    (ML_1M.format("hstu-sampled-softmax-n128-large-final"), DRY_RUN, r"parameters +\d"),
    (ML_1M.format("hstu-sampled-softmax-mini-train"), SMALL, r"TEST eval: .* \(test, 60 users"),
    (ML_1M.format("hstu-full-softmax-mini-train"), SMALL, r"TEST eval: .* \(test, 60 users"),
    (ML_1M.format("sasrec-gpt-like-full-softmax-mini"), SASREC, r"parameters +\d"),
    (MERLIN.format("sasrec-gpt-like-full-softmax-mini"), SASREC, r"parameters +\d"),
    (MERLIN.format("sasrec-gpt-like-full-softmax-no-ratings-mini"), SASREC, r"parameters +\d"),
    (MERLIN.format("sasrec-gpt-like-sampled-softmax-mini"), SASREC, r"parameters +\d"),
    (MERLIN.format("hstu-gpt-like-full-softmax-mini"), HSTU, r"parameters +\d"),
    (MERLIN.format("hstu-gpt-like-full-softmax-no-ratings-mini"), HSTU, r"parameters +\d"),
    (MERLIN.format("hstu-gpt-like-sampled-softmax-mini"), HSTU, r"parameters +\d"),
    ("python3 run_merlin_grid.py", DRY_RUN, r"6 runs"),
]
NAMES = [re.sub(r"^.*(configs/| (?=run_))|\.(gin|py).*", "", command) for command, *_ in TRAINING]
FRACTAL = (
    "python3 run_fractal_expansion.py --input-csv-file tmp/ml-20m/ratings.csv --write-dataset True "
    "--output-prefix tmp/ml-3b/"
)


class Shell:
    """A shell in a folder with the repository's commands, where `python3` is the interpreter of the tests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for path in (*ROOT.glob("*.py"), ROOT / "configs"):
            (folder / path.name).symlink_to(path)
        python = folder / "bin" / "python3"
        python.parent.mkdir()
        python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
        python.chmod(0o755)
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{python.parent}:{os.environ['PATH']}"}

    def run(self, command: str, *added: str) -> str:
        """What it writes to both streams; it has to succeed."""
        done = subprocess.run(
            ["sh", "-c", f"{command} {shlex.join(added)}"],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}"
        return done.stdout


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """With toys in tmp/ml-1m and tmp/merlin, both prepared."""
    result = Shell(tmp_path_factory.mktemp("repository"))
    write_toy_dataset(result.folder / "tmp", "ml-1m")
    write_tables(result.folder / "tmp" / "merlin", generate(60, 30, 0))
    result.run("python3 preprocess_merlin_data.py")
    return result


@pytest.mark.parametrize(("command", "added", "printed"), TRAINING, ids=NAMES)
def test_training_and_grid(shell: Shell, command: str, added: list[str], printed: str) -> None:
    assert re.search(printed, shell.run(command, *added))


def test_preprocessing_without_flags_is_of_the_three_public_datasets() -> None:
    assert preprocess_public_data.parser().parse_args([]).dataset is None
    assert preprocess_public_data.PUBLIC == ("ml-1m", "ml-20m", "amzn-books")


def test_merlin_preprocessing_with_and_without_prefixes(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    folder = tmp_path / "tmp" / "merlin"
    write_tables(folder, generate(60, 30, 0))
    rows = []
    for flags in ("", " --expand_sequences_to_prefixes"):
        shell.run(f"python3 preprocess_merlin_data.py{flags}")
        lengths = [len(items) for items in pq.read_table(folder / "sequences_train.parquet")["item_ids"].to_pylist()]
        rows.append(sorted(lengths))
        csv = (folder / "sasrec_format_train.csv").read_text().splitlines()
        assert len(csv) == len(lengths) + 1
    assert rows[1] == sorted(length for whole in rows[0] for length in range(2, whole + 1))


def test_fractal_expansion_is_a_dataset_of_its_name(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    (tmp_path / "tmp" / "ml-20m").mkdir(parents=True)
    lines = rating_lines(users=18, items=17)
    write_csv(tmp_path / "tmp" / "ml-20m" / "ratings.csv", lines)
    shell.run(FRACTAL)
    folder = tmp_path / "tmp" / "ml-3b"
    assert {f"16x32_{shard}.csv" for shard in range(16)} | {"16x32_users.csv", "dataset.json"} <= {
        path.name for path in folder.iterdir()
    }
    config = "configs/ml-3b/sasrec-sampled-softmax-n96-seqlen500-final.gin"
    assert "ml-3b" in shell.run(f"python3 main.py --gin_config_file={config} --master_port=12345", "--dry_run")
