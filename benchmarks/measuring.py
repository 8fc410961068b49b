"""One step of one provider: its time, its memory, and the row that keeps them."""

from __future__ import annotations

import csv
import ctypes
import gc
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from generative_recommenders.training.environment import environment

# Larger than any L2 cache, written this often: about a millisecond, which the host uses to run ahead.
FLUSHED_BYTES, FLUSHES = 256 << 20, 8

Row = dict[str, Any]


def elapsed(phases: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """Milliseconds of each phase, run one after the other; on a GPU between events of the device."""
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(phases) + 1)]
        events[0].record()
        for phase, event in zip(phases, events[1:], strict=True):
            phase()
            event.record()
        events[-1].synchronize()
        return [start.elapsed_time(end) for start, end in itertools.pairwise(events)]
    marks = [time.perf_counter()]
    for phase in phases:
        phase()
        marks.append(time.perf_counter())
    return [1e3 * (end - start) for start, end in itertools.pairwise(marks)]


def percentiles(name: str, milliseconds: Sequence[float]) -> Row:
    """Median, 20th and 80th percentile as columns `<name>_ms`, `<name>_p20_ms`, `<name>_p80_ms`."""
    median, low, high = np.percentile(milliseconds, [50, 20, 80])
    return {f"{name}_ms": float(median), f"{name}_p20_ms": float(low), f"{name}_p80_ms": float(high)}


def provenance(device: torch.device) -> Row:
    """What a figure has to be read with: device, threads, versions, commit and date.

    GR_COMMIT names the code where it is no checkout.
    """
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = None
    about = environment(device)
    about["commit"] = about["commit"] or os.environ.get("GR_COMMIT")
    return about | {"triton": triton, "date": time.strftime("%Y-%m-%d")}


def words(values: Mapping[str, Any]) -> str:
    """One cell for several named values."""
    return " ".join(f"{name}={value}" for name, value in values.items())


def append(path: Path, rows: Sequence[Row]) -> None:
    """Add rows to a csv, widening its header where they have new columns; the file is whole at any moment."""
    kept: list[Row] = []
    if path.exists():
        with path.open(newline="") as file:
            kept = list(csv.DictReader(file))
    kept += [{k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}")
    with aside.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in kept for name in row)))
        writer.writeheader()
        writer.writerows(kept)
    os.replace(aside, path)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether products of float32 may take tensor cores, within."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


class Step:
    """One provider on one set of inputs: `forward` and, where there are leaves, `backward`."""

    def __init__(self, provider: Callable[[Any], Any], inputs: Any, leaves: Sequence[Tensor], seed: int) -> None:
        self.provider, self.inputs, self.leaves, self.seed = provider, inputs, tuple(leaves), seed
        self.phases = (self.forward, self.backward) if self.leaves else (self.forward,)
        self.outputs: tuple[Tensor, ...] = ()
        self.gradients: tuple[Tensor, ...] = ()
        self._upstream: list[Tensor] = []

    def forward(self) -> None:
        with torch.set_grad_enabled(bool(self.leaves)):
            found = self.provider(self.inputs)
        self.outputs = (found,) if isinstance(found, Tensor) else tuple(found)

    def backward(self) -> None:
        outputs = [x for x in self.outputs if x.requires_grad]
        if not self._upstream:
            generator = torch.Generator().manual_seed(self.seed)
            self._upstream = [torch.randn(x.shape, generator=generator).to(x) for x in outputs]
        self.gradients = torch.autograd.grad(outputs, self.leaves, self._upstream)

    def run(self) -> None:
        for phase in self.phases:
            phase()

    def results(self) -> dict[str, Tensor]:
        self.run()
        outputs = {f"output {i}": x.detach() for i, x in enumerate(self.outputs)}
        return outputs | {f"gradient {i}": x for i, x in enumerate(self.gradients)}

    def forget(self) -> None:
        self.outputs = self.gradients = ()


def _resident_kilobytes(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(name))


def peak_megabytes(step: Step, device: torch.device) -> float:
    """Memory of one step beyond what was held before it; a first step loads libraries and starts threads."""
    step.run()
    step.forget()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step.run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    if not Path("/proc/self/clear_refs").exists():
        return float("nan")
    # Freed memory goes back to the system, so that the second step has to take it again.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident_kilobytes("VmRSS")
    step.run()
    return (_resident_kilobytes("VmHWM") - before) * 1024 / 1e6


def difference(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], allowed: float) -> str | None:
    """What is further apart than allowed, or None."""
    if actual.keys() != expected.keys():
        return f"{len(actual)} results against {len(expected)}"
    for name, value in actual.items():
        wanted = expected[name]
        if value.shape != wanted.shape:
            return f"{name} has shape {tuple(value.shape)} against {tuple(wanted.shape)}"
        if value.numel() == 0:
            continue
        # What is equal may be infinite, as the score of an excluded item is.
        gap = torch.where(value == wanted, 0.0, (value.double() - wanted.double()).abs()).max()
        size = torch.where(wanted.isinf(), 0.0, wanted.double().abs()).max().clamp_min(1e-30)
        apart = float(gap / size)
        if not apart <= (allowed if value.is_floating_point() else 0.0):
            return f"{name} differs by {apart:.1e} of the largest value, allowed {allowed:.0e}"
    return None


def flusher(device: torch.device) -> Callable[[], None]:
    if device.type != "cuda":
        return lambda: None
    buffer = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device)

    def flush() -> None:
        for _ in range(FLUSHES):
            buffer.zero_()

    return flush


def phases_and_host(step: Step, device: torch.device) -> list[float]:
    """Milliseconds of each phase, and of the host until all of them are under way."""
    host: list[float] = []
    started = time.perf_counter()
    *phases, _ = elapsed([*step.phases, lambda: host.append(1e3 * (time.perf_counter() - started))], device)
    return [*phases, *host]
