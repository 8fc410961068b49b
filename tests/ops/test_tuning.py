"""Tuning tables, the launches they serve, and compilation without a GPU."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ops import triton_runtime, tuning
from ops.tuning import Config, Table

ROOT = Path(__file__).resolve().parents[2]
TABLES = sorted(path.parent.name for path in ROOT.glob("ops/*/tuning.json"))
DEFAULT, OTHER, WIDE = ({"BLOCK": size, "num_warps": 4, "num_stages": 1} for size in (64, 32, 128))
TOY = {
    "add": {
        "interpreted": {"BLOCK": 16},
        "rows": [{"up_to": {"width": 64, "bytes": 2}, "default": DEFAULT, "others": [OTHER]}, {"default": WIDE}],
    }
}
NARROW = {"width": 50, "bytes": 2}


@pytest.fixture
def table() -> Table:
    toy = Table("toy")
    # In place of the file.
    toy.__dict__["kernels"] = json.loads(json.dumps(TOY))
    return toy


@pytest.fixture
def _compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables answer as outside the interpreter, on a machine without a GPU."""
    monkeypatch.setattr(tuning, "interpreted", lambda: False)
    monkeypatch.setattr(tuning, "_has_gpu", lambda: False)


class Device:
    """A pretended GPU whose configurations take the milliseconds given; counts the launches."""

    def __init__(self, milliseconds: dict[int, float], monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        self.milliseconds = milliseconds
        self.measured: list[int] = []
        self.name = "Toy GPU (80 GB)"
        triton_testing = pytest.importorskip("triton.testing")
        monkeypatch.setattr(tuning, "interpreted", lambda: False)
        monkeypatch.setattr(tuning, "_has_gpu", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: self.name)
        monkeypatch.setattr(triton_testing, "do_bench", self.do_bench)
        monkeypatch.setenv("GR_CACHE", str(cache))
        monkeypatch.setenv("GR_AUTOTUNE", "1")
        tuning._saved.cache_clear()

    def launch(self, config: Config) -> bool:
        if self.milliseconds[config["BLOCK"]] < 0:
            raise RuntimeError("out of resource: shared memory")
        self.measured.append(config["BLOCK"])
        return True

    def do_bench(self, call: Callable[[], object], **_: Any) -> float:
        call()
        return self.milliseconds[self.measured[-1]]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Device:
    return Device({64: 2.0, 32: 1.0, 128: 1.0}, monkeypatch, tmp_path)


def never(config: Config) -> bool:
    raise AssertionError("measured")


@pytest.mark.usefixtures("_compiled")
@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (NARROW, [DEFAULT, OTHER]),
        ({"width": 64, "bytes": 2}, [DEFAULT, OTHER]),
        ({"width": 65, "bytes": 2}, [WIDE]),
        ({"width": 50, "bytes": 4}, [WIDE]),
    ],
)
def test_the_first_row_that_bounds_every_name_is_used(table: Table, key: Config, expected: list[Config]) -> None:
    assert table.options("add", key, never) == expected


@pytest.mark.usefixtures("_compiled")
def test_rows_may_be_for_an_architecture(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    table.kernels["add"]["rows"].insert(0, {"up_to": {"sm": 80}, "default": OTHER})
    for capability, expected in ((80, [OTHER]), (90, [DEFAULT, OTHER])):
        monkeypatch.setattr(tuning, "architecture", lambda capability=capability: capability)
        assert table.options("add", NARROW, never) == expected


def test_the_interpreter_has_its_own_configuration(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "interpreted", lambda: True)
    assert table.options("add", NARROW, never) == [{"BLOCK": 16}]
    assert table.constant("add", NARROW, "BLOCK") == 16


@pytest.mark.usefixtures("_compiled")
def test_a_constant_is_what_all_configurations_of_the_row_share(table: Table) -> None:
    assert table.constant("add", NARROW, "num_warps") == 4
    with pytest.raises(ValueError, match="too many values"):
        table.constant("add", NARROW, "BLOCK")


def test_measuring_keeps_the_fastest_for_later_processes(table: Table, device: Device) -> None:
    assert table.options("add", NARROW, device.launch) == [OTHER, DEFAULT]
    assert set(device.measured) == {64, 32}
    assert table.options("add", NARROW, never) == [OTHER, DEFAULT]
    later = Table("toy")
    later.__dict__["kernels"] = table.kernels
    assert later.options("add", NARROW, never) == [OTHER, DEFAULT]
    # A row with one configuration leaves nothing to measure.
    assert table.options("add", {"width": 99, "bytes": 2}, never) == [WIDE]


def test_results_are_read_without_the_variable_and_by_device(
    table: Table, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    table.options("add", NARROW, device.launch)
    monkeypatch.delenv("GR_AUTOTUNE")
    table._choices.clear()
    assert table.options("add", NARROW, never)[0] == OTHER
    table._choices.clear()
    device.name = "Another GPU"
    assert table.options("add", NARROW, never)[0] == DEFAULT


def test_a_changed_row_is_measured_anew(table: Table, device: Device) -> None:
    table.options("add", NARROW, device.launch)
    table._choices.clear()
    table.kernels["add"]["rows"][0]["others"] = [WIDE]
    device.milliseconds[128] = 0.5
    assert table.options("add", NARROW, device.launch) == [WIDE, DEFAULT]


def test_a_candidate_that_does_not_run_is_no_candidate(table: Table, device: Device) -> None:
    device.milliseconds[32] = -1.0
    assert table.options("add", NARROW, device.launch) == [DEFAULT, OTHER]


def test_where_no_candidate_runs_the_default_says_why(table: Table, device: Device) -> None:
    device.milliseconds = dict.fromkeys(device.milliseconds, -1.0)
    assert table.options("add", NARROW, device.launch)[0] == DEFAULT


def test_nothing_is_learned_from_an_empty_launch(table: Table, device: Device) -> None:
    assert table.options("add", NARROW, lambda config: False) == [DEFAULT, OTHER]
    assert table.options("add", NARROW, device.launch) == [OTHER, DEFAULT]


@pytest.mark.parametrize("text", ["{", "[]", "null", "3"])
def test_a_damaged_cache_is_measured_anew(text: str, table: Table, device: Device) -> None:
    path = tuning._device_file()
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert table.options("add", NARROW, device.launch) == [OTHER, DEFAULT]
    assert list(json.loads(path.read_text()).values()) == [OTHER]


def test_compiling_on_a_machine_with_a_gpu_measures_nothing(
    table: Table, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "compiling", lambda: True)
    assert table.options("add", NARROW, never) == [DEFAULT, OTHER]


class Kernel:
    """Stands for a compiled kernel: `kernel[grid](*args, **constants)`."""

    def __init__(self) -> None:
        self.launches: list[tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = []

    def fn(self) -> None: ...

    fn.__name__ = "add"

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **constants: self.launches.append((grid, args, constants))


@pytest.mark.usefixtures("_compiled")
@pytest.mark.parametrize("rows", [100, 0])
def test_launch_takes_the_grid_of_its_configuration_and_skips_an_empty_one(table: Table, rows: int) -> None:
    kernel, x = Kernel(), torch.zeros(rows)

    def grid(config: Config) -> tuple[int, ...]:
        return -(-rows // config["BLOCK"]), 3

    triton_runtime.launch(kernel, grid, x, rows, table=table, key=NARROW, WEIGHTED=True)
    if rows == 0:
        assert kernel.launches == []
        return
    ((size, args, constants),) = kernel.launches
    assert size == (2, 3)
    assert args == (x, rows)
    assert constants == {"WEIGHTED": True, **DEFAULT}


@pytest.mark.parametrize("op", TABLES)
def test_tables_name_kernels_and_their_block_sizes(op: str) -> None:
    pytest.importorskip("triton")
    modules = [importlib.import_module(f"ops.{op}.{path.stem}") for path in ROOT.glob(f"ops/{op}/*kernels.py")]
    options = {"num_warps", "num_stages", "maxnreg"}
    for name, entry in Table(op).kernels.items():
        kernel = next(getattr(module, name) for module in modules if hasattr(module, name))
        rows = entry["rows"]
        assert set(entry) == {"interpreted", "rows"}
        assert all(set(row) <= {"up_to", "default", "others"} for row in rows)
        assert all("up_to" in row for row in rows[:-1])
        assert "up_to" not in rows[-1], f"{name}: the last row must take every key"
        for config in [entry["interpreted"], *(c for row in rows for c in (row["default"], *row.get("others", [])))]:
            blocks = set(config) - options
            assert blocks == set(entry["interpreted"]) - options, f"{name}: {config}"
            assert blocks <= set(kernel.arg_names), f"{name}: {config}"
            if config is not entry["interpreted"]:
                assert config["num_warps"] in (1, 2, 4, 8, 16), f"{name}: {config}"
                assert config["num_stages"] >= 1, f"{name}: {config}"
                assert config.get("maxnreg", 255) in (64, 128, 255), f"{name}: {config}"


COMPILING = """
import torch
from ops.dropout import dropout
from ops.triton_runtime import compile_only, compiling
for capability in (80, 90):
    with compile_only(capability, lambda name, options: options) as results:
        assert compiling()
        x = torch.ones(3, 5, requires_grad=True)
        dropout(x, 0.5, 1, torch.arange(3), backend="triton").sum().backward()
    assert not compiling()
    assert len(results) == 4, results
    for compiled in results:
        assert compiled.kernel == "dropout" and "BLOCK_T" in compiled.constants
        assert f".target sm_{capability}" in compiled.result.asm["ptx"]
try:
    dropout(x, 0.5, 1, torch.arange(3), backend="triton")
except ValueError as error:
    assert torch.cuda.is_available() or "no CUDA device" in str(error)
"""


def test_compile_only_compiles_forward_and_backward_for_the_architecture_asked_for() -> None:
    pytest.importorskip("triton")
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILING], cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_measuring_on_a_gpu_leaves_results_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ops.dropout import dropout, gpu

    x, keys_T = torch.randn(301, 50, device="cuda"), torch.arange(301, device="cuda")
    before = dropout(x, 0.5, 1, keys_T, backend="triton")
    monkeypatch.setenv("GR_CACHE", str(tmp_path))
    monkeypatch.setenv("GR_AUTOTUNE", "1")
    monkeypatch.setattr(gpu, "_TABLE", Table("dropout"))
    tuning._saved.cache_clear()
    assert torch.equal(dropout(x, 0.5, 1, keys_T, backend="triton"), before)
    assert len(json.loads(tuning._device_file().read_text())) == 1
    tuning._saved.cache_clear()
