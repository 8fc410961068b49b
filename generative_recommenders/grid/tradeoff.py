"""Draws two metrics of a grid's rows against each other: what a setting gains of one and costs of the other."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from generative_recommenders.config_syntax import suggestion
from generative_recommenders.grid.results import Row
from generative_recommenders.grid.sweep import GridError

PICTURE = "tradeoff.png"


def draw_tradeoff(rows: Sequence[Row], x: str, y: str, path: Path) -> None:
    """A point a row that has both, its mean over seeds, with its label; rows that are not finished are left out.

    Raises:
        GridError: no row has one of the metrics, or matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise GridError("--plot: matplotlib is not installed; try pip install matplotlib")
    points = [(row, row.mean(x), row.mean(y)) for row in rows]
    found = [(row, a, b) for row, a, b in points if a is not None and b is not None]
    if not found:
        known = sorted({name for row in rows for result in row.finished for name in result.values})
        missing = next((name for name in (x, y) if name not in known), x)
        raise GridError(f"--plot: got {missing!r}, which no finished run has measured; {suggestion(missing, known)}")
    figure: Any = importlib.import_module("matplotlib.figure").Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    axes.scatter([a for _, a, _ in found], [b for _, _, b in found], color="tab:blue")
    # What all points have in common is said once.
    shared = set.intersection(*(set(row.label.split()) for row, _, _ in found)) if len(found) > 1 else set()
    middle = (min(a for _, a, _ in found) + max(a for _, a, _ in found)) / 2
    for row, a, b in found:
        label = " ".join(word for word in row.label.split() if word not in shared)
        # Towards the middle, so that it stays inside.
        side, shift = ("right", -4) if a > middle else ("left", 4)
        axes.annotate(label, (a, b), xytext=(shift, 4), textcoords="offset points", fontsize=7, ha=side)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(" ".join(word for word in found[0][0].label.split() if word in shared), fontsize=9)
    axes.grid(alpha=0.3)
    aside = path.with_name(f".{path.name}")
    figure.savefig(aside, format="png", dpi=150)
    aside.replace(path)
