"""`report.html`: the results of a grid as one file that opens from disk and asks no network for anything.

The page is `report.html` beside this module with the tables written into it as escaped text and the curves as JSON,
which its script draws.
"""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from generative_recommenders.grid import store as s
from generative_recommenders.grid.results import (
    COLUMNS,
    SORTED_BY,
    Result,
    Row,
    cell,
    differing,
    on_several,
    rows_of,
    scope_name,
)
from generative_recommenders.grid.store import Store
from generative_recommenders.grid.tables import csv_text, markdown_table
from generative_recommenders.training.checkpoint import write_atomically

_TEMPLATE = Path(__file__).with_name("report.html")
_UNFINISHED = {s.FAILED: "Failed", s.INTERRUPTED: "Interrupted", s.RUNNING: "Running", s.WAITING: "Waiting"}


def write_reports(results: Sequence[Result], store: Store) -> list[Row]:
    """`results.csv`, `results.md` and `report.html` in the grid's folder; returns the rows of the table.

    Raises:
        CheckpointError: a file cannot be written.
    """
    rows = rows_of(results)
    write_atomically(store.out / "results.csv", csv_text(results))
    write_atomically(store.out / "results.md", markdown_table(rows))
    write_atomically(store.out / "report.html", page(rows, store.out.name or "grid"))
    return rows


def page(rows: Sequence[Row], title: str) -> str:
    """The whole page."""
    parts = {
        "TITLE": _text(title),
        "SUMMARY": _summary(rows),
        "RESULTS": _results_table(rows),
        "RUNS": _runs(rows),
        "DIFFERENCES": _differences(rows),
        "UNFINISHED": _unfinished(rows),
        "DATA": _json({"sort": SORTED_BY, "curves": _curves(rows)}),
    }
    text = _TEMPLATE.read_text(encoding="utf-8")
    # One pass over the template, so that a text that looks like a mark stays a text.
    pieces = text.split("%%")
    return "".join(parts[piece] if place % 2 else piece for place, piece in enumerate(pieces))


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _json(value: object) -> str:
    """JSON that cannot end the script element it stands in."""
    plain = json.dumps(value, allow_nan=False)
    return plain.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _summary(rows: Sequence[Row]) -> str:
    counts = Counter(result.status for row in rows for result in row.results)
    told = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    lines = [f"<p>{_text(told)}; written {datetime.now():%Y-%m-%d %H:%M}.</p>"]
    several = on_several(rows)
    for row in rows:
        if row.best:
            where = f" on {scope_name(row)}" if several else ""
            figure = cell(row, SORTED_BY, " ± ")
            name = COLUMNS[SORTED_BY]
            lines.append(f"<p>Best{_text(where)} by {name}: <strong>{_text(row.label)}</strong>, {figure}.</p>")
    return "\n".join(lines)


def _header(key: str, text: str, kind: str) -> str:
    return (
        f'<th scope="col" data-key="{_text(key)}" data-kind="{kind}"><button type="button">{_text(text)}</button></th>'
    )


def _results_table(rows: Sequence[Row]) -> str:
    several = on_several(rows)
    header = [_header("#", "#", "number"), _header("run", "run", "text")]
    header += [_header("data", "data", "text")] if several else []
    header += [_header("seeds", "seeds", "number")]
    header += [_header(name, text, "number") for name, text in COLUMNS.items()]
    body = []
    for number, row in enumerate(rows, start=1):
        mark = ' <span class="star" title="best">*</span>' if row.best else ""
        remark = f'<div class="remark">{_text(row.remark)}</div>' if row.remark else ""
        cells = [f'<td class="n">{number}</td>', f'<th scope="row">{_text(row.label)}{mark}{remark}</th>']
        cells += [f"<td>{_text(scope_name(row))}</td>"] if several else []
        cells += [f'<td class="n" data-value="{len(row.finished)}">{_text(row.seeds)}</td>']
        for name in COLUMNS:
            mean, shown = row.mean(name), _text(cell(row, name, " ± ")).replace(" ± ", ' <span class="sd">± ')
            closing = "</span>" if "<span" in shown else ""
            cells.append(f'<td class="n" data-value="{"" if mean is None else repr(mean)}">{shown}{closing}</td>')
        body.append(f"<tr{' class=best' if row.best else ''}>{''.join(cells)}</tr>")
    return _table("results", header, body)


def _table(identity: str, header: Sequence[str], body: Sequence[str]) -> str:
    lines = "\n".join(body)
    return (
        f'<div class="wide"><table id="{identity}">\n<thead><tr>{"".join(header)}</tr></thead>\n'
        f"<tbody>\n{lines}\n</tbody></table></div>"
    )


def _runs(rows: Sequence[Row]) -> str:
    """Every run by itself, where rows average over several."""
    if all(len(row.results) == 1 for row in rows):
        return ""
    header = [_header("#", "#", "number"), _header("run", "run", "text"), _header("seed", "seed", "number")]
    header += [_header(name, text, "number") for name, text in COLUMNS.items()]
    body = []
    for number, row in enumerate(rows, start=1):
        for result in row.results:
            single = Row([result])
            cells = [f'<td class="n">{number}</td>', f'<th scope="row">{_text(row.label)}</th>']
            seed = "" if result.run.seed is None else result.run.seed
            cells.append(f'<td class="n" data-value="{seed}">{seed}</td>')
            for name in COLUMNS:
                value = result.values.get(name)
                cells.append(
                    f'<td class="n" data-value="{"" if value is None else repr(value)}">{cell(single, name, "")}</td>'
                )
            body.append(f"<tr>{''.join(cells)}</tr>")
    return f"<section><h2>Each seed</h2>\n{_table('runs', header, body)}</section>"


def _differences(rows: Sequence[Row]) -> str:
    differences = differing(rows)
    if not differences:
        return "<p>The runs differ in nothing but their seeds.</p>" if len(rows) > 1 else "<p>There is one run.</p>"
    header = ['<th scope="col">binding</th>']
    header += [f'<th scope="col" title="{_text(row.label)}">#{n}</th>' for n, row in enumerate(rows, start=1)]
    body = []
    for name, values in differences.items():
        cells = "".join(f"<td>{_text(value)}</td>" for value in values)
        body.append(f'<tr><th scope="row"><code>{_text(name)}</code></th>{cells}</tr>')
    hint = '<p class="hint">Bindings that are not the same in all rows; # as in the results.</p>'
    return f"{_table('differences', header, body)}\n{hint}"


def _unfinished(rows: Sequence[Row]) -> str:
    items = []
    for status, heading in _UNFINISHED.items():
        for row in rows:
            for result in row.results:
                if result.status == status:
                    where = f"<br><code>{_text(result.log)}</code>" if result.log else ""
                    error = f": {_text(result.error)}" if result.error else ""
                    items.append(f"<li><strong>{heading}</strong> {_text(result.run.title)}{error}{where}</li>")
    if not items:
        return ""
    lines = "\n".join(items)
    return f'<section><h2>Not finished</h2>\n<ul id="unfinished">\n{lines}\n</ul></section>'


def _curves(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One series a run: the number of its row, its title and its points, each rounded to six digits."""
    series = []
    for number, row in enumerate(rows, start=1):
        for result in row.results:
            points = [{name: _rounded(value) for name, value in point.items()} for point in result.curve]
            if points:
                shared = len(row.results) == 1
                title = row.label if shared else result.run.title
                series.append({"row": number, "title": title, "label": row.label, "points": points})
    return series


def _rounded(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.6g}")
