"""What the tests of an op share: where it runs, and how right it must be.

An implementation is compared with the reference in float64. Its error, relative to the largest value of a tensor, may
be twice that of ordinary PyTorch in the same dtype (FlashAttention's rule) plus one rounding: no tolerance is tuned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ops.triton_runtime import interpreted

FACTOR = 2.0


@dataclass(frozen=True)
class Place:
    """A back-end on a device; "triton" on the CPU is Triton's interpreter."""

    backend: str
    device: str = "cpu"

    def __str__(self) -> str:
        return self.backend if self.device == "cpu" else f"{self.backend}-{self.device}"

    def put(self, values: Any) -> Any:
        """Tensors, and those inside lists, tuples and dicts, on this device."""
        if isinstance(values, Tensor):
            return values.to(self.device)
        if isinstance(values, Mapping):
            return {name: self.put(value) for name, value in values.items()}
        if isinstance(values, list | tuple):
            return type(values)(self.put(value) for value in values)
        return values


def places(cpu_refuses: Callable[..., str | None] | None = None, *, reference: bool = True) -> list[Any]:
    """pytest parameters: every place an op runs at here, and "triton" on a GPU under the mark `gpu`.

    cpu_refuses: the op's C++ or blocked form answering for this machine, None where it has none.
    """
    found: list[Any] = [Place("reference")] if reference else []
    if cpu_refuses is not None and cpu_refuses() is None:
        found.append(Place("cpu"))
    if interpreted():
        found.append(Place("triton"))
    gpu = pytest.param(Place("triton", "cuda"), marks=pytest.mark.gpu, id="gpu")
    return [*(pytest.param(place, id=str(place)) for place in found), gpu]


def assert_accurate(
    actual: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    *,
    precision: torch.dtype | None = None,
) -> None:
    """Every named tensor's error is at most twice the plain one's, plus a rounding of the dtype.

    plain: what PyTorch computes in the dtype under test; exact: float64. precision: the dtype whose rounding is
    allowed for, by default each tensor's own (inner products of bfloat16 inputs, say, may return float32).
    """
    assert actual.keys() == plain.keys() == exact.keys()
    for name, value in actual.items():
        wanted = exact[name].double().cpu()
        assert value.shape == wanted.shape, f"{name}: got {tuple(value.shape)}, expected {tuple(wanted.shape)}"
        if value.numel() == 0:
            continue
        assert bool(value.isfinite().all()), f"{name}: {int((~value.isfinite()).sum())} values are not finite"
        size = wanted.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        error, allowed = ((x.double().cpu() - wanted).abs().max() / size for x in (value, plain[name]))
        limit = FACTOR * allowed + torch.finfo(precision or value.dtype).eps
        assert error <= limit, f"{name}: error {error:.2e}, PyTorch {allowed:.2e}, limit {limit:.2e}"


def outputs_and_gradients(
    call: Callable[..., Tensor | tuple[Tensor, ...]], leaves: Mapping[str, Tensor], seed: int = 0
) -> dict[str, Tensor]:
    """Results `out`, `out1`, … of call(**leaves), and `grad_<leaf>` of each floating leaf, upstream ones being random.

    The upstream gradients are drawn on the CPU from `seed`, so that every back-end, device and dtype gets the same.
    """
    held = {n: x.detach().clone().requires_grad_(x.is_floating_point()) for n, x in leaves.items()}
    out = call(**held)
    outs: Sequence[Tensor] = (out,) if isinstance(out, Tensor) else out
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outs]
    wanted = {name: x for name, x in held.items() if x.requires_grad}
    grads = torch.autograd.grad(outs, tuple(wanted.values()), upstream)
    names = ["out", *(f"out{i}" for i in range(1, len(outs)))]
    results = {name: o.detach() for name, o in zip(names, outs, strict=True)}
    return results | {f"grad_{name}": g for name, g in zip(wanted, grads, strict=True)}


def offsets_of(lengths: Sequence[int]) -> Tensor:
    """Offsets (B + 1,) of rows of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0)


# Row lengths every jagged op is tried on: zero and one, one row, all equal, one very long, nothing at all.
LENGTHS: dict[str, list[int]] = {
    "mixed": [7, 0, 33, 1, 18, 40],
    "one row": [37],
    "all equal": [17, 17, 17],
    "one long": [3, 131, 0, 2],
    "all empty": [0, 0],
    "ends empty": [0, 6, 0],
}


def _bfloat16_of(values: np.ndarray) -> np.ndarray:
    """Rounded to nearest even, as uint16."""
    rounded = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16)


def _float32_of(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def repair_interpreter() -> None:
    """Make Triton's interpreter compute as a GPU does where it does not.

    In Triton 3.7 it rounds float32 to bfloat16 by cutting bits off, multiplies matrices of bfloat16 as if their bits
    were integers, and adds along any axis but the last one by one, where a GPU adds in a tree.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def faithful_convert(values: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if (source, target) == (tl.float32, tl.bfloat16):
            return _bfloat16_of(values)
        if (source, target) == (tl.bfloat16, tl.float32):
            return _float32_of(values)
        return convert(values, source, target, rounding_mode)

    def faithful_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        def widened(x: Any) -> Any:
            if x.dtype.scalar != tl.bfloat16:
                return x
            return interpreter.TensorHandle(_float32_of(x.data), tl.float32)

        return dot(self, widened(a), widened(b), d, *rest)

    def sum_as_a_tree(self: Any, x: Any) -> Any:
        values, axis = (x.handle.data.ravel(), 0) if self.axis is None else (x.handle.data, self.axis)
        added = np.ascontiguousarray(np.moveaxis(values, axis, -1)).sum(axis=-1, keepdims=self.keep_dims)
        return self.to_tensor(np.moveaxis(added, -1, axis) if self.keep_dims else added, x.dtype)

    interpreter.ReduceOps.sum = sum_as_a_tree
    interpreter._convert_float = faithful_convert
    interpreter.InterpreterBuilder.create_dot = faithful_dot


if interpreted():
    repair_interpreter()
