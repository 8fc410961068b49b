"""Grids: how runs are run, what the command refuses, and that nothing is lost or repeated whatever is killed."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

import main as launcher
import run_grid
import run_merlin_grid
from generative_recommenders.errors import UserError, exit_on_user_error
from generative_recommenders.grid import command
from generative_recommenders.grid.schedule import Options, environment
from tests.test_main import SMALL, SMALL_ENCODER
from tests.toy import write_toy_dataset

ROOT = Path(__file__).resolve().parent.parent
DEMO = "configs/synthetic/hstu-demo.gin"
FAKE = ROOT / "tests" / "fake_main.py"
TOY = "train_fn.dataset_name = 'toy'"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_toy_dataset(folder)
    return folder


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str


Launch = Callable[..., Outcome]


@pytest.fixture
def launch(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Launch:
    """A grid of the demo config on the toy data in `tmp_path / "out"`, with runs that behave by their seed."""
    monkeypatch.setattr(command, "_gpus", list)
    monkeypatch.chdir(tmp_path)

    def run(*flags: str, behaviors: Mapping[str, str] | None = None, real: bool = False) -> Outcome:
        places = [f"--data_dir={data_dir}", "--out=out"]
        monkeypatch.setattr(sys, "argv", ["run_grid.py", *places, *flags])
        runner = None if real else [sys.executable, os.fspath(FAKE), json.dumps(behaviors or {})]
        defaults = () if any(flag.startswith("--configs") for flag in flags) else (DEMO,)
        status = exit_on_user_error(lambda: command.run_command("", defaults, command=runner))()
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return run


TOY_FLAG = f"--gin_bindings={TOY}"


def statuses(out: Path) -> dict[int, str]:
    records = json.loads((out / "grid.json").read_text())["runs"].values()
    return {record["seed"]: record["status"] for record in records}


def starts(out: Path) -> dict[int, int]:
    """How often the run of each seed was started."""
    records = json.loads((out / "grid.json").read_text())["runs"].values()
    return {r["seed"]: len((out / "runs" / r["id"] / "starts.txt").read_text().splitlines()) for r in records}


def test_finished_runs_are_kept_and_failed_ones_told(launch: Launch, tmp_path: Path) -> None:
    out = tmp_path / "out"
    behaviors = {"2": "fail", "3": "crash", "4": "killed", "5": "leave"}
    first = launch(TOY_FLAG, "--seeds=1,2,3,4,5", behaviors=behaviors)
    assert first.status == 1, first.err
    failed = {2: "failed", 3: "failed", 4: "failed"}
    assert statuses(out) == {1: "finished", **failed, 5: "interrupted"}
    for seed, error in (
        (2, "out of luck; try <another> seed"),
        (3, "RuntimeError: a defect"),
        (4, "killed by SIGKILL"),
    ):
        assert f"failed: synthetic/hstu-demo seed={seed}: {error}" in first.out
    assert "1 of 5" in first.out
    again = launch(TOY_FLAG, "--seeds=1,2,3,4,5", "--jobs=3", behaviors=behaviors)
    assert again.status == 1
    assert starts(out) == {1: 1, 2: 1, 3: 1, 4: 1, 5: 2}
    retried = launch(TOY_FLAG, "--seeds=1,2,3,4,5", "--retry_failed", behaviors={"3": "fail"})
    assert retried.status == 1
    assert statuses(out) == {1: "finished", 2: "finished", 3: "failed", 4: "finished", 5: "finished"}
    assert starts(out) == {1: 1, 2: 2, 3: 2, 4: 2, 5: 3}
    assert launch(TOY_FLAG, "--seeds=1,2,4").status == 0
    assert starts(out) == {1: 1, 2: 2, 3: 2, 4: 2, 5: 3}


def test_a_run_whose_metrics_were_removed_runs_again(launch: Launch, tmp_path: Path) -> None:
    assert launch(TOY_FLAG, "--seeds=1").status == 0
    (metrics,) = (tmp_path / "out" / "runs").glob("*/*/*/metrics.json")
    metrics.unlink()
    assert launch(TOY_FLAG, "--seeds=1").status == 0
    assert metrics.exists()


def test_jobs_limit_the_runs_at_a_time(launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("generative_recommenders.grid.schedule.cores", lambda: 8)
    done = launch(TOY_FLAG, "--seeds=1,2,3,4", "--jobs=2", behaviors=dict.fromkeys("1234", "brief"))
    assert done.status == 0, done.out
    runs = list((tmp_path / "out" / "runs").iterdir())
    spans = [tuple(map(float, (run / "times.txt").read_text().split())) for run in runs]
    assert max(sum(begin <= at < end for begin, end in spans) for at, _ in spans) == 2
    for run in runs:
        _, threads, cwd = (run / "starts.txt").read_text().split()
        assert (threads, cwd) == ("4", os.fspath(ROOT))
    lines = [line for line in done.out.splitlines() if line.startswith("[")]
    assert [line.split()[1] for line in lines].count("running") == 4
    assert any(line.startswith("[4/4] finished ") and "seed=4 epoch 1: loss 0.5" in line for line in lines)


def test_places_have_a_gpu_or_their_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(Path(), jobs=3, gpus=["4", "6"])
    assert [environment({}, options, place)["CUDA_VISIBLE_DEVICES"] for place in range(3)] == ["4", "6", "4"]
    monkeypatch.setattr("generative_recommenders.grid.schedule.cores", lambda: 8)
    on_cpu = Options(Path(), jobs=3)
    assert environment({}, on_cpu, 1)["OMP_NUM_THREADS"] == "2"
    assert environment({"OMP_NUM_THREADS": "5"}, on_cpu, 1)["OMP_NUM_THREADS"] == "5"
    assert "OMP_NUM_THREADS" not in environment({}, Options(Path()), 0)
    assert "CUDA_VISIBLE_DEVICES" not in environment({}, on_cpu, 0)


def test_gpus_are_those_the_environment_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-5f")
    assert command._gpus() == ["3", "GPU-5f"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert command._gpus() == ["0", "1"]


def signal_when(ready: Callable[[], bool], *numbers: int) -> threading.Thread:
    """Send this process signals once `ready`, half a second apart."""

    def send() -> None:
        end = time.monotonic() + 30
        while not ready() and time.monotonic() < end:
            time.sleep(0.02)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.5)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_runs_save_and_the_same_command_continues(launch: Launch, tmp_path: Path, number: int) -> None:
    out = tmp_path / "out"
    flags, behaviors = [TOY_FLAG, "--seeds=1,2,3,4", "--jobs=2"], {"2": "slow", "3": "slow"}
    thread = signal_when(lambda: len(list(out.glob("runs/*/starts.txt"))) == 3, number)
    stopped = launch(*flags, behaviors=behaviors)
    thread.join()
    assert (stopped.status, statuses(out)) == (130, {1: "finished", 2: "interrupted", 3: "interrupted"})
    assert "stopped; the same command continues" in stopped.out
    done = launch(*flags, behaviors=behaviors)
    assert done.status == 0, done.out
    assert starts(out) == {1: 1, 2: 2, 3: 2, 4: 1}


def test_a_second_signal_kills_at_once(launch: Launch, tmp_path: Path) -> None:
    out = tmp_path / "out"
    thread = signal_when(lambda: bool(list(out.glob("runs/*/ready"))), signal.SIGINT, signal.SIGINT)
    began = time.monotonic()
    stopped = launch(TOY_FLAG, "--seeds=7", behaviors={"7": "stubborn"})
    thread.join()
    assert (stopped.status, statuses(out)) == (130, {7: "interrupted"})
    # One signal would have waited for 30 seconds.
    assert time.monotonic() - began < 25


def test_a_grid_that_cannot_go_on_lets_its_runs_save(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise UserError("no space left")

    monkeypatch.setattr(command, "write_reports", full)
    ended = launch(TOY_FLAG, "--seeds=1,2", "--jobs=2", behaviors={"2": "slow"})
    assert (ended.status, ended.err) == (2, "error: no space left\n")
    assert statuses(tmp_path / "out") == {1: "finished", 2: "interrupted"}


def test_a_run_beyond_its_time_is_a_failed_one(launch: Launch, tmp_path: Path) -> None:
    done = launch(TOY_FLAG, "--seeds=1,2", "--timeout_minutes=0.02", behaviors={"1": "slow"})
    assert (done.status, statuses(tmp_path / "out")) == (1, {1: "failed", 2: "finished"})
    assert "took more than --timeout_minutes=0.02; --retry_failed continues it" in done.out
    assert launch(TOY_FLAG, "--seeds=1,2", "--retry_failed", behaviors={"1": "slow"}).status == 0


def test_one_grid_at_a_time_in_a_folder(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        held.write("12345\n")
        held.flush()
        refused = launch(TOY_FLAG)
        assert refused.status == 2
        assert "another grid (process 12345) is running there" in refused.err
        assert launch(TOY_FLAG, "--dry_run").status == 0
    assert launch(TOY_FLAG, "--seeds=1").status == 0


def test_a_run_that_outlives_its_grid_is_waited_for(launch: Launch, tmp_path: Path) -> None:
    """Its lock keeps a second start away, and what it wrote meanwhile counts."""
    out = tmp_path / "out"
    assert launch(TOY_FLAG, "--seeds=1").status == 0
    records = json.loads((out / "grid.json").read_text())
    (record,) = records["runs"].values()
    record |= {"status": "running", "folder": ""}
    (out / "grid.json").write_text(json.dumps(records))
    folder = out / "runs" / record["id"]
    metrics = folder / "toy-l8" / "run" / "metrics.json"
    metrics.rename(folder / "aside")
    hold = "import fcntl, sys, time; f = open(sys.argv[1]); fcntl.flock(f, 2); print(flush=True); sys.stdin.readline()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, os.fspath(folder / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as orphan:
        assert orphan.stdin is not None and orphan.stdout is not None
        orphan.stdout.readline()

        def end() -> None:
            time.sleep(1)
            (folder / "aside").rename(metrics)
            orphan.communicate("\n")

        thread = threading.Thread(target=end)
        thread.start()
        done = launch(TOY_FLAG, "--seeds=1", behaviors={"1": "fail"})
        thread.join()
    assert done.status == 0, done.out
    assert starts(out) == {1: 1}


def test_a_killed_grid_takes_its_runs_along_and_repeats_nothing(launch: Launch, tmp_path: Path, data_dir: Path) -> None:
    out = tmp_path / "out"
    flags, behaviors = [TOY_FLAG, "--seeds=1,2,3"], {"2": "slow"}
    program = (
        "import sys\nfrom generative_recommenders.grid.command import run_command\n"
        f"run_command('', ({DEMO!r},), command=[sys.executable, {os.fspath(FAKE)!r}, {json.dumps(behaviors)!r}])"
    )
    places = [f"--data_dir={data_dir}", f"--out={out}"]
    grid = subprocess.Popen(
        [sys.executable, "-c", program, *places, *flags], cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True
    )
    end = time.monotonic() + 60
    while len(list(out.glob("runs/*/starts.txt"))) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    grid.kill()
    grid.wait()
    assert statuses(out) == {1: "finished", 2: "running"}
    done = launch(*flags, behaviors=behaviors)
    assert done.status == 0, done.out
    assert starts(out) == {1: 1, 2: 2, 3: 1}
    # The orphan was sent a SIGTERM, or the second start would have waited ten minutes for it.
    assert time.monotonic() < end + 60


REFUSED = [
    (["--configs=configs/nowhere/*.gin"], "--configs: 'configs/nowhere/*.gin' matches no file"),
    (["--configs=configs/synthetic/hstu-dmo.gin"], "did you mean configs/synthetic/hstu-demo.gin?"),
    (["--sweep=train_fn.learning_rat=1,2"], "train_fn has no parameter learning_rat; did you mean"),
    (["--sweep=train_fm.learning_rate=1,2"], "no configurable is named train_fm; did you mean train_fn?"),
    (
        ["--sweep=train_fn.num_epochs=1,2.5"],
        "--sweep 'train_fn.num_epochs = 2.5': train_fn.num_epochs = 2.5: expected int",
    ),
    (["--sweep=train_fn.loss_module=BCELoss"], "a string needs quotes"),
    (["--sweep=train_fn.num_epochs"], "--sweep: got 'train_fn.num_epochs', expected binding=value,value"),
    (["--sweep=RATE=1,2"], "--sweep RATE: no config refers to %RATE"),
    (["--sweep=train_fn.num_epochs=1", "--sweep=train_fn.num_epochs=2"], "bound twice"),
    (["--sweep=train_fn.random_seed=1,2", "--seeds=1,2"], "--seeds binds it as well"),
    (["--gin_bindings=train_fn.num_epoch = 3"], "train_fn has no parameter num_epoch; did you mean num_epochs"),
    (["--gin_bindings=include 'configs/base/demo.gin'"], "expected a binding such as"),
    (["--seeds=1,x"], "--seeds: got '1,x', expected whole numbers"),
    (["--jobs=0"], "--jobs: got 0, expected at least 1"),
    (["--timeout_minutes=0"], "--timeout_minutes: got 0, expected more than 0"),
]


@pytest.mark.parametrize(("flags", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_mistakes_refuse_the_grid_in_one_line(launch: Launch, tmp_path: Path, flags: list[str], message: str) -> None:
    refused = launch(TOY_FLAG, *flags)
    assert refused.status == 2, refused.out
    assert refused.err.startswith("error: ") and refused.err.count("\n") == 1
    assert message in refused.err
    assert not (tmp_path / "out").exists()


def test_a_store_that_is_not_ours_is_left_alone(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for content in ("{", '{"format": 99, "runs": {}}', '{"format": 1, "runs": {"a": {"status": "new"}}}'):
        (tmp_path / "out" / "grid.json").write_text(content)
        refused = launch(TOY_FLAG)
        assert refused.status == 2 and "grid.json: " in refused.err
        assert (tmp_path / "out" / "grid.json").read_text() == content


def test_dry_run_lists_and_writes_nothing(launch: Launch, tmp_path: Path) -> None:
    listed = launch(TOY_FLAG, "--seeds=1,2", "--dry_run")
    assert listed.status == 0
    assert [line.split()[0] for line in listed.out.splitlines()] == ["waiting", "waiting", "2"]
    assert not (tmp_path / "out").exists()
    launch(TOY_FLAG, "--seeds=2", behaviors={"2": "fail"})
    assert "failed       hstu-demo-" in launch(TOY_FLAG, "--seeds=1,2", "--dry_run").out


def test_the_scripts_are_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given: list[tuple[object, ...]] = []
    for script in (run_grid, run_merlin_grid):
        monkeypatch.setattr(script, "run_command", lambda description, **others: given.append((others,)) or 0)
        assert script.main() == 0
    assert given == [({},), ({"configs": ("configs/merlin/*.gin",), "out": Path("exps/merlin-grid")},)]


def test_end_to_end_with_the_launcher(launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    names = ["hstu-sampled-softmax-n128-final", "sasrec-sampled-softmax-n128-final"]
    small = [*SMALL, SMALL_ENCODER["HSTU"][0], "train_fn.num_negatives = 8", "train_fn.num_epochs = 1"]
    bindings = [f"--gin_bindings={binding}" for binding in small]
    configs = ["--configs", *(f"configs/ml-1m/{name}.gin" for name in names)]
    flags = [*configs, *bindings, "--seeds=1,2", "--jobs=2"]
    done = launch(*flags, real=True)
    assert done.status == 0, done.out + done.err
    folders = list((tmp_path / "out" / "runs").glob("*/toy-l8/*/metrics.json"))
    written = {path: path.stat().st_mtime_ns for path in folders}
    assert len(written) == 4
    table = (tmp_path / "out" / "results.md").read_text()
    assert all(f"ml-1m/{name}" in table.replace("\\", "") for name in names)
    figures = [json.loads(path.read_text())["metrics"]["ndcg@10"] for path in folders if "/hstu" in str(path)]
    assert f"| {sum(figures) / 2:.4f} ± " in table
    assert "not used: hstu_encoder.num_blocks" in table.replace("\\", "")
    again = launch(*flags, real=True)
    assert again.status == 0
    assert {path: path.stat().st_mtime_ns for path in folders} == written


def test_a_checkpoint_is_evaluated_under_every_combination_and_drawn(
    launch: Launch, tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    small = [TOY, *SMALL, SMALL_ENCODER["HSTU"][0], "train_fn.num_negatives = 8", "train_fn.num_epochs = 1"]
    bindings = [f"--gin_bindings={binding}" for binding in small]
    places = [f"--data_dir={data_dir}", f"--exps_dir={tmp_path / 'exps'}"]
    with monkeypatch.context() as patched:
        patched.setattr(sys, "argv", ["main.py", f"--gin_config_file={ROOT / DEMO}", *bindings, *places])
        launcher.main()
    (run,) = {path.parent for path in (tmp_path / "exps").glob("*/*/metrics.json")}
    flags = ["--configs", os.fspath(ROOT / DEMO), *bindings, "--jobs=2"]
    swept = [*flags, f"--checkpoint={run}", "--sweep", "train_fn.filter_history=True,False"]
    outcome = launch(*swept, "--plot", "hr@10", "ndcg@10", real=True)
    assert outcome.status == 0, outcome.err
    records = list((tmp_path / "out").glob("runs/*/evaluations/*/metrics.json"))
    assert len(records) == 2 and all(json.loads(path.read_text())["checkpoint"] == str(run) for path in records)
    found = {json.loads(path.read_text())["metrics"]["hr@10"] for path in records}
    assert len(found) == 2
    assert (tmp_path / "out" / "tradeoff.png").stat().st_size > 5_000
    # Finished evaluations are kept as finished runs are.
    again = launch(*swept, "--plot", "hr@10", "nonsense", real=True)
    assert again.status == 2 and again.err.startswith("error: --plot: got 'nonsense', which no finished run has")
    assert launch(*flags, "--checkpoint=nowhere", real=True).err.startswith("error: --checkpoint: nowhere is no folder")
