"""Every Triton kernel compiles for sm_80 and sm_90 without a GPU, in the configurations it ships with, and none spills.

Here the most demanding variant of each configuration is compiled; the committed report, which is held to be of these
very kernels, has all of them. The compiler cannot run beside the interpreter, which the other tests use, so each op is
compiled in a process of its own; Triton's cache keeps what did not change.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ops import compile_report

pytest.importorskip("triton")


OPS = compile_report.ops_with_kernels()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("op", OPS)
def test_kernels_compile_in_every_row_of_their_table_and_do_not_spill(op: str, tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    flags = ["--op", op, "--sample", "--cached", "--jobs", "1", "--output", str(tmp_path)]
    command = [sys.executable, compile_report.__file__, *flags]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for capability in compile_report.SHARED_LIMITS:
        rows = compile_report.read(tmp_path / f"compile_sm{capability}.csv")
        assert {row["op"] for row in rows} == {op}
        assert {row["arch"] for row in rows} == {f"sm_{capability}"}
        assert all(row["registers"] > 0 for row in rows)


@pytest.mark.parametrize("capability", compile_report.SHARED_LIMITS)
@pytest.mark.parametrize("op", OPS)
def test_committed_report_is_of_these_kernels(op: str, capability: int) -> None:
    rows = [x for x in compile_report.read(compile_report.RESULTS / f"compile_sm{capability}.csv") if x["op"] == op]
    stale = f"run python benchmarks/ops/compile_report.py --all --op {op}"
    assert {row["source"] for row in rows} == {compile_report.source(op)}, stale
    assert compile_report.unreached(op, capability, rows, everything=True) == [], stale
    assert compile_report.objections(rows) == []


def test_every_folder_with_kernels_has_a_tuning_table() -> None:
    folders = {path.parent.name for path in compile_report.ROOT.glob("ops/*/*kernels.py")}
    assert folders == set(OPS)


def row(**values: Any) -> compile_report.Row:
    return {
        "op": "toy",
        "kernel": "add",
        "variant": "float32",
        "constants": "",
        "config": "BLOCK=64",
        "default": True,
        "arch": "sm_80",
        "registers": 32,
        "shared": 0,
        "spill_stores": 0,
        "spill_loads": 0,
        "stack": 0,
        "seconds": "0.1",
        "source": "0",
        **values,
    }


@pytest.mark.parametrize(
    ("values", "objection"),
    [
        ({"spill_stores": 8}, "toy: add float32  BLOCK=64 on sm_80 spills 8 + 0 bytes"),
        ({"spill_loads": 4}, "spills 0 + 4 bytes"),
        ({"shared": 163 * 1024 + 1}, "takes 166913 bytes of shared memory, expected at most 166912"),
        ({"shared": 227 * 1024 + 1, "arch": "sm_90"}, "expected at most 232448"),
    ],
)
def test_defaults_that_spill_or_do_not_fit_are_objected_to(values: dict[str, Any], objection: str) -> None:
    assert compile_report.objections([row()]) == []
    (found,) = compile_report.objections([row(), row(**values)])
    assert objection in found
    assert compile_report.objections([row(**values, default=False)]) == []


def test_configurations_no_variant_reaches_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "ops" / "toy"
    folder.mkdir(parents=True)
    monkeypatch.setattr(compile_report, "ROOT", tmp_path)
    (folder / "tuning.json").write_text(
        '{"add": {"rows": [{"up_to": {"width": 64}, "default": {"BLOCK": 64}, "others": [{"BLOCK": 32}]},'
        ' {"default": {"BLOCK": 128}}]}}'
    )
    assert compile_report.ops_with_kernels() == ["toy"]
    assert compile_report.unreached("toy", 80, [row()], False) == ["toy: no variant reaches add BLOCK=128 on sm_80"]
    both = [row(), row(config="BLOCK=128")]
    assert compile_report.unreached("toy", 80, both, False) == []
    assert compile_report.unreached("toy", 80, both, True) == ["toy: no variant reaches add BLOCK=32 on sm_80"]


def test_rows_no_call_on_the_architecture_finds_need_not_be_reached() -> None:
    older, narrow, hidden, last = ({"up_to": x} for x in ({"sm": 80}, {"width": 64}, {"width": 32, "bytes": 2}, {}))
    assert compile_report.rows_for(80, [older, narrow, last]) == [older]
    assert compile_report.rows_for(90, [older, narrow, last]) == [narrow, last]
    assert compile_report.rows_for(90, [narrow, hidden, last]) == [narrow, last]
    assert compile_report.rows_for(90, [hidden, narrow, last]) == [hidden, narrow, last]


def test_saved_rows_replace_those_of_the_same_op_in_a_fixed_order(tmp_path: Path) -> None:
    path = tmp_path / "compile_sm80.csv"
    first = [row(op="b"), row(op="a", variant="old"), row(op="a", variant="bfloat16")]
    compile_report.save(path, first)
    compile_report.save(path, [row(op="a", variant="new")])
    assert compile_report.read(path) == [row(op="a", variant="new"), row(op="b")]
    compile_report.save(path, first)
    text = path.read_text()
    compile_report.save(path, first[::-1])
    assert path.read_text() == text


def test_only_the_last_variant_of_a_row_is_compiled_in_every_configuration() -> None:
    options = [{"BLOCK": 64}, {"BLOCK": 32}]
    extents = {
        (False, False): (1, 1),
        (True, False): (1, 2),
        (False, True): (0, 1),
        (True, True): (0, 2),
    }
    for (everything, sample), counts in extents.items():
        extent = compile_report.Extent(everything, sample)
        assert tuple(len(extent.chosen(is_last, options)) for is_last in (False, True)) == counts


def test_a_report_is_stale_once_a_kernel_it_calls_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_report, "ROOT", tmp_path)
    for op in ("toy", "called"):
        (tmp_path / "ops" / op).mkdir(parents=True)
        (tmp_path / "ops" / op / "tuning.json").write_text("{}")
    (tmp_path / "ops" / "toy" / "kernels.py").write_text("from ops.called.kernels import mix\n")
    called = tmp_path / "ops" / "called" / "kernels.py"
    called.write_text("A = 1\n")
    before = compile_report.source("toy")
    assert compile_report.source("toy") == before
    called.write_text("A = 2\n")
    assert compile_report.source("toy") != before
