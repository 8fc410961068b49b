"""What came out of a grid: figures and curves of its runs, and rows that average over seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from generative_recommenders.evaluation.metrics import LABELS
from generative_recommenders.grid import store as s
from generative_recommenders.grid.plan import GridRun
from generative_recommenders.grid.store import Store, final_metrics
from generative_recommenders.training.reporting import METRICS_LINES

SORTED_BY = "ndcg@10"
# Columns of the tables: metrics by their names in metrics.json, and what a run took.
COLUMNS: Mapping[str, str] = {**LABELS, "epochs": "epochs", "seconds": "seconds"}
_COUNTED = ("epochs", "seconds")


@dataclass(frozen=True)
class Result:
    """One run: `values` are its final metrics, epochs and seconds, empty where it did not finish.

    `log` is where its output is, "" where it was not started.
    """

    run: GridRun
    status: str
    error: str = ""
    note: str = ""
    log: str = ""
    values: Mapping[str, float] = field(default_factory=dict)
    split: str = ""
    protocol: str = ""
    curve: Sequence[Mapping[str, Any]] = ()


@dataclass
class Row:
    """Runs that differ in nothing but their seed; `best` is the one with the highest NDCG@10 on its dataset."""

    results: list[Result]
    best: bool = False

    @property
    def label(self) -> str:
        return self.results[0].run.label

    @property
    def finished(self) -> list[Result]:
        return [result for result in self.results if result.status == s.FINISHED]

    @property
    def seeds(self) -> str:
        """How many seeds finished, of how many where some did not."""
        done, wanted = len(self.finished), len(self.results)
        return str(done) if done == wanted else f"{done} of {wanted}"

    @property
    def scope(self) -> tuple[str, str, str]:
        """What figures must share to be compared: dataset, split and protocol."""
        first = (self.finished or self.results)[0]
        return first.run.dataset, first.split, first.protocol

    @property
    def remark(self) -> str:
        """What went wrong with a run of the row, or bindings that it did not use; "" where all is well."""
        wrong = [result for result in self.results if result.status != s.FINISHED]
        for status in (s.FAILED, s.INTERRUPTED, s.RUNNING, s.WAITING):
            for result in wrong:
                if result.status == status:
                    return f"{status}: {result.error}" if result.error else status
        notes = [result.note for result in self.results if result.note]
        return f"not used: {notes[0]}" if notes else ""

    def figures(self, name: str) -> list[float]:
        values = (result.values.get(name, math.nan) for result in self.finished)
        return [value for value in values if math.isfinite(value)]

    def mean(self, name: str) -> float | None:
        figures = self.figures(name)
        return statistics.fmean(figures) if figures else None

    def deviation(self, name: str) -> float | None:
        """Sample standard deviation over seeds, None for fewer than two."""
        figures = self.figures(name)
        return statistics.stdev(figures) if len(figures) > 1 else None


def read_results(runs: Iterable[GridRun], store: Store) -> list[Result]:
    """The results of `runs` as far as they have come."""
    return [_read(run, store) for run in runs]


def _read(run: GridRun, store: Store) -> Result:
    status, error, folder = store.status(run), store.error(run), store.folder(run)
    record = store.records.get(run.fingerprint)
    note = ", ".join(run.unused)
    log = f"{store.exps_dir(run)}/output.txt" if record else ""
    curve = curve_of(folder) if folder else []
    final = final_metrics(folder) if folder and status == s.FINISHED else None
    if final is None:
        return Result(run, status, error, note, log, curve=curve)
    values = numbers(final["metrics"]) | numbers({name: final.get(name) for name in _COUNTED})
    split, protocol = str(final.get("split", "")), str(final.get("protocol", ""))
    return Result(run, status, error, note, log, values, split, protocol, curve)


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Those of `values` that are finite numbers."""
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def curve_of(folder: Path) -> list[dict[str, Any]]:
    """`{"epoch": n, "metric": value, ..., "training loss": value}` of each evaluation that followed the training.

    Evaluations of a part of the users are left out where there are complete ones, and so is the final one of another
    split.
    """
    try:
        lines = (folder / METRICS_LINES).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    records: list[dict[str, Any]] = []
    for line in lines:
        try:
            record = json.loads(line)
            records.append({"epoch": int(record["epoch"]), **record})
        except (ValueError, KeyError, TypeError):
            # The last line of a run that was killed while writing it.
            continue
    followed = [record for record in records if record.get("split") == records[0].get("split")]
    complete = [record for record in followed if record.get("complete", True)]
    points = []
    for record in complete or followed:
        metrics, train = record.get("metrics"), record.get("train")
        shown = numbers(metrics) if isinstance(metrics, dict) else {}
        point = {name: value for name, value in shown.items() if name in COLUMNS}
        loss = numbers(train).get("loss") if isinstance(train, dict) else None
        points.append({"epoch": record["epoch"], **point, **({} if loss is None else {"training loss": loss})})
    return points


def rows_of(results: Sequence[Result]) -> list[Row]:
    """Rows by mean NDCG@10, the highest first, those without one last in the order of the plan."""
    groups: dict[str, Row] = {}
    for result in results:
        groups.setdefault(result.run.row, Row([])).results.append(result)
    rows = sorted(groups.values(), key=lambda row: -_finite(row.mean(SORTED_BY)))
    for row in rows:
        rivals = [other for other in rows if other.scope == row.scope]
        row.best = row is rivals[0] and row.mean(SORTED_BY) is not None
    return rows


def _finite(value: float | None) -> float:
    return -math.inf if value is None else value


def cell(row: Row, name: str, between: str) -> str:
    """Mean of a column over seeds and, for a metric of two seeds or more, `between` and the standard deviation."""
    mean, deviation = row.mean(name), row.deviation(name)
    if mean is None:
        return ""
    if name in _COUNTED:
        return f"{mean:,.1f}" if name == "seconds" or mean % 1 else f"{mean:,.0f}"
    return f"{mean:.4f}" if deviation is None else f"{mean:.4f}{between}{deviation:.4f}"


def on_several(rows: Sequence[Row]) -> bool:
    """Whether the figures of the rows are on more than one dataset, split or protocol."""
    return len({row.scope for row in rows if row.finished}) > 1


def scope_name(row: Row) -> str:
    """The dataset and split of a row, in a word."""
    dataset, split, _ = row.scope
    return f"{dataset} {split}".strip()


def differing(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Bindings that are not the same in all rows, the seed left out; "" where a row has no such binding."""
    values = [row.results[0].run.values for row in rows]
    known = {name for row in rows for name in row.results[0].run.values if not name.endswith(".random_seed")}
    found = {name: [row.get(name, "") for row in values] for name in sorted(known)}
    # A run that is broken has no values, which tells nothing about its bindings.
    present = [bool(row) for row in values]
    return {name: row for name, row in found.items() if len({v for v, p in zip(row, present, strict=True) if p}) > 1}
