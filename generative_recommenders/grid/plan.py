"""Which runs a grid has: configs x sweeps x seeds, each one loaded and constructed before the first is started.

A run is known by its fingerprint: the bindings with includes and macros resolved and defaults left out, the seed among
them, and the identity of the prepared dataset. How a config is spelt, where it lies and how many runs go at a time do
not change it.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from generative_recommenders import config as config_module
from generative_recommenders import config_registry as registry
from generative_recommenders.config import REPOSITORY_ROOT, Config, Main, load
from generative_recommenders.config_syntax import suggestion
from generative_recommenders.data.dataset import PreparedDataset
from generative_recommenders.errors import UserError, one_line
from generative_recommenders.generative.assemble import Plan as GenerativePlan
from generative_recommenders.generative.config import GenerativeConfig
from generative_recommenders.grid.sweep import GridError, Sweep, check_bindings
from generative_recommenders.retrieval.assemble import Plan, require_events, require_ratings
from generative_recommenders.retrieval.config import RetrievalConfig
from generative_recommenders.tokenizers.config import TokenizerConfig

# Bindings that do not change what is computed, so that a finished run stays finished under other values of them.
_WITHOUT_EFFECT = ("create_data_loader.num_workers", "create_data_loader.prefetch_factor")


@dataclass(frozen=True)
class GridRun:
    """One run: what main.py is given, and how it is called in tables.

    `row` is equal for runs that differ only in their seed; `values` holds all bindings as text, those of the config
    and the defaults of what was constructed; `unused` are bindings that nothing in the experiment uses; `broken` says
    why it cannot be started, "" where it can.
    """

    id: str
    fingerprint: str
    row: str
    config: str
    bindings: tuple[str, ...]
    label: str
    seed: int | None = None
    dataset: str = ""
    values: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    broken: str = ""

    @property
    def title(self) -> str:
        return self.label if self.seed is None else f"{self.label} seed={self.seed}"


@dataclass(frozen=True)
class Request:
    """What the command line asks for; `configs` are names or patterns, looked up here and then in the repository."""

    configs: Sequence[str]
    data_dir: Path
    bindings: Sequence[str] = ()
    sweeps: Sequence[Sweep] = ()
    seeds: Sequence[int] = ()
    # Evaluate this checkpoint, or the newest of this run, instead of training.
    checkpoint: Path | None = None


def plan(request: Request) -> list[GridRun]:
    """The runs in the order of configs, sweeps, seeds; combinations that come to the same run are one.

    Raises:
        GridError: a pattern that matches no file, or a binding or sweep that no configurable knows. A config that is
            broken by itself is a run with `broken`.
    """
    files = config_files(request.configs)
    # Includes are looked up from the current folder first, and that of a run is the repository.
    with _inside(REPOSITORY_ROOT), _each_warning_once():
        _check(request, files)
        planner = _Planner(request)
        combinations = itertools.product(*(sweep.bindings for sweep in request.sweeps))
        seeds: Sequence[int | None] = request.seeds or (None,)
        runs = [planner.run(f, c, s) for f, c, s in itertools.product(files, list(combinations), seeds)]
    planner.require_used_sweeps()
    return list({run.fingerprint: run for run in reversed(runs)}.values())[::-1]


def config_files(patterns: Sequence[str]) -> list[str]:
    """Files that names and patterns match, each one once; those of the repository relative to it."""
    found: dict[str, None] = {}
    for pattern in patterns:
        matches = sorted(glob.glob(pattern, recursive=True)) or sorted(
            glob.glob(os.fspath(REPOSITORY_ROOT / pattern), recursive=True)
        )
        files = [Path(match).resolve() for match in matches if Path(match).is_file()]
        if not files:
            shipped = [path.relative_to(REPOSITORY_ROOT).as_posix() for path in REPOSITORY_ROOT.glob("configs/*/*.gin")]
            raise GridError(
                f"--configs: {pattern!r} matches no file here or in the repository; {suggestion(pattern, shipped)}"
            )
        found |= {_name(file): None for file in files}
    return list(found)


def _name(file: Path) -> str:
    inside = file.is_relative_to(REPOSITORY_ROOT)
    return file.relative_to(REPOSITORY_ROOT).as_posix() if inside else os.fspath(file)


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _each_warning_once() -> Iterator[None]:
    """A config is loaded for each of its runs and would repeat what it warns about."""
    seen: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        new = text not in seen
        seen.add(text)
        return new

    logger = logging.getLogger(config_module.__name__)
    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)


def _check(request: Request, files: Sequence[str]) -> None:
    for file in files:
        # Imports in a config register what the bindings below may name. What else is wrong with it shows in its runs.
        with contextlib.suppress(UserError):
            load([file])
    given = set(check_bindings(request.bindings, "--gin_bindings"))
    for sweep in request.sweeps:
        keys = set(check_bindings(sweep.bindings, "--sweep"))
        if keys & given:
            raise GridError(f"--sweep {sweep.key}: bound twice, by --gin_bindings or another --sweep; drop one")
        given |= keys
        if request.seeds and sweep.key.endswith(".random_seed"):
            raise GridError(f"--sweep {sweep.key}: --seeds binds it as well; drop one")


class _Planner:
    def __init__(self, request: Request) -> None:
        self._request = request
        self._datasets: dict[str, str] = {}
        self._loaded: dict[tuple[str, ...], PreparedDataset] = {}
        self._experiments: dict[tuple[str, ...], str] = {}
        self._unused: list[set[str]] = []

    def run(self, file: str, combination: Sequence[str], seed: int | None) -> GridRun:
        bindings = (*self._request.bindings, *combination)
        label = " ".join([_short(file), *(self._varied(binding) for binding in combination)])
        try:
            return self._checked(file, bindings, label, seed)
        except UserError as error:
            row = _digest([file, *bindings])
            fingerprint = _digest([row, seed])
            return GridRun(
                _run_id(file, fingerprint), fingerprint, row, file, bindings, label, seed, broken=one_line(error)
            )

    def _checked(self, file: str, bindings: tuple[str, ...], label: str, seed: int | None) -> GridRun:
        name = self._experiment_name(file, bindings)
        if seed is not None:
            bindings = (*bindings, f"{name}.random_seed = {seed}")
        config = load([file], bindings)
        experiment = _construct(config, name)
        dataset = str(getattr(experiment, "dataset_name", ""))
        identity = self._dataset(dataset)
        if isinstance(experiment, RetrievalConfig):
            self._check_inputs(experiment)
        resume = getattr(experiment, "resume", "auto")
        if resume == "never":
            # Runs have folders of their own: in a new one this starts anew, in its own one it goes on.
            bindings = (*bindings, f"{name}.resume = 'auto'")
        elif resume != "auto":
            raise GridError(f"{name}.resume: got {resume!r}, expected 'auto' or 'never' in a grid; remove the binding")
        ignored = (f"{name}.resume", *_WITHOUT_EFFECT)
        evaluated = [] if self._request.checkpoint is None else [os.fspath(self._request.checkpoint)]
        fingerprint = _digest([config.fingerprint(ignored), identity, *evaluated])
        row = _digest([config.fingerprint((*ignored, f"{name}.random_seed")), identity, *evaluated])
        values = _assignments(config.full()) | _assignments(config.operative())
        values.pop(f"{name}.resume", None)
        unused = tuple(config.unused_bindings())
        self._unused.append(set(unused))
        seed = getattr(experiment, "random_seed", seed)
        run_id = _run_id(file, fingerprint)
        return GridRun(run_id, fingerprint, row, file, bindings, label, seed, dataset, values, unused)

    def _experiment_name(self, file: str, bindings: tuple[str, ...]) -> str:
        """What `main.experiment` names, which seeds have in common."""
        key = (file, *bindings)
        if key not in self._experiments:
            self._experiments[key] = load([file], bindings).build(Main).experiment
        return self._experiments[key]

    def _check_inputs(self, experiment: RetrievalConfig) -> None:
        """Refuse what only the events can tell: ratings and columns that do not fit the model's tables."""
        if experiment.input_features == "item" and not experiment.event_columns:
            return
        columns = sorted(experiment.event_columns)
        key = (experiment.dataset_name, *columns)
        if key not in self._loaded:
            self._loaded[key] = PreparedDataset.load(self._request.data_dir, experiment.dataset_name, columns)
        require_ratings(experiment, self._loaded[key])
        require_events(experiment, self._loaded[key])

    def _varied(self, binding: str) -> str:
        """`train_fn.learning_rate = 1e-3` as `learning_rate=1e-3`, whole where two sweeps share that name."""
        key, _, value = binding.partition(" = ")
        parameter = key.rpartition(".")[2]
        alike = [sweep.key for sweep in self._request.sweeps if sweep.key.rpartition(".")[2] == parameter]
        return f"{parameter if len(alike) == 1 else key}={value}"

    def _dataset(self, name: str) -> str:
        """Identity of a prepared dataset, the same after it was prepared again from the same files."""
        if not name:
            return ""
        if name not in self._datasets:
            path = self._request.data_dir / name / "dataset.json"
            if not path.exists():
                PreparedDataset.load(self._request.data_dir, name)
            try:
                facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
                facts.pop("command", None)
            except (OSError, ValueError, AttributeError) as error:
                raise GridError(f"{path}: cannot be read: {one_line(error)}; try preparing it again") from error
            self._datasets[name] = _digest([facts])
        return self._datasets[name]

    def require_used_sweeps(self) -> None:
        """A sweep over what no config uses would run the same thing many times."""
        for sweep in self._request.sweeps:
            several = sweep.is_macro or len(sweep.bindings) > 1
            if several and self._unused and all(sweep.key in unused for unused in self._unused):
                advice = f"no config refers to %{sweep.key}; try configurable.parameter"
                if not sweep.is_macro:
                    advice = "no config uses it; try a parameter of what the configs construct"
                raise GridError(f"--sweep {sweep.key}: {advice}")


def _construct(config: Config, name: str) -> Any:
    """The experiment, with all that it would construct, so that what nothing uses is known."""
    kind = registry.class_of(name.rpartition("/")[2])
    if kind is RetrievalConfig:
        return Plan.of(config).experiment
    if kind in (GenerativeConfig, TokenizerConfig):
        # Generative runs make the semantic IDs that are not there.
        config.build(config.build(TokenizerConfig).tokenizer)
    return GenerativePlan.of(config).experiment if kind is GenerativeConfig else config.experiment()


def _assignments(text: str) -> dict[str, str]:
    pairs = (line.partition(" = ") for line in text.splitlines())
    return {key: value for key, equals, value in pairs if equals}


def _digest(parts: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def _run_id(file: str, fingerprint: str) -> str:
    return f"{Path(file).stem}-{fingerprint}"


def _short(file: str) -> str:
    return file.removeprefix("configs/").removesuffix(".gin")
