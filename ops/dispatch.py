"""Which implementation of an op runs, and why.

An op is one `Op` object holding a reference and, where they exist, faster implementations ("cpu": C++ compiled on
first use, or blocked PyTorch; "triton": GPU kernels; "fbgemm": those of fbgemm_gpu). The choice, in falling priority:
the `backend=` argument of the call, an enclosing `with ops.backend(...)`, the environment variable `GR_OPS`, then the
fastest one that accepts the arguments. `ops.explain()` lists every op with what runs on this machine and the reason.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ops.triton_runtime import interpreted

BACKENDS = ("auto", "reference", "cpu", "triton", "fbgemm")

_OPS: dict[str, Op] = {}
_override: ContextVar[str | None] = ContextVar("gr_ops_backend", default=None)


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    `refuses(*args, **kwargs)` returns the reason why these arguments cannot be handled, or None; called without
    arguments it answers for the machine alone (no compiler, no GPU).
    """

    run: Callable[..., Any]
    refuses: Callable[..., str | None]


@torch.compiler.assume_constant_result
def _preferred() -> str:
    """The process's wish; `torch.compile` cannot trace a ContextVar and keeps the answer it had while compiling."""
    return _override.get() or os.environ.get("GR_OPS") or "auto"


def check_environment() -> None:
    """Raises ValueError for a `GR_OPS` that names no backend, which no op could follow."""
    wish = os.environ.get("GR_OPS") or "auto"
    if wish not in BACKENDS:
        raise ValueError(f"GR_OPS: got {wish!r}, expected one of {', '.join(BACKENDS)}")


def _without_autocast() -> AbstractContextManager[object]:
    # A compiled graph holds operators, which autocast does not reach into.
    if torch.compiler.is_compiling():
        return nullcontext()
    stack = ExitStack()
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            stack.enter_context(torch.autocast(device, enabled=False))
    return stack


@dataclass
class Op:
    """A named op: `reference` is required and accepts everything, the others are tried fastest first."""

    name: str
    reference: Callable[..., Any]
    implementations: dict[str, Implementation] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _OPS[self.name] = self

    def __call__(self, *args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        """Run the chosen form in the precision of its arguments: autocast would reach into some forms, not others."""
        with _without_autocast():
            return self._run(*args, backend=backend, **kwargs)

    def _run(self, *args: Any, backend: str | None, **kwargs: Any) -> Any:
        wanted = backend or _preferred()
        if wanted not in BACKENDS:
            raise ValueError(f"backend of {self.name}: got {wanted!r}, expected one of {', '.join(BACKENDS)}")
        if wanted == "reference":
            return self.reference(*args, **kwargs)
        if wanted == "auto":
            for implementation in self._automatic().values():
                if implementation.refuses(*args, **kwargs) is None:
                    return implementation.run(*args, **kwargs)
            return self.reference(*args, **kwargs)
        if wanted not in self.implementations:
            return self.reference(*args, **kwargs)
        implementation = self.implementations[wanted]
        reason = implementation.refuses(*args, **kwargs)
        if reason is not None:
            # An explicit request for one call is a promise to the caller; a process-wide preference is only a wish.
            if backend is not None:
                raise ValueError(f"{self.name}: backend {wanted!r} cannot run here: {reason}; try backend='auto'")
            return self.reference(*args, **kwargs)
        return implementation.run(*args, **kwargs)

    def _automatic(self) -> dict[str, Implementation]:
        """What "auto" chooses from: Triton's interpreter shows that a kernel is right and is no way to run it."""
        if not interpreted():
            return self.implementations
        return {name: x for name, x in self.implementations.items() if name != "triton"}

    def describe(self) -> tuple[str, str]:
        """The back-end that runs on this machine and the reason the faster ones are not taken."""
        wanted = _preferred()
        if wanted != "auto":
            asked = f"{wanted} is asked for"
            found = self.implementations.get(wanted)
            reason = "it has none" if found is None else found.refuses()
            if wanted == "reference" or reason is None:
                return wanted, asked
            return "reference", f"{asked}: {reason}"
        reasons: list[str] = []
        for name, implementation in self.implementations.items():
            reason = implementation.refuses()
            if reason is None and name not in self._automatic():
                reason = "only its interpreter, for tests"
            if reason is None:
                return name, "; ".join(reasons) or "fastest available"
            reasons.append(f"no {name}: {reason}")
        return "reference", "; ".join(reasons) or "only implementation"


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Prefer one back-end inside the `with` block; ops that lack it, or refuse the arguments, run their reference."""
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, expected one of {', '.join(BACKENDS)}")
    token = _override.set(name)
    try:
        yield
    finally:
        _override.reset(token)


def explain() -> str:
    """One line an op: its name, the back-end that runs on this machine, and why."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.ispkg:
            importlib.import_module(f"ops.{module.name}")
    rows = [(name, *op.describe()) for name, op in sorted(_OPS.items())]
    width = max((len(name) for name, _, _ in rows), default=0)
    return "\n".join(f"{name:<{width}}  {chosen:<9}  {why}" for name, chosen, why in rows)
