"""Choosing an implementation: priority of the wishes, explanations, and life without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ops
from ops import dispatch, native
from ops.dispatch import Implementation, Op
from ops.dropout import cpu as dropout_cpu
from ops.dropout import dropout
from ops.jagged import jagged_dense_bmm
from ops.linear_cross_entropy import linear_cross_entropy
from ops.random import uniform_ints
from ops.sampled_softmax import sampled_softmax_loss

needs_compiler = pytest.mark.skipif(dropout_cpu.refuses() is not None, reason=str(dropout_cpu.refuses()))
ROOT = Path(__file__).resolve().parents[2]


def refuses_odd(*args: int) -> str | None:
    return "odd number" if args and args[0] % 2 else None


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> Op:
    """An op that answers with the name of the back-end; "triton" wants a GPU, "cpu" even numbers."""
    monkeypatch.setattr(dispatch, "_OPS", {})
    monkeypatch.delenv("GR_OPS", raising=False)
    return Op(
        "example",
        lambda x: "reference",
        {
            "triton": Implementation(lambda x: "triton", lambda *args: "no GPU"),
            "cpu": Implementation(lambda x: "cpu", refuses_odd),
        },
    )


def test_auto_takes_the_first_that_accepts(op: Op) -> None:
    assert op(2) == "cpu"
    assert op(3) == "reference"


def test_argument_beats_context_beats_environment(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GR_OPS", "reference")
    assert op(2) == "reference"
    with ops.backend("cpu"):
        assert op(2) == "cpu"
        assert op(2, backend="reference") == "reference"
        with ops.backend("auto"):
            assert op(2) == "cpu"
    assert op(2) == "reference"
    assert op(2, backend="cpu") == "cpu"


def test_context_ends_with_an_exception(op: Op) -> None:
    with pytest.raises(KeyError), ops.backend("reference"):
        raise KeyError
    assert op(2) == "cpu"


def test_a_wish_falls_back_where_a_demand_is_refused(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    with ops.backend("triton"):
        assert op(2) == "reference"
    monkeypatch.setenv("GR_OPS", "cpu")
    assert op(3) == "reference"
    with pytest.raises(ValueError, match=r"example: backend 'triton' cannot run here: no GPU; try backend='auto'"):
        op(2, backend="triton")
    with pytest.raises(ValueError, match="odd number"):
        op(3, backend="cpu")


def test_unknown_names_are_refused(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="got 'cuda', expected one of auto, reference, cpu, triton"):
        op(2, backend="cuda")
    with pytest.raises(ValueError, match="got 'cuda'"), ops.backend("cuda"):
        pass
    monkeypatch.setenv("GR_OPS", "fast")
    with pytest.raises(ValueError, match="backend of example: got 'fast'"):
        op(2)


def test_explain_names_the_choice_and_the_reason(op: Op) -> None:
    Op("plain", lambda: None)
    told = {name: why for name, *why in (line.split(maxsplit=2) for line in ops.explain().splitlines())}
    assert told["example"] == ["cpu", "no triton: no GPU"]
    assert told["plain"] == ["reference", "only implementation"]


def test_explain_lists_ops_nobody_has_imported_yet() -> None:
    command = [sys.executable, "-c", "import ops; print(ops.explain())"]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert {"hstu_attention", "sampled_softmax", "rank_of_target"} <= {line.split()[0] for line in told.splitlines()}


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "_compiler", lambda: None)
    monkeypatch.setattr(native, "_state", {})
    monkeypatch.setenv("GR_CACHE", str(tmp_path))
    monkeypatch.delenv("GR_OPS", raising=False)


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_the_reference_runs() -> None:
    keys_T = torch.arange(5)
    assert torch.equal(uniform_ints(1, keys_T, 3, 10), uniform_ints(1, keys_T, 3, 10, backend="reference"))
    x = torch.ones(5, 4, requires_grad=True)
    assert torch.equal(dropout(x, 0.5, 1, keys_T), dropout(x, 0.5, 1, keys_T, backend="reference"))
    losses_T = sampled_softmax_loss(x, x, keys_T, keys_T[:, None], temperature=1.0)
    assert bool((losses_T < 1e-6).all())
    with pytest.raises(ValueError, match=r"dropout: backend 'cpu' cannot run here: no C\+\+ compiler found"):
        dropout(x, 0.5, 1, keys_T, backend="cpu")
    lines = {line.split()[0]: line for line in ops.explain().splitlines()}
    for name in ("dropout", "sampled_softmax", "uniform_ints"):
        assert "reference" in lines[name]
        assert "no cpu: no C++ compiler found" in lines[name]


def test_a_source_that_does_not_compile_is_explained(
    no_compiler: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("GR_CACHE", str(tmp_path))
    if native._compiler() is None:
        pytest.skip("no C++ compiler")
    source = tmp_path / "broken.cpp"
    source.write_text("int f( { return 1; }")
    assert native.library(source) is None
    reason = native.reason(source)
    assert reason is not None
    assert "failed on broken.cpp" in reason


def test_built_once_and_found_in_the_cache_afterwards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if native._compiler() is None:
        pytest.skip("no C++ compiler")
    source = tmp_path / "answer.cpp"
    source.write_text('extern "C" __attribute__((visibility("default"))) int answer() { return 42; }')
    monkeypatch.setenv("GR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "_state", {})
    first = native.library(source)
    assert first is not None
    assert first.answer() == 42

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("compiled a second time")

    monkeypatch.setattr(native.subprocess, "run", refuse)
    assert native.library(source) is first
    native._state.clear()
    again = native.library(source)
    assert again is not None
    assert again.answer() == 42
    assert len(list((tmp_path / "cache").rglob("*.so"))) == 1


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_compile_sees_through_the_ops(backend: str) -> None:
    if dropout_cpu.refuses() is not None:
        pytest.skip("no C++ compiler")
    keys_T = torch.arange(6)

    def step(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        negatives = uniform_ints(3, keys_T, 4, 9, backend=backend)
        hidden = dropout(x, 0.25, 5, keys_T, backend=backend)
        losses_T = sampled_softmax_loss(hidden, table, keys_T, negatives, temperature=0.5, backend=backend)
        return losses_T.mean()

    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(n, 8, generator=generator, requires_grad=True) for n in (6, 9)]
    eager = torch.autograd.grad(step(*leaves), leaves)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(torch.autograd.grad(compiled(*leaves), leaves), eager, strict=True):
        torch.testing.assert_close(got, wanted)


def test_explain_follows_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GR_OPS", "reference")
    lines = [line.split(maxsplit=2) for line in ops.explain().splitlines()]
    assert {tuple(line[1:]) for line in lines} == {("reference", "reference is asked for")}
    monkeypatch.setenv("GR_OPS", "")
    assert "is asked for" not in ops.explain()


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_autocast_changes_no_op(backend: str) -> None:
    queries, table = torch.randn(4, 16), torch.randn(9, 16)
    ids = torch.arange(9), torch.arange(4)
    weight = torch.randn(1, 16, 8)

    def results() -> tuple[torch.Tensor, ...]:
        losses = linear_cross_entropy(queries, table, *ids, temperature=1.0, backend=backend)
        return losses, jagged_dense_bmm(queries, torch.tensor([0, 4]), weight, backend=backend)

    wanted = results()
    with torch.autocast("cpu", torch.bfloat16):
        found = results()
    for value, expected in zip(found, wanted, strict=True):
        assert torch.equal(value, expected)


@needs_compiler
@pytest.mark.parametrize("damage", ["half", "empty", "foreign", "no checksum"])
def test_a_damaged_library_is_built_anew(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GR_CACHE", str(tmp_path))
    source = tmp_path / "toy" / "cpu.cpp"
    source.parent.mkdir()
    source.write_text('extern "C" __attribute__((visibility("default"))) int answer() { return 42; }')
    assert native.library(source) is not None
    (built,) = tmp_path.rglob("*.so")
    whole = built.read_bytes()
    # Written aside: the process has the old one mapped.
    aside = built.with_suffix(".aside")
    aside.write_bytes({"half": whole[: len(whole) // 2], "empty": b"", "foreign": b"x" * 100}.get(damage, whole))
    aside.replace(built)
    if damage == "no checksum":
        built.with_suffix(".sha256").unlink()
    code = f"from pathlib import Path; from ops import native; print(native.library(Path({str(source)!r})).answer())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "42\n", done.stderr


@needs_compiler
def test_a_compiler_may_come_with_words(tmp_path: Path) -> None:
    code = "from ops.dropout import cpu; print(cpu.refuses())"
    for compiler, said in (("env g++", "None\n"), ("false", "exit status 1"), ("'", "could not compile")):
        environ = {**os.environ, "CXX": compiler, "GR_CACHE": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environ, capture_output=True, text=True)
        assert said in done.stdout, done.stderr


def test_without_a_home_the_cache_is_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("GR_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(native.Path, "home", no_home)
    monkeypatch.setattr(native.tempfile, "tempdir", str(tmp_path))
    native._home_cache.cache_clear()
    try:
        assert native.cache_folder() == native.cache_folder()
        assert native.cache_folder().parent.parent == tmp_path
    finally:
        native._home_cache.cache_clear()
