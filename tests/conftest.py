"""Fixtures shared by all tests. Everything runs on a CPU; real data is used where it is at hand."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Before any kernel is imported: without a GPU they run under Triton's interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As in the background of a script: the tests send this signal, and processes that they start inherit how it is met.
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
# Set to a folder with data/ and golden/ to run the tests on real data; by default it is looked for beside the
# repository.
SHARED = Path(os.environ.get("GR_SHARED", ROOT.parent / "shared"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Each test draws the same numbers wherever and in whatever order it runs."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent: set GR_SHARED to run on real data")
    return SHARED


@pytest.fixture(scope="session")
def golden_dir(shared_dir: Path) -> Path:
    return shared_dir / "golden"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are left out, not skipped, on a machine without one."""
    if torch.cuda.is_available():
        return
    absent = [item for item in items if item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=absent)
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]
