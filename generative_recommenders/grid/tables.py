"""A grid's results as text: the table on the console, `results.md` and `results.csv`."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from generative_recommenders.grid.results import COLUMNS, Result, Row, cell, on_several, scope_name


def cells(rows: Sequence[Row], between: str) -> tuple[list[str], list[list[str]]]:
    """Header and cells of a table of rows; the data is named where not all rows are on the same."""
    several = on_several(rows)
    remarks = any(row.remark for row in rows)
    header = ["#", "run", *(["data"] if several else []), "seeds", *COLUMNS.values(), *(["remark"] if remarks else [])]
    body = []
    for number, row in enumerate(rows, start=1):
        data = [scope_name(row)] if several else []
        figures = [cell(row, name, between) for name in COLUMNS]
        mark = f"{number} *" if row.best else str(number)
        body.append([mark, row.label, *data, row.seeds, *figures, *([row.remark] if remarks else [])])
    return header, body


def console_table(rows: Sequence[Row]) -> str:
    """Columns of equal width, the best row marked with *."""
    header, body = cells(rows, " +-")
    if header[-1] == "remark":
        # The last column is as long as it is: an error is not cut.
        header[-1] = ""
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    left = {0, 1, len(header) - 1 if not header[-1] else -1}
    lines = []
    for row in [header, *body]:
        padded = [
            text.ljust(width) if place in left else text.rjust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def markdown_table(rows: Sequence[Row]) -> str:
    """The same table for a pull request or a README; the best row is bold."""
    header, body = cells(rows, " ± ")
    lines = [_markdown_line(header), "| --- | --- |" + " ---: |" * (len(header) - 2)]
    for row, texts in zip(rows, body, strict=True):
        escaped = [_markdown(text) for text in texts]
        escaped[1] = f"**{escaped[1]}**" if row.best else escaped[1]
        lines.append(_markdown_line(escaped))
    return "\n".join(lines) + "\n"


def _markdown_line(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _markdown(text: str) -> str:
    for character in "\\|*_`<>[]":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())


def csv_text(results: Sequence[Result]) -> str:
    """One row a run with all its metrics, finished or not."""
    metrics: dict[str, None] = {}
    for result in results:
        metrics |= dict.fromkeys(name for name in result.values if name not in ("epochs", "seconds"))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    facts = ["run", "config", "label", "bindings", "seed", "dataset", "split", "protocol", "status", "error"]
    writer.writerow([*facts, "epochs", "seconds", *metrics])
    for result in results:
        run = result.run
        known = [run.id, run.config, run.label, "; ".join(run.bindings), run.seed, run.dataset]
        told = [result.split, result.protocol, result.status, result.error]
        writer.writerow([*known, *told, *(result.values.get(name, "") for name in ("epochs", "seconds", *metrics))])
    return text.getvalue()
