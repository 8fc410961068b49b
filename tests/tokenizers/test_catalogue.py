"""Catalogues that grow and shrink: nothing old changes, nobody's work is lost, a crash leaves the version before."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from generative_recommenders.data.errors import DataError
from generative_recommenders.tokenizers import catalogue
from generative_recommenders.tokenizers.catalogue import add_items, load_current, publish, rebuild, remove_items
from generative_recommenders.tokenizers.churn import ChurnReport, compare
from generative_recommenders.tokenizers.collisions import resolve
from generative_recommenders.tokenizers.quantizer import ResidualQuantizer, fingerprint
from generative_recommenders.tokenizers.semantic_ids import SemanticIds

ROOT = Path(__file__).resolve().parents[2]
WIDTH = 4


def quantizer() -> ResidualQuantizer:
    generator = torch.Generator().manual_seed(0)
    return ResidualQuantizer([torch.randn(size, WIDTH, generator=generator) for size in (8, 8)])


def embeddings(item_ids: list[int] | range) -> Tensor:
    """An embedding an item, of few distinct ones, so that tuples collide."""
    rows = [torch.randn(WIDTH, generator=torch.Generator().manual_seed(item % 7)) for item in item_ids]
    return torch.stack(rows)


def first_table(item_ids: list[int] | range, policy: str, raw: bool = False) -> SemanticIds:
    trained, x_ND = quantizer(), embeddings(item_ids)
    result = resolve(policy, trained, x_ND, trained.encode(x_ND), width=40 if policy == "dedup" else 0)
    return SemanticIds(
        result.codes_NL,
        torch.tensor(item_ids),
        tuple(result.sizes),
        np.array([f"raw{item}" for item in item_ids]) if raw else None,
        policy=policy,
        tokenizer_fingerprint=fingerprint(trained),
        dataset_fingerprint="d1",
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    publish(tmp_path / "ids", first_table(range(1, 11), "dedup", raw=True), quantizer())
    return tmp_path / "ids"


def raws(item_ids: list[int]) -> list[str]:
    return [f"raw{item}" for item in item_ids]


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_versions_and_what_changed(folder: Path) -> None:
    first = load_current(folder)
    report = add_items(folder, [30, 20], embeddings([30, 20]), raws([30, 20]), dataset_fingerprint="d2")
    second = load_current(folder)
    assert (report.version_before, report.version, report.items, report.added, report.changed) == (1, 2, 12, 2, 0)
    assert report == ChurnReport(**(json.loads((folder / "v2/churn.json").read_text()) | _sizes(report)))
    assert torch.equal(second.codes_of(first.item_ids_N), first.codes_NL.long())
    assert second.item_ids_N.tolist() == [*range(1, 11), 20, 30]
    assert second.raw_ids is not None and second.raw_ids.tolist()[-2:] == ["raw20", "raw30"]
    assert len(second.group_sizes()) == 12
    assert second.version == 2 and second.dataset_fingerprint == "d2" and second.policy == "dedup"
    second.check_fingerprint(first.fingerprint)

    report = remove_items(folder, [3, 20])
    third = load_current(folder)
    assert (report.version, report.items, report.removed, report.added) == (3, 10, 2, 0)
    assert third.fingerprint == second.fingerprint
    offsets, _ = third.items_of(third.codes_of([3, 4, 20]))
    assert offsets.tolist() == [0, 0, 1, 1]
    third.check_fingerprint(first.fingerprint)

    report = rebuild(folder, dataset_fingerprint="d3")
    fourth = load_current(folder)
    assert (report.version, report.items, report.dropped, report.removed, report.changed) == (4, 10, 2, 0, 0)
    assert fourth.item_ids_N.tolist() == [1, 2, *range(4, 11), 30]
    assert torch.equal(fourth.codes_NL, third.codes_NL[third.active_N])
    with pytest.raises(DataError, match="version 4"):
        fourth.check_fingerprint(first.fingerprint)
    assert listing(folder) == [".lock", "current.json", "tokenizer", "v1", "v2", "v3", "v4"]
    assert SemanticIds.load(folder / "v1").fingerprint == first.fingerprint
    assert "v3 to v4: 10 items, 0 added, 0 restored, 0 removed, 2 dropped" in report.summary()


def _sizes(report: ChurnReport) -> dict[str, object]:
    """Tuples, which JSON has not."""
    return {"sizes": report.sizes, "sizes_before": report.sizes_before}


def test_a_removed_item_returns_with_its_codes(folder: Path) -> None:
    before = load_current(folder).codes_of([4])
    remove_items(folder, [4])
    report = add_items(folder, [4, 50], embeddings([5, 50]), raws([4, 50]))
    assert (report.restored, report.added, report.items) == (1, 1, 11)
    assert load_current(folder).codes_of([4]).tolist() == before.tolist()
    remove_items(folder, [4])
    assert add_items(folder, [4], embeddings([4]), raws([4])).restored == 1
    remove_items(folder, [4])
    with pytest.raises(DataError, match="got raw id 'other' for item 4, expected 'raw4'"):
        add_items(folder, [4], embeddings([4]), ["other"])


def test_codes_of_removed_items_are_free_after_a_rebuild_only(folder: Path) -> None:
    # Items 3, 10, 24 and 31 have one embedding, and 10 has the highest digit of the table.
    codes = load_current(folder).codes_of([10]).tolist()
    remove_items(folder, [10])
    add_items(folder, [24], embeddings([24]), raws([24]))
    assert load_current(folder).codes_of([24]).tolist() != codes
    remove_items(folder, [24])
    rebuild(folder)
    add_items(folder, [31], embeddings([31]), raws([31]))
    assert load_current(folder).codes_of([31]).tolist() == codes


def test_what_does_nothing_writes_no_version(folder: Path) -> None:
    table = load_current(folder)
    assert rebuild(folder).version == 1
    assert remove_items(folder, []).version == 1
    assert publish(folder, table, quantizer()).version == 1
    remove_items(folder, [1])
    assert remove_items(folder, [1]).version == 2
    assert listing(folder) == [".lock", "current.json", "tokenizer", "v1", "v2"]


def test_collisions_resolved_are_counted(tmp_path: Path) -> None:
    # All of 1 to 7 differ, 8 equals 1, 15 and 22 equal each other and 1.
    for policy, resolved in (("dedup", 3), ("none", 0)):
        folder = tmp_path / policy
        publish(folder, first_table([1], policy), quantizer())
        report = add_items(folder, [8, 15, 22], embeddings([8, 15, 22]))
        assert (report.collisions_resolved, report.unresolved) == (resolved, 3 - resolved)
    assert load_current(tmp_path / "none").group_sizes().tolist() == [4]


def test_a_level_that_grows_ends_the_lineage(tmp_path: Path) -> None:
    folder = tmp_path / "ids"
    first = dataclasses.replace(first_table([1, 8], "dedup"), sizes=(8, 8, 2))
    publish(folder, first, quantizer())
    report = add_items(folder, [15], embeddings([15]))
    assert (report.sizes_before, report.sizes) == ((8, 8, 2), (8, 8, 3))
    grown = load_current(folder)
    assert torch.equal(grown.codes_of([1, 8]), first.codes_NL.long())
    with pytest.raises(DataError, match="pass the table the model was trained with"):
        grown.check_fingerprint(first.fingerprint)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_any_history_keeps_old_codes_and_counts(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("history") / "ids"
    policy = data.draw(st.sampled_from(["dedup", "greedy", "none"]))
    start = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=10, unique=True))
    publish(folder, first_table(sorted(start), policy), quantizer())
    active, removed = set(start), set()
    for step in data.draw(st.lists(st.sampled_from(["add", "remove", "rebuild"]), max_size=6)):
        before = load_current(folder)
        if step == "add":
            free = sorted(set(range(1, 60)) - active)
            chosen = data.draw(st.lists(st.sampled_from(free), min_size=1, max_size=6, unique=True))
            report = add_items(folder, chosen, embeddings(chosen))
            assert (report.added, report.restored) == (len(set(chosen) - removed), len(set(chosen) & removed))
            active |= set(chosen)
            removed -= set(chosen)
        elif step == "remove":
            chosen = data.draw(st.lists(st.sampled_from(sorted(active | removed)), max_size=4))
            report = remove_items(folder, chosen)
            assert report.removed == len(set(chosen) & active)
            removed |= set(chosen)
            active -= set(chosen)
        elif active:
            report = rebuild(folder)
            assert report.dropped == len(removed)
            removed = set()
        else:
            with pytest.raises(DataError, match="all items removed"):
                rebuild(folder)
            continue
        after = load_current(folder)
        assert set(after.item_ids_N[after.active_N].tolist()) == active
        assert set(after.item_ids_N[~after.active_N].tolist()) == removed
        both = [item for item in before.item_ids_N.tolist() if after.rows_of([item])[0] >= 0]
        assert torch.equal(after.codes_of(both), before.codes_of(both))
        assert report.changed == 0 and report.items == len(active)
        if policy != "none":
            assert len(torch.unique(after.codes_NL, dim=0)) == len(after)


def test_a_new_table_is_compared_with_the_one_before(folder: Path) -> None:
    old = load_current(folder)
    other = dataclasses.replace(old, codes_NL=torch.cat([old.codes_NL[:9], old.codes_NL[:1]]), tokenizer_fingerprint="")
    report = publish(folder, other)
    assert (report.version, report.changed, report.added) == (2, 1, 0)
    flat = SemanticIds(torch.tensor([[0], [1]]), torch.tensor([1, 99]), (2,))
    report = compare(old, flat)
    assert (report.changed, report.added, report.removed) == (1, 1, 9)


BAD: list[tuple[list[int], Tensor, list[str] | None, str]] = [
    ([20, 3], embeddings([20, 3]), raws([20, 3]), r"item 3 to add \(1 such\), which is there already"),
    ([20, 20], embeddings([20, 20]), ["a", "b"], "item 20 twice"),
    ([0], embeddings([1]), ["a"], "item 0, expected every item once and ids from 1"),
    ([20], embeddings([20]), ["raw3"], "got 'raw3' for several items"),
    ([20], embeddings([20]), None, "raw ids: got none"),
    ([20, 21], embeddings([20, 21]), ["a"], r"raw ids: got shape \(1,\)"),
    ([20, 21], embeddings([20]), raws([20, 21]), r"shape \(1, 4\), expected \(2 items, width\)"),
    ([21, 20], torch.tensor([[0.0] * 4, [0, 0, 0, float("nan")]]), raws([21, 20]), "NaN or infinity for item 20"),
    ([20], torch.zeros(1, 3), raws([20]), "3"),
    ([], torch.zeros(0, 4), [], "some items"),
]


@pytest.mark.parametrize(("item_ids", "x_nD", "raw_ids", "message"), BAD)
def test_bad_additions_change_nothing(
    folder: Path, item_ids: list[int], x_nD: Tensor, raw_ids: list[str] | None, message: str
) -> None:
    before = load_current(folder)
    with pytest.raises(DataError, match=message):
        add_items(folder, item_ids, x_nD, raw_ids)
    assert load_current(folder).fingerprint == before.fingerprint
    assert listing(folder) == [".lock", "current.json", "tokenizer", "v1"]


def test_unknown_folders_items_and_tokenizers(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"item 77 to remove \(1 such\), which is not in the table"):
        remove_items(folder, [3, 77])
    with pytest.raises(DataError, match="no such folder"):
        remove_items(tmp_path / "nothing", [1])
    with pytest.raises(DataError, match=r"current\.json: no such file"):
        load_current(tmp_path)
    other = ResidualQuantizer([torch.ones(8, WIDTH), torch.ones(8, WIDTH)])
    with pytest.raises(DataError, match=rf"tokenizer {fingerprint(other)}, expected {fingerprint(quantizer())}"):
        publish(folder, load_current(folder), other)
    unknown = dataclasses.replace(first_table([1], "none"), tokenizer_fingerprint="")
    publish(tmp_path / "imported", unknown)
    with pytest.raises(DataError, match="a table without a tokenizer"):
        add_items(tmp_path / "imported", [20], embeddings([20]))
    publish(tmp_path / "swapped", first_table([1], "none"), quantizer())
    (tmp_path / "swapped" / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="tokenizer"):
        add_items(tmp_path / "swapped", [20], embeddings([20]))


def test_a_current_file_that_does_not_fit(folder: Path) -> None:
    path = folder / "current.json"
    content = json.loads(path.read_text())
    for changes, message in [
        ({"format": 9}, "got format 9, expected 1"),
        ({"fingerprint": "f00"}, "expected f00"),
        ({"version": 7}, r"v7/semantic_ids\.json: no such file"),
        ({"version": None}, "cannot be read"),
    ]:
        path.write_text(json.dumps(content | changes))
        with pytest.raises(DataError, match=message):
            load_current(folder)
    with pytest.raises(DataError, match="it is a catalogue"):
        SemanticIds.load(folder)


def test_codes_that_would_change_stop_everything(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(table: SemanticIds, *rest: object) -> SemanticIds:
        return dataclasses.replace(table, codes_NL=table.codes_NL.roll(1, 0))

    monkeypatch.setattr(catalogue, "_with_rows", careless)
    with pytest.raises(RuntimeError, match=r"codes of .* old items would change"):
        add_items(folder, [20], embeddings([20]), raws([20]))
    assert listing(folder) == [".lock", "current.json", "tokenizer", "v1"]


def test_a_failed_swap_leaves_the_old_version(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "no space")))
        with pytest.raises(DataError, match=r"current\.json: cannot write"):
            add_items(folder, [20], embeddings([20]), raws([20]))
    assert load_current(folder).version == 1
    # The version nobody used keeps its number.
    assert add_items(folder, [20], embeddings([20]), raws([20])).version == 3
    assert load_current(folder).version == 3
    assert not [name for name in listing(folder) if "partial" in name]


DRIVER = """
    import os, sys
    sys.path.insert(0, {root!r})
    from pathlib import Path
    from tests.tokenizers import test_catalogue as cases
    folder, job = Path(sys.argv[1]), sys.argv[2]
    print("ready", flush=True)
    sys.stdin.readline()
    if job == "crash":
        os.replace = lambda *_: os._exit(9)
        cases.add_items(folder, [20], cases.embeddings([20]), cases.raws([20]))
    cases.add_one_by_one(folder, range(101, 106))
"""


def add_one_by_one(folder: Path, item_ids: range) -> None:
    for item in item_ids:
        add_items(folder, [item], embeddings([item]), raws([item]))


def start(folder: Path, job: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(DRIVER).format(root=str(ROOT)), str(folder), job]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_processes_that_add_at_once_and_one_that_dies(folder: Path) -> None:
    children = [start(folder, job) for job in ("crash", "add")]
    try:
        for child in children:
            assert child.stdout is not None and child.stdout.readline() == "ready\n"
        for child in children:
            assert child.stdin is not None
            child.stdin.write("go\n")
            child.stdin.flush()
        add_one_by_one(folder, range(201, 206))
        assert [child.wait(timeout=120) for child in children] == [9, 0]
    finally:
        for child in children:
            child.kill()
            child.communicate()
    table = load_current(folder)
    assert table.item_ids_N.tolist() == [*range(1, 11), *range(101, 106), *range(201, 206)]
    assert len(table.group_sizes()) == len(table)
    # Ten additions, the first table, and the version that was written and never used.
    assert len(list(folder.glob("v*"))) == 12
