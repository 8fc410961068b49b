"""What the Triton implementations share: whether they can run, and how a kernel is launched.

Kernels are in `ops/<op>/kernels.py`, the only files that import triton at their top; `ops/<op>/gpu.py` checks,
allocates and launches them through `launch`. With `TRITON_INTERPRET=1` in the environment before the first kernel is
imported, kernels run on CPU tensors under Triton's interpreter: slow, the same arithmetic, never chosen by "auto".
Inside `compile_only(capability)` launches compile for that architecture and run nothing, so that a machine without a
GPU sees exactly what a GPU would compile.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

MIN_CAPABILITY = (8, 0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


_INSTALLED = importlib.util.find_spec("triton") is not None
_INTERPRETED = _INSTALLED and os.environ.get("TRITON_INTERPRET") == "1"


def interpreted() -> bool:
    """Whether kernels run under the interpreter, on CPU tensors."""
    return _INTERPRETED


@torch.compiler.assume_constant_result
def _machine_refuses() -> str | None:
    # The compiler looks through a cache, but not through a function that is said to be constant.
    return _examined_machine()


@functools.cache
def _examined_machine() -> str | None:
    if not _INSTALLED:
        return "triton is not installed"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]}, expected 8.0 or higher"
    return None


def compiling() -> bool:
    """Whether launches are compiled and not run, inside `compile_only`."""
    return _compiling is not None


def architecture() -> int:
    """Compute capability that kernels are compiled for, as 10 * major + minor; 0 without a device."""
    if _compiling is not None:
        return _compiling.capability
    return _device_architecture()


@functools.cache
def _device_architecture() -> int:
    if not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def refuses(*args: Any, **kwargs: Any) -> str | None:
    """Why Triton kernels cannot take these arguments, or None; without arguments, about this machine.

    Tensors must be on a GPU (under the interpreter: anywhere), floating ones of float32, bfloat16 or float16.
    """
    if compiling():
        return None
    reason = _machine_refuses()
    if reason is not None:
        return reason
    for value in (*args, *kwargs.values()):
        if not isinstance(value, Tensor):
            continue
        if value.device.type != "cuda" and not interpreted():
            return f"a tensor is on {value.device.type}"
        if value.is_floating_point() and value.dtype not in DTYPES:
            return f"no kernel for {value.dtype}"
    return None


def precision() -> Literal["tf32", "ieee"]:
    """What products of float32 take: tensor cores where PyTorch may use them."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def power_of_two(size: int, at_least: int = 1) -> int:
    """The smallest that holds `size`: what a block of Triton's is as long as."""
    return max(1 << max(size - 1, 0).bit_length(), at_least)


def on_gpu(tensor: Tensor, forced: bool) -> bool:
    """Whether an operator that serves both devices runs its Triton form: on a GPU tensor, or where a test forces it."""
    return tensor.is_cuda or forced


@dataclass
class Compiled:
    """One compilation: the kernel's name, the arguments that select the variant, Triton's result, and its time."""

    kernel: str
    constants: dict[str, Any]
    result: Any
    seconds: float


@dataclass
class _Compilation:
    capability: int
    configs: Callable[[str, list[dict[str, int]]], list[dict[str, int]]]
    results: list[Compiled] = field(default_factory=list)


_compiling: _Compilation | None = None


class _AbsentGPU:
    """Stands for the active Triton driver while compiling without a device."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        # One compilation cache an architecture.
        return self.capability

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@contextmanager
def compile_only(
    capability: int, configs: Callable[[str, list[dict[str, int]]], list[dict[str, int]]] | None = None
) -> Iterator[list[Compiled]]:
    """Compile every launch inside the block for an architecture (80, 90) instead of running it; results have no values.

    configs(kernel name, [default, *candidates]) selects the configurations to compile; default: the default alone.
    Must not be entered where the interpreter is on.
    """
    global _compiling
    assert not interpreted(), "unset TRITON_INTERPRET to compile"
    from triton.runtime import driver

    before = driver._active
    driver.set_active(_AbsentGPU(capability))
    _compiling = _Compilation(capability, configs or (lambda kernel, options: options[:1]))
    try:
        yield _compiling.results
    finally:
        _compiling = None
        driver._active = before


class Options(Protocol):
    """`ops.tuning.Table`."""

    def options(
        self, kernel: str, key: dict[str, int], measure: Callable[[dict[str, int]], bool]
    ) -> list[dict[str, int]]:
        """The configuration to launch with, followed by the others worth compiling.

        measure(config) launches once and returns whether there was anything to do.
        """


def launch(
    kernel: Any,
    grid: Callable[[dict[str, int]], tuple[int, ...]],
    *args: Any,
    table: Options,
    key: dict[str, int],
    **constants: Any,
) -> None:
    """Run `kernel[grid(config)](*args, **constants, **config)` with the configuration that `table` has for `key`.

    A grid with a zero is nothing to do. The launch goes to the device of the first tensor. A kernel must be free to run
    twice: measuring configurations repeats it.
    """
    device = next(x.device for x in args if isinstance(x, Tensor))
    name = kernel.fn.__name__

    def run(config: dict[str, int]) -> bool:
        size = grid(config)
        if 0 in size:
            return False
        kernel[size](*args, **constants, **config)
        return True

    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        options = table.options(name, key, run)
        if _compiling is None:
            run(options[0])
            return
        for config in _compiling.configs(name, options):
            started = time.perf_counter()
            result = kernel.warmup(*args, **constants, **config, grid=(1, 1, 1))
            _compiling.results.append(Compiled(name, {**constants, **config}, result, time.perf_counter() - started))
