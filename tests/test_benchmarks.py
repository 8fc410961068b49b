"""The benchmark harness, and that every benchmark runs and compares like with like."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import harness, measuring, verification
from benchmarks.e2e import ml_20m_step
from benchmarks.harness import Benchmark, table
from benchmarks.measuring import Row, Step, append, difference, elapsed, percentiles
from benchmarks.ops.compile_report import benchmark_of
from generative_recommenders.config import load
from generative_recommenders.retrieval.assemble import Plan, build_model
from tests.toy import write_toy_dataset

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKED = sorted(path.stem.removeprefix("bench_") for path in ROOT.glob("benchmarks/ops/bench_*.py"))
CPU = torch.device("cpu")


def benchmark_in(op: str) -> Benchmark:
    (found,) = [value for value in vars(benchmark_of(op)).values() if isinstance(value, Benchmark)]
    return found


def test_percentiles_of_a_sample() -> None:
    assert percentiles("total", [5.0, 1.0, 2.0, 3.0, 4.0, 0.0]) == {
        "total_ms": 2.5,
        "total_p20_ms": 1.0,
        "total_p80_ms": 4.0,
    }


def test_phases_are_timed_one_by_one_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 1.5, 4.5])
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: next(clock))
    done: list[str] = []
    assert elapsed([lambda: done.append("forward"), lambda: done.append("backward")], CPU) == [500.0, 3000.0]
    assert done == ["forward", "backward"]


def test_backward_gets_the_same_upstream_gradients_in_every_provider() -> None:
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    integers = torch.arange(3)
    steps = [Step(call, x, [x], 1) for call in (lambda x: (2 * x, integers), lambda x: (x + x, integers))]
    first, second = (step.results() for step in steps)
    assert list(first) == ["output 0", "output 1", "gradient 0"]
    assert difference(first, second, 0.0) is None
    assert x.grad is None
    steps[0].forget()
    assert steps[0].outputs == steps[0].gradients == ()


def test_without_leaves_forward_alone_runs_and_records_nothing() -> None:
    weight = torch.ones(3, requires_grad=True)
    step = Step(lambda x: x * weight, torch.ones(3), (), 1)
    step.run()
    assert len(step.phases) == 1
    assert not step.outputs[0].requires_grad


@pytest.mark.parametrize(
    ("actual", "expected", "found"),
    [
        ([1.0, 100.0], [1.05, 100.0], None),
        ([1.0, 100.0], [1.0, 100.2], "x differs by 2.0e-03 of the largest value, allowed 1e-03"),
        ([1.0, float("-inf")], [1.0, float("-inf")], None),
        ([1.0, float("-inf")], [1.0, 2.0], "x differs by inf"),
        ([float("nan")], [1.0], "x differs by nan"),
        ([2**40], [2**40 + 1], "x differs by"),
        ([0.0], [0.0], None),
        ([], [], None),
        ([1.0], [1.0, 1.0], "x has shape (1,) against (2,)"),
    ],
)
def test_difference_is_relative_to_the_largest_value(actual: list, expected: list, found: str | None) -> None:
    result = difference({"x": torch.tensor(actual)}, {"x": torch.tensor(expected)}, 1e-3)
    assert result == found if found is None else result is not None and result.startswith(found)


def test_another_number_of_results_is_a_difference() -> None:
    assert difference({"x": torch.ones(1)}, {}, 1e-3) == "1 results against 0"


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_new_columns_widen_the_table(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "toy.csv"
    append(path, [{"provider": "ops", "total_ms": 1.23456}])
    append(path, [{"provider": "ops", "peak_mb": 2.0}, {"provider": "torch, eager", "note": None}])
    assert path.read_text().splitlines()[0] == "provider,total_ms,peak_mb,note"
    assert read(path) == [
        {"provider": "ops", "total_ms": "1.235", "peak_mb": "", "note": ""},
        {"provider": "ops", "total_ms": "", "peak_mb": "2", "note": ""},
        {"provider": "torch, eager", "total_ms": "", "peak_mb": "", "note": ""},
    ]
    assert list(path.parent.iterdir()) == [path]


def measured(provider: str, milliseconds: float, megabytes: float) -> Row:
    return {"provider": provider, **percentiles("total", [milliseconds]), "peak_mb": megabytes}


def test_ratios_are_to_the_op() -> None:
    rows = [measured("ops", 2.0, 10.0), measured("torch", 5.0, 40.0), {"provider": "naive", "note": "out of memory"}]
    header, *lines = table(rows).splitlines()
    assert header.split("  ")[-2:] == ["time / ops", "memory / ops"]
    assert "forward" not in header
    assert [line.split()[-2:] for line in lines] == [["1.00", "1.00"], ["2.50", "4.00"], ["of", "memory"]]


def test_without_the_op_there_are_no_ratios() -> None:
    assert "ops" not in table([measured("torch", 5.0, 40.0)])
    # Where the resident set did not grow there is nothing to divide by.
    assert table([measured("ops", 2.0, 0.0)]).splitlines()[1].split()[-1] == "1.00"


@pytest.fixture
def toy_op(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one op, `toy`; returns the file of its tests."""
    (tmp_path / "ops" / "toy").mkdir(parents=True)
    (tmp_path / "ops" / "toy" / "__init__.py").write_text("VALUE = 1\n")
    (tmp_path / "tests" / "ops").mkdir(parents=True)
    monkeypatch.setenv("GR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(verification, "ROOT", tmp_path)
    return tmp_path / "tests" / "ops" / "test_toy.py"


GREEN = "def test_green(): assert True\n"
RED = "def test_wrong_gradient(): assert 1 == 2\n"
ON_GPU = "import pytest\n@pytest.mark.gpu\ndef test_gpu(): assert 1 == 2\n"


def test_a_red_op_is_refused_by_the_name_of_its_test(toy_op: Path) -> None:
    toy_op.write_text(GREEN + RED)
    refused = verification.verify("toy", "cpu")
    assert refused is not None
    assert refused.startswith("toy: its tests are red on cpu, status 1")
    assert "FAILED tests/ops/test_toy.py::test_wrong_gradient" in refused


@pytest.mark.filterwarnings("ignore")
def test_a_green_op_is_tested_once_for_the_same_code(toy_op: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_op.write_text(GREEN + ON_GPU)
    assert verification.verify("toy", "cpu") is None
    runs: list[list[str]] = []

    def record(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        runs.append(command)
        return subprocess.CompletedProcess(command, 1, "", "")

    monkeypatch.setattr(subprocess, "run", record)
    assert verification.verify("toy", "cpu") is None
    assert runs == []
    (verification.ROOT / "ops" / "toy" / "__init__.py").write_text("VALUE = 2\n")
    assert verification.verify("toy", "cpu") is not None
    (verification.ROOT / "ops" / "toy" / "__init__.py").write_text("VALUE = 1\n")
    toy_op.write_text(GREEN + RED)
    assert verification.verify("toy", "cpu") is not None
    assert [command[command.index("not gpu") - 1] for command in runs] == ["-m", "-m"]


def test_an_op_without_tests_is_refused(toy_op: Path) -> None:
    refused = verification.verify("toy", "cpu")
    assert refused is not None
    assert "status" in refused


def test_a_refused_op_is_not_timed(
    toy_op: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    toy_op.write_text(RED)
    assert run(TOY, monkeypatch, tmp_path) == 1
    captured = capsys.readouterr()
    assert "test_wrong_gradient" in captured.err
    assert captured.out == ""
    assert not (tmp_path / "toy.csv").exists()


def make(sizes: harness.Sizes, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.randn(sizes["rows"], 4, device=device, dtype=dtype, requires_grad=True)]


TOY = Benchmark(
    op="toy",
    shapes={
        "wide": {"rows": 100, "dtypes": ("float32", "bfloat16")},
        "narrow": {"rows": 8},
        "huge": {"rows": 10**9, "devices": ("cuda",)},
    },
    make=make,
    providers={
        "ops": lambda inputs: inputs[0].square(),
        "reference": lambda inputs: inputs[0] * inputs[0],
        "another": lambda inputs: inputs[0] + 1,
        "naive": lambda inputs: inputs[0] ** 2,
    },
    leaves=lambda inputs: inputs,
    flops=lambda sizes: 4e9 * sizes["rows"],
    bytes=lambda sizes, dtype: 8 * sizes["rows"] * dtype.itemsize,
    skip=lambda provider, shape, device: (provider, shape, device) == ("naive", "wide", "cpu"),
    unlike=("another",),
)


def run(benchmark: Benchmark, monkeypatch: pytest.MonkeyPatch, results: Path, *flags: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench_toy.py", "--device", "cpu", "--results", str(results), *flags])
    monkeypatch.setattr(harness, "_peak_of_a_fresh_process", lambda *_: 1.5)
    return benchmark.main()


def test_every_shape_dtype_and_provider_has_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(TOY, monkeypatch, tmp_path, "--skip-tests", "--repeats", "3") == 0
    rows = read(tmp_path / "toy.csv")
    assert [(row["shape"], row["dtype"], row["provider"]) for row in rows] == [
        *(("narrow", "float32", name) for name in ("ops", "reference", "another", "naive")),
        *(("wide", dtype, name) for dtype in ("float32", "bfloat16") for name in ("ops", "reference", "another")),
    ]
    for row in rows:
        assert row["tests"] == "skipped"
        assert (row["repeats"], row["seed"], row["peak_mb"]) == ("3", "1", "1.5")
        assert all(row[name] for name in ("device", "threads", "torch", "python", "date"))
        assert float(row["forward_p20_ms"]) <= float(row["forward_ms"]) <= float(row["forward_p80_ms"])
        assert float(row["total_ms"]) >= float(row["backward_p20_ms"])
    # Backward counts twice the forward's operations.
    assert float(rows[0]["tflops"]) * float(rows[0]["total_ms"]) == pytest.approx(3 * 4e9 * 8 / 1e9, rel=1e-2)
    assert float(rows[0]["forward_gb_s"]) * float(rows[0]["forward_ms"]) == pytest.approx(8 * 8 * 4 / 1e6, rel=1e-2)
    assert "toy narrow (rows=8), float32 on" in capsys.readouterr().out


def test_flags_choose_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--skip-tests", "--shape", "wide", "--dtype", "float32", "--provider", "reference", "--provider", "ops")
    assert run(TOY, monkeypatch, tmp_path, *flags) == 0
    assert [row["provider"] for row in read(tmp_path / "toy.csv")] == ["ops", "reference"]
    assert run(TOY, monkeypatch, tmp_path / "none", "--skip-tests", "--no-csv") == 0
    assert not (tmp_path / "none").exists()
    assert run(TOY, monkeypatch, tmp_path / "quick", "--skip-tests", "--quick") == 0
    assert {row["shape"] for row in read(tmp_path / "quick" / "toy.csv")} == {"narrow"}


def test_a_benchmark_whose_providers_disagree_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(replace(TOY, unlike=()), monkeypatch, tmp_path, "--skip-tests") == 1
    assert "toy: not timed, it disagrees with another: output 0 differs by" in capsys.readouterr().err
    assert run(replace(TOY, unlike=(), agree=1e9), monkeypatch, tmp_path, "--skip-tests") == 0


def test_a_device_that_is_absent_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench_toy.py", "--device", "cuda"])
    with pytest.raises(SystemExit, match="device: got cuda, expected cpu"):
        TOY.main()


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (RuntimeError("no\ncompiler"), "RuntimeError: no compiler"),
    ],
)
def test_a_baseline_that_cannot_run_has_a_row_that_says_so(
    error: Exception, note: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        raise error

    broken = replace(TOY, providers={**TOY.providers, "naive": fail})
    assert run(broken, monkeypatch, tmp_path, "--skip-tests", "--shape", "narrow") == 0
    *timed, last = read(tmp_path / "toy.csv")
    assert all(row["note"] == "" and row["total_ms"] for row in timed)
    assert (last["provider"], last["note"], last["total_ms"]) == ("naive", note, "")


def test_an_op_that_cannot_run_ends_its_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        raise RuntimeError("illegal memory access")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        run(replace(TOY, providers={**TOY.providers, "ops": fail}), monkeypatch, tmp_path, "--skip-tests")


MEMORY = """
import sys
import torch
from benchmarks.harness import Benchmark

benchmark = Benchmark(
    op="toy",
    shapes={"one": {"megabytes": 60}},
    make=lambda sizes, device, dtype: torch.ones(sizes["megabytes"] * 250_000),
    providers={"ops": lambda x: x + 1, "reference": lambda x: (x + 2) - torch.ones_like(x)},
)
sys.exit(benchmark.main())
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read from Linux")
def test_peak_memory_is_what_a_step_takes_beyond_its_inputs(tmp_path: Path) -> None:
    (tmp_path / "bench_toy.py").write_text(MEMORY)
    flags = ["--device", "cpu", "--skip-tests", "--repeats", "1", "--results", ".", "--provider", "reference"]
    command, environ = [sys.executable, "bench_toy.py", *flags], os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = read(tmp_path / "toy.csv")
    assert float(row["peak_mb"]) == pytest.approx(180, abs=12)


def test_every_op_has_a_benchmark() -> None:
    assert sorted(path.parent.name for path in ROOT.glob("ops/*/__init__.py")) == BENCHMARKED


@pytest.mark.parametrize("op", BENCHMARKED)
def test_benchmark_names_its_op_first_and_has_variants(op: str) -> None:
    benchmark = benchmark_in(op)
    assert benchmark.op == op
    assert (ROOT / "tests" / "ops" / f"test_{op}.py").exists()
    assert next(iter(benchmark.providers)) == "ops"
    assert len(benchmark.providers) > 1, "nothing to compare with"
    assert set(benchmark.unlike) < set(benchmark.providers)
    for shape in benchmark.shapes:
        sizes = benchmark.sizes(shape)
        assert benchmark.flops is None or benchmark.flops(sizes) > 0
        assert benchmark.bytes is None or benchmark.bytes(sizes, torch.float32) > 0
    names = [name for name, _ in getattr(benchmark_of(op), "variants", lambda: [("", None)])()]
    assert names
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("op", BENCHMARKED)
def test_providers_agree_at_the_smallest_shape(op: str) -> None:
    benchmark = benchmark_in(op)
    names = benchmark.shapes_on("cpu")
    if not names:
        pytest.skip("only timed on a GPU")
    dtype = benchmark.dtypes(names[0], "cpu")[0]
    steps = benchmark.steps(names[0], CPU, dtype, list(benchmark.providers), 1)
    assert "ops" in steps
    assert benchmark.disagreement(steps, dtype) is None


WHOLE = [f"benchmarks/e2e/{name}.py" for name in ("train_throughput",) * 2 + ("ml_20m_step",) * 2 + ("wide_beam",)]

STAND_IN = """#!/usr/bin/env bash
[ "$1" = -c ] && exit 0
[ "$1" = - ] && exit 0
echo "$@" >> "$COMMANDS"
case "$*" in *bench_rank.py*) exit 3 ;; esac
"""


def suite(folder: Path, **environ: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run the suite's script with a program that notes its arguments in the place of Python."""
    python = folder / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    commands = folder / "commands"
    values = {"PYTHON": str(python), "COMMANDS": str(commands), "OUT": str(folder / "out"), "DATA_DIR": str(folder)}
    done = subprocess.run(
        ["bash", "benchmarks/gpu_suite.sh"], cwd=ROOT, env=os.environ | values | environ, capture_output=True, text=True
    )
    return done, commands.read_text().splitlines()


def test_suite_runs_every_part_and_reports_what_failed(tmp_path: Path) -> None:
    done, commands = suite(tmp_path, GPU_SUITE_DEVICE="cpu")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-2].endswith("1 objections")
    assert done.stdout.splitlines()[-1] == "benchmark of rank: status 3"
    assert (tmp_path / "out" / "gpu_suite.log").read_text() == done.stdout
    assert (tmp_path / "out" / "results.tar.gz").exists()
    assert commands[0].startswith("benchmarks/verification.py --device cpu")
    assert [line.split()[0] for line in commands[1 : 1 + len(BENCHMARKED)]] == [
        f"benchmarks/ops/bench_{op}.py" for op in BENCHMARKED
    ]
    prepare, *whole = commands[1 + len(BENCHMARKED) :]
    assert prepare.startswith("preprocess_public_data.py --dataset=synthetic")
    assert [line.split()[0] for line in whole] == WHOLE
    assert all((ROOT / name).exists() for line in commands for name in line.split() if name.endswith(".py"))


def test_suite_takes_prepared_data_and_trains_when_asked(tmp_path: Path) -> None:
    (tmp_path / "ml-1m").mkdir()
    (tmp_path / "ml-1m" / "dataset.json").write_text(json.dumps({}))
    done, commands = suite(tmp_path, GPU_SUITE_OPS="dropout", GPU_SUITE_TRAIN="1", GPU_SUITE_DEVICE="cpu")
    assert done.returncode == 0, done.stdout
    assert [line.split()[0] for line in commands] == [
        "benchmarks/verification.py",
        "benchmarks/ops/bench_dropout.py",
        *WHOLE,
        "main.py",
    ]
    assert all("train_fn.dataset_name = 'ml-1m'" in line for line in (*commands[2:4], commands[-1]))


def test_wide_beams_run(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/e2e/wide_beam.py", "--quick", "--device=cpu", f"--results={tmp_path}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with (tmp_path / "wide_beam.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 and all(float(row["search_ms"]) > float(row["constraint_ms"]) > 0 for row in rows)


def test_generative_decoding_is_held_against_the_same_lists(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    write_toy_dataset(tmp_path)
    # Its configs are those of Beauty, so the toy data takes that name.
    (tmp_path / "toy").rename(tmp_path / "amzn14-beauty")
    metadata = tmp_path / "amzn14-beauty" / "dataset.json"
    metadata.write_text(metadata.read_text().replace('"toy"', '"amzn14-beauty"'))
    ids = ["--gin_config_file=configs/amzn14-beauty/rqkmeans.gin", "--gin_bindings=rq_kmeans.sizes = (4, 4, 4)"]
    ids += ["--gin_bindings=train_tokenizer.encoder = 'hashed'", f"--data_dir={tmp_path}", "--device=cpu"]
    subprocess.run([sys.executable, "main.py", *ids], cwd=ROOT, check=True, capture_output=True)
    command = [
        sys.executable,
        "benchmarks/e2e/generative_decoding.py",
        f"--data_dir={tmp_path}",
        f"--results={tmp_path}",
    ]
    command += ["--batch=4", "--batches=1", "--baseline_batches=1", "--beams=5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "generative_decoding.csv").open(newline="") as file:
        rows = {row["provider"]: row for row in csv.DictReader(file)}
    assert {"transformers", "tiger", "parallel_exact", "sid_gr_hstu", "sasrec"} <= rows.keys()
    assert float(rows["transformers"]["times_faster_than_transformers"]) == 1.0


def test_ml_20m_step_counts_and_times(tmp_path: Path) -> None:
    bindings = ("train_fn.local_batch_size = 2", "hstu_encoder.num_blocks = 2", "train_fn.max_sequence_length = 30")
    command = [sys.executable, "benchmarks/e2e/ml_20m_step.py", "--steps", "1", "--results", str(tmp_path)]
    command += ["--profile", str(tmp_path / "profile.txt"), *(f"--gin_bindings={x}" for x in bindings)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with (tmp_path / "ml_20m_step.csv").open(newline="") as file:
        (written,) = csv.DictReader(file)
    assert 40 <= float(written["tokens"]) <= 60
    assert float(written["share"]) == pytest.approx(
        float(written["tflops"]) / float(written["matmul_bf16_tflops"]), rel=0.01
    )
    assert "gr::hstu_attention" in (tmp_path / "profile.txt").read_text()


def test_ml_20m_step_counts_what_pytorch_counts() -> None:
    """The layers' products by PyTorch's counter, which does not see into the ops: those are left out of both."""
    plan = Plan.of(
        load([str(ROOT / ml_20m_step.CONFIG)], ["hstu_encoder.num_blocks = 2", "train_fn.num_negatives = 1"])
    )
    catalog_X = torch.arange(1, ml_20m_step.ITEMS + 1)
    generator = torch.Generator().manual_seed(0)
    lengths_B = ml_20m_step.row_lengths(3, 60, generator)
    batch = ml_20m_step.random_batch(lengths_B, generator)
    model = build_model(plan, catalog_X, torch.ones_like(catalog_X))
    with FlopCounterMode(display=False) as counter:
        model(batch, 0)[0].backward()
    width = plan.experiment.item_embedding_dim
    pairs = float((lengths_B.double() * (lengths_B + 1) / 2).sum())
    ops = 6 * (2 * pairs * 2 * width + float(lengths_B.sum()) * 2 * width)
    assert counter.get_total_flops() == pytest.approx(ml_20m_step.step_flops(plan, lengths_B) - ops, rel=1e-6)
