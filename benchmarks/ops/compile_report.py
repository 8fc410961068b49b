"""Compiles the Triton kernels of every op for sm_80 and sm_90 without a GPU, and lists what each of them needs.

    python benchmarks/ops/compile_report.py [--all] [--op NAME] [--capability 90] [--jobs 2]

The calls are those of `variants()` in `benchmarks/ops/bench_<op>.py`, plain ones first; a kernel is compiled in the
default configuration of its tuning table, with `--all` in every one. Registers, spills and stack are ptxas's, with the
options Triton gives it. The rows go to `benchmarks/results/compile_sm80.csv` and `compile_sm90.csv`, where they replace
those of the same ops. Exits with 1 where a default configuration spills or takes more shared memory than the
architecture has, or where no variant reaches a row of a tuning table.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ops.triton_runtime import Compiled, compile_only, interpreted

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
# What one block may take, in bytes.
SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024}
ORDER = ("op", "kernel", "variant", "constants", "config")
COUNTED = ("registers", "shared", "spill_stores", "spill_loads", "stack")
COLUMNS = (*ORDER, "default", "arch", *COUNTED, "seconds", "source")

Row = dict[str, Any]
Variants = Callable[[], Iterable[tuple[str, Callable[[], object]]]]


def benchmark_of(op: str) -> ModuleType:
    """The module `benchmarks/ops/bench_<op>.py`."""
    path = ROOT / "benchmarks" / "ops" / f"bench_{op}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ops_with_kernels() -> list[str]:
    return sorted(path.parent.name for path in (ROOT / "ops").glob("*/tuning.json"))


def source(op: str) -> str:
    """A hash of the op's kernels, of those they call, and of its tuning table."""
    files = [ROOT / "ops" / op / "tuning.json"]
    wanted = sorted(ROOT.glob(f"ops/{op}/*kernels.py"))
    while wanted:
        files.append(wanted.pop())
        called = re.findall(r"^from (ops\.\w+\.\w*kernels) import", files[-1].read_text(), re.MULTILINE)
        paths = (ROOT / f"{module.replace('.', '/')}.py" for module in called)
        wanted += [path for path in paths if path not in files and path not in wanted]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()[:12]


def words(values: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in sorted(values.items()))


@dataclass(frozen=True)
class Extent:
    """How much is compiled: by default every variant in its default configuration.

    Of the variants that reach a row of a tuning table the last has the most switched on. everything: that one in the
    other configurations of the row too. sample: that one alone.
    """

    everything: bool = False
    sample: bool = False

    def chosen(self, is_last: bool, options: list[dict[str, int]]) -> list[dict[str, int]]:
        default = options[:1] if is_last or not self.sample else []
        return default + (options[1:] if is_last and self.everything else [])


def compiled(
    variants: Variants, capability: int, extent: Extent
) -> Iterator[tuple[str, Compiled, dict[str, int], bool]]:
    """Variant, compilation, configuration and whether that is a default."""
    now = ""
    last: dict[tuple[str, ...], str] = {}
    taken: list[tuple[dict[str, int], bool]] = []

    def note(kernel: str, options: list[dict[str, int]]) -> list[dict[str, int]]:
        last[(kernel, *map(words, options))] = now
        return []

    def choose(kernel: str, options: list[dict[str, int]]) -> list[dict[str, int]]:
        chosen = extent.chosen(last[(kernel, *map(words, options))] == now, options)
        taken.extend((config, config is options[0]) for config in chosen)
        return chosen

    with compile_only(capability, note):
        for now, call in variants():  # noqa: B007
            call()
    with compile_only(capability, choose) as results:
        for now, call in variants():
            first = len(results)
            call()
            for result, (config, default) in zip(results[first:], taken[first:], strict=True):
                yield now, result, config, default


def resources(result: Any) -> dict[str, int]:
    """Registers, spilled bytes and stack of a compiled kernel, from ptxas."""
    from triton import knobs

    target = re.search(r"^\.target\s+(\w+)", result.asm["ptx"], re.MULTILINE)
    assert target is not None
    fusion = [] if result.metadata.enable_fp_fusion else ["--fmad=false"]
    options = ["-v", "-lineinfo", "--regAllocOptLevel=2", *fusion, f"--gpu-name={target[1]}", "-o", os.devnull]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(result.asm["ptx"])
        file.flush()
        command = [knobs.nvidia.ptxas.path, *options, file.name]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    # Device functions that were not inlined have lines of their own: the worst of them counts.
    patterns = {
        "registers": r"Used (\d+) registers",
        "spill_stores": r"(\d+) bytes spill stores",
        "spill_loads": r"(\d+) bytes spill loads",
        "stack": r"(\d+) bytes stack frame",
    }
    return {name: max(map(int, re.findall(pattern, log))) for name, pattern in patterns.items()}


def rows_of(op: str, capability: int, extent: Extent) -> list[Row]:
    """One row for each kernel that differs in dtypes, constants or configuration."""
    variants = getattr(benchmark_of(op), "variants", None)
    if variants is None:
        raise ValueError(f"benchmarks/ops/bench_{op}.py: has no variants(), expected one for every kernel compiled")
    found: dict[str, Row] = {}
    origin = source(op)
    for variant, compilation, config, default in compiled(variants, capability, extent):
        result = compilation.result
        if result.hash in found:
            found[result.hash]["default"] |= default
            continue
        owner = result.src.fn.__module__.split(".")[1]
        kernel = compilation.kernel if owner == op else f"{owner}.{compilation.kernel}"
        constants = {name: value for name, value in compilation.constants.items() if name not in config}
        row: Row = {"op": op, "kernel": kernel, "variant": variant, "constants": words(constants)}
        row |= {"config": words(config), "default": default, "arch": f"sm_{capability}"}
        row |= {"shared": result.metadata.shared, "seconds": f"{compilation.seconds:.1f}", "source": origin}
        found[result.hash] = row | resources(result)
    return in_order(found.values())


def attempt(op: str, capability: int, extent: Extent) -> list[Row] | str:
    """`rows_of`, or what went wrong: one op that does not compile leaves the others their rows."""
    try:
        return rows_of(op, capability, extent)
    except Exception:
        return f"{op} sm_{capability}: not compiled\n{traceback.format_exc()}"


def in_order(rows: Iterable[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: [row[name] for name in ORDER])


def rows_for(capability: int, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a tuning table that some call on the architecture finds, earlier ones being asked first."""
    found: list[tuple[dict[str, int], dict[str, Any]]] = []
    for row in rows:
        bounds = {"sm": capability, **row.get("up_to", {})}
        applies = bounds.pop("sm") >= capability
        hidden = any(all(bounds.get(name, math.inf) <= x for name, x in before.items()) for before, _ in found)
        if applies and not hidden:
            found.append((bounds, row))
    return [row for _, row in found]


def unreached(op: str, capability: int, rows: Iterable[Row], everything: bool) -> list[str]:
    """Configurations of the op's tuning table that no variant compiled."""
    tables = json.loads((ROOT / "ops" / op / "tuning.json").read_text())
    seen = {(row["kernel"], row["config"]) for row in rows}
    listed = (
        (kernel, words(config))
        for kernel, table in tables.items()
        for row in rows_for(capability, table["rows"])
        for config in [row["default"], *(row.get("others", []) if everything else [])]
    )
    missing = dict.fromkeys(place for place in listed if place not in seen)
    return [f"{op}: no variant reaches {kernel} {config} on sm_{capability}" for kernel, config in missing]


def objections(rows: list[Row]) -> list[str]:
    """What no default configuration may do."""
    found = []
    for row in rows:
        limit = SHARED_LIMITS[int(row["arch"].removeprefix("sm_"))]
        where = f"{row['op']}: {row['kernel']} {row['variant']} {row['constants']} {row['config']} on {row['arch']}"
        if row["default"] and row["spill_stores"] + row["spill_loads"] > 0:
            found.append(f"{where} spills {row['spill_stores']} + {row['spill_loads']} bytes")
        if row["default"] and row["shared"] > limit:
            found.append(f"{where} takes {row['shared']} bytes of shared memory, expected at most {limit}")
    return found


def read(path: Path) -> list[Row]:
    """The rows of a saved report."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows: list[Row] = list(csv.DictReader(file))
    for row in rows:
        row["default"] = row["default"] == "True"
        row |= {name: int(row[name]) for name in COUNTED}
    return rows


def save(path: Path, rows: list[Row]) -> None:
    """Replace the rows of these ops."""
    ops = {row["op"] for row in rows}
    kept = [row for row in read(path) if row["op"] not in ops]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(in_order([*kept, *rows]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ops_with_kernels()
    parser.add_argument("--op", action="append", choices=known, help="default: every op that has kernels")
    parser.add_argument("--capability", type=int, action="append", choices=list(SHARED_LIMITS), help="default: both")
    parser.add_argument("--all", action="store_true", help="every configuration, not the defaults alone")
    parser.add_argument("--sample", action="store_true", help="one variant for each configuration")
    parser.add_argument("--cached", action="store_true", help="take from Triton's cache what is there; seconds mislead")
    parser.add_argument("--jobs", type=int, default=2, help="processes, default: %(default)s")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the csv files")
    arguments = parser.parse_args()
    if interpreted():
        sys.exit("TRITON_INTERPRET: got 1, expected it unset: the interpreter compiles nothing")
    if not arguments.cached:
        os.environ["TRITON_ALWAYS_COMPILE"] = "1"
    wrong: list[str] = []
    found: dict[int, list[Row]] = {capability: [] for capability in arguments.capability or SHARED_LIMITS}
    tasks = list(itertools.product(arguments.op or known, found, [Extent(arguments.all, arguments.sample)]))
    with contextlib.ExitStack() as stack:
        spread: Callable[..., Iterable[list[Row] | str]] = map
        if arguments.jobs > 1:
            context = multiprocessing.get_context("spawn")
            spread = stack.enter_context(ProcessPoolExecutor(arguments.jobs, context)).map
        for (op, capability, _), rows in zip(tasks, spread(attempt, *zip(*tasks, strict=True)), strict=True):
            if isinstance(rows, str):
                wrong.append(rows)
                continue
            found[capability] += rows
            wrong += objections(rows) + unreached(op, capability, rows, arguments.all)
            registers, shared = (max((row[name] for row in rows), default=0) for name in ("registers", "shared"))
            print(f"{op} sm_{capability}: {len(rows)} kernels, {registers} registers, {shared} bytes shared at most")
    for capability, rows in found.items():
        save(arguments.output / f"compile_sm{capability}.csv", rows)
    if wrong:
        print("\n".join(dict.fromkeys(wrong)), file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
