"""A grid's tables and page: what they say, that no text breaks them, and that a browser shows and sorts them."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from generative_recommenders.grid.display import Lines, Table, clock, printable, table_lines
from generative_recommenders.grid.plan import GridRun
from generative_recommenders.grid.report import page, write_reports
from generative_recommenders.grid.results import Result, curve_of, differing, read_results, rows_of
from generative_recommenders.grid.schedule import State
from generative_recommenders.grid.store import Store
from generative_recommenders.grid.tables import console_table, csv_text, markdown_table

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# Each of these would end an element, an attribute, a script or a string if it were not escaped.
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;%%DATA%%|`"


def run(name: str, seed: int | None = 1, row: str = "", dataset: str = "toy", **values: str) -> GridRun:
    label = f"config {name}"
    bindings = {"train_fn.learning_rate": "0.001", "train_fn.random_seed": str(seed), **values}
    identity = f"{name}-{seed}"
    return GridRun(identity, identity, row or name, f"{name}.gin", ("a.b = 1",), label, seed, dataset, bindings)


def finished(name: str, ndcg: float, seed: int = 1, dataset: str = "toy", **others: Any) -> Result:
    values = {"ndcg@10": ndcg, "hr@10": 1 - ndcg, "mrr": ndcg / 2, "epochs": 3, "seconds": 12.34}
    curve = [{"epoch": n, "ndcg@10": ndcg * n / 3, "training loss": 3.0 - n} for n in (1, 2, 3)]
    given = {"values": values, "split": "test", "protocol": "p", "curve": curve, **others}
    return Result(run(name, seed, dataset=dataset), "finished", **given)


@pytest.fixture
def results() -> list[Result]:
    return [
        Result(run("broken"), "failed", "training loss: got NaN"),
        finished("low", 0.1),
        finished("high", 0.5, seed=1),
        finished("high", 0.3, seed=2),
        Result(run("high", 3), "failed", EVIL),
        finished("middle", 0.2),
    ]


def test_rows_are_sorted_and_average_over_seeds(results: list[Result]) -> None:
    rows = rows_of(results)
    assert [row.label for row in rows] == ["config high", "config middle", "config low", "config broken"]
    assert [row.best for row in rows] == [True, False, False, False]
    assert [row.seeds for row in rows] == ["2 of 3", "1", "1", "0 of 1"]
    assert rows[0].mean("ndcg@10") == pytest.approx(0.4)
    assert rows[0].deviation("ndcg@10") == pytest.approx(math.sqrt(0.02))
    assert (rows[1].deviation("ndcg@10"), rows[3].mean("ndcg@10")) == (None, None)


def test_each_dataset_has_its_best() -> None:
    rows = rows_of([finished("a", 0.1), finished("b", 0.9, dataset="other"), finished("c", 0.2), finished("d", 0.3)])
    assert [(row.label[-1], row.best) for row in rows] == [("b", True), ("d", True), ("c", False), ("a", False)]
    assert "toy test" in console_table(rows)


def test_a_grid_without_results_has_no_best() -> None:
    rows = rows_of([Result(run("a"), "failed", "x"), Result(run("b"), "waiting")])
    assert not any(row.best for row in rows)
    assert "Best" not in page(rows, "t")


def test_console_table(results: list[Result]) -> None:
    header, *lines = console_table(rows_of(results)).splitlines()
    names = "NDCG@5 NDCG@10 NDCG@50 HR@5 HR@10 HR@50 MRR eval_loss epochs seconds"
    assert header.split() == ["#", "run", "seeds", *names.split()]
    assert lines[0].split()[:9] == "1 * config high 2 of 3 0.4000 +-0.1414".split()
    assert lines[1].split() == "2 config middle 1 0.2000 0.8000 0.1000 3 12.3".split()
    assert lines[3].endswith("failed: training loss: got NaN")
    end = header.index("NDCG@10") + len("NDCG@10")
    assert lines[1][:end].endswith(" 0.2000")


def test_markdown_and_csv_keep_odd_texts_in_their_cells(results: list[Result]) -> None:
    rows = rows_of(results)
    header, rule, *body = markdown_table(rows).splitlines()
    cells = [re.split(r"(?<!\\)\|", line) for line in (header, rule, *body)]
    assert {len(line) for line in cells} == {len(cells[0])}
    assert "**config high**" in body[0] and "0.4000 ± 0.1414" in body[0]
    assert r"\<script\>" in body[0]
    table = list(csv.DictReader(io.StringIO(csv_text(results))))
    assert [line["status"] for line in table].count("finished") == 4
    assert [float(line["ndcg@10"]) for line in table if line["ndcg@10"]] == [0.1, 0.5, 0.3, 0.2]
    assert next(line for line in table if line["seed"] == "3")["error"] == EVIL
    assert {"config", "bindings", "dataset", "split", "hr@10", "mrr", "epochs", "seconds"} <= table[0].keys()


def test_only_bindings_that_differ_are_listed() -> None:
    first, second = run("a", 1, **{"hstu_encoder.dv": "8"}), run("b", 2, **{"train_fn.learning_rate": "0.1"})
    rows = rows_of([Result(r, "finished") for r in (first, second)])
    assert differing(rows) == {"hstu_encoder.dv": ["8", ""], "train_fn.learning_rate": ["0.001", "0.1"]}
    broken = GridRun("c", "c", "c", "c.gin", (), "c", broken="no")
    assert differing(rows_of([Result(first, "finished"), Result(broken, "failed", "no")])) == {}


def test_curves_follow_one_split_and_survive_a_line_cut_short(tmp_path: Path) -> None:
    def line(epoch: int, split: str, complete: bool, value: float) -> str:
        metrics = {"ndcg@10": value, "hr@200": 1.0, "ndcg@10_>=4": math.nan}
        train = {"loss": 2.0} if epoch else None
        return json.dumps({"epoch": epoch, "split": split, "complete": complete, "metrics": metrics, "train": train})

    lines = [line(0, "valid", True, 0.1), line(1, "valid", False, 0.9), line(2, "valid", True, 0.3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, line(3, "test", True, 0.8), '{"epoch": 4, "spl']))
    points = curve_of(tmp_path)
    assert points == [{"epoch": 0, "ndcg@10": 0.1}, {"epoch": 2, "ndcg@10": 0.3, "training loss": 2.0}]
    assert curve_of(tmp_path / "nowhere") == []


def test_results_are_read_from_the_runs(tmp_path: Path) -> None:
    store = Store(tmp_path)
    done, started, new = run("done"), run("started"), run("new")
    folder = store.exps_dir(done) / "toy-l8" / "x"
    folder.mkdir(parents=True)
    metrics = {"ndcg@10": 0.25, "ndcg@10_>=4": math.nan, "loss": 1.5}
    final = {"metrics": metrics, "split": "test", "epochs": 2, "seconds": 9.5, "protocol": "p"}
    (folder / "metrics.json").write_text(json.dumps(final))
    store.change(done, status="finished", folder=folder.relative_to(tmp_path).as_posix())
    store.change(started, status="running")
    read = read_results([done, started, new], Store(tmp_path))
    assert [result.status for result in read] == ["finished", "interrupted", "waiting"]
    assert dict(read[0].values) == {"ndcg@10": 0.25, "loss": 1.5, "epochs": 2, "seconds": 9.5}
    rows = write_reports(read, store)
    assert rows[0].best
    for name in ("results.csv", "results.md", "report.html"):
        assert "0.25" in (tmp_path / name).read_text()


# The page.


class Elements(HTMLParser):
    """Elements with attributes, and the text of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_asks_no_network(results: list[Result]) -> None:
    text = page(rows_of(results), "grid")
    elements = Elements(text).found
    assert not [tag for tag, attributes in elements if {"src", "href", "action", "srcset"} & attributes.keys()]
    assert not {"img", "link", "iframe", "object", "a"} & {tag for tag, _ in elements}
    assert not re.findall(r"url\(|@import|fetch\(|XMLHttpRequest|import\(", text)
    policy = next(a["content"] for tag, a in elements if tag == "meta" and "http-equiv" in a)
    assert policy is not None and policy.startswith("default-src 'none';")
    # The namespace of inline drawings is a name, not an address.
    assert set(re.findall(r"https?://[^\"'\s]+", text)) == {"http://www.w3.org/2000/svg"}


@given(st.text(alphabet=st.sampled_from("</scriptSCRIPT!->\"'&%\\\u2028 a"), max_size=40) | st.just(EVIL))
def test_no_text_adds_elements(text: str) -> None:
    def tags(name: str) -> list[str]:
        odd = Result(GridRun("a", "a", "a", name, (name,), name, 1, name, {name: name}), "failed", name, log=name)
        other = finished("b", 0.5, note=name, split=name)
        curve = Result(run("c", seed=2), "interrupted", name, curve=[{"epoch": 1, name: 0.5}])
        return [tag for tag, _ in Elements(page(rows_of([odd, other, curve]), name)).found]

    assert tags(text or "plain") == tags("plain")


def test_the_data_of_the_curves_is_json_in_a_script(results: list[Result]) -> None:
    odd = Result(run(EVIL), "interrupted", curve=[{"epoch": 1, EVIL: 0.5}])
    text = page(rows_of([*results, odd]), "grid")
    (body,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    curves = json.loads(body)["curves"]
    assert [len(curve["points"]) for curve in curves] == [3, 3, 3, 3, 1]
    assert curves[0]["title"] == "config high seed=1"
    assert EVIL in curves[-1]["points"][0]


# In a browser.


@pytest.fixture(scope="module")
def browser() -> str:
    given = os.environ.get("GR_BROWSER")
    found = given or next(filter(None, map(shutil.which, (*CHROMIUM, "firefox"))), None)
    if found is None:
        pytest.skip("no browser is installed: set GR_BROWSER or install chromium to test the page in one")
    return found


Dump = Callable[..., str]


@pytest.fixture
def dump(browser: str, results: list[Result], tmp_path: Path) -> Dump:
    """The page's elements after its scripts and `script` ran."""
    if "firefox" in Path(browser).name:
        pytest.skip("firefox cannot print a page's elements: set GR_BROWSER to a chromium to test sorting")

    def run_browser(fragment: str = "", script: str = "") -> str:
        path = tmp_path / "report.html"
        # Errors become visible in the title.
        watch = "<script>addEventListener('error', (e) => { document.title = 'ERROR ' + e.message; });</script>"
        text = page(rows_of(results), "grid").replace("<title>", f"{watch}<title>")
        path.write_text(text.replace("</body>", f"<script>{script}</script></body>"))
        return browse(browser, tmp_path, "--dump-dom", f"{path.as_uri()}{fragment}")

    return run_browser


def browse(browser: str, profile: Path, *arguments: str) -> str:
    # A container's root may not use the sandbox; the page is our own.
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    if "firefox" in Path(browser).name:
        flags = ["--headless", "--profile", os.fspath(profile)]
    else:
        flags.append(f"--user-data-dir={profile / 'profile'}")
    done = subprocess.run([browser, *flags, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def order(dom: str, table: str = "results") -> list[str]:
    body = re.search(rf'<table id="{table}">.*?</table>', dom, re.DOTALL)
    assert body is not None
    return re.findall(r'<th scope="row">config (\w+)', body[0])


def test_the_page_sorts_as_its_fragment_says(dump: Dump) -> None:
    plain = dump()
    assert "<title>grid</title>" in plain
    assert order(plain) == ["high", "middle", "low", "broken"]
    assert plain.count("<polyline") == 4
    assert '<option value="ndcg@10"' in plain and '<option value="training loss"' in plain
    assert order(dump("#sort=hr@10")) == ["low", "middle", "high", "broken"]
    assert order(dump("#sort=run:asc")) == ["broken", "high", "low", "middle"]
    assert order(dump("#sort=nothing")) == ["high", "middle", "low", "broken"]


def test_the_page_answers_clicks_and_the_pointer(dump: Dump) -> None:
    dom = dump(
        script="""
        const header = document.querySelector('#results th[data-key="ndcg@10"] button');
        header.click();
        const svg = document.querySelector('#chart svg'), box = svg.getBoundingClientRect();
        const [x, y] = svg.querySelector('polyline').getAttribute('points').split(' ')[1].split(',').map(Number);
        svg.dispatchEvent(new PointerEvent('pointermove', { clientX: box.left + x, clientY: box.top + y }));
        const note = document.createElement('output');
        note.textContent = document.getElementById('told').textContent + '|' + location.hash;
        document.body.append(note);
        document.querySelector('#legend button').click();
        """
    )
    assert "<title>grid</title>" in dom
    assert order(dom) == ["low", "middle", "high", "broken"]
    assert 'data-key="ndcg@10" data-kind="number" aria-sort="ascending"' in dom
    assert "<output>#1 config high seed=1, epoch 2: 0.3333|#sort=ndcg%4010:asc</output>" in dom
    # Both seeds of the first row are hidden.
    assert dom.count("<polyline") == 2


def test_texts_stay_texts_in_the_browser(dump: Dump) -> None:
    dom = dump()
    assert "<img" not in dom
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in dom


def test_the_page_can_be_photographed(browser: str, results: list[Result], tmp_path: Path) -> None:
    path, shot = tmp_path / "report.html", tmp_path / "shot.png"
    path.write_text(page(rows_of(results), "grid"))
    browse(browser, tmp_path, "--window-size=800,1200", f"--screenshot={shot}", path.as_uri())
    data = shot.read_bytes()
    assert struct.unpack(">II", data[16:24]) == (800, 1200)
    # A blank page of this size is a few kilobytes.
    assert len(data) > 20_000


# While it runs.


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def states() -> list[State]:
    names = ("finished", "waiting", "running", "failed", "waiting")
    made = [State(run(name, seed), name, error="it broke", line="epoch 1") for seed, name in enumerate(names)]
    made[2].began, made[0].began, made[0].ended = 0.0, 1.0, 76.0
    return made


def test_a_change_is_one_line() -> None:
    stream, shown = io.StringIO(), states()
    lines = Lines(stream)
    lines.show(shown)
    lines.show(shown)
    first = stream.getvalue().splitlines()
    assert [line.split()[:2] for line in first] == [["[1/5]", "finished"], ["[3/5]", "running"], ["[4/5]", "failed"]]
    assert first[0].endswith("1:15 config finished seed=0 epoch 1") and first[2].endswith("it broke")
    shown[1].status = "running"
    lines.show(shown)
    assert stream.getvalue().splitlines()[3:] == ["[2/5] running config waiting seed=1 epoch 1"]


def test_a_terminal_is_drawn_over() -> None:
    stream, shown = Terminal(), states()
    table = Table(stream)
    table.show(shown)
    table.show(shown)
    assert stream.getvalue().count("\n") == 6
    assert "1 running, 1 failed, 2 waiting, 1 finished" in stream.getvalue()
    shown[1].status = "finished"
    table.show(shown)
    assert "\x1b[6F" in stream.getvalue()


def test_a_small_screen_shows_what_is_urgent() -> None:
    lines = table_lines(states(), width=40, height=3)
    assert [line.split()[0] for line in lines[:-1]] == ["running", "failed"]
    assert "(2 of 5 shown)" in table_lines(states(), width=100, height=3)[-1]
    assert max(map(len, lines)) <= 40


def test_texts_of_runs_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[2Jb\tc", io.StringIO()) == "a [2Jb c"
    assert printable("±", io.TextIOWrapper(io.BytesIO(), encoding="ascii")) == "?"
    assert [clock(seconds) for seconds in (0, 61.9, 3600 + 62)] == ["0:00", "1:01", "1:01:02"]
