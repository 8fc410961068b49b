"""The command line of run_grid.py and run_merlin_grid.py."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from generative_recommenders.errors import UserError
from generative_recommenders.grid import store as s
from generative_recommenders.grid.display import display, printable
from generative_recommenders.grid.plan import GridRun, Request, plan
from generative_recommenders.grid.report import write_reports
from generative_recommenders.grid.results import read_results
from generative_recommenders.grid.schedule import Grid, Options, State
from generative_recommenders.grid.store import Store
from generative_recommenders.grid.sweep import GridError, Sweep
from generative_recommenders.grid.tables import console_table
from generative_recommenders.grid.tradeoff import PICTURE, draw_tradeoff

INTERRUPTED_STATUS = 130


def parser(description: str, configs: Sequence[str], out: Path) -> argparse.ArgumentParser:
    """The flags; `configs` and `out` are the defaults of a grid that has them."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    add = result.add_argument
    which = f"default {' '.join(configs)}" if configs else "needed"
    add("--configs", nargs="+", action="extend", metavar="F", help=f"gin files or patterns; may be repeated; {which}")
    add("--gin_bindings", action="append", default=[], metavar="B", help="a binding of all runs; may be repeated")
    add(
        "--sweep",
        action="append",
        default=[],
        metavar="B=V,V",
        help="values of a binding, e.g. 'train_fn.learning_rate=1e-3,3e-4';\nseveral sweeps give all combinations",
    )
    add("--seeds", default="", metavar="N,N", help="each run once a seed, e.g. 1,2,3; default: the config's seed")
    add("--jobs", type=int, help="runs at a time; default: the number of GPUs, or 1")
    add("--out", type=Path, default=out, help=f"folder of runs and reports; default {out}")
    add("--data_dir", type=Path, default=Path("tmp"), help="prepared datasets; default tmp")
    add("--retry_failed", action="store_true", help="run again what failed before")
    add("--timeout_minutes", type=float, metavar="M", help="stop a run that takes longer; it counts as failed")
    add("--checkpoint", type=Path, metavar="RUN", help="evaluate this run under every combination; nothing is trained")
    add("--plot", nargs=2, metavar=("X", "Y"), help=f"draw two metrics of all rows against each other: {PICTURE}")
    add("--dry_run", action="store_true", help="list the runs and what is left to do")
    return result


def run_command(
    description: str, configs: Sequence[str] = (), out: Path = Path("exps/grid"), command: Sequence[str] | None = None
) -> int:
    """What the scripts do; returns the exit status: 0 all finished, 1 not all, 130 stopped by a signal.

    `command` starts a run in the place of main.py.

    Raises:
        UserError: the grid cannot be planned or its folder cannot be used.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    arguments = parser(description, configs, out).parse_args()
    request = Request(
        configs=arguments.configs or configs,
        data_dir=arguments.data_dir.resolve(),
        bindings=arguments.gin_bindings,
        sweeps=[Sweep.read(text) for text in arguments.sweep],
        seeds=_seeds(arguments.seeds),
        checkpoint=_checkpoint(arguments.checkpoint),
    )
    if not request.configs:
        raise GridError("--configs: not given, expected gin files; try --configs 'configs/ml-1m/*.gin'")
    gpus = _gpus()
    options = Options(
        data_dir=request.data_dir,
        jobs=_at_least("--jobs", arguments.jobs, 1) if arguments.jobs is not None else max(1, len(gpus)),
        gpus=gpus,
        retry_failed=arguments.retry_failed,
        timeout_minutes=_above_zero("--timeout_minutes", arguments.timeout_minutes),
        checkpoint=request.checkpoint,
    )
    runs = plan(request)
    reasons = {run.broken for run in runs}
    if len(reasons) == 1 and all(reasons):
        raise GridError(f"none of {len(runs)} runs can start: {reasons.pop()}")
    store = Store(arguments.out.resolve())
    if arguments.dry_run:
        _list(runs, store)
        return 1 if any(run.broken for run in runs) else 0
    with store.locked():
        return _run(runs, store, options, command, arguments.plot)


def _run(
    runs: Sequence[GridRun],
    store: Store,
    options: Options,
    command: Sequence[str] | None,
    plotted: Sequence[str] | None,
) -> int:
    screen = display(sys.stdout)
    grid = Grid(runs, store, options, screen, command or (sys.executable, "main.py"))
    screen.say(f"{len(runs)} runs, {options.jobs} at a time; runs, logs and reports in {store.out}")

    def ended(state: State) -> None:
        # The page can be looked at while the grid goes on.
        write_reports(read_results(runs, store), store)

    grid.run(ended)
    results = read_results(runs, store)
    rows = write_reports(results, store)
    if grid.stopped:
        screen.say("stopped; the same command continues")
        return INTERRUPTED_STATUS
    _say("\n" + console_table(rows))
    _say("\n".join(f"{store.out / name}" for name in ("results.csv", "results.md", "report.html")))
    if plotted is not None:
        draw_tradeoff(rows, plotted[0], plotted[1], store.out / PICTURE)
        _say(str(store.out / PICTURE))
    left = [result for result in results if result.status != s.FINISHED]
    for result in left:
        _say(f"{result.status}: {result.run.title}: {result.error or 'the same command continues it'}")
    if any(result.status == s.FAILED and not result.run.broken for result in left):
        _say("--retry_failed runs what failed once more")
    return 1 if left else 0


def _checkpoint(path: Path | None) -> Path | None:
    if path is not None and not path.is_dir():
        raise GridError(f"--checkpoint: {path} is no folder, expected a run folder or one of its checkpoints/step-*")
    return None if path is None else path.resolve()


def _list(runs: Sequence[GridRun], store: Store) -> None:
    for run in runs:
        status, error = store.status(run), store.error(run)
        _say(f"{status:<11}  {run.id}  {run.title}{f': {error}' if error else ''}")
    _say(f"{len(runs)} runs")


def _say(text: str) -> None:
    sys.stdout.write(printable(text, sys.stdout) + "\n")
    sys.stdout.flush()


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text.strip() else []
    except ValueError as error:
        raise GridError(f"--seeds: got {text!r}, expected whole numbers with commas; try --seeds 1,2,3") from error


def _at_least(flag: str, value: int, least: int) -> int:
    if value < least:
        raise UserError(f"{flag}: got {value}, expected at least {least}")
    return value


def _above_zero(flag: str, value: float | None) -> float | None:
    if value is not None and not value > 0:
        raise UserError(f"{flag}: got {value:g}, expected more than 0")
    return value


def _gpus() -> list[str]:
    """Values of CUDA_VISIBLE_DEVICES, one a visible GPU; those that the variable names where it is set."""
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if named else [str(number) for number in range(count)]
