"""README commands are tests: bash blocks marked `<!-- test -->` are run, in order, in one copy of the repository.

Training and generated data are made small by further flags; public data is replaced by a toy dataset, since it needs a
network; grids list their runs; `make` and `pip` are checked without being run. A command that is none of these is
refused: teach it here.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import preprocess_public_data
from generative_recommenders import config
from generative_recommenders.data import sources
from tests.fractal_ratings import rating_lines, write_csv
from tests.toy import ID_STEP, write_toy_dataset

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("configs", "generative_recommenders", "ops", "benchmarks", "*.py", "requirements*.txt", "Makefile")
MARKED = re.compile(r"^<!-- test -->\s*\n+```bash\n(?P<body>.*?)^```", re.MULTILINE | re.DOTALL)
SMALL = (
    "train_fn.num_epochs = 1",
    "train_fn.max_sequence_length = 8",
    "train_fn.item_embedding_dim = 16",
    "train_fn.local_batch_size = 32",
)
SMALL_IDS = ("train_tokenizer.embedding_dim = 8", "rq_kmeans.sizes = (4, 4)")
# By the experiment that a config is of.
SMALL_BINDINGS = {
    "train_fn": SMALL,
    "train_tokenizer": SMALL_IDS,
    "train_generative": (
        *SMALL_IDS,
        "train_generative.num_epochs = 1",
        "train_generative.max_sequence_length = 8",
        "train_generative.local_batch_size = 32",
        "sid_gr.dim = 16",
        "sid_gr.num_blocks = 1",
        "sid_gr.num_heads = 2",
    ),
}
# Added at the end, where they win.
SMALL_SCRIPTS = {
    "run_fractal_expansion.py": ["--num-row-multiplier=2", "--num-col-multiplier=2"],
    "preprocess_merlin_data.py": [],
    "run_grid.py": ["--dry_run"],
    "run_merlin_grid.py": ["--dry_run"],
}
SMALL_MODULES = {"generative_recommenders.data.merlin_synthetic": ["--sessions=60", "--items=30"]}
SMALL_SOURCES = {"synthetic": ["--synthetic_users=60", "--synthetic_items=100"], "custom": []}
CUSTOM_COLUMNS = {"user": "user_id", "item": "item_id", "timestamp": "timestamp"}


def commands(markdown: str) -> list[str]:
    """The commands of all marked blocks; comments and prompts are dropped, continued lines joined."""
    bodies = "\n".join(match["body"] for match in MARKED.finditer(markdown)).replace("\\\n", " ")
    lines = (line.strip().removeprefix("$ ") for line in bodies.splitlines())
    return [part for line in lines if not line.startswith("#") for part in _without_comment(line).split(" && ") if part]


def _without_comment(line: str) -> str:
    return re.sub(r"\s+#\s.*", "", line)


class Reader:
    """Someone who types the README's commands in a fresh copy of the repository."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for pattern in COPIED:
            for path in ROOT.glob(pattern):
                copy = shutil.copytree if path.is_dir() else shutil.copy
                copy(path, folder / path.name)
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def type(self, line: str) -> None:
        words = shlex.split(self._newest_run(line))
        match words:
            case ["make", *arguments]:
                self._run(["make", "--dry-run", *arguments])
            case ["pip", "install", "-r", file]:
                listed = (self.folder / file).read_text().splitlines()
                assert [Requirement(entry) for entry in listed if not entry.startswith("#")]
            case ["tensorboard", "--logdir", folder]:
                assert list((self.folder / folder).rglob("events.out.tfevents.*")), f"{folder}: nothing to show"
            case ["python", "main.py", *arguments]:
                self._main([sys.executable], arguments)
            case ["torchrun", *before] if "main.py" in before:
                place = before.index("main.py")
                self._main([sys.executable, "-m", "torch.distributed.run", *before[:place]], before[place + 1 :])
            case ["python", "preprocess_public_data.py", *arguments]:
                self._preprocess(arguments)
            case ["python", script, *arguments] if script in SMALL_SCRIPTS:
                self._prepare_inputs(arguments)
                self._run([sys.executable, script, *arguments, *SMALL_SCRIPTS[script]])
            case ["python", "-m", module, *arguments] if module in SMALL_MODULES:
                self._run([sys.executable, "-m", module, *arguments, *SMALL_MODULES[module]])
            case _:
                raise AssertionError(f"README: {line!r} is no command that this test knows")

    def _newest_run(self, line: str) -> str:
        """`exps/ml-1m-l200/RUN` stands for the newest run folder there."""

        def newest(match: re.Match[str]) -> str:
            runs = sorted((self.folder / match[1]).iterdir(), key=lambda path: path.stat().st_mtime)
            return str(runs[-1].relative_to(self.folder))

        small = re.sub(r"(exps/[\w-]+?)-l\d+(?=[/\s]|$)", r"\1-l8", line)
        return re.sub(r"(exps/[\w-]+)/RUN\b", newest, small)

    def _main(self, interpreter: list[str], arguments: list[str]) -> None:
        files, bindings = _values(arguments, "gin_config_file"), _values(arguments, "gin_bindings")
        if files:
            loaded = config.load([self.folder / file for file in files], bindings)
            name = loaded.experiment().dataset_name
            if not (self.folder / "tmp" / name).exists():
                write_toy_dataset(self.folder / "tmp", name)
            arguments = [
                *arguments,
                *(f"--gin_bindings={binding}" for binding in SMALL_BINDINGS[loaded.build(config.Main).experiment]),
            ]
        for file in _values(arguments, "histories"):
            (self.folder / file).write_text('user_id,item_ids\n7,"sku-3,item-3"\n')
        self._run([*interpreter, "main.py", *arguments])

    def _prepare_inputs(self, arguments: list[str]) -> None:
        """The ratings that a command names, as a toy."""
        named = [Path(value) for flag, value in pairwise(arguments) if flag == "--input-csv-file"]
        for file in [self.folder / path for path in named if not (self.folder / path).exists()]:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_csv(file, rating_lines())

    def _preprocess(self, arguments: list[str]) -> None:
        options = preprocess_public_data.parser().parse_args(arguments)
        if options.dataset == "custom":
            columns = (getattr(options, f"{name}_column", default) for name, default in CUSTOM_COLUMNS.items())
            rows = (f"u{event % 20},sku-{ID_STEP * (event % 11 + 1)},{event}" for event in range(200))
            (self.folder / options.raw).write_text("\n".join([",".join(columns), *rows, ""]))
        if options.dataset in SMALL_SOURCES:
            self._run([sys.executable, "preprocess_public_data.py", *arguments, *SMALL_SOURCES[options.dataset]])
        else:
            assert options.dataset is None or sources.get(options.dataset)

    def _run(self, command: list[str]) -> None:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=240,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"


def _values(arguments: list[str], flag: str) -> list[str]:
    return [a.removeprefix(f"--{flag}=") for a in arguments if a.startswith(f"--{flag}=")]


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    yield Reader(tmp_path)
    shutil.rmtree(tmp_path, ignore_errors=True)


def test_marked_commands_of_the_readme_run(reader: Reader) -> None:
    lines = commands((ROOT / "README.md").read_text(encoding="utf-8"))
    assert [line for line in lines if line.startswith("python main.py")]
    for line in lines:
        reader.type(line)


def test_commands_are_those_of_marked_blocks() -> None:
    unmarked = "```bash\nno\n```\n"
    marked = "<!-- test -->\n```bash\n# why\n$ a b && a 'c#d'  # why\nc \\\n  d\n\n```\n"
    assert (
        commands(unmarked + marked + unmarked + marked.replace("-->\n", "-->\n\n")) == ["a b", "a 'c#d'", "c    d"] * 2
    )


@pytest.mark.parametrize(
    "line",
    [
        "make tset",
        "pip install -r requirements-missing.txt",
        "tensorboard --logdir exps/nothing-l8/",
        "python preprocess_public_data.py --dataset=ml-7m",
        "python main.py --gin_config_file=configs/ml-1m/missing.gin",
        "python run_grid.py --configs configs/ml-1m/missing.gin",
        "python preprocess_merlin_data.py --raw=missing",
        "python run_fractal_expansion.py --input-csv-file tmp/ml-20m/ratings.csv --write-datasets True",
        "python -m generative_recommenders.data.merlin_synthetic --sessions 9",
        "curl https://example.org",
    ],
)
def test_commands_that_cannot_work_fail(reader: Reader, line: str) -> None:
    with pytest.raises((AssertionError, OSError, ValueError)):
        reader.type(line)


def test_commands_that_work_pass(reader: Reader) -> None:
    for line in (
        "make install TORCH_INDEX=https://example.org/cpu",
        "pip install -r requirements.txt",
        "python preprocess_public_data.py --dataset=ml-1m --raw=../somewhere/ml-1m.zip",
        "python preprocess_public_data.py --dataset=synthetic",
        "python main.py --gin_config_file=configs/synthetic/hstu-demo.gin",
        "tensorboard --logdir exps/synthetic-l100/",
        "python main.py --mode=recommend --checkpoint=exps/synthetic-l100/RUN --histories=users.csv --output=top.json",
    ):
        reader.type(line)
