"""Times an op beside its baselines: one file an op, `benchmarks/ops/bench_<op>.py`, and one table of results an op.

    python benchmarks/ops/bench_dropout.py [--device cuda] [--shape NAME] [--provider NAME] [--dtype bfloat16]

For every shape, dtype and provider the median, the 20th and the 80th percentile of forward, backward and both are
printed with the ratio to the op, and appended to `benchmarks/results/<op>.csv` with device, versions and commit.

- An op whose tests are red on the device is not timed, nor one that disagrees with its baselines on the inputs.
- Providers take turns within a repeat, so that a busy machine slows all alike; the first turn of each is not counted.
- On a GPU device events time the kernels. Before each step a buffer larger than the L2 cache is written often enough
  for the host to run ahead: the time of launching is in `host_ms`, not in the others, unless the device waits for it.
- Peak memory is what one step takes beyond its inputs, results included: of PyTorch's allocator on a GPU, of the
  resident set of a fresh process on a CPU (Linux).
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.measuring import (
    Row,
    Step,
    append,
    difference,
    flusher,
    peak_megabytes,
    percentiles,
    phases_and_host,
    provenance,
    words,
)
from benchmarks.verification import ROOT, verify

RESULTS = ROOT / "benchmarks" / "results"
# The op's name among the providers.
OURS = "ops"
DEVICES = ("cpu", "cuda")
DTYPES = {"cpu": ("float32",), "cuda": ("float32", "bfloat16")}
REPEATS = {"cpu": 5, "cuda": 30}
# Largest difference between providers, relative to the largest value of a tensor: catches what is wrong, not rounding.
AGREE = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 1e-2}

Sizes = Mapping[str, Any]


def _never(provider: str, shape: str, device: str) -> bool:
    return False


@dataclass(frozen=True)
class Benchmark:
    """What to time: the op of `ops/<op>`, tested by `tests/ops/test_<op>.py`, and what it is compared with.

    shapes: name -> sizes. Two optional names in a shape are not sizes: "devices", by default both, and "dtypes", by
    default float32 on a CPU, float32 and bfloat16 on a GPU. make(sizes, device, dtype) draws the inputs.
    providers: name -> callable of the inputs; the first is the op, under the name "ops", the others its baselines.
    leaves(inputs): what backward differentiates with respect to; None times forward alone, without autograd.
    flops(sizes), bytes(sizes, dtype): of one forward call, counted for what has to be computed and moved whatever
    the provider does; backward counts `backward_flops` times the forward's operations.
    skip(provider, shape name, "cpu" or "cuda"): what not to run, for instance where it would not fit.
    agree: largest difference from the op, relative to the largest value of a tensor, by dtype or for all; `unlike`
    names the providers that compute something else: they are not compared, and have no rates.
    """

    op: str
    shapes: Mapping[str, Sizes]
    make: Callable[[Sizes, torch.device, torch.dtype], Any]
    providers: Mapping[str, Callable[[Any], Tensor | tuple[Tensor, ...]]]
    leaves: Callable[[Any], Sequence[Tensor]] | None = None
    flops: Callable[[Sizes], float] | None = None
    backward_flops: float = 2.0
    bytes: Callable[[Sizes, torch.dtype], float] | None = None
    skip: Callable[[str, str, str], bool] = _never
    agree: float | Mapping[str, float] = field(default_factory=lambda: AGREE)
    unlike: Sequence[str] = ()

    def sizes(self, shape: str) -> Sizes:
        return {name: value for name, value in self.shapes[shape].items() if name not in ("devices", "dtypes")}

    def shapes_on(self, device: str) -> list[str]:
        """Shapes that are timed on the device, "cpu" or "cuda", by the product of their sizes."""
        names = [name for name, shape in self.shapes.items() if device in shape.get("devices", DEVICES)]
        return sorted(names, key=lambda n: math.prod(max(x, 1) for x in self.sizes(n).values() if isinstance(x, int)))

    def dtypes(self, shape: str, device: str) -> Sequence[str]:
        found: Sequence[str] = self.shapes[shape].get("dtypes", DTYPES[device])
        return found

    def steps(self, shape: str, device: torch.device, dtype: str, chosen: Sequence[str], seed: int) -> dict[str, Step]:
        """The chosen providers that run at this shape, on the same inputs."""
        names = [name for name in chosen if not self.skip(name, shape, device.type)]
        torch.manual_seed(seed)
        inputs = self.make(self.sizes(shape), device, getattr(torch, dtype)) if names else None
        leaves = self.leaves(inputs) if names and self.leaves else ()
        return {name: Step(self.providers[name], inputs, leaves, seed) for name in names}

    def disagreement(self, steps: Mapping[str, Step], dtype: str) -> str | None:
        """How the op differs from a baseline that computes the same, or None."""
        if OURS not in steps:
            return None
        allowed = self.agree if isinstance(self.agree, float) else self.agree.get(dtype, 0.0)
        ours = steps[OURS].results()
        for name in steps:
            if name == OURS or name in self.unlike:
                continue
            found = difference(ours, steps[name].results(), allowed)
            steps[name].forget()
            if found is not None:
                return f"{self.op}: not timed, it disagrees with {name}: {found}"
        return None

    def main(self) -> int:
        """The command line of a benchmark; 1 where the op must not be timed."""
        arguments = _parser(self).parse_args()
        device = torch.device(arguments.device)
        if device.type == "cuda" and not torch.cuda.is_available():
            sys.exit("device: got cuda, expected cpu: no CUDA device is available")
        chosen = [name for name in self.providers if name in (arguments.provider or self.providers)]
        if arguments.peak:
            (step,) = self.steps(arguments.shape[0], device, arguments.dtype[0], chosen, arguments.seed).values()
            print(peak_megabytes(step, device))
            return 0
        refused = None if arguments.skip_tests else verify(self.op, device.type)
        if refused is not None:
            print(refused, file=sys.stderr)
            return 1
        about = provenance(device) | {"seed": arguments.seed, "tests": "skipped" if arguments.skip_tests else "green"}
        shapes, repeats = self.shapes_on(device.type), arguments.repeats or REPEATS[device.type]
        if arguments.quick:
            shapes, repeats = shapes[:1], 1
        for shape in arguments.shape or shapes:
            for dtype in arguments.dtype or self.dtypes(shape, device.type):
                rows = self.measure(shape, device, dtype, chosen, repeats, arguments.seed)
                if isinstance(rows, str):
                    print(rows, file=sys.stderr)
                    return 1
                print(f"\n{self.op} {shape} ({words(self.sizes(shape))}), {dtype} on {about['device']}\n{table(rows)}")
                if arguments.csv:
                    append(arguments.results / f"{self.op}.csv", [row | about for row in rows])
        return 0

    def measure(
        self, shape: str, device: torch.device, dtype: str, providers: Sequence[str], repeats: int, seed: int
    ) -> list[Row] | str:
        """A row for each provider that runs at this shape, or why the op must not be timed."""
        steps = self.steps(shape, device, dtype, providers, seed)
        failures = {name: _failure(step, name != OURS) for name, step in steps.items()}
        running = {name: step for name, step in steps.items() if failures[name] is None}
        refused = self.disagreement(running, dtype)
        if refused is not None:
            return refused
        times: dict[str, list[list[float]]] = {name: [] for name in running}
        flush = flusher(device)
        for _ in range(repeats):
            for name, step in running.items():
                flush()
                times[name].append(phases_and_host(step, device))
                step.forget()
        rows = []
        for name in steps:
            row: Row = {"op": self.op, "shape": shape, "sizes": words(self.sizes(shape)), "dtype": dtype}
            row |= {"provider": name, "repeats": repeats}
            if failures[name] is not None:
                rows.append(row | {"note": failures[name]})
                continue
            *phases, host = zip(*times[name], strict=True)
            for phase, milliseconds in zip(("forward", "backward"), phases, strict=False):
                row |= percentiles(phase, milliseconds)
            row |= percentiles("total", [sum(turn) for turn in zip(*phases, strict=True)])
            if device.type == "cuda":
                row |= {"host_ms": float(np.median(host)), "peak_mb": peak_megabytes(running[name], device)}
                running[name].forget()
            else:
                row["peak_mb"] = _peak_of_a_fresh_process(shape, name, dtype, seed)
            rows.append(row | self.rates(shape, dtype, row))
        return rows

    def rates(self, shape: str, dtype: str, row: Row) -> Row:
        """TFLOP/s of the step and GB/s of forward, where the benchmark counts them."""
        found: Row = {}
        if row["provider"] in self.unlike:
            return found
        if self.flops is not None:
            flops = self.flops(self.sizes(shape)) * (1 + self.backward_flops * ("backward_ms" in row))
            found["tflops"] = flops / row["total_ms"] / 1e9
        if self.bytes is not None:
            found["forward_gb_s"] = self.bytes(self.sizes(shape), getattr(torch, dtype)) / row["forward_ms"] / 1e6
        return found


def _failure(step: Step, baseline: bool) -> str | None:
    """Run a step once, which also builds and tunes kernels; why it cannot be timed, or None. The op must not fail."""
    try:
        step.run()
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return "out of memory"
    except Exception as error:
        if not baseline:
            raise
        return " ".join(f"{type(error).__name__}: {error}".split())[:80]
    finally:
        step.forget()
    return None


def _peak_of_a_fresh_process(shape: str, provider: str, dtype: str, seed: int) -> float:
    """Of the program that is running, which must be a benchmark's file."""
    choice = ["--shape", shape, "--provider", provider, "--dtype", dtype, "--seed", str(seed), "--device", "cpu"]
    # Blocks of any size are mapped on their own and unmapped when freed.
    environ = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, sys.argv[0], *choice, "--peak"]
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1])


def table(rows: Sequence[Row]) -> str:
    """One line a provider; ratios are to the op: 2.0 is twice its time or memory. Empty columns are left out."""
    ours = next((row for row in rows if row["provider"] == OURS and "total_ms" in row), None)
    phases = ("forward", "backward", "total")
    rates = {"peak_mb": "peak MB", "host_ms": "host ms", "tflops": "TFLOP/s", "forward_gb_s": "GB/s"}
    lines = [
        ["provider", *(f"{phase} ms [p20 p80]" for phase in phases), *rates.values(), "time / ops", "memory / ops"]
    ]
    for row in rows:
        cells = [row["provider"], *(_interval(row, phase) for phase in phases)]
        cells += [f"{row[name]:.3g}" if name in row else "" for name in rates]
        for name in ("total_ms", "peak_mb"):
            cells.append(f"{row[name] / ours[name]:.2f}" if ours and name in row and ours[name] > 0 else "")
        lines.append([*cells[:-1], cells[-1] or row.get("note", "")])
    shown = [column for column in zip(*lines, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in shown]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in zip(*shown, strict=True))


def _interval(row: Row, phase: str) -> str:
    if f"{phase}_ms" not in row:
        return ""
    return "{:.3g} [{:.3g} {:.3g}]".format(*(row[f"{phase}{which}_ms"] for which in ("", "_p20", "_p80")))


def _parser(benchmark: Benchmark) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=f"Time {benchmark.op} beside its baselines.")
    parser.add_argument("--shape", action="append", choices=list(benchmark.shapes), help="default: all")
    parser.add_argument("--provider", action="append", choices=list(benchmark.providers), help="default: all")
    parser.add_argument("--dtype", action="append", metavar="NAME", help="torch's name; default: those of the shape")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=DEVICES, default=default, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, help="default: 5 on a CPU, 30 on a GPU")
    parser.add_argument("--quick", action="store_true", help="the smallest shape once: a check, not a measurement")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--csv", action=argparse.BooleanOptionalAction, default=True, help="append the rows")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the csv files")
    parser.add_argument("--skip-tests", action="store_true", help="time an op whatever its tests say; the rows say so")
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    return parser
